"""The points as curves.csv, one tidy line each, and as the table on the screen."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tokprune_exp.curves.axes import METRIC_NAMES, metric_unit
from tokprune_exp.curves.points import Curve, Point, Spread, TaskCurves
from tokprune_exp.curves.style import settings_text, with_deviation

DENSE = "dense"


def rows(tasks: Iterable[TaskCurves]) -> list[dict[str, Any]]:
    """One flat row per operating point, and one per dense reference (method: dense)."""
    found = []
    for task in tasks:
        for reference in task.references:
            found.append(
                {
                    "task": task.task,
                    "method": DENSE,
                    "curve": reference.label,
                    **spread_columns("metric", reference.metric, task.metric),
                    **{f"{column(key)}_mean": value for key, value in reference.costs.items()},
                }
            )
        found += [point_row(task, curve, point) for curve in task.curves for point in curve.points]
    return found


def point_row(task: TaskCurves, curve: Curve, point: Point) -> dict[str, Any]:
    """One operating point; metrics in the unit of `metric_unit`, costs as mean and deviation over seeds."""
    row: dict[str, Any] = {
        "task": task.task,
        "method": curve.method,
        "curve": curve.label,
        "scorer": curve.variant.get("scorer"),
        "retainer": curve.variant.get("retainer"),
        "backbone": curve.backbone,
        "settings": settings_text(point.settings, list(point.settings)),
        "seeds": " ".join(map(str, point.seeds)),
        **spread_columns("metric", point.metric, task.metric),
        "unpruned_mean": point.unpruned and point.unpruned.mean,
        "examples": point.examples,
    }
    for key, cost in point.costs.items():
        row |= {f"{column(key)}_mean": cost.mean, f"{column(key)}_std": cost.std}
    return row | {
        "pareto_axis": task.axis.key,
        "pareto_task": int(point.on_front),
        "pareto_method": int(point.on_method_front),
    }


def column(axis: str) -> str:
    """Where a cost stands: shares say in their name that they are in percent."""
    return f"{axis}_percent" if axis in ("flops_share", "retention") else axis


def spread_columns(name: str, spread: Spread, metric: str) -> dict[str, Any]:
    """A metric's statistics over seeds."""
    return {
        name: metric,
        f"{name}_unit": metric_unit(metric),
        f"{name}_mean": spread.mean,
        f"{name}_std": spread.std,
        f"{name}_min": spread.least,
        f"{name}_max": spread.greatest,
        f"{name}_n": spread.n,
    }


def columns(table: Sequence[dict[str, Any]]) -> list[str]:
    """Every column, in the order of the fullest row; the Pareto flags last."""
    names = dict.fromkeys(key for row in sorted(table, key=len, reverse=True) for key in row)
    return [*(name for name in names if not name.startswith("pareto")), *(n for n in names if n.startswith("pareto"))]


def write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Write the rows; what a row does not have is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(table))
        writer.writeheader()
        writer.writerows(table)


def screen_table(task: TaskCurves) -> Table:
    """The points of one task, and its dense references below them; `*` is on the task's front, `+` on its method's."""
    unit = metric_unit(task.metric)
    digits = 1 if unit else 3
    name = METRIC_NAMES.get(task.metric, task.metric)
    table = Table(
        box=box.SIMPLE,
        title=Text(
            f"{task.task}: {name}{f', {unit}' if unit else ''}; "
            f"{'front along' if task.axis.is_cost else 'by'} {task.axis.key}"
        ),
        caption=Text(
            "n: seeds (dense: models)   FLOPs: % of the unpruned encoder, unpadded   ×: the inverse"
            + ("\n* on the Pareto front of the task   + on that of its method" if task.axis.is_cost else "")
        ),
    )
    table.add_column("curve", overflow="fold", min_width=16)
    table.add_column("settings", overflow="fold", min_width=18)
    costs = dict(SHOWN_COSTS)
    if task.axis.is_cost and task.axis.key not in costs:
        # the axis takes a column's place, so that the table stays as wide as it is
        costs = {key: text for key, text in costs.items() if key != "reduction_padded"} | {task.axis.key: ("--x", 2)}
    for heading in ("n", "metric", *(heading for heading, _ in costs.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for curve in task.curves:
        for point in curve.points:
            values = {key: cost.mean for key, cost in point.costs.items()}
            table.add_row(
                Text(curve.label),
                Text(settings_text(point.settings, curve.shown_settings) or "–"),
                str(len(point.seeds)),
                with_deviation(point.metric, digits),
                *cost_cells(values, costs),
                "*" if point.on_front else "+" if point.on_method_front else "",
            )
    table.add_section()
    for reference in task.references:
        cells = (Text(reference.label), "", str(reference.metric.n), with_deviation(reference.metric, digits))
        table.add_row(*cells, *cost_cells(reference.costs, costs), "")
    return table


SHOWN_COSTS = {
    "flops_share": ("FLOPs %", 1),
    "reduction_unpadded": ("×", 2),
    "reduction_padded": ("× padded", 2),
    "retention": ("kept %", 1),
}
"""Costs on the screen, with their headings and decimals."""


def cost_cells(values: Mapping[str, float], costs: Mapping[str, tuple[str, int]]) -> list[str]:
    """The costs as text; a dash where there is none."""
    return [f"{values[key]:.{decimals}f}" if key in values else "–" for key, (_, decimals) in costs.items()]
