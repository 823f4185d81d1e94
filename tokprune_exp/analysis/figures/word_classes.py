"""Which classes of words stay, with intervals and beside pruning at random; the numbers are those of retention.csv."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokprune_exp.analysis.figures.canvas import KEPT, RANDOM, WRONG, caption, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.analysis.units import LAST_READ
from tokprune_exp.errors import UserError

KINDS = ("flag", "pos")
FEWEST = 20
"""Words; smaller classes are in retention.csv only."""


def of_words(retention: pd.DataFrame, kinds: tuple[str, ...] = KINDS, group: str = "all") -> pd.DataFrame:
    """The rows of retention.csv that are about words of some kinds of classes.

    Raises:
        UserError: there are none.
    """
    chosen = retention["unit"].eq("word") & retention["group"].eq(group) & retention["kind"].isin(kinds)
    if not chosen.any():
        raise UserError(f"retention.csv has no rows about {' or '.join(kinds)}")
    return retention[chosen]


def last_read(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows about what the last layer read, kind by kind, the best kept classes first; no class of few words."""
    rows = rows[(rows["layer"].astype(str) == LAST_READ) & (rows["total"] >= FEWEST)]
    return rows.sort_values(["kind", "retention"], ascending=[True, False], ignore_index=True)


def draw_retention(axes: Any, rows: pd.DataFrame, overall: float) -> None:
    """Share of each class that is kept, with its interval, beside the share when pruning is random."""
    places = _places(axes, rows)
    _points(axes, 100 * rows["retention"], 100 * rows["retention_low"], 100 * rows["retention_high"], places, "model")
    axes.plot(100 * rows["random_retention"], places, "|", color=RANDOM, markersize=7, label="pruned at random")
    name = f"all words: {100 * overall:.1f} %"
    axes.axvline(100 * overall, color="#404040", linewidth=0.7, linestyle="--", label=name)
    axes.set_xlabel("words kept, % of the class")
    axes.set_xlim(left=0)


def draw_lift(axes: Any, rows: pd.DataFrame) -> None:
    """How many times as often as all words, and as when pruned at random, a class is kept; with intervals."""
    places = _places(axes, rows)
    _points(axes, rows["lift"], rows["lift_low"], rows["lift_high"], places - 0.17, "over all words")
    ends = rows["over_random_low"], rows["over_random_high"]
    _points(axes, rows["over_random"], *ends, places + 0.17, "over random pruning", WRONG, "s")
    axes.axvline(1, color="#404040", linewidth=0.7, linestyle="--")
    axes.set_xlabel("kept, times as often (1: no difference)")
    axes.set_xlim(left=0)


def draw_layers(axes: Any, rows: pd.DataFrame) -> Any:
    """Retention per class and layer as a heat map with the percentages in it; returns the image."""
    order, rows = last_read(rows), rows.astype({"layer": str})
    stages = list(dict.fromkeys(rows["layer"]))
    table = rows.pivot(index=["kind", "class"], columns="layer", values="retention")
    values = 100 * table.loc[list(zip(order["kind"], order["class"], strict=True)), stages].to_numpy()
    image = axes.imshow(values, aspect="auto", cmap="YlGnBu", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value > 55 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
    axes.set_xticks(range(len(stages)), ["read\nby last" if stage == LAST_READ else stage for stage in stages])
    axes.set_yticks(range(len(order)), order["class"])
    axes.tick_params(length=0, labelsize=6)
    axes.set_xlabel("behind layer")
    _line_between_kinds(axes, order, "white", 2.5)
    axes.grid(visible=False)
    return image


def retention_figure(tables: Tables, file: Path) -> None:
    """Retention per word class.

    Raises:
        UserError: retention.csv is not there.
    """
    retention = tables.csv("retention.csv")
    rows, overall = last_read(of_words(retention)), last_read(of_words(retention, ("all",)))["retention"].iloc[0]
    with sheet(file, 0.9 + 0.125 * len(rows)) as figure:
        axes = figure.add_subplot()
        draw_retention(axes, rows, overall)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        caption(figure, f"{CAPTION} Bars: 95 % intervals over the texts.")


def lift_figure(tables: Tables, file: Path) -> None:
    """Lift per word class.

    Raises:
        UserError: retention.csv is not there.
    """
    rows = last_read(of_words(tables.csv("retention.csv")))
    with sheet(file, 0.9 + 0.145 * len(rows)) as figure:
        axes = figure.add_subplot()
        draw_lift(axes, rows)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        caption(figure, f"{CAPTION} Bars: 95 % intervals over the texts.")


def layers_figure(tables: Tables, file: Path) -> None:
    """Retention per word class and layer.

    Raises:
        UserError: retention.csv is not there.
    """
    rows = of_words(tables.csv("retention.csv"))
    classes = len(last_read(rows))
    with sheet(file, 0.7 + 0.13 * classes) as figure:
        axes = figure.add_subplot()
        bar = figure.colorbar(draw_layers(axes, rows), ax=axes, pad=0.02, aspect=30)
        bar.set_label("words kept, % of the class", fontsize=6.5)
        bar.ax.tick_params(labelsize=6)
        caption(figure, "A word is kept if a piece of it is; mean: over the layers' own shares.")


CAPTION = (
    "A word is kept if the last layer reads a piece of it. "
    f"In brackets: words of the class; classes of fewer than {FEWEST} are not shown."
)


def _places(axes: Any, rows: pd.DataFrame) -> np.ndarray:
    """Label the y axis with the classes and their sizes, best kept on top, a line between the kinds."""
    places = np.arange(len(rows), dtype=float)
    axes.set_yticks(places, [f"{name} ({total:,})" for name, total in zip(rows["class"], rows["total"], strict=True)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    axes.grid(visible=False, axis="y")
    _line_between_kinds(axes, rows, "#BBBBBB", 0.6)
    return places


def _line_between_kinds(axes: Any, rows: pd.DataFrame, colour: str, width: float) -> None:
    kinds = rows["kind"].to_numpy()
    for place in np.flatnonzero(kinds[1:] != kinds[:-1]):
        axes.axhline(place + 0.5, color=colour, linewidth=width)


def _points(
    axes: Any,
    values: pd.Series,
    low: pd.Series,
    high: pd.Series,
    places: np.ndarray,
    name: str,
    colour: str = KEPT,
    marker: str = "o",
) -> None:
    """Points with intervals."""
    reach = np.clip([values - low, high - values], 0, None)
    axes.errorbar(values, places, xerr=reach, fmt=marker, color=colour, markersize=2.8, elinewidth=0.8, label=name)
