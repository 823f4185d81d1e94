"""The thresholds that a model learned, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokprune_exp.analysis.figures.canvas import KEPT, caption, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.errors import UserError


def draw_thresholds(axes: Any, thresholds: Sequence[float | None]) -> None:
    """A bar per layer that has a threshold, with its value; the others stay empty."""
    known = [(layer, value) for layer, value in enumerate(thresholds, start=1) if value is not None]
    bars = axes.bar(*zip(*known, strict=True), color=KEPT, width=0.7)
    axes.bar_label(bars, fmt="%.2g", fontsize=6, padding=1)
    axes.set_xticks(range(1, len(thresholds) + 1))
    axes.set_xlim(0.4, len(thresholds) + 0.6)
    axes.margins(y=0.15)
    axes.set_xlabel("layer")
    axes.set_ylabel("threshold (importance)")
    axes.grid(visible=False, axis="x")


def thresholds_figure(tables: Tables, file: Path) -> None:
    """The thresholds of the model.

    Raises:
        UserError: it has none.
    """
    thresholds = tables.about["model"]["thresholds"]
    if not any(value is not None for value in thresholds):
        raise UserError("the model has no thresholds")
    with sheet(file, 1.9) as figure:
        draw_thresholds(figure.add_subplot(), thresholds)
        caption(figure, "A token goes on if its importance exceeds the threshold of the layer.")
