"""The bench: three variants of one model, raced on real texts, and a record that can be read back."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from model_directories import MAX_TOKENS, save_random_model

from tokprune_exp.bench import PlainTransformers, check_same_model, flops_reduction, main, measure, reached
from tokprune_exp.config import load_task
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.errors import UserError
from tokprune_exp.model import load_model

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def directory(random_classifier, tiny_tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), random_classifier, tiny_tokenizer)


@pytest.fixture(scope="module")
def sst2_root(tiny_root, tmp_path_factory):
    """A data root that holds the tiny task's rows under SST-2's name."""
    root = tmp_path_factory.mktemp("root")
    (root / "glue_sst2").mkdir()
    for split in ("train", "validation"):
        pd.read_parquet(tiny_root / "tiny" / f"{split}.parquet").to_parquet(root / "glue_sst2" / f"{split}.parquet")
    return root


def test_a_bench_is_a_table_and_two_files(directory, sst2_root, tmp_path):
    sizes = ["--examples", "8", "--rounds", "2", "--batch-sizes", "1", "4", "32", "--threads", "1"]
    called = [sys.executable, "-m", "tokprune_exp.bench", str(directory), *sizes]
    done = subprocess.run(
        [*called, "--data-root", str(sst2_root), "--output", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("(b) plain transformers", "Only ratios within this run are meaningful", "batch size 32", "bench.csv"):
        assert words in done.stdout

    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["model"] == {"directory": str(directory), "method": "random", "task": "sst2"}
    assert record["command"].startswith("python -m tokprune_exp.bench ")
    assert record["hardware"]["threads"] == 1
    assert {"torch", "transformers"} <= set(record["versions"])
    assert record["float32_products"]
    assert record["texts"]["rows_used"] == 8
    assert [(row["batch_size"], row["batches"]) for row in record["rows"]] == [(1, 8), (4, 2)]
    for row in record["rows"]:
        assert row["flops_reduction"] > 1
        assert row["attained"] == pytest.approx(row["speedup"] / row["flops_reduction"])
        assert row["pruned_texts_per_s"] == pytest.approx(1e3 * row["batch_size"] / row["pruned_ms"])

    with (tmp_path / "out" / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, record["rows"], strict=True):
        assert float(line["speedup"]) == row["speedup"]
        assert [float(line[f"speedup_quartiles_{end}"]) for end in (1, 3)] == row["speedup_quartiles"]
        assert (line["command"], line["threads"], line["torch"]) == (record["command"], "1", row["torch"])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_plain_transformers_puts_out_the_logits_of_our_unpruned_model(
    family, random_classifier, tiny_tokenizer, tmp_path
):
    model, _ = load_model(save_random_model(tmp_path, random_classifier, tiny_tokenizer, family=family))
    texts = ["good film", "the plot is not very good", "dull"]
    batch = encode_texts(tiny_tokenizer, texts, MAX_TOKENS).collate(range(3))
    # each family pads with a token of its own
    batch.input_ids[~batch.valid] = model.encoder.shape.pad_token
    batch.input_ids[batch.valid & (batch.input_ids == model.encoder.shape.pad_token)] = 7
    plain = PlainTransformers(model)
    with torch.no_grad():
        theirs, ours = plain(batch), model(batch, "gathered", prune=False).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        check_same_model(model, plain, [batch])
    assert not plain.training


def test_another_model_is_not_raced_against(directory, tiny_tokenizer):
    model, _ = load_model(directory)
    plain = PlainTransformers(model)
    plain.encoder.encoder.layer[0].output.dense.bias.data[0] += 1
    batch = encode_texts(tiny_tokenizer, ["good film"], MAX_TOKENS).collate([0])
    with torch.no_grad(), pytest.raises(RuntimeError, match="puts out other logits"):
        check_same_model(model, plain, [batch])


def test_the_reduction_is_that_of_the_texts_timed(directory, tiny_tokenizer):
    model, _ = load_model(directory)
    split = encode_texts(tiny_tokenizer, ["good film", "the plot is not very good but long"], MAX_TOKENS)
    dim, ff_dim = model.encoder.shape.dim, model.encoder.shape.ff_dim

    def layer(before, after):
        return 3 * dim**2 * before + 2 * dim * before**2 + (dim**2 + 2 * dim * ff_dim) * after

    # 4 and 10 tokens, of which [CLS] and ⌈0.4 · 3⌉ = 2, ⌈0.4 · 9⌉ = 4 others survive the second of four layers
    dense = 4 * (layer(4, 4) + layer(10, 10))
    pruned = sum(layer(n, n) + layer(n, k) + 2 * layer(k, k) for n, k in ((4, 3), (10, 5)))
    with torch.no_grad():
        assert flops_reduction(model, [split.collate([0, 1])]) == pytest.approx(dense / pruned)


def test_attained_is_the_share_of_the_reduction_that_became_speed():
    row = {"batch_size": 8, "pruned_ms": 4.0, "dense_ms": 8.0, "hugging_face_ms": 16.0, "speedup": 2.0}
    assert reached(row, 2.5) == {
        "pruned_texts_per_s": 2000.0,
        "dense_texts_per_s": 1000.0,
        "hugging_face_texts_per_s": 500.0,
        "flops_reduction": 2.5,
        "attained": 0.8,
    }


def test_too_few_texts_are_refused(directory, tiny_tokenizer):
    model, _ = load_model(directory)
    with pytest.raises(UserError, match="1 texts fill no batch of 8: raise --examples"):
        measure(model, encode_texts(tiny_tokenizer, ["good"], MAX_TOKENS), [32, 8], rounds=1)


def test_a_task_without_a_file_is_refused():
    assert load_task("mnli").text == ["premise", "hypothesis"]
    with pytest.raises(
        UserError, match=r"the model is of task mine, but there is no .*; there are 20newsgroups, ag_news"
    ):
        load_task("mine")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{empty}"], "no model in {empty}: looked for"),
        (["{model}", "--output", "{file}"], "--output {file} cannot be made: File exists"),
        (["{model}", "--data-root", "{empty}", "--threads", "none"], "none is not a whole number above 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(directory, tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    places = {"model": directory, "file": tmp_path / "file", "empty": tmp_path / "empty"}
    monkeypatch.setattr(sys, "argv", ["bench", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert sentence.format(**places) in capsys.readouterr().err.splitlines()[-1]
