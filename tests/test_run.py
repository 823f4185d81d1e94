"""Whole runs: what they leave behind, that a killed one goes on, that every method works on every task."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tokprune_exp.config import check_config, choices, config_directory
from tokprune_exp.errors import UserError
from tokprune_exp.model import load_model
from tokprune_exp.run import run

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tiny_overrides(tiny_root, tiny_tokenizer_directory, tmp_path):
    """The tiny task with a random encoder, so that a whole run takes seconds."""
    return [
        "task=sst2",
        "task.name=tiny",
        "task.directory=tiny",
        "backbone=tiny",
        f"backbone.path={tiny_tokenizer_directory}",
        f"data.root={tiny_root}",
        f"data.cache={tmp_path / 'cache'}",
        "data.batch_size=16",
        "data.selection_examples=20",
        "optimizer.lr=1e-3",
        "measure.latency_examples=8",
        "measure.latency_rounds=1",
        "measure.latency_batch_sizes=[1,4]",
        "trainer.enable_progress_bar=false",
        "trainer.precision=32-true",
    ]


def composed(overrides):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("config", overrides)
    check_config(cfg)
    return cfg


def result_of(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def test_adtp_learns_the_tiny_task_and_leaves_everything_it_promises(tiny_overrides, tmp_path, capsys):
    directory = tmp_path / "run"
    run(composed(["+method=adtp", "teacher.epochs=8", "method.epochs=8", *tiny_overrides]), directory)
    result = result_of(directory)
    assert result["status"] == "completed"
    assert result["metrics"]["dense"]["accuracy"] > 0.95
    assert result["metrics"]["pruned"]["accuracy"] > 0.9
    assert result["flops"]["reduction_unpadded"] > 1.5
    assert result["flops"]["fvcore_forwards_equal"] == 5
    assert sum(result["flops"]["ratio_shares"]) == pytest.approx(1)
    assert result["flops"]["ratio_asked"] == 0.3
    assert not any(name.startswith("gflops_sttabt") for name in result["flops"])
    assert all("plan_ms" not in row for row in result["latency"])
    assert [row["batch_size"] for row in result["latency"]] == [1, 4]
    assert result["data"]["kind"] == "directory"
    assert set(result["wall_seconds"]["stages"]) == {"teacher", "student"}
    assert {path.name for path in directory.iterdir()} >= {"config.yaml", "model", "csv", "wandb", "result.json"}
    model, card = load_model(directory / "model")
    assert card.task == "tiny"
    assert model.pruning is not None
    printed = capsys.readouterr().out
    assert "reduction unpadded" in printed
    assert "result.json" in printed.replace("\n", "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["+method=ltp", "retainer.rise=code"],  # its first layer never prunes: over half of the cost of two
        ["+method=adtp", "retainer.layer=1", "retainer=static"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_budget_out_of_reach_ends_the_run_before_any_stage(overrides, tiny_overrides, tmp_path):
    directory = tmp_path / "run"
    cfg = composed([*overrides, "backbone.layers=2", "budget=0.2", "trainer=smoke", "logger=none", *tiny_overrides])
    with pytest.raises(UserError, match=r"^budget=0\.2 cannot be met: .* costs between 0\.[5-9]\d\d and 1\."):
        run(cfg, directory)
    assert result_of(directory)["status"] == "failed"
    assert result_of(directory)["wall_seconds"]["stages"] == {}
    assert not (directory / "checkpoints").exists() and not (directory / "model").exists()


def test_sttabt_leaves_what_its_figures_need(tiny_overrides, tmp_path):
    """Tables 1, 2 and A.1: the error of the ApproxNet, and what it and the plan cost, counted and by the clock."""
    run(composed(["+method=sttabt", "epochs=1", "logger=none", *tiny_overrides]), tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert set(result["findings"]["approximation"]) == {"untrained", "random", "distilled"}
    assert all(set(error) == {"kl", "mse"} for error in result["findings"]["approximation"].values())
    assert all(row["plan_ms"] > 0 for row in result["latency"])
    flops = result["flops"]
    assert flops["gflops_sttabt_encoder"] > flops["gflops_encoder"] > 0  # elementwise operations come on top
    assert flops["gflops_sttabt_approx"] > flops["gflops_pruner"] > 0
    assert flops["gflops_sttabt_mask_update"] > 0


def test_a_completed_run_is_not_run_again_unless_asked(tiny_overrides, tmp_path, caplog):
    directory, arguments = tmp_path / "run", ["+method=finetune", "method.epochs=1", "logger=none", *tiny_overrides]
    run(composed(arguments), directory)
    first = result_of(directory)["finished"], (directory / "result.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        run(composed(arguments), directory)
    assert "overwrite=true starts it anew" in caplog.text
    assert (result_of(directory)["finished"], (directory / "result.json").stat().st_mtime_ns) == first
    run(composed([*arguments, "overwrite=true"]), directory)
    assert (directory / "result.json").stat().st_mtime_ns != first[1]


def test_a_directory_that_holds_another_configuration_is_refused(tiny_overrides, tmp_path):
    directory, arguments = tmp_path / "run", ["+method=finetune", "method.epochs=1", "logger=none", *tiny_overrides]
    run(composed(arguments), directory)
    with pytest.raises(UserError, match="another configuration"):
        run(composed([*arguments, "seed=1"]), directory)


def test_a_failed_run_says_why(tiny_overrides, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(UserError, match=r"retainer\.layer=7"):
        run(composed(["+method=adtp", "retainer.layer=7", "logger=none", *tiny_overrides]), directory)
    result = result_of(directory)
    assert result["status"] == "failed"
    assert "retainer.layer=7" in result["reason"]


def test_a_value_out_of_bounds_is_one_sentence_for_the_user(tiny_overrides, tmp_path):
    for override, message in (("retainer.ratio=2.0", "retainer.ratio=2.0"), ("loss.alpha=3.0", "loss.alpha=3.0")):
        with pytest.raises(UserError, match=message):
            run(composed(["+method=adtp", override, "logger=none", *tiny_overrides]), tmp_path / message)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_term(tiny_overrides, tmp_path):
    with pytest.raises(FloatingPointError, match="cross_entropy is nan"):
        run(
            composed(
                ["+method=finetune", "optimizer.lr=1e30", "logger=none", "method.epochs=20", *tiny_overrides[:-6]]
            ),
            tmp_path / "run",
        )


def test_a_student_starts_from_a_model_trained_before(tiny_overrides, tmp_path):
    """With a learning rate of almost 0 its unpruned accuracy is that of the model it started from."""
    run(composed(["+method=adtp", "teacher.epochs=8", "logger=none", *tiny_overrides]), tmp_path / "first")
    arguments = [
        "+method=adtp",
        "teacher.initialises_student=false",
        f"teacher.path={tmp_path / 'first' / 'teacher'}",
        f"start_from={tmp_path / 'first' / 'teacher'}",
        "method.epochs=1",
        "logger=none",
        *tiny_overrides,
        "optimizer.lr=1e-9",
    ]
    run(composed(arguments), tmp_path / "student")
    result = result_of(tmp_path / "student")
    assert result["metrics"]["unpruned"] == result["metrics"]["dense"]
    assert result["metrics"]["dense"]["accuracy"] > 0.9
    card = tmp_path / "first" / "teacher" / "config.json"
    card.write_text(card.read_text().replace('"task": "tiny"', '"task": "sst2"'))
    with pytest.raises(UserError, match="was trained on sst2, not on tiny"):
        run(composed([*arguments, "seed=1"]), tmp_path / "other")


def test_a_teacher_trained_before_is_named_instead_of_trained_again(tiny_overrides, tmp_path):
    run(composed(["+method=adtp", "epochs=2", "logger=none", *tiny_overrides]), tmp_path / "first")
    teacher = f"teacher.path={tmp_path / 'first' / 'teacher'}"
    run(composed(["+method=adtp", "method.epochs=1", "logger=none", teacher, *tiny_overrides]), tmp_path / "student")
    result = result_of(tmp_path / "student")
    assert set(result["wall_seconds"]["stages"]) == {"student"}
    assert result["metrics"]["dense"] == result_of(tmp_path / "first")["metrics"]["dense"]
    assert not (tmp_path / "student" / "teacher").exists()
    model, card = load_model(tmp_path / "first" / "teacher")
    assert model.pruning is None
    assert (card.method, card.backbone) == ("finetune", "tiny")


# a learning rate of 0: no epoch is better than the first, and yet each must be kept
STANDSTILL = {"adtp": [], "ltp": [], "sttabt": ["method.approx_patience=null", "method.approx_lr=0"]}
EPOCHS = {
    "adtp": {"teacher": "teacher.epochs", "student": "method.epochs"},
    "ltp": {"teacher": "teacher.epochs", "soft": "method.soft_epochs", "hard": "method.epochs"},
    "sttabt": {
        "teacher": "teacher.epochs",
        "approx": "method.approx_epochs",
        "soft": "method.soft_epochs",
        "hard": "method.epochs",
    },
}
"""What sets the epochs of each stage."""


@pytest.mark.parametrize(
    ("method", "killed_stage"),
    [
        ("adtp", "teacher"),
        ("adtp", "student"),
        ("ltp", "soft"),
        ("ltp", "hard"),
        ("sttabt", "approx"),
        ("sttabt", "soft"),
        ("sttabt", "hard"),
    ],
)
def test_a_run_killed_in_a_stage_goes_on_at_the_epoch_it_had_reached(method, killed_stage, tiny_overrides, tmp_path):
    directory = tmp_path / "run"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tokprune_exp",
        f"+method={method}",
        "logger=csv",
        f"run_dir={directory}",
        *(f"{key}={8 if stage == killed_stage else 1}" for stage, key in EPOCHS[method].items()),
        *STANDSTILL[method],
        *tiny_overrides,
        "optimizer.lr=0",
        "method.pruner_lr=0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}

    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    reached, saved, deadline = directory / "checkpoints" / killed_stage / "last.ckpt", set(), time.monotonic() + 300
    while len(saved) < 3 and process.poll() is None and time.monotonic() < deadline:
        if reached.exists():
            saved.add(reached.stat().st_mtime_ns)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(saved) == 3, "killed too late to say anything"
    killed = result_of(directory)
    assert killed["status"] == "running"
    assert killed["wall_seconds"]["stages"][killed_stage] > 0

    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    result = result_of(directory)
    assert result["status"] == "completed"
    assert result["started"] == killed["started"]
    assert result["wall_seconds"]["stages"][killed_stage] > killed["wall_seconds"]["stages"][killed_stage]
    assert set(result["metrics"]) == {"dense", "unpruned", "pruned"}
    assert f"stage {killed_stage}: goes on from" in again.stdout
    assert ("stage teacher: done before" in again.stdout) == (killed_stage != "teacher")
    judged = f"{killed_stage}/selection_{'attention_kl' if killed_stage == 'approx' else 'accuracy'}"
    trained = [int(row["epoch"]) for row in rows_of(directory / "csv" / "version_1") if row.get(judged)]
    assert min(trained) >= 2
    assert max(trained) == 7


def test_a_checkpoint_that_a_kill_left_half_written_is_put_aside(tiny_overrides, tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoints" / "finetune"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"half of a checkpoint")
    with caplog.at_level("INFO"):
        run(composed(["+method=finetune", "method.epochs=1", "logger=none", *tiny_overrides]), tmp_path / "run")
    assert "starts again, its checkpoint cannot be read" in caplog.text
    assert result_of(tmp_path / "run")["status"] == "completed"


def test_a_teacher_of_another_backbone_cannot_replace_the_students_weights(tiny_overrides, tmp_path):
    run(composed(["+method=finetune", "method.epochs=1", "logger=none", *tiny_overrides]), tmp_path / "teacher")
    card = tmp_path / "teacher" / "model" / "config.json"
    card.write_text(card.read_text().replace('"backbone": "tiny"', '"backbone": "another"'))
    teacher = f"teacher.path={tmp_path / 'teacher' / 'model'}"
    with pytest.raises(UserError, match="holds another, from which tiny cannot start"):
        run(composed(["+method=adtp", "logger=none", teacher, *tiny_overrides]), tmp_path / "student")


def test_overwriting_a_run_leaves_other_files_alone(tiny_overrides, tmp_path):
    arguments = ["+method=finetune", "method.epochs=1", "logger=none", *tiny_overrides]
    run(composed(arguments), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(composed([*arguments, "overwrite=true"]), tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", choices("task"))
@pytest.mark.parametrize("method", choices("method"))
def test_the_smoke_trainer_finishes_every_method_on_every_task(
    method, task, request, tiny_tokenizer_directory, tmp_path
):
    if task == "rotten_tomatoes":
        request.getfixturevalue("rotten_tomatoes_directory")
        root = []
    else:
        root = [f"data.root={request.getfixturevalue('shared_data')}"]
    cfg = composed(
        [
            f"+method={method}",
            f"task={task}",
            "trainer=smoke",
            "trainer.enable_progress_bar=false",
            "backbone=tiny",
            f"backbone.path={tiny_tokenizer_directory}",
            "task.max_tokens=64",
            "logger=none",
            *root,
        ]
    )
    run(cfg, tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert result["status"] == "completed"
    assert all(0 <= abs(value) <= 1 for scores in result["metrics"].values() for value in scores.values())
