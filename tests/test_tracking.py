"""The record of a run, the loggers' files read back from the disk, and the table."""

import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import wandb
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import Logger
from offline_runs import finished_run, read_offline_run
from rich.console import Console

from tokprune_exp.__main__ import main
from tokprune_exp.config import check_config, config_directory, overrides
from tokprune_exp.errors import UserError
from tokprune_exp.examples import Example, log_examples
from tokprune_exp.serving import Prediction, Token
from tokprune_exp.tracking import (
    RunRecord,
    close,
    json_safe,
    log_result,
    make_loggers,
    print_summary,
    quieten_lightning,
    summary_table,
    wandb_runs,
)
from tokprune_exp.tracking.loggers import sweep_of
from tokprune_exp.tracking.results import frontier_point


@dataclass
class Settings:
    """The `logger` group of a configuration."""

    csv: bool = False
    wandb: bool = False
    project: str = "pruning"
    entity: str | None = None
    group: str | None = "a_sweep"
    offline: bool = True


RESULT: dict[str, Any] = {
    "status": "completed",
    "method": "ltp",
    "task": "sst2",
    "backbone": "minilm_l6",
    "metrics": {"dense": {"accuracy": 0.92}, "unpruned": {"accuracy": 0.91}, "pruned": {"accuracy": 0.9}},
    "by_length": {
        "dense": [
            {
                "shortest": 4,
                "longest": 9,
                "examples": 2,
                "metrics": {"accuracy": 1.0, "matthews": None},
                "gflops_per_example": 0.5,
                "reduction_unpadded": 1.0,
            }
        ],
        "pruned": [
            {
                "shortest": 4,
                "longest": 9,
                "examples": 2,
                "metrics": {"accuracy": 0.5, "matthews": float("nan")},
                "gflops_per_example": 0.25,
                "reduction_unpadded": 2.0,
            },
            {
                "shortest": 10,
                "longest": 30,
                "examples": 2,
                "metrics": {"accuracy": 0.75, "matthews": 0.25},
                "gflops_per_example": 1.5,
                "reduction_unpadded": 2.5,
            },
        ],
    },
    "flops": {
        "gflops_per_example": 1.0,
        "gflops_dense": 2.0,
        "gflops_dense_padded": 10.0,
        "reduction_unpadded": 2.0,
        "reduction_padded": 10.0,
        "retention_mean": 0.5,
        "retention_per_layer": [0.75, 0.25],
        "tokens_per_layer": [15.0, 5.0],
    },
    "latency": [{"batch_size": 8, "speedup": 1.7, "speedup_quartiles": [1.6, 1.8], "plan_ms": 3.5, "device": "cpu"}],
    "wall_seconds": {"total": 3.0, "stages": {"soft": 2.0}},
}


# ---------------------------------------------------------------------------------------------------------------
# result.json


