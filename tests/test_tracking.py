"""The record of a run, the loggers' files read back from the disk, and the table."""

import io
import json
import logging
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console

from tokprune_exp.tracking import (
    RunRecord,
    close,
    json_safe,
    log_result,
    make_loggers,
    print_summary,
    quieten_lightning,
    summary_table,
)


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
    "latency": [{"batch_size": 8, "speedup": 1.7, "speedup_quartiles": [1.6, 1.8], "device": "cpu"}],
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
    assert not list(quiet_wandb.rglob("media/table/*"))


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


def test_an_offline_wandb_run_holds_configuration_curves_and_result(quiet_wandb: Path) -> None:
    loggers = loggers_for(Settings(wandb=True), quiet_wandb)
    loggers[0].log_metrics({"teacher/loss": 0.7}, step=9)
    loggers[0].log_metrics({"soft/loss": 0.5, "soft/val/accuracy": 0.8}, step=1)
    log_result(loggers, RESULT)
    close(loggers)

    (file,) = quiet_wandb.glob("wandb/offline-run-*/*.wandb")
    records = finished_run(file)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == ("pruning", "a_sweep", "a_name", ["a_tag"])
    assert items_of(records, "config", "update")["loss"] == {"alpha": 0.1}

    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert (history[0]["teacher/loss"], history[0]["teacher/step"]) == (0.7, 9)
    assert (history[1]["soft/val/accuracy"], history[1]["soft/step"]) == (0.8, 1)
    axes = {
        record.metric.glob_name or record.metric.name: record.metric for record in records if record.HasField("metric")
    }
    assert axes["teacher/*"].step_metric == "teacher/step"
    assert axes["soft/*"].step_metric == "soft/step"
    assert "*" not in axes

    summary = items_of(records, "summary", "update")
    assert summary["metrics/pruned/accuracy"] == 0.9
    assert summary["flops/reduction_unpadded"] == 2.0
    assert summary["latency/batch_8/speedup"] == 1.7
    assert summary["status"] == "completed"
    (table,) = quiet_wandb.rglob("media/table/layers_*.json")
    assert json.loads(table.read_text())["data"] == [[1, 0.75, 15.0], [2, 0.25, 5.0]]
    (table,) = quiet_wandb.rglob("media/table/by_length_*.json")
    quartiles = json.loads(table.read_text())
    assert quartiles["columns"] == [
        *("model", "shortest", "longest", "examples", "metrics/accuracy", "metrics/matthews"),
        *("gflops_per_example", "reduction_unpadded"),
    ]
    assert quartiles["data"] == [
        ["dense", 4, 9, 2, 1.0, None, 0.5, 1.0],
        ["pruned", 4, 9, 2, 0.5, None, 0.25, 2.0],
        ["pruned", 10, 30, 2, 0.75, 0.25, 1.5, 2.5],
    ]
    assert records[-1].exit.exit_code == 0


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


def test_the_summary_ends_with_the_path_of_everything_that_was_written(tmp_path: Path) -> None:
    with a_record(tmp_path) as record:
        record.update(**{key: RESULT[key] for key in ("metrics", "flops", "latency")})
    (tmp_path / "csv").mkdir()
    console = Console(width=160, record=True, file=io.StringIO())
    print_summary(record.result, record.path.parent, console)
    printed = console.export_text()
    assert printed.rstrip().endswith(f"Written:\n  {tmp_path / 'csv'}/\n  {tmp_path / 'result.json'}")


# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for W&B runs; everything else that W&B writes stays below it as well."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    return tmp_path


def a_record(directory: Path, config_hash: str = "0123abcd") -> RunRecord:
    return RunRecord(
        directory,
        method="ltp",
        task="sst2",
        backbone="minilm_l6",
        seed=0,
        config_hash=config_hash,
        overrides=["task=sst2"],
    )


def written(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def loggers_for(settings: Settings, directory: Path) -> list[Logger]:
    return make_loggers(settings, directory, "a_name", "a_group", ["a_tag"], {"seed": 0, "loss": {"alpha": 0.1}})


def rendered(result: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(result))
    return console.export_text()


def numbers(rows: str, name: str) -> list[str]:
    (line,) = [line for line in rows.splitlines() if line.strip().startswith(name)]
    return line.split(name)[1].split()


def finished_run(path: Path) -> list[Any]:
    """The records of an offline run, the exit record last; W&B writes it some milliseconds after `finish` returned."""
    for _ in range(500):
        records = list(wandb_records(path))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.02)
    raise AssertionError(f"{path} holds no exit record, only {len(records)} others")


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, 32 KiB blocks of chunks, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(pending)
            pending = b""


def items(pairs: Any) -> dict[str, Any]:
    return {pair.key or "/".join(pair.nested_key): json.loads(pair.value_json) for pair in pairs}


def items_of(records: list[Any], kind: str, field: str) -> dict[str, Any]:
    """Every item of the records of one kind, the later ones on top."""
    merged: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == kind:
            merged |= items(getattr(getattr(record, kind), field))
    return merged


def test_the_table_of_a_method_that_prunes_nothing_has_one_column() -> None:
    result = {**RESULT, "metrics": {"dense": {"accuracy": 0.92}}, "latency": []}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(result))
    printed = console.export_text()
    assert "student" not in printed
    assert "2.0000" in printed
