"""The papers' own points, from published.csv: values as printed, each under the convention of its paper.

published.csv has a line per point: method, paper, figure_or_table, task (as in conf/task), model, metric, value,
flops_value, flops_unit_or_convention, note. Values are × 100; flops_value is empty for a dense model whose FLOPs the
paper does not give.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokprune_exp.curves.axes import METRIC_NAMES, PERCENT

FILE = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class PublishedPoint:
    """One point of a figure or table."""

    method: str
    paper: str
    figure_or_table: str
    task: str
    model: str
    metric: str
    value: float
    printed: str
    """The value with the decimals of the paper."""
    flops_value: float | None
    unit: str
    note: str

    @property
    def is_dense(self) -> bool:
        """Whether this is an unpruned model."""
        return self.method.startswith("dense")


@dataclass(frozen=True)
class Panel:
    """The points of one paper on one task under one convention: what may stand on common axes."""

    paper: str
    unit: str
    points: list[PublishedPoint]

    @property
    def title(self) -> str:
        """Paper, models and where the points stand in it."""
        models = ", ".join(dict.fromkeys(point.model for point in self.points if point.model != "not stated"))
        places = ", ".join(dict.fromkeys(point.figure_or_table for point in self.points))
        return f"{self.paper}{f' ({models})' if models else ''}, {places}"

    @property
    def metric_label(self) -> str:
        """The metric's name and unit, where the paper's metric is known."""
        metric = self.points[0].metric
        if metric not in METRIC_NAMES:
            return "The paper's metric, × 100"
        return f"{METRIC_NAMES[metric]}, {'%' if metric in PERCENT else '× 100'}"

    @property
    def methods(self) -> list[str]:
        """Pruned methods in the order of the file."""
        return list(dict.fromkeys(point.method for point in self.points if not point.is_dense))

    @property
    def placed(self) -> list[PublishedPoint]:
        """The points whose FLOPs are known."""
        return [point for point in self.points if point.flops_value is not None]

    def of(self, method: str) -> list[PublishedPoint]:
        """The points of one method, by FLOPs; those without are left out."""
        placed = [(point.flops_value, point) for point in self.points if point.method == method]
        return [point for value, point in sorted(placed, key=lambda pair: pair[0] or 0.0) if value is not None]


def published_panels(task: str, file: Path = FILE) -> list[Panel]:
    """The panels of one task, in the order of the file; those that show no pruned model are left out."""
    grouped: dict[tuple[str, str], list[PublishedPoint]] = {}
    for point in read_published(file):
        if point.task == task:
            grouped.setdefault((point.paper, point.unit), []).append(point)
    panels = [Panel(paper, unit, points) for (paper, unit), points in grouped.items()]
    return [panel for panel in panels if panel.methods]


def read_published(file: Path = FILE) -> Iterator[PublishedPoint]:
    """Every point of the file."""
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield PublishedPoint(
                method=row["method"],
                paper=row["paper"],
                figure_or_table=row["figure_or_table"],
                task=row["task"],
                model=row["model"],
                metric=row["metric"],
                value=float(row["value"]),
                printed=row["value"],
                flops_value=float(row["flops_value"]) if row["flops_value"] else None,
                unit=row["flops_unit_or_convention"],
                note=row["note"],
            )
