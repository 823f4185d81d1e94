"""Every figure that the tables of an analysis allow."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokprune_exp.analysis.figures import (
    domain_terms,
    lengths,
    sentence,
    states,
    thresholds,
    word_classes,
    words,
)
from tokprune_exp.analysis.figures.inputs import Tables
from tokprune_exp.errors import UserError

FIGURES: dict[str, Callable[[Tables, Path], None]] = {
    "retention_by_word_class": word_classes.retention_figure,
    "lift_by_word_class": word_classes.lift_figure,
    "retention_by_layer": word_classes.layers_figure,
    "frequent_words": words.bars_figure,
    "frequent_words_true_positives": partial(words.bars_figure, which=words.TRUE_POSITIVES),
    "word_clouds": words.clouds_figure,
    "word_clouds_true_positives": partial(words.clouds_figure, which=words.TRUE_POSITIVES),
    "domain_terms": domain_terms.terms_figure,
    "lengths": lengths.trajectories_figure,
    "length_histograms": lengths.histograms_figure,
    "thresholds": thresholds.thresholds_figure,
    "states": states.states_figure,
    "sentence": sentence.sentence_figure,
}


def draw_all(directory: Path, say: Callable[[str], object] = print) -> list[Path]:
    """Draw what the tables in a directory allow into its folder `figures`; returns the PNGs.

    What is left out is named with its reason, in one line each, by `say`.

    Raises:
        UserError: the directory holds no analysis.
    """
    tables = Tables(directory)
    tables.file("about.json")
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        file = folder / f"{name}.png"
        file.unlink(missing_ok=True)  # an older one would be taken for one of these tables
        try:
            draw(tables, file)
        except UserError as error:
            say(f"{name} left out: {error}")
        else:
            written.append(file)
    return written
