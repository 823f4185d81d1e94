"""Points of a curves.csv that was written before, drawn once more beside new ones: their runs may be gone.

A line of the table is a whole point, its seeds averaged already. Where new runs have the same point, theirs counts.
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tokprune_exp.curves.axes import Axis
from tokprune_exp.curves.points import (
    VARIANT_KEYS,
    Curve,
    Point,
    Reference,
    Spread,
    TaskCurves,
    label,
    mark_fronts,
    sorted_by_cost,
)
from tokprune_exp.curves.read import LeftOut, printable
from tokprune_exp.curves.style import settings_text
from tokprune_exp.curves.tables import DENSE, column
from tokprune_exp.errors import UserError

Row = Mapping[str, str]
NEEDED = ("task", "method", "curve", "backbone", "settings", "seeds", "metric", "metric_mean", "metric_n")
EARLIER_CLOCK = "the machine of an earlier table"


def read_tables(files: Sequence[Path]) -> list[tuple[Path, int, Row]]:
    """Read every line of some tables, with the file and the number of the line.

    Raises:
        UserError: a file cannot be read, or is no curves.csv.
    """
    lines: list[tuple[Path, int, Row]] = []
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                reader = csv.DictReader(opened)
                missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
                if missing:
                    raise UserError(f"{file} is no curves.csv: it has no column {', '.join(missing)}")
                lines += [(file, number, row) for number, row in enumerate(reader, start=2)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{file} cannot be read as a curves.csv: {why}") from error
    return lines


def with_earlier(
    tasks: Sequence[TaskCurves], lines: Sequence[tuple[Path, int, Row]], axis: Axis, metric: str | None = None
) -> tuple[list[TaskCurves], list[LeftOut]]:
    """Add the lines of earlier tables to the curves of new runs, label all, and mark the fronts anew."""
    found = {task.task: replace(task, curves=_copies(task.curves), references=[*task.references]) for task in tasks}
    left_out = []
    for file, number, row in lines:
        name = printable(row["task"])
        wanted = found[name].metric if name in found else metric or row["metric"]
        task = found.get(name) or TaskCurves(name, wanted, axis, [], [], [])
        try:
            if row["metric"] != wanted:
                raise ValueError(f"its metric is {row['metric']}, not {wanted}")
            _add(task, row)
        except ValueError as error:
            left_out.append(LeftOut(file, f"line {number}: {printable(str(error))}"))
            continue
        found[name] = task
    for task in found.values():
        for curve in task.curves:
            curve.points = sorted_by_cost(curve.points, axis)
        task.curves.sort(key=lambda curve: (curve.method, curve.backbone, tuple(curve.variant.items())))
        label(task.curves)
        if axis.is_cost:
            mark_fronts(task.curves, axis)
    return [task for _, task in sorted(found.items()) if task.curves], left_out


def _copies(curves: Sequence[Curve]) -> list[Curve]:
    return [replace(curve, points=[*curve.points]) for curve in curves]


def _add(task: TaskCurves, row: Row) -> None:
    """Put one line where it belongs.

    Raises:
        ValueError: a number is missing or none.
    """
    if row["method"] == DENSE:
        _add_reference(task, Reference(printable(row["curve"]), 1.0, _spread(row, "metric"), _means(_costs(row))))
        return
    variant = _variant(row)
    point = _point(row, task.axis)
    curve = next(
        (
            one
            for one in task.curves
            if (one.method, one.backbone, one.variant) == (row["method"], row["backbone"], variant)
        ),
        None,
    )
    if curve is None:
        curve = Curve(printable(row["method"]), printable(row["backbone"]), variant)
        task.curves.append(curve)
    if row["settings"] not in {settings_text(one.settings, list(one.settings)) for one in curve.points}:
        curve.points.append(point)
        if any(key.startswith("speedup@") for key in point.costs) and EARLIER_CLOCK not in task.clocks:
            task.clocks = [*task.clocks, EARLIER_CLOCK]


def _add_reference(task: TaskCurves, earlier: Reference) -> None:
    """Add a dense model; where new runs have another one of that name, both are the reference."""
    for place, known in enumerate(task.references):
        if known.label == earlier.label:
            is_same = math.isclose(known.metric.mean, earlier.metric.mean, abs_tol=1e-6)
            task.references[place] = known if is_same else replace(known, metric=_pooled(known.metric, earlier.metric))
            return
    task.references.append(earlier)


def _pooled(one: Spread, other: Spread) -> Spread:
    """The spread of the values behind two spreads."""
    n = one.n + other.n
    mean = (one.n * one.mean + other.n * other.mean) / n
    squares = sum((each.n - 1) * (each.std or 0) ** 2 + each.n * (each.mean - mean) ** 2 for each in (one, other))
    return Spread(mean, math.sqrt(squares / (n - 1)), min(one.least, other.least), max(one.greatest, other.greatest), n)


def _means(costs: Mapping[str, Spread]) -> dict[str, float]:
    return {key: cost.mean for key, cost in costs.items()}


def _variant(row: Row) -> dict[str, str]:
    """Scorer and retainer, and the keys that `--by` made curves of, which stand in the curve's label alone."""
    parts = {key: row[key] for key in VARIANT_KEYS if row.get(key)}
    parts |= dict(word.split("=", 1) for word in row["curve"].split(" · ") if "=" in word)
    return {printable(key): printable(value) for key, value in parts.items()}


def _point(row: Row, axis: Axis) -> Point:
    pairs = [one.split("=", 1) for one in re.split(r", (?=[~+\w.@/]+=)", row["settings"]) if "=" in one]
    settings = {printable(key): printable(value) for key, value in pairs}
    costs = _costs(row)
    if not axis.is_cost and _is_number(settings.get(axis.key)):
        costs[axis.key] = Spread.of([float(settings[axis.key])])
    return Point(
        settings=settings,
        seeds=[int(seed) for seed in row["seeds"].split()],
        metric=_spread(row, "metric"),
        unpruned=Spread.of([float(row["unpruned_mean"])]) if _is_number(row.get("unpruned_mean")) else None,
        costs=costs,
        examples=int(row["examples"]) if (row.get("examples") or "").isdecimal() else None,
    )


def _costs(row: Row) -> dict[str, Spread]:
    """What the point costs on every axis that the table has a mean for."""
    axes = [key.removesuffix("_mean") for key in row if key and key.endswith("_mean")]
    shown = {column(key): key for key in ("flops_share", "retention")}
    return {
        shown.get(name, name): _spread(row, name)
        for name in axes
        if name not in ("metric", "unpruned") and _is_number(row.get(f"{name}_mean"))
    }


def _spread(row: Row, name: str) -> Spread:
    """The statistics of some columns; least and greatest are the mean where the table does not say."""
    mean = _number(row, f"{name}_mean")
    deviation = _number(row, f"{name}_std") if row.get(f"{name}_std") else None
    least, greatest = (_number(row, f"{name}_{end}") if row.get(f"{name}_{end}") else mean for end in ("min", "max"))
    count = int(_number(row, "metric_n"))
    if count < 1:
        raise ValueError(f"metric_n={count} is no number of runs")
    return Spread(mean, deviation, least, greatest, count)


def _number(row: Row, key: str) -> float:
    if not _is_number(row.get(key)):
        raise ValueError(f"{key}={row.get(key)} is no number")
    return float(row[key])


def _is_number(value: str | None) -> bool:
    try:
        return value is not None and math.isfinite(float(value))
    except ValueError:
        return False