def test_the_record_is_running_inside_and_completed_after(tmp_path: Path) -> None:
    with a_record(tmp_path) as record:
        assert written(tmp_path)["status"] == "running"
        with record.stage("soft"):
            pass
        record.update(metrics={"dense": {"accuracy": 0.9}})
        record.update(metrics={"pruned": {"accuracy": 0.8}}, flops={"reduction_unpadded": 2.0}, latency=[])
        assert written(tmp_path)["metrics"]["pruned"] == {"accuracy": 0.8}
    result = written(tmp_path)
    assert (result["status"], result["reason"]) == ("completed", None)
    assert result["metrics"] == {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8}}
    assert 0 <= result["wall_seconds"]["stages"]["soft"] <= result["wall_seconds"]["total"]
    assert result["started"] <= result["finished"]
    assert result["overrides"] == ["task=sst2"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["hardware"]["cpu"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_quartiles_of_the_lengths_stand_in_the_record_and_are_replaced_as_a_whole(tmp_path: Path) -> None:
    with a_record(tmp_path) as record:
        assert written(tmp_path)["by_length"] == {}
        record.update(by_length=RESULT["by_length"])
        record.update(by_length={"dense": []})
    result = written(tmp_path)["by_length"]
    assert result["dense"] == []
    assert [row["metrics"]["matthews"] for row in result["pruned"]] == [None, 0.25]


def test_a_run_that_failed_before_it_was_measured_is_logged_without_tables(quiet_wandb: Path) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    log_result(loggers, a_record(quiet_wandb).result)
    close(loggers, failed=True)
    assert read_offline_run(quiet_wandb).summary["status"] == "running"
    assert not list(quiet_wandb.rglob("media/*/*"))


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (FloatingPointError("loss.alpha is NaN"), "failed", "FloatingPointError: loss.alpha is NaN"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (SystemExit(1), "interrupted", "SystemExit"),
    ],
)
def test_an_exception_closes_the_record_with_its_reason_and_goes_on(
    tmp_path: Path, error: BaseException, status: str, reason: str
) -> None:
    with pytest.raises(type(error)), a_record(tmp_path) as record, record.stage("soft"):
        raise error
    result = written(tmp_path)
    assert (result["status"], result["reason"]) == (status, reason)
    assert result["finished"] and "soft" in result["wall_seconds"]["stages"]


def test_a_resumed_run_adds_to_the_clock_of_its_first_part_and_another_configuration_does_not(tmp_path: Path) -> None:
    with a_record(tmp_path) as record:
        record.result["wall_seconds"]["stages"]["teacher"] = 50.0
        record._start -= 100.0
    with a_record(tmp_path):
        pass
    assert written(tmp_path)["wall_seconds"]["total"] >= 100.0
    assert written(tmp_path)["wall_seconds"]["stages"] == {"teacher": 50.0}
    with a_record(tmp_path, config_hash="another"):
        pass
    assert written(tmp_path)["wall_seconds"]["stages"] == {}


def test_an_unknown_key_is_refused_with_the_keys_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"result\.json has no key metric; choose from status, .*metrics"):
        a_record(tmp_path).update(metric={})


def test_everything_that_is_measured_becomes_plain_json() -> None:
    @dataclass
    class Source:
        path: Path

    value = {
        "scalar": torch.tensor(2),
        "vector": torch.tensor([1.5, torch.nan]),
        "array": np.arange(3),
        "number": np.float32(0.5),
        "infinite": float("inf"),
        "source": Source(Path("data/sst2")),
        8: (1, "two", None, True),
    }
    plain = json_safe(value)
    assert plain == {
        "scalar": 2,
        "vector": [1.5, None],
        "array": [0, 1, 2],
        "number": 0.5,
        "infinite": None,
        "source": {"path": "data/sst2"},
        "8": [1, "two", None, True],
    }
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_what_has_no_place_in_a_record_is_refused_and_the_earlier_file_survives(tmp_path: Path) -> None:
    record = a_record(tmp_path)
    record.update(metrics={"dense": {"accuracy": 0.9}})
    with pytest.raises(TypeError, match=r"a Linear cannot be written into result\.json"):
        record.update(data={"model": torch.nn.Linear(1, 1)})
    assert written(tmp_path)["metrics"] == {"dense": {"accuracy": 0.9}}


# ---------------------------------------------------------------------------------------------------------------
# Loggers


def test_no_logger_is_an_empty_list(tmp_path: Path) -> None:
    assert loggers_for(Settings(), tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_gets_a_csv_folder_of_its_own(tmp_path: Path) -> None:
    for accuracy in (0.5, 0.75):
        loggers = loggers_for(Settings(csv=True), tmp_path)
        loggers[0].log_metrics({"soft/accuracy": accuracy}, step=3)
        close(loggers)
    files = sorted(tmp_path.rglob("metrics.csv"))
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "csv/version_0/metrics.csv",
        "csv/version_1/metrics.csv",
    ]
    assert [file.read_text().split()[1] for file in files] == ["0.5,3", "0.75,3"]
    assert "alpha: 0.1" in (tmp_path / "csv/version_0/hparams.yaml").read_text()


