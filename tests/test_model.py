"""The model directory: what is written is what is loaded; and what a classifier says of its batch."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokprune_exp.encoder.pretrained import encoder_from_transformers
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.model import ModelCard, PrunedClassifier, load_model, save_model, without_dropout
from tokprune_exp.pruning.retainers import AdaptiveRatio, KeepAll, MinP, Nucleus, RandomRatio, StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass, RandomScores, TokenSaliency

LENGTHS = [23, 1, 2, 3, 40, 11, 5]
CARD = ModelCard("tiny", "tiny", ["bad", "good"], 64, False, 128, "adtp", ["accuracy"])
PRUNINGS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "keep_all": (TokenSaliency, KeepAll),
    "adaptive": (
        partial(TokenSaliency, hidden_dim=8, activation="relu"),
        partial(AdaptiveRatio, ratio=0.4, candidates=5, summary="cls_mean", layer=1, keeps_separators=True),
    ),
    "static": (
        partial(AttentionMass, normalisation="constant", constant=64),
        partial(StaticRatio, ratio=0.4, layer=1, keeps_separators=True),
    ),
    "min_p": (TokenSaliency, partial(MinP, ratio=0.4, layer=1)),
    "nucleus": (TokenSaliency, partial(Nucleus, ratio=0.4, layer=1, keeps_separators=True)),
    "random": (partial(RandomScores, seed=9), partial(RandomRatio, ratio=0.4, layer=1, seed=8, keeps_separators=True)),
}

Build = Callable[..., Any]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_loaded_model_gives_identical_logits_with_identical_settings(
    pruning: str,
    family: str,
    random_classifier: Build,
    ragged_batch: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    ours = random_classifier(*PRUNINGS[pruning], family=family)
    save_model(tmp_path / "model", ours, CARD, tiny_tokenizer)
    theirs, card = load_model(tmp_path / "model")
    assert card == CARD and theirs.encoder.shape == ours.encoder.shape and theirs.separator == ours.separator
    assert not any(module.training for module in theirs.modules())
    batch = ragged_batch(ours, LENGTHS)
    with torch.no_grad():
        for execution in ("masked", "gathered"):
            assert torch.equal(theirs(batch, execution).logits, ours(batch, execution).logits)
    if ours.pruning is None:
        assert theirs.pruning is None
    else:
        for part in ("scorer", "retainer"):
            one, two = getattr(theirs.pruning, part), getattr(ours.pruning, part)
            assert type(one) is type(two) and one.settings() == two.settings()


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_stored_settings_are_all_that_the_constructors_take(
    pruning: str, random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Every value that was given, none of them a default, is found in config.json."""
    model = random_classifier(*PRUNINGS[pruning])
    save_model(tmp_path, model, CARD, tiny_tokenizer)
    stored = json.loads((tmp_path / "config.json").read_text())["pruning"]
    if pruning == "none":
        assert stored is None
        return
    for kind, build in zip(("scorer", "retainer"), PRUNINGS[pruning], strict=True):
        given = build.keywords if isinstance(build, partial) else {}
        assert given.items() <= stored[kind].items()


def test_the_directory_holds_json_and_safetensors_and_nothing_pickled(
    random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, random_classifier(*PRUNINGS["adaptive"]), CARD, tiny_tokenizer)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickling")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    load_model(tmp_path)


def test_the_directory_has_the_tokenizer_it_was_trained_with(
    random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path, random_classifier(), CARD, tiny_tokenizer)
    text = "the film was not bad"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tiny_tokenizer(text).input_ids


