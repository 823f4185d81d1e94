"""result.json files below some directories, read without trust: what cannot be used is named and left out."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tokprune_exp.config import config_directory
from tokprune_exp.errors import UserError

LARGEST = 10_000_000
"""Bytes of a result.json; a record has some thousand."""

NO_SETTINGS = (
    *("method", "task", "backbone", "scorer", "retainer", "seed"),
    *("run_dir", "shared_dir", "overwrite", "tags", "logger", "sweep"),
)
NO_SETTINGS_BELOW = (
    *("logger.", "hydra.", "measure.", "data.root", "data.cache", "backbone.weights_root"),
    "trainer.enable_progress_bar",
)
"""Overrides that are no part of an operating point: they name a curve or a seed, or say where files lie."""


@dataclass(frozen=True)
class Run:
    """One completed run, as far as curves need it; numbers are finite, names printable."""

    path: Path
    method: str
    task: str
    backbone: str
    seed: int
    finished: str
    scorer: str | None
    retainer: str | None
    """Names of the configuration groups' choices; None where neither config.yaml nor an override tells."""
    settings: dict[str, str]
    """The overrides that make up the operating point, key → value."""
    metrics: dict[str, dict[str, float]]
    """dense, unpruned, pruned → metric → value."""
    flops: dict[str, float]
    speedups: dict[int, float]
    """Batch size → measured speed-up over the unpruned model."""
    clock: str
    """What the speed-ups were measured on."""


@dataclass(frozen=True)
class LeftOut:
    """A result.json that is in no curve, and why."""

    path: Path
    why: str


def read_runs(directories: Iterable[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read every result.json below the directories, each file once.

    Raises:
        UserError: a directory is not there or holds no result.json.
    """
    files: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory; name the directory of a sweep, for instance multirun/NAME")
        found = sorted(directory.rglob("result.json"))
        if not found:
            raise UserError(f"no result.json lies below {directory}; name the directory of a sweep or of a run")
        files |= {file.resolve(): file for file in found}
    runs, left_out = [], []
    for file in files.values():
        try:
            runs.append(read_run(file))
        except (OSError, ValueError, ArithmeticError, RecursionError) as error:
            left_out.append(LeftOut(file, printable(str(error))))
    return runs, left_out


def read_run(file: Path) -> Run:
    """Read one record.

    Raises:
        ValueError: it is no JSON, lacks what every record has, or its run is not completed.
        OSError: it cannot be read.
    """
    result = load_json(file)
    status = text_at(result, "status")
    if status != "completed":
        reason = result.get("reason")
        raise ValueError(f"{status}{f': {reason}' if isinstance(reason, str) else ''}")
    choices = dict(group_choices(file.parent / "config.yaml"))
    overrides = dict(split_overrides(result.get("overrides")))
    chosen = {name: choices.get(name) or overrides.get(name) for name in ("scorer", "retainer")}
    settings = {key: value for key, value in overrides.items() if is_setting(key)}
    if not overrides:  # composed in Python: nothing but the hash tells one configuration from another
        settings = {"config_hash": str(result.get("config_hash"))}
    latency = [row for row in as_list(result.get("latency")) if isinstance(row, dict)]
    return Run(
        path=file,
        method=text_at(result, "method"),
        task=text_at(result, "task"),
        backbone=text_at(result, "backbone"),
        seed=whole_number_at(result, "seed"),
        finished=str(result.get("finished") or ""),
        scorer=chosen["scorer"],
        retainer=chosen["retainer"],
        settings={printable(key): printable(value) for key, value in sorted(settings.items())},
        metrics={
            printable(model): numbers(values)
            for model, values in as_dict(result.get("metrics")).items()
            if isinstance(values, dict)
        },
        flops=numbers(as_dict(result.get("flops"))),
        speedups={
            row["batch_size"]: float(row["speedup"])
            for row in latency
            if isinstance(row.get("batch_size"), int) and is_number(row.get("speedup"))
        },
        clock=clock_of(latency, as_dict(result.get("hardware"))),
    )


def load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: too large, not UTF-8, not JSON or no object.
    """
    size = file.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes are no record of a run")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("broken: not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"broken: not JSON ({error.msg}, line {error.lineno})") from error
    if not isinstance(value, dict):
        raise ValueError("broken: not a JSON object")
    return value


def split_overrides(overrides: Any) -> Iterator[tuple[str, str]]:
    """`+key=value` → (key, value); `~key` → (~key, "")."""
    for override in as_list(overrides):
        if isinstance(override, str):
            key, _, value = override.partition("=")
            yield key.strip().lstrip("+"), value.strip()


def is_setting(key: str) -> bool:
    """Whether an override of this key makes another operating point."""
    return key not in NO_SETTINGS and not key.startswith(NO_SETTINGS_BELOW)


def group_choices(config: Path) -> Iterator[tuple[str, str]]:
    """Scorer and retainer of a resolved configuration, by the names of their files in conf/; nothing without it."""
    if not config.is_file():
        return
    try:
        resolved = yaml.load(config.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    for group in ("scorer", "retainer"):
        target = as_dict(as_dict(resolved).get(group)).get("_target_")
        if name := names_of_targets(group).get(str(target)):
            yield group, name


@cache
def names_of_targets(group: str) -> dict[str, str]:
    """What each file of a configuration group constructs → the file's name."""
    found = {}
    for file in sorted((config_directory() / group).glob("*.yaml")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("_target_: "):
                found[line.removeprefix("_target_: ").strip()] = file.stem
    return found


def clock_of(latency: list[dict[str, Any]], hardware: Mapping[str, Any]) -> str:
    """Device, threads and processor that the speed-ups hold for."""
    row = latency[0] if latency else {}
    name = hardware.get("gpu") if row.get("device") != "cpu" else hardware.get("cpu")
    threads = (
        f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
        if row.get("device") == "cpu" and "threads" in row
        else ""
    )
    return printable(", ".join(str(part) for part in (name or row.get("device"), threads) if part))


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values."""
    return {printable(key): float(value) for key, value in values.items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text_at(result: Mapping[str, Any], key: str) -> str:
    """The non-empty text of a key, or ValueError."""
    value = result.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"broken: {key} is no text")
    return printable(value)


def whole_number_at(result: Mapping[str, Any], key: str) -> int:
    """The whole number of a key, or ValueError."""
    value = result.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"broken: {key} is no whole number")
    return value


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def printable(text: str) -> str:
    """The text with every control character as a space: names reach a terminal."""
    return "".join(each if each.isprintable() else " " for each in text)
