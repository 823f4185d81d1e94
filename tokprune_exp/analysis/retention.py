"""Which classes of words stay: retention, lift over the mean, and the same over pruning at random, with intervals.

    retention = kept / all of the class          lift = retention of the class / retention of all words
    over_random = kept by the model / kept on average when as many pieces of each text are kept at random

Random pruning is the fair comparison for words: one of many pieces is kept more often whatever the rule, and texts of
which more is kept may hold more words of one class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from tokprune_exp.analysis.passes import progress
from tokprune_exp.analysis.resampling import Bootstrap, interval, ratio
from tokprune_exp.analysis.units import LAST_READ, MEAN, Pieces, Words, classes_of, counts_of, shuffled_depth

Groups = Mapping[str, Bool[np.ndarray, " examples"]]
"""Examples that are looked at on their own: all, correct, incorrect, those of each class."""


@dataclass
class Counts:
    """Units of each class in each example, in total (index 0) and at each stage; `random` is the mean over draws.

    The last of the `stages` is `MEAN`.
    """

    unit: str
    classes: list[tuple[str, str]]
    stages: list[str]
    model: Float[np.ndarray, "examples classes stages_and_total"]
    random: Float[np.ndarray, "examples classes stages_and_total"]

    def of(self, kind: str, name: str) -> int | None:
        """Return the index of a class; None if no word belongs to it."""
        return self.classes.index((kind, name)) if (kind, name) in self.classes else None

    def at(self, stage: str) -> int:
        """Return the index of a stage."""
        return self.stages.index(stage) + 1


def count_units(pieces: Pieces, words: Words, draws: int, seed: int = 0) -> dict[str, Counts]:
    """Count words and pieces by class, as the model kept them and as `draws` random prunings do."""
    frames = {"word": words.frame, "piece": pieces.frame}
    classes = {unit: classes_of(frame) for unit, frame in frames.items()}
    examples = {unit: frame["example"].to_numpy() for unit, frame in frames.items()}

    def count(depth: np.ndarray) -> dict[str, np.ndarray]:
        deep = {"word": words.depth(depth), "piece": depth}
        sizes = pieces.examples, len(pieces.stages)
        return {
            unit: with_mean(counts_of(examples[unit], deep[unit], classes[unit], *sizes), pieces.stages)
            for unit in frames
        }

    model = count(pieces.depth)
    random = {unit: np.zeros_like(counts) for unit, counts in model.items()}
    generator = np.random.default_rng(seed)
    with progress(draws, "random pruning", " draws") as bar:
        for _ in range(draws):
            for unit, counts in count(shuffled_depth(pieces, generator)).items():
                random[unit] += counts / draws
            bar.update()
    return {
        unit: Counts(unit, list(classes[unit]), [*pieces.stages, MEAN], model[unit], random[unit]) for unit in frames
    }


def with_mean(counts: np.ndarray, stages: list[str]) -> np.ndarray:
    """Append the mean over the layers; what the last layer reads is no layer of its own."""
    layers = [place for place, stage in enumerate(stages, start=1) if stage != LAST_READ]
    return np.concatenate([counts, counts[..., layers].mean(-1, keepdims=True)], axis=-1)


def retention_rows(counts: Counts, groups: Groups, replicates: int) -> list[dict[str, Any]]:
    """Make a row per group, class and stage: kept + dropped = total, the three figures and their intervals."""
    rows = []
    for group, inside in groups.items():
        model, random = counts.model[inside], counts.random[inside]
        bootstrap = Bootstrap(len(model), replicates)
        sums, drawn = figures(model.sum(0), random.sum(0)), figures(bootstrap.sums(model), bootstrap.sums(random))
        ends = {name: interval(values) for name, values in drawn.items()}
        totals = model.sum(0)
        for number, (kind, name) in enumerate(counts.classes):
            if totals[number, 0] == 0:
                continue
            for place, stage in enumerate(counts.stages):
                total, kept = int(totals[number, 0]), float(totals[number, place + 1])
                row: dict[str, Any] = {"unit": counts.unit, "group": group, "kind": kind, "class": name, "layer": stage}
                row |= {"total": total, "kept": kept, "dropped": total - kept}
                for figure, values in sums.items():
                    row[figure] = values[number, place]
                    row[f"{figure}_low"], row[f"{figure}_high"] = (end[number, place] for end in ends[figure])
                row["random_retention"] = random.sum(0)[number, place + 1] / total
                rows.append(row)
    return rows


def figures(model: np.ndarray, random: np.ndarray) -> dict[str, np.ndarray]:
    """Compute retention, lift and over_random from sums over examples, (…, classes, total and stages)."""
    retention = ratio(model[..., 1:], model[..., :1])
    return {
        "retention": retention,
        "lift": ratio(retention, retention[..., :1, :]),  # class 0 is all words
        "over_random": ratio(model[..., 1:], random[..., 1:]),
    }


def special_rows(special: pd.DataFrame, stages: list[str]) -> list[dict[str, Any]]:
    """Count the special tokens ([CLS], [SEP]), which belong to no class of words."""
    depth, total = special["depth"].to_numpy(), len(special)
    rows = []
    for place, stage in enumerate(stages, start=1):
        kept = int((depth >= place).sum())
        row = {"unit": "piece", "group": "all", "kind": "special", "class": "special token", "layer": stage}
        rows.append({**row, "total": total, "kept": kept, "dropped": total - kept, "retention": kept / total})
    return rows


def composition_rows(counts: Counts, groups: Groups, stage: str, replicates: int) -> list[dict[str, Any]]:
    """Make a row per group and part of speech: its share of all words and of those kept at a stage.

    Both with stop words and without them: taking them out first decides much of the answer.
    """
    rows = []
    for group, inside in groups.items():
        bootstrap = Bootstrap(int(inside.sum()), replicates)
        for kind, stop_words in (("pos", "with"), ("pos without stop words", "without")):
            places = [place for place, (its_kind, _) in enumerate(counts.classes) if its_kind == kind]
            if not places:
                continue
            model = counts.model[inside][:, places][:, :, [0, counts.at(stage)]]
            sums = model.sum(0)
            shares = ratio(sums, sums.sum(0))
            drawn = bootstrap.sums(model)
            low, high = interval(ratio(drawn, drawn.sum(1, keepdims=True)))
            for number, place in enumerate(places):
                row: dict[str, Any] = {"group": group, "stop_words": stop_words, "pos": counts.classes[place][1]}
                for column, name in enumerate(("share_of_text", "share_of_kept")):
                    row |= {name: shares[number, column]}
                    row |= {f"{name}_low": low[number, column], f"{name}_high": high[number, column]}
                rows.append({**row, "words": int(sums[number, 0]), "kept": int(sums[number, 1])})
    return rows
