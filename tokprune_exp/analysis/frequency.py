"""The words that are kept most often, of each class and of its true positives, with stop words and without them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from tokprune_exp.analysis.words import MARKUP

MOST = 100
"""Words of each list."""


def frequency_rows(
    words: pd.DataFrame, read_depth: int, groups: Mapping[str, Bool[np.ndarray, " examples"]], most: int = MOST
) -> list[dict[str, Any]]:
    """Make a row per group, list and word, by falling number of times that the last layer read the word.

    `read_depth` is the depth from which on a word is read by the last layer. Words are counted in lower case;
    punctuation, numbers and markup are in neither list. `examples` is the number of texts in which the word was kept.
    """
    is_word = ~(words["punctuation"] | words["number"] | (words["tag"] == MARKUP)).to_numpy()
    shown = words.loc[is_word, ["example", "stop", "depth"]].copy()
    shown["word"] = words.loc[is_word, "word_text"].astype(str).str.lower().astype("category")
    shown["kept"] = shown["depth"] >= read_depth
    rows: list[dict[str, Any]] = []
    for group, inside in groups.items():
        here = shown[inside[shown["example"].to_numpy()]]
        rows += _list(here, group, "with", most)
        rows += _list(here[~here["stop"].to_numpy()], group, "without", most)
    return rows


def _list(words: pd.DataFrame, group: str, stop_words: str, most: int) -> Sequence[dict[str, Any]]:
    total = words.groupby("word", observed=True).size()
    is_kept = words[words["kept"].to_numpy()]
    kept = is_kept.groupby("word", observed=True).agg(kept=("kept", "size"), examples=("example", "nunique"))
    kept = kept.reset_index().sort_values(["kept", "word"], ascending=[False, True]).head(most)
    return [
        {
            "group": group,
            "stop_words": stop_words,
            "rank": rank,
            "word": row.word,
            "kept": row.kept,
            "total": int(total[row.word]),
            "retention": row.kept / int(total[row.word]),
            "examples": row.examples,
        }
        for rank, row in enumerate(kept.itertuples(index=False), start=1)
    ]
