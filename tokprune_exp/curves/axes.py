"""What a point costs, convention by convention, or how it was set, and the units in which metrics are shown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokprune_exp.curves.read import Run
from tokprune_exp.errors import UserError

PERCENT = ("accuracy", "f1", "accuracy_f1", "exact_match")
"""Metrics that are fractions and shown in percent; the others are correlations and shown as they are."""
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "accuracy_f1": "Mean of accuracy and F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "pearson_spearman": "Mean of Pearson and Spearman",
}
SPEEDUP = "speedup@"


@dataclass(frozen=True)
class Axis:
    """One way to say what a pruned model costs, or a setting that it was trained with."""

    key: str
    label: str
    """Of the axis, with its unit."""
    note: str
    """What is counted: the caption says it."""
    of: Callable[[Run], float | None]
    of_dense: Callable[[Run], float | None]
    """The same for the unpruned student."""
    larger_is_cheaper: bool = False
    is_cost: bool = True
    """Whether accuracy is paid with it, so that there is a Pareto front; with a setting it is not."""

    @property
    def sign(self) -> int:
        """Factor that turns a value into one of which less is cheaper."""
        return -1 if self.larger_is_cheaper else 1


def percent_of_reduction(run: Run) -> float | None:
    """Share of the unpruned FLOPs, in percent, from the reduction."""
    reduction = run.flops.get("reduction_unpadded")
    return 100 / reduction if reduction else None


def percent_kept(run: Run) -> float | None:
    """Share of the real tokens, in percent."""
    retention = run.flops.get("retention_mean")
    return None if retention is None else 100 * retention


def pad_inflation(run: Run) -> float | None:
    """How much more the unpruned encoder costs when it is padded to the published length."""
    dense, padded = run.flops.get("gflops_dense"), run.flops.get("gflops_dense_padded")
    return padded / dense if dense and padded is not None else None


AXES = (
    Axis(
        "flops_share",
        "FLOPs, % of the unpruned encoder (unpadded)",
        "FLOPs: matrix products of encoder and pruner, unpadded, against the unpruned encoder at the same lengths",
        percent_of_reduction,
        lambda run: 100.0,
    ),
    Axis(
        "gflops_per_example",
        "GFLOPs per example (unpadded)",
        "FLOPs: matrix products of encoder and pruner, unpadded, 2 per multiply-add",
        lambda run: run.flops.get("gflops_per_example"),
        lambda run: run.flops.get("gflops_dense"),
    ),
    Axis(
        "reduction_unpadded",
        "FLOPs reduction, × (unpadded)",
        "Reduction: unpruned encoder at the same unpadded lengths / encoder and pruner",
        lambda run: run.flops.get("reduction_unpadded"),
        lambda run: 1.0,
        larger_is_cheaper=True,
    ),
    Axis(
        "reduction_padded",
        "FLOPs reduction, × (padded baseline)",
        "Reduction: unpruned encoder padded to the published length / encoder and pruner unpadded; padding is in it",
        lambda run: run.flops.get("reduction_padded"),
        pad_inflation,
        larger_is_cheaper=True,
    ),
    Axis(
        "reduction_ltp_convention",
        "FLOPs reduction, × (LTP's convention)",
        "Reduction as LTP counts: unpadded, the output projection charged for all queries, the pruner free",
        lambda run: run.flops.get("reduction_ltp_convention"),
        lambda run: 1.0,
        larger_is_cheaper=True,
    ),
    Axis(
        "retention",
        "Retained tokens, % of the real ones (mean over layers)",
        "Retention: share of the real tokens that leaves a layer, mean over layers and examples",
        percent_kept,
        lambda run: 100.0,
    ),
)


def speedup_axis(batch_size: int) -> Axis:
    """The measured speed-up at one batch size."""
    return Axis(
        f"{SPEEDUP}{batch_size}",
        f"Measured speed-up at batch size {batch_size}, ×",
        "Speed-up: wall-clock, gathered, over the unpruned encoder in the same code and run",
        lambda run: run.speedups.get(batch_size),
        lambda run: 1.0,
        larger_is_cheaper=True,
    )


def setting_axis(key: str) -> Axis:
    """A setting whose values are numbers, such as loss.alpha."""

    def value(run: Run) -> float | None:
        try:
            number = float(run.settings.get(key, ""))
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    return Axis(key, key, f"Points by {key}", value, lambda run: None, is_cost=False)


def axis_named(key: str, runs: Sequence[Run] = ()) -> Axis:
    """The axis of `--x KEY`: a cost, or a setting that some of the runs have.

    Raises:
        UserError: there is none of this name.
    """
    if key.startswith(SPEEDUP) and key.removeprefix(SPEEDUP).isdecimal():
        return speedup_axis(int(key.removeprefix(SPEEDUP)))
    for axis in AXES:
        if axis.key == key:
            return axis
    if any(key in run.settings for run in runs):
        return setting_axis(key)
    names = ", ".join(axis.key for axis in AXES)
    raise UserError(
        f"--x {key}: there is no such axis; choose from {names}, {SPEEDUP}N with a batch size N, or a setting that "
        f"these runs vary, such as budget or loss.alpha"
    )


def all_axes(runs: Sequence[Run]) -> list[Axis]:
    """Every axis that the runs hold values for."""
    return [*AXES, *(speedup_axis(size) for size in sorted({size for run in runs for size in run.speedups}))]


def metric_scale(metric: str) -> float:
    """What a value in result.json is multiplied by to be shown."""
    return 100.0 if metric in PERCENT else 1.0


def metric_unit(metric: str) -> str:
    """The unit that a metric is shown in; a correlation has none."""
    return "%" if metric in PERCENT else ""


def metric_label(metric: str) -> str:
    """A metric's name with its unit, for an axis."""
    name, unit = METRIC_NAMES.get(metric, metric), metric_unit(metric)
    return f"{name}, {unit}" if unit else name
