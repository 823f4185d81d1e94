"""Are the words of the domain kept? Each term beside the mean of all terms, of other content words, of stop words."""

from pathlib import Path
from typing import Any

import pandas as pd

from tokprune_exp.analysis.figures.canvas import GONE, KEPT, WRONG, caption, printable, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.analysis.figures.word_classes import last_read, of_words
from tokprune_exp.errors import UserError

SHOWN = 25
BESIDE = (
    ("domain term", "all domain terms", "-", KEPT),
    ("other content word", "other content words", "--", WRONG),
    ("stop word", "stop words", ":", "#404040"),
)


def draw_terms(axes: Any, terms: pd.DataFrame, classes: pd.DataFrame) -> None:
    """A point per term, the share of its occurrences that is kept; lines at the shares of whole classes of words."""
    shares, places = 100 * terms["kept"] / terms["total"], range(len(terms))
    axes.hlines(places, 0, shares, color=GONE, linewidth=1)
    axes.plot(shares, places, "o", color=KEPT, markersize=3)
    retention = classes.set_index("class")["retention"]
    for name, words, style, colour in BESIDE:
        if name in retention:
            share = 100 * retention[name]
            axes.axvline(share, linestyle=style, color=colour, label=f"{words}: {share:.1f} %")
    labels = [f"{printable(term)} ({total:,})" for term, total in zip(terms["term"], terms["total"], strict=True)]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("kept, % of the occurrences")


def terms_figure(tables: Tables, file: Path) -> None:
    """The domain terms that occur most often, with the number of their occurrences.

    Raises:
        UserError: there is no such table, or no domain term stands in the texts.
    """
    terms = tables.csv("domain_terms.csv")
    found = terms[terms["total"] > 0].sort_values(["total", "term"], ascending=[False, True])
    if not len(found):
        raise UserError("no domain term stands in the texts")
    shown = found.head(SHOWN)
    classes = last_read(of_words(tables.csv("retention.csv"), ("flag",)))
    with sheet(file, 0.95 + 0.115 * len(shown)) as figure:
        axes = figure.add_subplot()
        draw_terms(axes, shown, classes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", frameon=False)
        caption(figure, f"The {len(shown)} most frequent of {len(found)} terms in the texts; in brackets how often.")
