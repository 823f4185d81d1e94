"""The bench of training: every variant trains on the same batches, and its time is held against plain fine-tuning."""

import json

import pytest
import torch

from tokprune_exp.bench import training
from tokprune_exp.bench.arguments import read_arguments
from tokprune_exp.bench.screen import Steps, screen
from tokprune_exp.bench.training import STAGES, bench, race, rows_of


@pytest.fixture
def given(tiny_root, tiny_tokenizer_directory, tmp_path):
    """A command that trains a random encoder on the tiny task."""
    return [
        "training",
        *("--examples", "48", "--rounds", "1", "--data-root", str(tiny_root), "--output", str(tmp_path / "out")),
        "task.directory=tiny",
        "backbone=tiny",
        f"backbone.path={tiny_tokenizer_directory}",
        f"data.cache={tmp_path / 'cache'}",
        "data.batch_size=8",
        "trainer.precision=32-true",
    ]


def test_the_command_times_an_epoch_of_each(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(training, "CHUNK", 4)
    bench(read_arguments(given))
    printed = capsys.readouterr().out
    assert "÷ transformers" in printed and "at most 3.5" in printed
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (record["examples"], record["batches"], record["batch_size"], record["backbone"]) == (48, 6, 8, "tiny")
    assert [row["variant"] for row in record["rows"]] == ["transformers", *STAGES]
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert record["rows"][0]["ratio"] == 1.0
    assert record["seconds_of_holding_adtp_at_its_cost"] > 0


def test_stages_are_prepared_as_a_run_prepares_them(given, tmp_path):
    arguments = read_arguments(given)
    methods = {name: training.prepare(name, arguments, "32-true", tmp_path) for name in STAGES}
    soft, hard = methods["ltp_soft"].method, methods["ltp_hard"].method
    assert soft.learns_thresholds and soft.learned.offset.requires_grad
    assert not hard.learns_thresholds and not hard.learned.offset.requires_grad
    student = methods["adtp"]
    assert student.data.train.teacher_attribution is not None
    assert student.method.target_share is None and student.seconds_of_holding > 0
    orders = [methods[name].data.train.input_ids for name in STAGES]
    assert all(torch.equal(ids, orders[0]) for ids in orders)


def test_a_variant_is_trained_and_the_head_of_another_is_not(given, tmp_path):
    prepared = training.prepare("finetune", read_arguments(given), "32-true", tmp_path)
    loop = training.PlainLoop(prepared, "32-true")
    ours = prepared.method.model
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    theirs = loop.model.head.classifier.weight.clone()
    batches = [torch.arange(8), torch.arange(8, 16)]
    assert loop(batches) > 0
    assert not torch.equal(loop.model.head.classifier.weight, theirs)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert training.Fitted(prepared, "32-true", tmp_path)(batches) > 0
    assert not torch.equal(ours.head.classifier.weight, before["head.classifier.weight"])


def test_variants_take_turns_over_chunks(monkeypatch):
    monkeypatch.setattr(training, "CHUNK", 2)
    calls = []

    def trainer(name):
        return lambda batches: calls.append((name, len(batches))) or 1.5

    trainers = {name: trainer(name) for name in ("transformers", "finetune")}
    with Steps(screen(), "", None) as steps:
        seconds = race(trainers, [torch.zeros(1)] * 5, 2, steps)
    assert seconds == {"transformers": [4.5, 4.5], "finetune": [4.5, 4.5]}
    warmup, first, second = calls[:2], calls[2:8], calls[8:]
    assert warmup == [("transformers", 2), ("finetune", 2)]
    assert [name[0] for name, _ in first] == ["t", "f", "f", "t", "t", "f"]
    assert [name[0] for name, _ in second] == ["f", "t", "t", "f", "f", "t"]
    assert [size for _, size in first] == [2, 2, 2, 2, 1, 1]


def test_ratios_are_within_a_round():
    seconds = {"transformers": [2.0, 4.0, 1.0], "ltp_soft": [3.0, 4.0, 1.2]}
    plain, soft = rows_of(seconds)
    assert (plain["ratio"], plain["aim"]) == (1.0, None)
    assert (soft["ratio"], soft["seconds"], soft["aim"]) == (1.2, 3.0, 1.3)