def test_an_offline_wandb_run_says_what_it_is_and_holds_the_whole_configuration(quiet_wandb: Path) -> None:
    close(loggers_for(Settings(wandb=True), quiet_wandb / "a_run"))
    run = read_offline_run(quiet_wandb / "a_run")
    assert (run.project, run.group, run.job_type, run.name) == ("pruning", "a_sweep", "ltp", "a_run")
    assert sorted(run.tags) == ["a_tag", "ltp", "minilm_l6", "sst2"]
    assert run.config["loss"] == {"alpha": 0.1}
    assert run.config["seed"] == 0
    assert run.config["run"] == {
        "method": "ltp",
        "task": "sst2",
        "backbone": "minilm_l6",
        "sweep": None,
        "config_hash": "0123abcd",
    }
    assert run.exit_code == 0


@pytest.mark.parametrize(
    ("asked", "overrides", "group"),
    [
        (None, ["task=sst2"], "ltp-sst2-minilm_l6"),
        (None, ["budget=0.5", "+sweep=budgets", "task=sst2"], "budgets"),
        ("mine", ["+sweep=budgets"], "mine"),
    ],
)
def test_runs_are_grouped_by_their_sweep_or_by_what_they_are(
    quiet_wandb: Path, asked: str | None, overrides: list[str], group: str
) -> None:
    close(loggers_for(Settings(wandb=True, group=asked), quiet_wandb, overrides=overrides))
    assert read_offline_run(quiet_wandb).group == group


def test_a_job_of_a_sweep_knows_the_name_of_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stand_in = SimpleNamespace(run=lambda cfg, directory: seen.append(sweep_of(overrides())))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setitem(sys.modules, "tokprune_exp.run", stand_in)
    monkeypatch.setattr(sys, "argv", ["tokprune_exp", "retainer.ratio=0.4", "+sweep=adtp_ratios", "hydra.mode=RUN"])
    main()
    assert seen == ["adtp_ratios"]


def test_every_stage_has_axes_of_its_own(quiet_wandb: Path) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    loggers[0].log_metrics({"teacher/loss": 0.7, "epoch": 0}, step=9)
    loggers[0].log_metrics({"teacher/loss": 0.6, "epoch": 1}, step=19)
    loggers[0].log_metrics({"soft/loss": 0.5, "epoch": 0}, step=1)
    loggers[0].log_metrics({"soft/selection_accuracy": 0.8, "epoch": 3}, step=40)
    close(loggers)
    run = read_offline_run(quiet_wandb)
    assert run.curve("teacher/loss") == [(9, 0.7), (19, 0.6)]
    assert run.curve("soft/loss") == [(1, 0.5)]
    assert run.curve("soft/selection_accuracy") == [(3, 0.8)]
    assert run.axes["teacher/loss"] == "teacher/step"
    assert run.axes["soft/selection_accuracy"] == "soft/epoch"
    assert "*" not in run.axes


def test_the_result_stands_in_the_summary_and_in_tables(quiet_wandb: Path) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    log_result(loggers, RESULT)
    close(loggers)
    run = read_offline_run(quiet_wandb)
    assert run.summary["metrics/pruned/accuracy"] == 0.9
    assert run.summary["flops/reduction_unpadded"] == 2.0
    assert run.summary["latency/batch_8/speedup"] == 1.7
    assert run.summary["latency/batch_8/plan_ms"] == 3.5
    assert run.summary["status"] == "completed"
    assert run.table("layers") == [
        {"layer": 1, "retention": 0.75, "tokens": 15.0},
        {"layer": 2, "retention": 0.25, "tokens": 5.0},
    ]
    assert run.curve("layer/retention") == [(1, 0.75), (2, 0.25)]
    assert run.curve("layer/tokens") == [(1, 15.0), (2, 5.0)]
    rows = run.table("by_length")
    assert list(rows[0]) == [
        *("model", "shortest", "longest", "examples", "metrics/accuracy", "metrics/matthews"),
        *("gflops_per_example", "reduction_unpadded"),
    ]
    assert [list(row.values()) for row in rows] == [
        ["dense", 4, 9, 2, 1.0, None, 0.5, 1.0],
        ["pruned", 4, 9, 2, 0.5, None, 0.25, 2.0],
        ["pruned", 10, 30, 2, 0.75, 0.25, 1.5, 2.5],
    ]


