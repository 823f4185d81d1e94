"""One sentence as a map: a column per token, a row per layer, the colour its importance, white where it is gone."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokprune_exp.analysis.figures.canvas import caption, printable, sheet
from tokprune_exp.analysis.figures.inputs import Tables, answer
from tokprune_exp.errors import UserError

FEWEST, MOST = 8, 30
"""Tokens of the sentence that is taken."""


def example_to_show(examples: pd.DataFrame) -> int | None:
    """The number of the first correctly answered example of readable length, else of the first of such length."""
    readable = examples[examples["length"].between(FEWEST, MOST)]
    right = readable[[one is True for one in readable["correct"].tolist()]]  # None in a regression
    for candidates in (right, readable):
        if len(candidates):
            return int(candidates["example"].iloc[0])
    return None


def layer_map(tokens: pd.DataFrame) -> np.ndarray:
    """Layers × tokens: NaN where a token was gone when the layer ended, else its share of the layer's importance.

    Importances of a layer are divided by their largest; 0.5 stands where the layer decided nothing.
    """
    layers = int(tokens["n_layers"].iloc[0])
    values = np.array([[np.nan if one is None else one for one in row] for row in tokens["importance"]], float).T
    alive = tokens["survived"].to_numpy() >= np.arange(1, layers + 1)[:, None]
    alive[-1] |= tokens["kept_last_read"].to_numpy(bool)
    with np.errstate(invalid="ignore"):
        largest = np.array([row[np.isfinite(row)].max() if np.isfinite(row).any() else np.nan for row in values])
        shares = np.where(np.isfinite(values), values, np.nan) / largest[:, None]
    return np.where(alive, np.where(np.isnan(shares), 0.5, shares), np.nan)


def draw_map(axes: Any, tokens: pd.DataFrame) -> Any:
    """Draw one sentence; returns the image, for a colour bar."""
    values = layer_map(tokens)
    image = axes.imshow(values, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(tokens)), [printable(piece, 14) for piece in tokens["piece_text"]], rotation=90)
    axes.set_yticks(range(len(values)), range(1, len(values) + 1))
    axes.tick_params(axis="x", labelsize=6, length=0)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.set_xticks(np.arange(len(tokens) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(values) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    return image


def sentence_figure(tables: Tables, file: Path) -> None:
    """The map of one short sentence.

    Raises:
        UserError: none is short enough, or a table is missing.
    """
    number = example_to_show(tables.examples)
    if number is None:
        raise UserError(f"no example has {FEWEST} to {MOST} tokens; the page shows the longer ones")
    tokens = tables.tokens_of(number)
    example = tables.examples[tables.examples["example"] == number].iloc[0]
    with sheet(file, 1.9) as figure:
        axes = figure.add_subplot()
        bar = figure.colorbar(draw_map(axes, tokens), ax=axes, pad=0.02, aspect=12)
        bar.set_label("importance /\nlargest of the layer", fontsize=6.5)
        bar.ax.tick_params(labelsize=6)
        label, predicted = (answer(example[key], tables.about["labels"]) for key in ("label", "predicted"))
        axes.set_title(printable(f"label {label}, predicted {predicted}", 60))
        caption(figure, "White: gone. In the last layer what it read has a colour; 0.5 where a layer decided nothing.")
