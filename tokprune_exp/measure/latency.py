"""Wall-clock time of variants that are measured side by side.

Only ratios of variants of one measurement mean anything: clocks, neighbours and caches move absolute times by more
than the differences that are looked for. So the variants take turns within every round, in alternating order, and a
speed-up is the median over rounds of the ratio within a round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokprune_exp.data.batch import Batch

Forward = Callable[[Batch], Any]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two variants: the median over rounds of the ratio within a round, and its quartiles."""

    median: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Ratio":
        """Summarise one ratio per round."""
        return cls(statistics.median(ratios), _quartiles(ratios))


@dataclass
class Timing:
    """The seconds of one variant, one entry per round."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile over rounds, in seconds: the spread."""
        return _quartiles(self.seconds)

    def over(self, other: "Timing") -> Ratio:
        """Divide these seconds by those of another variant, round by round."""
        return Ratio.of([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


def interleaved_medians(
    callables: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    after_each: Callable[[], Any] = lambda: None,
) -> dict[str, Timing]:
    """Seconds of each variant in each round, the variants taking turns, every second round in reversed order.

    A GPU that is in use is waited for before and after each call. `after_each` is called, untimed, after every call.

    Raises:
        ValueError: without a round to measure.
    """
    if rounds < 1:
        raise ValueError(f"measure.latency_rounds is {rounds}; it must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for round_ in range(-warmup, rounds):
        order = list(callables) if round_ % 2 == 0 else list(callables)[::-1]
        for name in order:
            took = _timed(callables[name])
            if round_ >= 0:
                seconds[name].append(took)
            after_each()
    return {name: Timing(each) for name, each in seconds.items()}


def length_sorted_chunks(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of full batches of neighbours in length, so that hardly anything is padded; rows left over are left out."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    full = len(lengths) - len(lengths) % batch_size
    return [by_length[start : start + batch_size] for start in range(0, full, batch_size)]


def compare_latency(
    pruned: Forward,
    dense: Forward,
    batches_by_size: Mapping[int, Sequence[Batch]],
    rounds: int,
    warmup: int = 1,
    plan: Forward | None = None,
) -> list[dict[str, Any]]:
    """Speed-up of the pruned over the unpruned forward at each batch size, one row per size.

    `*_ms` is the median time of one batch, `speedup` the median over rounds of dense / pruned within the round, with
    `speedup_quartiles` as its spread. `plan_ms`, where there is a `plan`, is the time of making it: a part of
    `pruned_ms`, measured once more on its own.

    Raises:
        ValueError: for a batch size without batches.
    """
    variants = {"dense": dense, "pruned": pruned} | ({} if plan is None else {"plan": plan})
    return [_compare(variants, size, batches, rounds, warmup) for size, batches in batches_by_size.items()]


@torch.inference_mode()
def _compare(
    variants: Mapping[str, Forward], size: int, batches: Sequence[Batch], rounds: int, warmup: int
) -> dict[str, Any]:
    """The row of one batch size."""
    if not batches:
        raise ValueError(f"measure.latency_batch_sizes has {size}, but the split holds no full batch of that size")

    def over_all_batches(forward: Forward) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                forward(batch)

        return run

    timings = interleaved_medians({name: over_all_batches(each) for name, each in variants.items()}, rounds, warmup)
    row: dict[str, Any] = {"batch_size": size, "batches": len(batches), "rounds": rounds}
    row |= {f"{name}_ms": 1e3 * timing.median_s / len(batches) for name, timing in timings.items()}
    row |= _speedup("speedup", timings["dense"], timings["pruned"])
    device = torch.cuda.get_device_name() if _gpu_is_used() else "cpu"
    return row | {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _speedup(name: str, slow: Timing, fast: Timing) -> dict[str, Any]:
    """Median and quartiles over rounds of the ratio within a round."""
    ratio = slow.over(fast)
    return {name: ratio.median, f"{name}_quartiles": list(ratio.quartiles)}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, both the value itself where there is only one."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _timed(call: Callable[[], Any]) -> float:
    """Seconds that one call takes, the GPU's work included."""
    _wait_for_gpu()
    start = time.perf_counter()
    call()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    """Return when the GPU, if this process uses one, has done everything it was given."""
    if _gpu_is_used():
        torch.cuda.synchronize()


def _gpu_is_used() -> bool:
    """Whether this process has put anything on a GPU."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()
