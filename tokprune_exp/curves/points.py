"""Runs → curves: one point per operating point, its seeds averaged, and who is on the Pareto front."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokprune_exp.curves.axes import Axis, all_axes, metric_scale
from tokprune_exp.curves.read import LeftOut, Run

VARIANT_KEYS = ("scorer", "retainer")


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for one value), least and greatest of n values."""

    mean: float
    std: float | None
    least: float
    greatest: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, min(values), max(values), len(values))


@dataclass
class Point:
    """One operating point of a curve: all seeds of one choice of settings."""

    settings: dict[str, str]
    seeds: list[int]
    metric: Spread
    """In the unit that is shown."""
    unpruned: Spread | None
    costs: dict[str, Spread]
    """Axis → what the point costs; an axis that some seed has no value for is left out."""
    examples: int | None
    """Evaluated examples."""
    on_front: bool = False
    """Of the task."""
    on_method_front: bool = False


@dataclass
class Curve:
    """The points of one method in one variant on one backbone, cheapest first."""

    method: str
    backbone: str
    variant: dict[str, str]
    """Scorer, retainer and the keys of `--by`."""
    label: str = ""
    points: list[Point] = field(default_factory=list)

    @property
    def shown_settings(self) -> list[str]:
        """Settings that tell the points apart; where none does, those that say how strongly the method prunes."""
        keys = sorted({key for point in self.points for key in point.settings})
        differing = [key for key in keys if len({point.settings.get(key) for point in self.points}) > 1]
        return differing or [key for key in keys if key == "budget" or key.startswith("retainer.")]


@dataclass
class Reference:
    """The dense models that the curves are compared with."""

    label: str
    size: float
    """FLOPs of the dense model / those of the unpruned student: 1 unless a larger teacher was used."""
    metric: Spread
    """Over distinct dense models."""
    costs: dict[str, float]


@dataclass
class TaskCurves:
    """Everything that is drawn for one task."""

    task: str
    metric: str
    axis: Axis
    curves: list[Curve]
    references: list[Reference]
    clocks: list[str]
    """Machines that speed-ups were measured on."""

    @property
    def points(self) -> list[Point]:
        """The points of all curves."""
        return [point for curve in self.curves for point in curve.points]


def collect(
    runs: Sequence[Run], axis: Axis, metric: str | None = None, by: Sequence[str] = ()
) -> tuple[list[TaskCurves], list[LeftOut]]:
    """Make the curves of every task; `metric` None: the task's first. `by`: settings that make a curve of their own.

    Runs that have no such metric, no FLOPs, or repeat a seed are left out, as are tasks with nothing pruned.
    """
    left_out: list[LeftOut] = []
    of_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        of_task[run.task].append(run)
    tasks = []
    for task, its_runs in sorted(of_task.items()):
        name = metric or first_metric(its_runs)
        usable = []
        for run in its_runs:
            if why := unusable(run, name):
                left_out.append(LeftOut(run.path, why))
            else:
                usable.append(run)
        usable, repeated = without_repeats(usable, by)
        left_out += repeated
        if all(run.method == "finetune" for run in usable):
            left_out += [LeftOut(run.path, "a dense model, and no pruned result to compare with it") for run in usable]
        elif name:
            tasks.append(task_curves(task, name, usable, axis, by))
    return tasks, left_out


def first_metric(runs: Sequence[Run]) -> str | None:
    """The first metric of a task's record: the one that the task is summarised by."""
    return next((name for run in runs for values in run.metrics.values() for name in values), None)


def unusable(run: Run, metric: str | None) -> str | None:
    """Why a completed run gives no point and no reference; None if it gives one."""
    model = "dense" if run.method == "finetune" else "pruned"
    values = run.metrics.get(model, {})
    if metric not in values:
        return f"completed, but without metrics.{model}.{metric}; it has {', '.join(values) or 'none'}"
    if not run.flops.get("reduction_unpadded"):
        return "completed, but without flops.reduction_unpadded"
    return None


def without_repeats(runs: Sequence[Run], by: Sequence[str]) -> tuple[list[Run], list[LeftOut]]:
    """The runs without those whose operating point and seed another one has as well; the one finished last stays."""
    latest: dict[tuple[object, ...], Run] = {}
    left_out = []
    for run in sorted(runs, key=lambda run: run.finished):
        key = (*curve_key(run, by), tuple(run.settings.items()), run.seed)
        if key in latest:
            left_out.append(
                LeftOut(latest[key].path, f"the same seed and settings as the later {run.path.parent.name}")
            )
        latest[key] = run
    return list(latest.values()), left_out


def curve_key(run: Run, by: Sequence[str]) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """What the runs of one curve have in common."""
    variant = {"scorer": run.scorer, "retainer": run.retainer} | {key: run.settings.get(key) for key in by}
    return run.method, run.backbone, tuple((key, value) for key, value in variant.items() if value is not None)


def task_curves(task: str, metric: str, runs: Sequence[Run], axis: Axis, by: Sequence[str]) -> TaskCurves:
    """Group the runs of one task, average, label, and mark the fronts."""
    grouped: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[Run]] = defaultdict(list)
    for run in runs:
        if run.method != "finetune":
            grouped[curve_key(run, by)].append(run)
    axes = [*all_axes(runs), *([] if axis.is_cost else [axis])]
    curves = [
        Curve(method, backbone, dict(variant), points=points_of(its_runs, metric, axes, axis, by))
        for (method, backbone, variant), its_runs in sorted(grouped.items())
    ]
    label(curves)
    if axis.is_cost:
        mark_fronts(curves, axis)
    clocks = sorted({run.clock for run in runs if run.speedups and run.clock})
    return TaskCurves(task, metric, axis, curves, references(runs, metric, axes), clocks)


