"""What the retained-token analysis claims, as measured numbers with intervals, above or below what they stand against.

Nouns dominate; stop words go; domain terms and entities are kept more; forcing domain terms in or out matters; pruning
costs accuracy; classes form clusters. A number is `undecided` if its interval holds the value that it stands against.
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from tokprune_exp.analysis.resampling import Bootstrap, interval, ratio
from tokprune_exp.analysis.retention import Counts, Groups
from tokprune_exp.analysis.units import LAST_READ, MEAN

STAGES = (LAST_READ, MEAN)


@dataclass(frozen=True)
class Claim:
    """A measured number: `claim` names the statement, `quantity` says what was measured, on the examples of `group`.

    `stage` is the place in the model, of claims about what was kept.
    """

    claim: str
    quantity: str
    group: str
    value: float
    low: float
    high: float
    against: float
    stage: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the fields and on which side of `against` the whole interval lies."""
        side = "above" if self.low > self.against else "below" if self.high < self.against else "undecided"
        return {**asdict(self), "is": side}


def nouns_dominate(counts: Counts, groups: Groups, replicates: int) -> list[Claim]:
    """Compare the share of NOUN among the kept words with that of the next most frequent part of speech.

    The largest of the others is sought anew in every resample. Once with stop words and once without.
    """
    claims = []
    for kind, which in (("pos", "kept words"), ("pos without stop words", "kept words that are no stop words")):
        places = [place for place, (its_kind, _) in enumerate(counts.classes) if its_kind == kind]
        names = [counts.classes[place][1] for place in places]
        if "NOUN" not in names or len(names) < 2:
            continue
        noun = names.index("NOUN")

        def lead(kept: np.ndarray, noun: int = noun) -> np.ndarray:
            others = np.delete(kept, noun, axis=-1).max(-1)
            return ratio(kept[..., noun] - others, kept.sum(-1))

        for (group, inside), stage in product(groups.items(), STAGES):
            kept = counts.model[inside][:, places, counts.at(stage)]
            low, high = interval(lead(Bootstrap(len(kept), replicates).sums(kept)))
            value = float(lead(kept.sum(0)))
            if np.isnan(value):  # no word was kept
                continue
            quantity = f"share of NOUN among {which} minus that of the next part of speech"
            claims.append(Claim("nouns dominate", quantity, group, value, float(low), float(high), 0.0, stage))
    return claims


KEPT_MORE = [
    ("nouns are kept more", ("pos", "NOUN")),
    ("proper nouns are kept more", ("pos", "PROPN")),
    ("adjectives are kept more", ("pos", "ADJ")),
    ("named entities are kept more", ("flag", "named entity")),
    ("domain terms are kept more", ("flag", "domain term")),
    ("stop words are kept more", ("flag", "stop word")),
    ("punctuation is kept more", ("flag", "punctuation")),
]
REFERENCES = [("flag", "other noun"), ("flag", "other content word")]


def kept_more(retention: list[dict[str, Any]]) -> list[Claim]:
    """Compare classes with all words (lift) and with random pruning, from the rows of the retention table."""
    claims = []
    rows = {
        (row["kind"], row["class"], row["layer"]): row
        for row in retention
        if (row["unit"], row["group"]) == ("word", "all")
    }
    for (claim, (kind, name)), stage in product(KEPT_MORE, STAGES):
        key = kind, name, stage
        if key not in rows:
            continue
        for figure, quantity in (("lift", "retention / retention of all words"), ("over_random", "kept / at random")):
            value, low, high = (float(rows[key][f"{figure}{end}"]) for end in ("", "_low", "_high"))
            if not np.isnan(value):
                claims.append(Claim(claim, quantity, "all", value, low, high, 1.0, stage))
    return claims


def terms_against_others(counts: Counts, replicates: int) -> list[Claim]:
    """Compare the retention of domain terms with that of other nouns and of other content words."""
    term = counts.of("flag", "domain term")
    claims = []
    for (kind, name), stage in product(REFERENCES, STAGES):
        other = counts.of(kind, name)
        if term is None or other is None:
            continue
        both = counts.model[:, [term, other]][:, :, [0, counts.at(stage)]]

        def difference(sums: np.ndarray) -> np.ndarray:
            retention = ratio(sums[..., 1], sums[..., 0])
            return np.asarray(retention[..., 0] - retention[..., 1])

        low, high = interval(difference(Bootstrap(len(both), replicates).sums(both)))
        quantity = f"retention minus that of the class: {name}"
        value = float(difference(both.sum(0)))
        if np.isnan(value):
            continue
        claims.append(Claim("domain terms are kept more", quantity, "all", value, float(low), float(high), 0.0, stage))
    return claims


def from_accuracy(forced: list[dict[str, Any]]) -> list[Claim]:
    """Take the differences of accuracy from the rows of the table `forced`."""
    claims = []
    for row in forced:
        if row["difference"] is not None:
            value, low, high = (float(row[f"difference{end}"]) for end in ("", "_low", "_high"))
            quantity = f"accuracy, {row['variant']}, minus {row['compared_with']}"
            claims.append(Claim("domain terms decide", quantity, "all", value, low, high, 0.0))
    return claims


def classes_cluster(silhouettes: list[dict[str, Any]]) -> list[Claim]:
    """Take the silhouettes by class, dense and pruned."""
    claims = []
    for row in silhouettes:
        value, low, high = (float(row[f"silhouette{end}"]) for end in ("", "_low", "_high"))
        quantity = f"silhouette of the {row['states']} states, {row['pass']}"
        claims.append(Claim("classes form clusters", quantity, "all", value, low, high, 0.0))
    return claims
