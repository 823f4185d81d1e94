"""The picture for a paper: one column wide, readable in print, one PNG per task."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tokprune_exp.curves.axes import metric_label
from tokprune_exp.curves.points import Point, TaskCurves, staircase
from tokprune_exp.curves.published import Panel
from tokprune_exp.curves.style import (
    DENSE,
    FRONT,
    FRONT_LABEL,
    MARKERS,
    PALETTE,
    axis_label,
    caption,
    evenly_spaced,
    method_fronts,
    reference_label,
    styles,
)

COLUMN_INCHES = 3.4
DPI = 300
LOOK: Any = {
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 8,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#EBEBEB",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.0,
    "font.family": "sans-serif",
    "text.parse_math": False,
}
"""text.parse_math off: a $ in a name is a dollar."""


def write_figure(path: Path, task: TaskCurves, methods: Sequence[str], title: str) -> None:
    """Draw one task into a PNG."""
    with matplotlib.rc_context(LOOK):
        names = [
            *([FRONT_LABEL] if task.axis.is_cost else []),
            *(curve.label for curve in task.curves),
            *(r.label for r in task.references),
        ]
        words = textwrap.fill(caption(task), 80)
        height = 2.5 + 0.14 * -(-len(names) // legend_columns(names)) + 0.1 * (words.count("\n") + 1)
        figure = Figure(figsize=(COLUMN_INCHES, height), dpi=DPI, layout="constrained")
        place: Any = figure.subfigures()  # of its own, so that the legend in it and the caption below keep apart
        axes = place.add_subplot()
        draw_ours(axes, task, methods)
        axes.set_title(title)
        legend_below(place, axes)
        figure.supxlabel(words, fontsize=5.5, color="#555555", x=0.02, ha="left")
        figure.savefig(path)


def write_published_figure(
    path: Path, task: TaskCurves, panels: Sequence[Panel], methods: Sequence[str], title: str
) -> None:
    """Draw one task beside the papers' points: a panel, an axis and a legend for each paper and convention.

    Panels of one point say nothing without others beside it; they are on the page only.
    """
    panels = [panel for panel in panels if len(panel.placed) > 1]
    with matplotlib.rc_context(LOOK):
        rows = -(-(len(panels) + 1) // 2)
        figure = Figure(
            figsize=(2 * COLUMN_INCHES, 3.6 * rows), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08)
        )
        places = list(figure.subfigures(rows, 2, squeeze=False).flat)
        for place, panel in zip(places, [None, *panels], strict=False):
            axes = place.add_subplot()
            if panel is None:
                draw_ours(axes, task, methods)
                axes.set_title(f"Measured here: {title}")
            else:
                draw_panel(axes, panel)
                axes.set_title(textwrap.fill(panel.title, 58))
            legend_below(place, axes)
        words = f"{caption(task)} Papers: as printed, each under its own convention; axes are not comparable."
        figure.supxlabel(textwrap.fill(words, 165), fontsize=5.5, color="#555555", x=0.02, ha="left")
        figure.savefig(path)


def draw_ours(axes: Any, task: TaskCurves, methods: Sequence[str]) -> None:
    """Points with their spread over seeds, fronts as step lines, dense references as dashed lines.

    Against a setting there is no front: lines join the points of a curve.
    """
    axis, x = task.axis, task.axis.key
    its_styles = styles(task, methods)
    colour_of = {curve.label: style.colour for curve, style in zip(task.curves, its_styles, strict=True)}
    if axis.is_cost:
        front = [point for point in task.points if point.on_front]
        axes.plot(*staircase(front, axis), color=FRONT, linewidth=3.5, label=FRONT_LABEL, zorder=1)
        for curve, points in method_fronts(task):
            axes.plot(*staircase(points, axis), color=colour_of[curve.label], linewidth=0.8, zorder=2)
    spaced = evenly_spaced(task)

    def place(point: Point) -> float:
        return float(spaced.index(point.costs[x].mean)) if spaced else point.costs[x].mean

    if spaced:
        axes.set_xticks(range(len(spaced)), [f"{value:g}" for value in spaced])
    for curve, style in zip(task.curves, its_styles, strict=True):
        axes.plot([], [], style.marker, color=style.colour, markersize=4, label=curve.label)
        placed = [point for point in curve.points if x in point.costs]
        if not axis.is_cost:
            axes.plot([*map(place, placed)], [point.metric.mean for point in placed], color=style.colour, zorder=2)
        for point in placed:
            axes.errorbar(
                place(point),
                point.metric.mean,
                xerr=point.costs[x].std,
                yerr=point.metric.std,
                fmt=style.marker,
                color=style.colour,
                markerfacecolor=style.colour if point.on_method_front or not axis.is_cost else "white",
                markersize=4,
                elinewidth=0.8,
                capsize=1.5,
                zorder=3,
            )
    for number, reference in enumerate(task.references):
        dashes = (0, (4, 2 + 2 * number))
        axes.axhline(
            reference.metric.mean,
            color=DENSE,
            linewidth=0.8,
            linestyle=dashes,
            label=reference_label(reference, task.metric),
            zorder=1.5,
        )
        if x in reference.costs and reference.size == 1:  # a larger teacher would push the curves into a corner
            axes.plot(reference.costs[x], reference.metric.mean, "*", color=DENSE, markersize=6, zorder=2.5)
    axes.set_xlabel(axis_label(task))
    axes.set_ylabel(metric_label(task.metric))
    axes.margins(0.06)


def draw_panel(axes: Any, panel: Panel) -> None:
    """A paper's points under its own convention."""
    for number, method in enumerate(panel.methods):
        points = panel.of(method)
        axes.plot(
            [point.flops_value for point in points],
            [point.value for point in points],
            marker=MARKERS[number % len(MARKERS)][0],
            color=PALETTE[number % len(PALETTE)],
            linewidth=0.8 if len(points) > 1 else 0,
            markersize=3.5,
            label=method,
        )
    for number, dense in enumerate(point for point in panel.points if point.is_dense):
        dashes = (0, (4, 2 + 2 * number))
        axes.axhline(
            dense.value, color=DENSE, linewidth=0.8, linestyle=dashes, label=f"{dense.method}: {dense.printed}"
        )
        if dense.flops_value is not None:
            axes.plot(dense.flops_value, dense.value, "*", color=DENSE, markersize=6)
    axes.set_xlabel(textwrap.fill(panel.unit, 46))
    axes.set_ylabel(panel.metric_label)
    axes.margins(0.06)
    axes.set_xlim(0, 1.06 * max(point.flops_value or 0.0 for point in panel.points))


def legend_below(figure: Any, axes: Any) -> None:
    """A legend outside the axes, so that it hides no point."""
    handles, labels = axes.get_legend_handles_labels()
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=legend_columns(labels), frameon=False, handlelength=2.2)


def legend_columns(labels: Sequence[str]) -> int:
    """Two columns where their widest entries fit into the width of the picture."""
    return 2 if max(map(len, labels)) < 34 else 1