def points_of(runs: Sequence[Run], metric: str, axes: Iterable[Axis], axis: Axis, by: Sequence[str]) -> list[Point]:
    """One point for each choice of settings, cheapest first; points without a cost last."""
    grouped: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for run in runs:
        grouped[tuple((key, value) for key, value in run.settings.items() if key not in by)].append(run)
    points = []
    for settings, group in grouped.items():
        group.sort(key=lambda run: run.seed)
        scale = metric_scale(metric)
        unpruned = [
            scale * run.metrics["unpruned"][metric] for run in group if metric in run.metrics.get("unpruned", {})
        ]
        examples = {run.flops.get("examples") for run in group}
        known = examples.pop() if len(examples) == 1 else None
        points.append(
            Point(
                settings=dict(settings),
                seeds=[run.seed for run in group],
                metric=Spread.of([scale * run.metrics["pruned"][metric] for run in group]),
                unpruned=Spread.of(unpruned) if len(unpruned) == len(group) else None,
                costs=costs_of(group, axes),
                examples=None if known is None else int(known),
            )
        )
    return sorted_by_cost(points, axis)


def sorted_by_cost(points: Iterable[Point], axis: Axis) -> list[Point]:
    """Cheapest first; points without a cost last."""
    return sorted(
        points, key=lambda point: axis.sign * point.costs[axis.key].mean if axis.key in point.costs else math.inf
    )


def costs_of(runs: Sequence[Run], axes: Iterable[Axis]) -> dict[str, Spread]:
    """What some seeds of one point cost on every axis that each of them has a value for."""
    costs = {}
    for axis in axes:
        values = [value for run in runs if (value := axis.of(run)) is not None]
        if len(values) == len(runs):
            costs[axis.key] = Spread.of(values)
    return costs


def label(curves: Sequence[Curve]) -> None:
    """Name each curve by its method and by what differs from other curves: of the method, and between backbones."""
    several_backbones = len({curve.backbone for curve in curves}) > 1
    for curve in curves:
        siblings = [other for other in curves if other.method == curve.method]
        keys = dict.fromkeys(key for other in siblings for key in other.variant)
        differing = [key for key in keys if len({other.variant.get(key) for other in siblings}) > 1]
        words = [
            value if key in VARIANT_KEYS else f"{key}={value}"
            for key in differing
            if (value := curve.variant.get(key)) is not None
        ]
        curve.label = " · ".join([curve.method, *words, *([curve.backbone] if several_backbones else [])])


def mark_fronts(curves: Sequence[Curve], axis: Axis) -> None:
    """Mark the points that no other point of the task, and of their method, is as cheap and better than."""
    every = [point for curve in curves for point in curve.points]
    for point, is_on in zip(every, pareto_front(every, axis), strict=True):
        point.on_front = is_on
    for method in {curve.method for curve in curves}:
        of_method = [point for curve in curves if curve.method == method for point in curve.points]
        for point, is_on in zip(of_method, pareto_front(of_method, axis), strict=True):
            point.on_method_front = is_on


def pareto_front(points: Sequence[Point], axis: Axis) -> list[bool]:
    """For each point: whether no other one costs at most as much and is at least as good, one of them strictly.

    A point without a cost is on no front; two equal points are both on it.
    """
    placed = [
        (axis.sign * point.costs[axis.key].mean, point.metric.mean) if axis.key in point.costs else None
        for point in points
    ]
    others = [each for each in placed if each is not None]
    return [
        one is not None
        and not any(cost <= one[0] and value >= one[1] and (cost, value) != one for cost, value in others)
        for one in placed
    ]


def staircase(points: Iterable[Point], axis: Axis) -> tuple[list[float], list[float]]:
    """Corners of the step line through the points of a front: what the money buys, from the cheapest on."""
    corners = sorted({(axis.sign * point.costs[axis.key].mean, point.metric.mean) for point in points})
    xs, ys = [], []
    for number, (cost, value) in enumerate(corners):
        if number:
            xs.append(axis.sign * cost)
            ys.append(corners[number - 1][1])
        xs.append(axis.sign * cost)
        ys.append(value)
    return xs, ys


def references(runs: Sequence[Run], metric: str, axes: Iterable[Axis]) -> list[Reference]:
    """The dense models of the runs: one reference per backbone and size of the dense model beside the student."""
    grouped: dict[tuple[str, float], list[Run]] = defaultdict(list)
    for run in runs:
        if metric in run.metrics.get("dense", {}):
            dense, teacher = run.flops.get("gflops_dense"), run.flops.get("gflops_teacher")
            size = round(teacher / dense, 2) if dense and teacher else 1.0
            grouped[run.backbone, size].append(run)
    several_backbones = len({backbone for backbone, _ in grouped}) > 1
    found = []
    for (backbone, size), group in sorted(grouped.items()):
        words = "dense" if size == 1 else f"dense teacher of {size:g}× the FLOPs"
        scores = sorted({round(metric_scale(metric) * run.metrics["dense"][metric], 9) for run in group})
        found.append(
            Reference(
                label=f"{words} ({backbone})" if several_backbones else words,
                size=size,
                metric=Spread.of(scores),
                costs=dense_costs(group, axes, size),
            )
        )
    return found


def dense_costs(runs: Sequence[Run], axes: Iterable[Axis], size: float) -> dict[str, float]:
    """What a dense model of `size` times the student costs; its tokens and its time are known for size 1 only."""
    costs = {}
    for axis in axes:
        values = [value for run in runs if (value := axis.of_dense(run)) is not None]
        is_flops = "flops" in axis.key or "reduction" in axis.key
        if values and (is_flops or size == 1):
            costs[axis.key] = statistics.fmean(values) * size**axis.sign
    return costs