def test_a_student_of_the_first_layers_can_be_saved(
    random_transformer: Build, ragged_batch: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its weights are shared with the longer encoder, which must not come along."""
    student = encoder_from_transformers(random_transformer()).first_layers(2)
    ours = PrunedClassifier(student, Head(64, 2), None, separator=3).eval()
    save_model(tmp_path, ours, CARD, tiny_tokenizer)
    theirs, _ = load_model(tmp_path)
    assert theirs.encoder.shape.layers == len(theirs.encoder.layers) == 2
    batch = ragged_batch(ours, LENGTHS)
    assert torch.equal(theirs(batch).logits, ours(batch).logits)


@pytest.mark.parametrize("absent", ["everything", "config.json", "model.safetensors"])
def test_a_directory_without_a_model_is_a_user_error_that_names_it(
    absent: str, random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    if absent != "everything":
        save_model(directory, random_classifier(), CARD, tiny_tokenizer)
        (directory / absent).unlink()
    with pytest.raises(UserError, match=r"no model in .*model: looked for config\.json and model\.safetensors"):
        load_model(directory)


def test_a_directory_of_another_format_is_a_user_error(
    random_classifier: Build, random_transformer: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path / "ours", random_classifier(), CARD, tiny_tokenizer)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "format": 0}))
    random_transformer().save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        with pytest.raises(UserError, match="is not a tokprune_exp model of format 2"):
            load_model(tmp_path / name)


def test_a_budget_that_was_held_in_another_way_is_a_user_error(
    random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = random_classifier(TokenSaliency, AdaptiveRatio)
    model.pruning.retainer.knob.fill_(-19.9)
    save_model(tmp_path, model, CARD, tiny_tokenizer)
    with pytest.raises(UserError, match="was trained by an earlier version, whose budgets were held in another way"):
        load_model(tmp_path)


def test_without_a_pruning_nothing_but_the_first_position_is_protected(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier()
    sequences = model.sequences(ragged_batch(model, LENGTHS, extra=2))
    assert sequences.protected[:, 0].all() and not sequences.protected[:, 1:].any()
    assert sequences.prunable.sum(1).tolist() == [n - 1 for n in LENGTHS]


def test_the_fingerprint_depends_on_the_real_tokens_only(random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier()
    narrow, wide = (ragged_batch(model, LENGTHS, extra) for extra in (0, 8))
    wide.input_ids[~wide.valid] = 44
    assert torch.equal(model.sequences(narrow).fingerprint, model.sequences(wide).fingerprint)


def test_a_model_is_put_back_into_its_mode_even_after_an_error() -> None:
    model = nn.Dropout().train()
    with pytest.raises(RuntimeError, match="stop"), without_dropout(model):
        assert not model.training
        raise RuntimeError("stop")
    assert model.training


def different(model: PrunedClassifier) -> PrunedClassifier:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layers", [2, 4])
def test_starting_from_a_teacher_copies_its_first_layers_and_its_head(
    layers: int, random_classifier: Build, ragged_batch: Build
) -> None:
    teacher = random_classifier()
    student = different(random_classifier(TokenSaliency, StaticRatio, layers=layers))
    untouched = [parameter.clone() for parameter in student.pruning.parameters()]
    student.start_from(teacher)
    shortened = PrunedClassifier(teacher.encoder.first_layers(layers), teacher.head, None, 3).eval()
    batch = ragged_batch(teacher, LENGTHS)
    assert torch.equal(student(batch, prune=False).logits, shortened(batch).logits)
    assert all(torch.equal(*pair) for pair in zip(student.pruning.parameters(), untouched, strict=True))

    before = teacher(batch).logits
    different(student)
    assert torch.equal(teacher(batch).logits, before)  # copied, not shared


@pytest.mark.parametrize("sizes", [{"dim": 32}, {"layers": 6}, {"heads": 8}])
def test_starting_from_a_teacher_of_other_sizes_is_a_user_error(
    sizes: dict[str, int], random_classifier: Build
) -> None:
    with pytest.raises(UserError, match=r"teacher\.initialises_student=true needs a model of the student's sizes"):
        random_classifier(**sizes).start_from(random_classifier())


def test_the_head_is_a_tanh_pooler_and_a_linear_layer_and_counts_them() -> None:
    head = Head(6, 4).eval()
    first = torch.randn(3, 6)
    pooled = torch.tanh(first @ head.pooler.weight.T + head.pooler.bias)
    torch.testing.assert_close(head(first), pooled @ head.classifier.weight.T + head.classifier.bias)
    assert head.macs() == 6 * 6 + 6 * 4
