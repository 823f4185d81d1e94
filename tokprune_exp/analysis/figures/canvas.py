"""The paper that every figure is drawn on: one column wide, or two, in the look of the curves."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tokprune_exp.curves.figure import COLUMN_INCHES, DPI, LOOK
from tokprune_exp.curves.style import PALETTE

KEPT, GONE, RANDOM = PALETTE[0], "#D9D9D9", "#7F7F7F"
RIGHT, WRONG = PALETTE[2], PALETTE[1]
OF_CLASS = PALETTE[:3] + PALETTE[3:7]


@contextmanager
def sheet(file: Path, height: float, columns: int = 1) -> Iterator[Any]:
    """A matplotlib figure of one or two columns' width and `height` inches, saved as a PNG when the block ends."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(columns * COLUMN_INCHES, height), dpi=DPI, layout="constrained")
        yield figure
        figure.savefig(file)


def caption(figure: Any, words: str) -> None:
    """Lines below everything that say what was counted."""
    figure.supxlabel(textwrap.fill(words, 82), fontsize=5.5, color="#555555", x=0.02, ha="left")


def printable(text: str, most: int = 18) -> str:
    """A word for an axis: shortened, and without characters that would break its line or have no glyph."""
    clean = "".join(one if one.isprintable() and ord(one) < 0x2E80 else "□" for one in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"