def test_thresholds_are_drawn_layer_by_layer_where_there_are_any(quiet_wandb: Path) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    log_result(loggers, {**RESULT, "flops": {**RESULT["flops"], "thresholds_per_layer": [0.01, 0.02]}})
    close(loggers)
    run = read_offline_run(quiet_wandb)
    assert run.curve("layer/thresholds") == [(1, 0.01), (2, 0.02)]
    assert [row["thresholds"] for row in run.table("layers")] == [0.01, 0.02]


def test_the_point_of_a_frontier_is_that_of_the_pruned_model_at_the_largest_batch() -> None:
    timed = [{"batch_size": 32, "speedup": 2.5}, {"batch_size": 8, "speedup": 1.7}]
    assert frontier_point({**RESULT, "latency": timed}) == {
        "sst2": {"accuracy": 0.9},
        "flops_share": 0.5,
        "gflops_per_example": 1.0,
        "retention": 0.5,
        "speedup": 2.5,
    }


def test_a_model_that_prunes_nothing_is_the_end_of_every_frontier_and_a_run_not_yet_measured_is_no_point() -> None:
    flops = {**RESULT["flops"], "reduction_unpadded": 1.0, "retention_mean": 1.0, "gflops_per_example": 2.0}
    dense = {**RESULT, "metrics": {"dense": {"f1": 0.8, "accuracy": 0.9}}, "flops": flops, "latency": []}
    point = frontier_point(dense)
    assert (point["sst2"], point["flops_share"], point["speedup"]) == ({"f1": 0.8}, 1.0, 1.0)
    assert frontier_point({**RESULT, "metrics": {}, "flops": {}}) == {}
    assert "speedup" not in frontier_point({**RESULT, "latency": []})


# ---------------------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("labels", [("negative", "positive"), ()])
def test_examples_hold_text_answers_and_the_tokens_that_each_layer_dropped(
    quiet_wandb: Path, labels: tuple[str, ...]
) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    answer = replace(AN_ANSWER, label="positive", probability=0.9) if labels else AN_ANSWER
    log_examples(wandb_runs(loggers), [Example(answer, "negative" if labels else 2.25)])
    close(loggers)
    run = read_offline_run(quiet_wandb)
    (row,) = run.table("examples")
    assert row["text"] == "a <b>fine</b> film ‖ dull & long"
    judged = ("negative", "positive", False) if labels else (2.25, 1.5, 0.75)
    assert (row["gold"], row["predicted"], row["correct" if labels else "error"]) == judged
    assert (row["tokens"], row["tokens_kept"]) == (8, "7 4 1")
    assert row["retention"] == pytest.approx((7 + 4 + 1) / 24)
    assert row["marked"] == "[a] <b>fine[</b> film] ‖ [dull] & long"
    assert [row[f"dropped_in_layer_{layer}"] for layer in (1, 2, 3)] == ["a", "</b> film [SEP] dull", ""]
    page = run.media("examples_page", "html-file").read_text()
    shown = re.sub(r"<[^>]*>", "", page.partition("</p>")[2])
    assert "a &lt;b&gt;fine&lt;/b&gt; film ‖ dull &amp; long" in shown
    places = re.findall(r'<span title="([^"]*)"[^>]*>([^<]*)</span>', page.partition("</p>")[2])
    assert places == [
        ("dropped in layer 1", "a"),
        ("read by the last layer", " &lt;b&gt;fine"),
        ("dropped in layer 2", "&lt;/b&gt; film"),
        ("dropped in layer 2", "dull"),
        ("read by the last layer", " &amp; long"),
    ]
    assert ("class='answer wrong'" in page) == bool(labels)


