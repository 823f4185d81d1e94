"""What is counted: the pieces or the words of the long table, how deep each one got, and the classes it belongs to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tokprune_exp.analysis.tokens import read_columns
from tokprune_exp.analysis.words import MARKUP

COLUMNS = (
    *("example", "text", "word", "word_text", "n_layers", "survived", "kept_last_read", "pos", "tag", "stop", "entity"),
    *("number", "punctuation", "domain_term", "special"),
)
LAST_READ = "last_read"
"""The stage between the last layer but one and the last: what the last layer can still attend to."""
MEAN = "mean"
"""No stage but the mean over those of the layers: where next to nothing reaches the last layer, it still says much."""


@dataclass
class Pieces:
    """The rows of the long table that belong to the texts, and apart from them the special tokens.

    `example` counts the examples from 0 on. `depth` says how far a piece got: it is kept at stage k of `stages`,
    counted from 1, if its depth is at least k. That order holds since the sets of tokens are nested.
    """

    frame: pd.DataFrame
    special: pd.DataFrame
    stages: list[str]
    examples: int

    @property
    def depth(self) -> Int[np.ndarray, " pieces"]:
        """Return how far each piece of the texts got."""
        return self.frame["depth"].to_numpy()


def read_pieces(directory: Path) -> Pieces:
    """Read the long table of one model."""
    frame = read_columns(directory / "tokens.parquet", COLUMNS).to_pandas()
    layers = int(frame["n_layers"].iloc[0])
    # survived 0 … layers-1 and not read by the last layer, read by it, gone through it
    frame["depth"] = frame["survived"] + ((frame["survived"] >= layers - 1) & frame["kept_last_read"])
    frame["example"] = pd.factorize(frame["example"])[0]
    stages = [*map(str, range(1, layers)), LAST_READ, str(layers)]
    special = frame["special"].to_numpy()
    return Pieces(frame[~special], frame[special], stages, int(frame["example"].max()) + 1)


@dataclass
class Words:
    """The words of the texts: a row of the table per word, and where its pieces begin. A word is kept with any piece.

    Pieces of no word (whitespace alone) are left out.
    """

    frame: pd.DataFrame
    of_word: Int[np.ndarray, " aligned"]
    starts: Int[np.ndarray, " words"]

    def depth(self, of_pieces: Int[np.ndarray, " pieces"]) -> Int[np.ndarray, " words"]:
        """Compute how far each word got from how far its pieces got."""
        return np.maximum.reduceat(of_pieces[self.of_word], self.starts)


def words_of(pieces: Pieces) -> Words:
    """Group the pieces into words."""
    of_word = np.flatnonzero(pieces.frame["word"].to_numpy() >= 0)
    rows = pieces.frame.iloc[of_word]
    keys = rows[["example", "text", "word"]].to_numpy()
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(1)])
    words = Words(rows.iloc[starts].copy(), of_word, starts)
    words.frame["depth"] = words.depth(pieces.depth)
    return words


def shuffled_depth(pieces: Pieces, random: np.random.Generator) -> Int[np.ndarray, " pieces"]:
    """Prune at random: as many pieces of each text stay in each layer as in the model, and who has gone stays away.

    The depths of an example's pieces change places, which is all of that at once.
    """
    example = pieces.frame["example"].to_numpy()
    order = np.lexsort((random.random(len(example)), example))
    return pieces.depth[order]


Classes = dict[tuple[str, str], Bool[np.ndarray, " units"]]
"""Which units belong to a class, by the kind of the class and its name."""


def classes_of(frame: pd.DataFrame) -> Classes:
    """Find the classes of words: all, parts of speech (with and without stop words), flags and kinds of entities.

    Other nouns (and proper nouns) and other content words are those that are no domain terms; a content word is no stop
    word, punctuation or markup. Classes without a word are left out.
    """
    stop, term = frame["stop"].to_numpy(), frame["domain_term"].to_numpy()
    entity, pos = frame["entity"].to_numpy(), frame["pos"].to_numpy()
    markup, punctuation = (frame["tag"] == MARKUP).to_numpy(), frame["punctuation"].to_numpy()
    noun = np.isin(pos, ["NOUN", "PROPN"])
    content = ~(stop | punctuation | markup)
    found = {
        ("all", "all"): np.ones(len(frame), bool),
        **{("flag", name): mask for name, mask in {"stop word": stop, "content word": content}.items()},
        ("flag", "named entity"): entity != "",
        ("flag", "number"): frame["number"].to_numpy(),
        ("flag", "punctuation"): punctuation,
        ("flag", "markup"): markup,
        ("flag", "domain term"): term,
        ("flag", "other noun"): noun & ~term,
        ("flag", "other content word"): content & ~term,
        **{("pos", name): pos == name for name in sorted(set(pos) - {""})},
        **{("pos without stop words", name): (pos == name) & ~stop for name in sorted(set(pos) - {""})},
        **{("entity", name): entity == name for name in sorted(set(entity) - {""})},
    }
    return {name: np.asarray(mask, bool) for name, mask in found.items() if mask.any()}


def counts_of(
    example: Int[np.ndarray, " units"],
    depth: Int[np.ndarray, " units"],
    classes: Classes,
    examples: int,
    stages: int,
) -> Float[np.ndarray, "examples classes stages_and_total"]:
    """Count the units of each class in each example: all of them at index 0, those kept at stage k at index k."""
    width = stages + 1
    counts = np.zeros((examples, len(classes), width))
    for number, mask in enumerate(classes.values()):
        key = example[mask] * width + depth[mask]
        by_depth = np.bincount(key, minlength=examples * width).reshape(examples, width)
        counts[:, number] = by_depth[:, ::-1].cumsum(1)[:, ::-1]
    return counts
