"""What a run leaves behind: result.json, the loggers' files and the table on the screen.

result.json is the record; CSV and Weights & Biases are views of it and of the training curves.
"""

import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich import box
from rich.console import Console
from rich.table import Table

from tokprune_exp import __version__

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "hydra-core", "wandb")
VARIANTS = {"dense": "dense teacher", "unpruned": "student unpruned", "pruned": "student pruned"}
"""The three evaluated models: their key in `metrics` and their name in the table."""
LAYER_COLUMNS = ("retention", "tokens", "thresholds", "kept_probability")
"""What `flops` may hold for every layer, as <name>_per_layer."""


# ---------------------------------------------------------------------------------------------------------------
# result.json


class RunRecord:
    """The record of one run, `result.json`, true at every moment: written at the start, at every update, at the end.

    A context manager around the run: the status is `running` inside and `completed`, `failed` (with the reason) or
    `interrupted` afterwards; exceptions go on. Keys of `result`:

        status reason method task backbone seed overrides config_hash
        started finished wall_seconds {total, stages {<stage>}}
        metrics {dense, unpruned, pruned} of {<metric>}
        by_length {dense, pruned} of [a row per quartile of the lengths: evaluation.quartiles]
        flops {FlopsReport.summary}   latency [compare_latency rows]   saliency {spearman, mse}   data {…}
        findings {what a stage found out; ltp: binarisation {soft, hard} of {<metric>, cost_share}
                  sttabt: approximation {untrained, distilled} of {kl, mse}}
        versions {python, <package>}   hardware {cpu, threads, gpu}

    A run that is resumed in its directory under the same configuration adds to the earlier wall_seconds.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        method: str,
        task: str,
        backbone: str,
        seed: int,
        config_hash: str,
        overrides: Sequence[str] = (),
    ) -> None:
        self.path = Path(directory) / "result.json"
        self.result: dict[str, Any] = {
            "status": "running",
            "reason": None,
            "method": method,
            "task": task,
            "backbone": backbone,
            "seed": seed,
            "overrides": list(overrides),
            "config_hash": config_hash,
            "started": _now(),
            "finished": None,
            "wall_seconds": {"total": 0.0, "stages": {}},
            "metrics": {},
            "by_length": {},
            "flops": {},
            "latency": [],
            "saliency": {},
            "findings": {},
            "data": {},
            "versions": versions(),
            "hardware": hardware(),
        }
        self._continue_earlier_clock()
        self._start = time.perf_counter() - self.result["wall_seconds"]["total"]

    def update(self, **fields: Any) -> None:
        """Put values into the record and write it; a mapping is merged into the mapping that is there.

        Raises:
            ValueError: for a key that the record does not have.
        """
        for key, value in fields.items():
            if key not in self.result:
                raise ValueError(f"result.json has no key {key}; choose from {', '.join(self.result)}")
            self.result[key] = {**self.result[key], **value} if isinstance(value, Mapping) else value
        self.result["wall_seconds"]["total"] = time.perf_counter() - self._start
        write_json(self.path, self.result)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `wall_seconds.stages`, also when it is left by an exception."""
        start, stages = time.perf_counter(), self.result["wall_seconds"]["stages"]
        try:
            yield
        finally:
            stages[name] = stages.get(name, 0.0) + time.perf_counter() - start
            self.update()

    def __enter__(self) -> "RunRecord":
        """Write the record of a run that has started."""
        self.update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the record; an exception is not swallowed."""
        if error is None:
            status, reason = "completed", None
        elif isinstance(error, KeyboardInterrupt | SystemExit):  # Lightning turns Ctrl-C into sys.exit(1)
            status, reason = "interrupted", type(error).__name__
        else:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        self.update(status=status, reason=reason, finished=_now())

    def _continue_earlier_clock(self) -> None:
        """Take over the times of an earlier part of this run, if this directory holds its record."""
        if self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["config_hash"] == self.result["config_hash"]:
                self.result["wall_seconds"] = earlier["wall_seconds"]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file such that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def json_safe(value: Any) -> Any:
    """The same value in JSON's own types: tensors and arrays as lists, paths as text, NaN and infinity as null.

    Raises:
        TypeError: for a value that has no place in a record.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return json_safe(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return json_safe(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): json_safe(each) for key, each in value.items()}
    if isinstance(value, Sequence | set):
        return [json_safe(each) for each in value]
    raise TypeError(f"a {type(value).__name__} cannot be written into result.json: {value!r}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "tokprune_exp": __version__, **packages}


def hardware() -> dict[str, Any]:
    """Processor, threads that torch uses, and GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}


def _cpu_name() -> str:
    """The processor's model name; Linux keeps it in /proc/cpuinfo only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------
# Loggers


@runtime_checkable
class LoggerSettings(Protocol):
    """What `make_loggers` reads of the configuration's `logger` group."""

    csv: bool
    wandb: bool
    project: str
    entity: str | None
    group: str | None
    offline: bool


class StagewiseWandbLogger(WandbLogger):
    """A WandbLogger that draws `teacher/…` against `teacher/step`, `soft/…` against `soft/step`, and so on.

    The step starts again in every stage, so that a common axis would fold the stages' curves over each other.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics and, for each stage among their prefixes, the stage's own step."""
        stages = {name.partition("/")[0] for name in metrics if "/" in name} if step is not None else set()
        for stage in stages:
            self.experiment.define_metric(f"{stage}/step")
            self.experiment.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        super().log_metrics({**metrics, **{f"{stage}/step": float(step or 0) for stage in stages}}, step)


def make_loggers(
    settings: LoggerSettings,
    directory: str | Path,
    name: str,
    group: str | None,
    tags: Sequence[str],
    config: dict[str, Any],
) -> list[Logger]:
    """The loggers that the settings ask for, none included, each holding the plain, resolved configuration.

    CSV goes to `csv/version_N/`, a fresh N for a resumed run, since CSVLogger deletes what it finds in its folder.
    W&B goes to `wandb/`; an offline run cannot be resumed, so a resumed run is a new W&B run of the same group.
    """
    loggers: list[Logger] = []
    if settings.csv:
        loggers.append(CSVLogger(save_dir=directory, name="csv"))
    if settings.wandb:
        loggers.append(_make_wandb_logger(settings, directory, name, group, tags))
    for logger in loggers:
        logger.log_hyperparams(config)
    return loggers


def log_result(loggers: Iterable[Logger], result: Mapping[str, Any]) -> None:
    """Write a record into the W&B run: every number into its summary under `metrics/pruned/accuracy` and the like.

    Retention and tokens per layer become a table, as do the quartiles of the lengths; latency rows
    `latency/batch_8/speedup`.
    """
    safe = json_safe(result)
    by_size = {f"batch_{row['batch_size']}": row for row in safe["latency"]}
    kept = ("status", "reason", "metrics", "flops", "saliency", "findings", "wall_seconds")
    parts = {key: safe.get(key) for key in kept} | {"latency": by_size}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # half a second, and only where W&B is used

            logger.experiment.summary.update(dict(_flat_numbers(parts)))
            if safe["flops"]:
                columns = {name: safe["flops"].get(f"{name}_per_layer") for name in LAYER_COLUMNS}
                given = {name: values for name, values in columns.items() if values is not None}
                rows = [[layer, *values] for layer, values in enumerate(zip(*given.values(), strict=True), start=1)]
                logger.experiment.log({"layers": wandb.Table(columns=["layer", *given], data=rows)})
            if safe["by_length"]:
                quartiles = _quartile_rows(safe["by_length"])
                table = wandb.Table(columns=list(quartiles[0]), data=[list(row.values()) for row in quartiles])
                logger.experiment.log({"by_length": table})


def close(loggers: Iterable[Logger], failed: bool = False) -> None:
    """Flush and end every logger; belongs into a `finally`, else the next job of a multirun logs into this W&B run."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed))


def quieten_lightning() -> None:
    """Keep Lightning from announcing with every Trainer what hardware there is and what else could be installed."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    # a frozen ApproxNet plans without dropout
    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode at the start of training")
    # raised by Lightning itself on torch 2.13
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _make_wandb_logger(
    settings: LoggerSettings,
    directory: str | Path,
    name: str,
    group: str | None,
    tags: Sequence[str],
) -> StagewiseWandbLogger:
    """A logger on a W&B run started here: Lightning's own start prints a notice and may fall into another job's run."""
    import wandb

    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group or group,
        name=name,
        tags=list(tags),
        dir=str(directory),
        mode="offline" if settings.offline else "online",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True),  # the path of the run is printed with all others at the end
    )
    return StagewiseWandbLogger(
        name=name, project=settings.project, save_dir=directory, offline=settings.offline, experiment=run
    )