def test_a_copied_run_holds_its_tables_and_pages_and_nothing_lies_anywhere_else(quiet_wandb: Path) -> None:
    here, there = quiet_wandb / "here", quiet_wandb / "there"
    loggers = loggers_for(Settings(wandb=True), here)
    log_result(loggers, RESULT)
    log_examples(wandb_runs(loggers), [Example(AN_ANSWER, 1.0)])
    close(loggers)
    finished = read_offline_run(here)
    shutil.copytree(here, there, symlinks=True)
    shutil.rmtree(here)
    copy = read_offline_run(there)
    assert finished.artifacts == copy.artifacts == []  # they would be staged in the user's home
    assert copy.summary == finished.summary
    assert len(copy.table("layers")) == 2
    assert len(copy.table("by_length")) == 3
    assert len(copy.table("examples")) == 1
    assert copy.media("examples_page", "html-file").read_text().startswith("<!DOCTYPE html>")
    assert [path for path in there.rglob("*") if path.is_symlink() and not path.exists()] == []
    naming = {path.suffix for path in there.rglob("*") if path.is_file() and str(here).encode() in path.read_bytes()}
    assert naming <= {".wandb", ".log"}  # W&B notes where a run was written, for the reader only
    assert str(here) not in json.dumps([copy.config, copy.history, copy.summary])
    elsewhere = [path for path in (quiet_wandb / "elsewhere").rglob("*") if path.is_file()]
    assert {path.suffix for path in elsewhere} <= {".log"}


@pytest.mark.parametrize(("arguments", "mode"), [([], "offline"), (["logger.offline=false"], "online")])
def test_runs_are_offline_unless_asked(
    quiet_wandb: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], mode: str
) -> None:
    asked: dict[str, Any] = {}

    def init(**settings: Any) -> Any:
        asked.update(settings)
        raise wandb.Error("No network in a test.")

    monkeypatch.setattr(wandb, "init", init)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("config", ["+method=ltp", "logger=wandb", "logger.csv=false", *arguments])
    check_config(cfg)
    expected = rf"logger\.offline={mode == 'offline'}: .* \(No network in a test\); ".lower()
    with pytest.raises(UserError, match=f"(?i){expected}"):
        make_loggers(cfg.logger, a_record(quiet_wandb), [], {})
    assert asked["mode"] == mode


@pytest.mark.parametrize("first_job_closes", [True, False])
def test_two_jobs_of_a_multirun_never_share_a_wandb_run(quiet_wandb: Path, first_job_closes: bool) -> None:
    for job in ("first", "second"):
        loggers = loggers_for(Settings(wandb=True), quiet_wandb / job)
        loggers[0].log_metrics({"soft/loss": 0.5}, step=0)
        if first_job_closes or job == "second":
            close(loggers, failed=True)
    files = sorted(quiet_wandb.rglob("*.wandb"))
    assert len(files) == 2
    assert finished_run(files[1])[-1].exit.exit_code == 1


