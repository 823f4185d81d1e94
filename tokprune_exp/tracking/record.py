"""result.json: the record of a run, written at its start, after every epoch, at every result, and at its end."""

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from tokprune_exp import __version__

PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "hydra-core", "wandb")


class RunRecord:
    """The record of one run, `result.json`: written at the start, after every epoch, at every result, at the end.

    A context manager around the run: the status is `running` inside and `completed`, `failed` (with the reason) or
    `interrupted` afterwards; exceptions go on. Keys of `result`:

        status reason method task backbone seed overrides config_hash
        started finished wall_seconds {total, stages {<stage>}}
        metrics {dense, unpruned, pruned} of {<metric>}
        by_length {dense, pruned} of [a row per quartile of the lengths: evaluation.quartiles]
        commonest_answer share of the texts that got the label which was answered most often
        flops {FlopsReport.summary; of STTABT and manual_topk evaluation.in_sttabts_counting too}
        latency [compare_latency rows]   saliency {spearman, mse}   data {…}
        findings {what a stage found out; ltp: binarisation {soft, hard} of {<metric>, cost_share}
                  sttabt: approximation {untrained, random, after_text, distilled} of {kl, mse},
                  random where the start is not, after_text with +text}
        versions {python, <package>}   hardware {cpu, threads, gpu}

    A run that is resumed in its directory under the same configuration keeps `started` and adds to the earlier
    wall_seconds; what a kill took away since the last epoch is not in them.
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
            "commonest_answer": None,
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
        self._running: tuple[str, float] | None = None

    def update(self, **fields: Any) -> None:
        """Put values into the record and write it; a mapping is merged into the mapping that is there.

        Raises:
            ValueError: for a key that the record does not have.
        """
        for key, value in fields.items():
            if key not in self.result:
                raise ValueError(f"result.json has no key {key}; choose from {', '.join(self.result)}")
            self.result[key] = {**self.result[key], **value} if isinstance(value, Mapping) else value
        clock, now = self.result["wall_seconds"], time.perf_counter()
        clock["total"] = now - self._start
        if self._running is not None:
            stage, since = self._running
            clock["stages"][stage] = now - since
        write_json(self.path, self.result)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `wall_seconds.stages`, also when it is left by an exception."""
        earlier = self.result["wall_seconds"]["stages"].get(name, 0.0)
        self._running = name, time.perf_counter() - earlier
        try:
            yield
        finally:
            self.update()
            self._running = None

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
        """Take over start and times of an earlier part of this run, if this directory holds its record."""
        if self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if earlier["config_hash"] == self.result["config_hash"]:
                self.result |= {key: earlier[key] for key in ("started", "wall_seconds")}


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
