"""How the sequences get shorter from layer to layer, and whether the wrongly answered ones do it otherwise."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from tokprune_exp.analysis.figures.canvas import RIGHT, WRONG, caption, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.errors import UserError

BINS, PANELS = 30, 8
SIDES = (("correct", True, RIGHT), ("incorrect", False, WRONG))


def draw_trajectories(axes: Any, kept: np.ndarray, correct: np.ndarray) -> None:
    """Mean tokens behind each layer, with the middle 80 % of the examples; `kept`: examples × (layers + 1)."""
    layers = np.arange(kept.shape[1])
    for name, side, colour in SIDES:
        chosen = kept[correct == side]
        if not len(chosen):
            continue
        low, high = np.quantile(chosen, [0.1, 0.9], axis=0)
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(layers, chosen.mean(0), "o-", color=colour, markersize=3, label=f"{name} (n = {len(chosen):,})")
    axes.set_xticks(layers, ["input", *map(str, layers[1:])])
    axes.set_xlabel("behind layer")
    axes.set_ylabel("tokens")
    axes.set_ylim(bottom=0)


def draw_histogram(axes: Any, counts: np.ndarray, correct: np.ndarray, title: str) -> None:
    """Share of the correctly and of the incorrectly answered examples by their number of tokens at one place."""
    low, high = counts.min(), counts.max()
    step = max(1, int(np.ceil((high - low + 1) / BINS)))
    edges = np.arange(low, high + step + 0.5, step) - 0.5
    for name, side, colour in SIDES:
        chosen = counts[correct == side]
        if len(chosen):
            shares = 100 * np.histogram(chosen, edges)[0] / len(chosen)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(shares, edges, color=colour, linewidth=1, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_title(title)


def trajectories_figure(tables: Tables, file: Path) -> None:
    """Tokens behind every layer, of the correctly and of the incorrectly answered examples.

    Raises:
        UserError: answers cannot be right or wrong, or there is no examples.parquet.
    """
    correct = correctness(tables)
    with sheet(file, 2.3) as figure:
        axes = figure.add_subplot()
        draw_trajectories(axes, tables.kept_per_layer, correct)
        axes.legend(frameon=False)
        caption(figure, "Lines: mean over the examples. Bands: the middle 80 % of them. Special tokens are counted.")


def histograms_figure(tables: Tables, file: Path) -> None:
    """Histograms of the tokens at the input and behind the layers, correct against incorrect.

    Raises:
        UserError: see `trajectories_figure`.
    """
    correct, kept = correctness(tables), tables.kept_per_layer
    drops = (kept[:, 1:] != kept[:, :-1]).any(0) & (kept[:, 1:] != kept[:1, 1:]).any(0)
    layers = [0, *(np.flatnonzero(drops) + 1).tolist()]
    layers = layers[:: -(-len(layers) // PANELS)]
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    with sheet(file, 0.45 + 1.25 * rows) as figure:
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, layer in zip(places, layers, strict=False):
            draw_histogram(axes, kept[:, layer], correct, f"behind layer {layer}" if layer else "input")
        for axes in places[len(layers) :]:
            axes.set_axis_off()
        figure.supylabel("share of the examples, %", fontsize=7.5)
        handles = places[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
        caption(
            figure,
            "x: tokens of the sequence, special ones included. No panel: layers that drop nothing.",
        )


def correctness(tables: Tables) -> np.ndarray:
    """Which examples were answered correctly.

    Raises:
        UserError: the task has scores, so that no answer is right or wrong.
    """
    correct = tables.examples["correct"]
    if correct.isna().any():
        raise UserError("the task has scores, so that no answer is right or wrong")
    return correct.to_numpy(bool)