def _flat_numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings under its path with slashes; lists are left out."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat_numbers(each, f"{prefix}/{key}" if prefix else key)
    elif not isinstance(value, list):
        yield prefix, value


def _quartile_rows(by_length: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The quartiles of all models as rows of one table: the model, then every figure in a column of its own."""
    return [{"model": model, **dict(_flat_numbers(row))} for model, rows in by_length.items() for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# The table on the screen


def summary_table(result: Mapping[str, Any]) -> Table:
    """The result side by side: the dense teacher, the student before and after pruning; a dash was not measured.

    A method that prunes nothing has one column. The teacher's GFLOPs stand there only if the record holds
    `flops.gflops_teacher`, since the teacher may be larger than the student.
    """
    prunes_nothing = set(result["metrics"]) == {"dense"}
    variants = {"dense": "dense"} if prunes_nothing else VARIANTS
    rows = {**_score_rows(result["metrics"]), **_cost_rows(result["flops"], prunes_nothing)}
    for timed in result["latency"]:
        rows[f"speed-up at batch {timed['batch_size']}"] = {"unpruned": 1.0, "pruned": timed["speedup"]}
    table = Table(box=box.SIMPLE, title=f"{result['method']} · {result['task']} · {result['backbone']}")
    table.add_column("")
    for title in variants.values():
        table.add_column(title, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(_number(values.get(variant)) for variant in variants))
    return table


def print_summary(result: Mapping[str, Any], directory: Path, console: Console | None = None) -> None:
    """Print the table and the path of everything that lies in the run's directory."""
    console = console or Console()
    console.print(summary_table(result))
    console.print("Written:")
    for path in sorted(directory.iterdir()):
        console.print(f"  {path}{'/' if path.is_dir() else ''}", soft_wrap=True, highlight=False)


def _score_rows(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Each metric's values by variant."""
    names = dict.fromkeys(name for scores in metrics.values() for name in scores)
    return {name: {variant: scores.get(name) for variant, scores in metrics.items()} for name in names}


def _cost_rows(flops: Mapping[str, Any], prunes_nothing: bool) -> dict[str, dict[str, float | None]]:
    """GFLOPs, reductions and retention by variant; nothing where FLOPs were not counted."""
    if not flops:
        return {}
    if prunes_nothing:
        return {
            "GFLOPs per example": {"dense": flops["gflops_dense"]},
            "GFLOPs padded": {"dense": flops["gflops_dense_padded"]},
        }
    asked = flops.get("share_asked")
    budget = {f"share (asked {asked:g})": {"pruned": flops["share_unpadded"]}} if asked is not None else {}
    dense, pad_inflation = flops["gflops_dense"], flops["gflops_dense_padded"] / flops["gflops_dense"]
    return {
        "GFLOPs per example": {
            "dense": flops.get("gflops_teacher"),
            "unpruned": dense,
            "pruned": flops["gflops_per_example"],
        },
        "reduction unpadded": {"unpruned": 1.0, "pruned": flops["reduction_unpadded"]},
        "reduction padded": {"unpruned": pad_inflation, "pruned": flops["reduction_padded"]},
        "retention": {"unpruned": 1.0, "pruned": flops["retention_mean"]},
        **budget,
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
