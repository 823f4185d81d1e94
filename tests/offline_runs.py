"""What an offline Weights & Biases run holds, read from its own files, without anything of the writing side."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """One run as its log and its files have it; keys of nested values are joined by a slash."""

    files: Path
    project: str
    group: str
    job_type: str
    name: str
    tags: list[str]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    axes: dict[str, str]
    summary: dict[str, Any]
    artifacts: list[str]
    exit_code: int

    @property
    def logged(self) -> set[str]:
        """Every key of the history."""
        return {key for row in self.history for key in row}

    def curve(self, key: str) -> list[tuple[Any, Any]]:
        """A figure against its own axis."""
        return [(row[self.axes[key]], row[key]) for row in self.history if key in row]

    def media(self, key: str, kind: str) -> Path:
        """The file that was logged under a key, which must be of this type."""
        (row,) = [row for row in self.history if f"{key}/_type" in row]
        assert row[f"{key}/_type"] == kind
        return self.files / row[f"{key}/path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of a table."""
        values = json.loads(self.media(key, "table-file").read_text())
        return [dict(zip(values["columns"], row, strict=True)) for row in values["data"]]


def read_offline_run(directory: Path) -> OfflineRun:
    """Read the one finished offline run below a directory."""
    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    records = finished_run(file)
    (run,) = [record.run for record in records if record.HasField("run")]
    metrics = [record.metric for record in records if record.HasField("metric")]
    return OfflineRun(
        files=file.parent / "files",
        project=run.project,
        group=run.run_group,
        job_type=run.job_type,
        name=run.display_name,
        tags=list(run.tags),
        config=items_of(records, "config", "update"),
        history=[items(record.history.item) for record in records if record.HasField("history")],
        axes={metric.glob_name or metric.name: metric.step_metric for metric in metrics},
        summary=items_of(records, "summary", "update"),
        artifacts=[record.artifact.name for record in records if record.HasField("artifact")],
        exit_code=records[-1].exit.exit_code,
    )


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
