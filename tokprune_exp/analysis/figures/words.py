"""Which words were kept, class by class: bars of kept among all, and clouds; the numbers are frequent_words.csv's."""

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd

from tokprune_exp.analysis.figures.canvas import GONE, KEPT, OF_CLASS, caption, printable, sheet
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.errors import UserError

CLASS, TRUE_POSITIVES = "class", "true positives"
"""Groups of frequent_words.csv begin with one of these: all texts of a class, or those rightly put into it."""
MOST_CLASSES = 6
"""Panels of one figure; of more classes the first."""
BARS = 15
STOP_COLOUR = "#9A9A9A"


def most_kept(frequent: pd.DataFrame, group: str) -> pd.DataFrame:
    """The words of a group, the most kept first: columns word, kept, total and stop (whether it is a stop word)."""
    here = frequent[frequent["group"] == group]
    words = here[here["stop_words"] == "with"]
    # the list without stop words is as long, so that it holds every other word of this one
    no_stop = set(here.loc[here["stop_words"] == "without", "word"])
    words = words.assign(stop=[word not in no_stop for word in words["word"]])
    return words.sort_values("rank", ignore_index=True)[["word", "kept", "total", "stop"]]


def draw_bars(axes: Any, words: pd.DataFrame, title: str) -> None:
    """The most kept words of one class: the bar of a word is its occurrences, the dark part those that were kept."""
    shown = words.head(BARS)
    places = range(len(shown))
    axes.barh(places, shown["total"], color=GONE, label="dropped", height=0.75)
    axes.barh(places, shown["kept"], color=KEPT, label="kept", height=0.75)
    axes.set_yticks(places, [printable(word) for word in shown["word"]])
    for label, is_stop in zip(axes.get_yticklabels(), shown["stop"], strict=True):
        label.set_color(STOP_COLOUR if is_stop else "black")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    axes.set_xlabel("occurrences")
    axes.set_title(printable(title, 30))


def draw_cloud(axes: Any, words: pd.DataFrame, title: str, colour: str) -> None:
    """The kept words of one class, as large as they were often kept; stop words in grey."""
    from wordcloud import WordCloud

    stops = set(words.loc[words["stop"], "word"])
    cloud = WordCloud(
        width=900,
        height=600,
        background_color="white",
        max_words=60,
        min_font_size=12,
        random_state=0,  # the same picture for the same table
        color_func=lambda word, **_: STOP_COLOUR if word in stops else colour,
    )
    frequencies = dict(zip(words["word"], words["kept"], strict=True))
    axes.imshow(cloud.generate_from_frequencies(frequencies).to_array(), interpolation="bilinear")
    axes.set_axis_off()
    axes.set_title(printable(title, 30))


def bars_figure(tables: Tables, file: Path, which: str = CLASS) -> None:
    """A panel of bars per class.

    Raises:
        UserError: there is no frequent_words.csv, or it has no classes.
    """
    panels = _panels(tables, which)
    rows = -(-len(panels) // 2)
    with sheet(file, 0.35 + 2.35 * rows) as figure:
        places = _places(figure, rows, len(panels))
        for axes, (label, words) in zip(places, panels.items(), strict=False):
            draw_bars(axes, words, label)
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        caption(figure, f"{_texts(which)} Kept: the last layer read a piece of the word. Grey: stop words.")


def clouds_figure(tables: Tables, file: Path, which: str = CLASS) -> None:
    """A cloud per class.

    Raises:
        UserError: there is no frequent_words.csv, it has no classes, or the package wordcloud is not installed.
    """
    if importlib.util.find_spec("wordcloud") is None:
        raise UserError("the package wordcloud is not installed: pip install 'tokprune_exp[analysis]'")
    panels = _panels(tables, which)
    rows = -(-len(panels) // 2)
    with sheet(file, 0.25 + 1.3 * rows) as figure:
        places = _places(figure, rows, len(panels))
        for number, (axes, (label, words)) in enumerate(zip(places, panels.items(), strict=False)):
            draw_cloud(axes, words, label, OF_CLASS[number % len(OF_CLASS)])
        caption(figure, f"{_texts(which)} Size: how often the word was kept. Grey: stop words.")


def _panels(tables: Tables, which: str) -> dict[str, pd.DataFrame]:
    """The words of each class that has some, by the name of the class."""
    frequent = tables.csv("frequent_words.csv")
    words = {label: most_kept(frequent, f"{which} {label}") for label in tables.labels}
    found = [(label, its_words) for label, its_words in words.items() if len(its_words)]
    if not found:
        raise UserError(f"frequent_words.csv has no words of {which}")
    return dict(found[:MOST_CLASSES])


def _places(figure: Any, rows: int, used: int) -> list[Any]:
    """Two panels a row, what is left over empty."""
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in places[used:]:
        axes.set_axis_off()
    return places


def _texts(which: str) -> str:
    return "All texts of a class." if which == CLASS else "Texts rightly put into a class."