def test_a_trainer_logs_into_both_loggers_without_announcements(
    quiet_wandb: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_SILENT")
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)  # for caplog
    quieten_lightning()
    loggers = loggers_for(Settings(csv=True, wandb=True), quiet_wandb)
    lightning.Trainer(logger=loggers, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    close(loggers)
    printed = caplog.text + "".join(capfd.readouterr())
    assert "Tip" not in printed
    assert "anonymous" not in printed
    assert "GPU available" not in printed


# ---------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_sets_the_three_models_side_by_side_in_80_columns() -> None:
    rows = rendered({**RESULT, "flops": {**RESULT["flops"], "gflops_teacher": 4.0}})
    assert "dense teacher   student unpruned   student pruned" in rows
    assert numbers(rows, "accuracy") == ["0.9200", "0.9100", "0.9000"]
    assert numbers(rows, "GFLOPs per example") == ["4.0000", "2.0000", "1.0000"]
    assert numbers(rows, "reduction unpadded") == ["–", "1.0000", "2.0000"]
    assert numbers(rows, "reduction padded") == ["–", "5.0000", "10.0000"]
    assert numbers(rows, "retention") == ["–", "1.0000", "0.5000"]
    assert numbers(rows, "speed-up at batch 8") == ["–", "1.0000", "1.7000"]


def test_the_table_of_a_run_that_measured_little_has_dashes_and_no_empty_rows() -> None:
    rows = rendered({**RESULT, "metrics": {"pruned": {"f1": None}}, "flops": {}, "latency": []})
    assert numbers(rows, "f1") == ["–", "–", "–"]
    assert "FLOPs" not in rows and "speed-up" not in rows


def test_the_table_of_a_method_that_prunes_nothing_has_one_column() -> None:
    result = {**RESULT, "metrics": {"dense": {"accuracy": 0.92}}, "latency": []}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(result))
    printed = console.export_text()
    assert "student" not in printed
    assert "2.0000" in printed


def test_the_summary_ends_with_the_path_of_everything_that_was_written(tmp_path: Path) -> None:
    with a_record(tmp_path) as record:
        record.update(**{key: RESULT[key] for key in ("metrics", "flops", "latency")})
    (tmp_path / "csv").mkdir()
    console = Console(width=160, record=True, file=io.StringIO())
    print_summary(record.result, record.path.parent, console)
    printed = console.export_text()
    assert printed.rstrip().endswith(f"Written:\n  {tmp_path / 'csv'}/\n  {tmp_path / 'result.json'}")


@pytest.mark.parametrize(("share", "is_told"), [(1.0, True), (0.99, False)])
def test_a_model_that_answers_alike_to_every_text_is_pointed_out(tmp_path: Path, share: float, is_told: bool) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    print_summary({**RESULT, "commonest_answer": share}, tmp_path, console)
    assert ("All texts got the same answer" in console.export_text()) is is_told


# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for W&B runs; everything else that W&B writes stays below it as well."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    return tmp_path


AN_ANSWER = Prediction(
    text=("a <b>fine</b> film", "dull & long"),
    label=None,
    probability=None,
    logits=[1.5],
    tokens=[
        Token("[CLS]", None, 0, 0),
        Token("a", 0, 0, 1),
        Token("fine", 0, 2, 9),
        Token("film", 0, 9, 18),
        Token("[SEP]", None, 0, 0),
        Token("dull", 1, 0, 4),
        Token("&", 1, 5, 6),
        Token("long", 1, 7, 11),
    ],
    # as LTP: the last layer reads what the second one kept, and passes on the first token alone
    kept=[
        [True, False, True, True, True, True, True, True],
        [True, False, True, False, False, False, True, True],
        [True, False, False, False, False, False, False, False],
    ],
    read=[True, False, True, False, False, False, True, True],
    truncated=False,
)


def a_record(directory: Path, config_hash: str = "0123abcd", overrides: Sequence[str] = ("task=sst2",)) -> RunRecord:
    return RunRecord(
        directory,
        method="ltp",
        task="sst2",
        backbone="minilm_l6",
        seed=0,
        config_hash=config_hash,
        overrides=overrides,
    )


def written(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def loggers_for(settings: Settings, directory: Path, overrides: Sequence[str] = ()) -> list[Logger]:
    directory.mkdir(exist_ok=True)
    record = a_record(directory, overrides=overrides)
    return make_loggers(settings, record, ["a_tag"], {"seed": 0, "loss": {"alpha": 0.1}})


def rendered(result: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(result))
    return console.export_text()


def numbers(rows: str, name: str) -> list[str]:
    (line,) = [line for line in rows.splitlines() if line.strip().startswith(name)]
    return line.split(name)[1].split()
