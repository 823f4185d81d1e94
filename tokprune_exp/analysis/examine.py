"""Every table of one model and the claims: group-bys on its long table, and what needs further passes."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokprune_exp.analysis.claims import (
    Claim,
    classes_cluster,
    from_accuracy,
    kept_more,
    nouns_dominate,
    terms_against_others,
)
from tokprune_exp.analysis.forced import answers_when_forced
from tokprune_exp.analysis.frequency import frequency_rows
from tokprune_exp.analysis.lengths import length_rows
from tokprune_exp.analysis.passes import logits_of
from tokprune_exp.analysis.retention import Groups, composition_rows, count_units, retention_rows, special_rows
from tokprune_exp.analysis.scores import difference_of_means, right_answers, score_rows
from tokprune_exp.analysis.states import EXAMPLES, save_states, silhouette_rows, states_of
from tokprune_exp.analysis.terms import Term
from tokprune_exp.analysis.texts import AnalysedTexts
from tokprune_exp.analysis.tokens import Subject, read_columns
from tokprune_exp.analysis.units import LAST_READ, Pieces, Words, read_pieces, words_of
from tokprune_exp.measure.report import sample

Rows = list[dict[str, Any]]


@dataclass
class Findings:
    """The tables of one model by name, and the claims."""

    tables: dict[str, Rows]
    claims: list[Claim]


def examine(subject: Subject, texts: AnalysedTexts, terms: list[Term], arguments: argparse.Namespace) -> Findings:
    """Compute every table of one model from its long table, and what needs further passes."""
    model, split, labels, names = subject.classifier.model, subject.split, texts.labels, texts.task.labels
    replicates = arguments.bootstrap
    pieces = read_pieces(subject.directory)
    words = words_of(pieces)
    counts = count_units(pieces, words, arguments.random_draws)
    groups = groups_of(subject.observed.logits, labels, names)

    passes = {"unpruned": logits_of(model, split, "unpruned", prune=False)}
    if model.pruning is not None:
        passes["pruned"] = subject.observed.logits
    tables: dict[str, Rows] = {
        "scores": score_rows(passes, labels, names, texts.task.metrics),
        "retention": [
            *retention_rows(counts["word"], groups, replicates),
            *retention_rows(counts["piece"], {"all": groups["all"]}, replicates),
            *special_rows(pieces.special, pieces.stages),
        ],
        "composition": composition_rows(counts["word"], groups, LAST_READ, replicates),
        "frequent_words": frequent(words, pieces, groups),
        "lengths": length_rows(subject.observed.tokens_kept, split.lengths.numpy(), groups, replicates),
        "domain_terms": term_rows(terms, words, pieces, names),
        "forced": forced_rows(subject, labels, replicates) if terms else [],
        "silhouettes": state_rows(subject, texts, replicates),
    }
    claims = [
        *nouns_dominate(counts["word"], groups, replicates),
        *kept_more(tables["retention"]),
        *terms_against_others(counts["word"], replicates),
        *from_accuracy(tables["forced"]),
        *classes_cluster(tables["silhouettes"]),
    ]
    if names and "pruned" in passes:
        claims.append(cost_of_pruning(passes, labels, replicates))
    return Findings(tables, claims)


def groups_of(logits: Tensor, labels: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Group the examples: all, answered rightly, wrongly, and by class; groups without an example are left out."""
    groups = {"all": np.ones(len(labels), bool)}
    if names:
        right = right_answers(logits, labels) > 0
        groups |= {"correct": right, "incorrect": ~right}
        groups |= {f"class {name}": labels == number for number, name in enumerate(names)}
    return {name: inside for name, inside in groups.items() if inside.any()}


def frequent(words: Words, pieces: Pieces, groups: Groups) -> Rows:
    """Count the kept words of all texts, of each class, and of each class where it was found (true positives)."""
    asked = {name: inside for name, inside in groups.items() if name == "all" or name.startswith("class ")}
    for name, inside in list(asked.items()):
        if name != "all" and "correct" in groups and (inside & groups["correct"]).any():
            asked[f"true positives {name.removeprefix('class ')}"] = inside & groups["correct"]
    return frequency_rows(words.frame, pieces.stages.index(LAST_READ) + 1, asked)


def term_rows(terms: Sequence[Term], words: Words, pieces: Pieces, names: Sequence[str]) -> Rows:
    """Make a row per domain term: where it comes from, and how often the last layer read it in the analysed texts."""
    frame = words.frame[words.frame["domain_term"].to_numpy()]
    form = frame["word_text"].astype(str).str.lower()
    read = frame["depth"] >= pieces.stages.index(LAST_READ) + 1
    total, kept = Counter(form), Counter(form[read.to_numpy()])
    return [
        {
            "rank": rank,
            "term": term.word,
            "class": names[term.label],
            **{name: value for name, value in asdict(term).items() if name not in ("word", "label")},
            "total": total[term.word],
            "kept": kept[term.word],
            "dropped": total[term.word] - kept[term.word],
        }
        for rank, term in enumerate(terms, start=1)
    ]


def forced_rows(subject: Subject, labels: np.ndarray, replicates: int) -> Rows:
    """Make a row per interference: the accuracy with it, and its difference from that of the model as it is.

    `named` counts the tokens that it names, `named_read` those of them that the last layer reads in the model as it is.
    The last rows compare domain terms with as many other tokens. Nothing is forced where no domain term occurs.
    """
    columns = read_columns(subject.directory / "tokens.parquet", ["domain_term", "word"]).to_pandas()
    named = columns["domain_term"].to_numpy(bool)
    others = (columns["word"] >= 0).to_numpy() & ~named
    as_it_is = right_answers(subject.observed.logits, labels)
    nothing = dict.fromkeys(("compared_with", "difference", "difference_low", "difference_high"))
    rows: Rows = [{"variant": "as it is", "named": 0, "named_read": 0, **mean_of(as_it_is, replicates), **nothing}]
    right: dict[str, np.ndarray] = {}
    if not named.any():
        return rows
    for variant, (mask, logits) in answers_when_forced(subject.classifier.model, subject.split, named, others).items():
        right[variant] = right_answers(logits, labels)
        row = {"variant": variant, "named": int(mask.sum()), "named_read": int((mask & subject.observed.read).sum())}
        row |= mean_of(right[variant], replicates)
        rows.append({**row, **compared(right[variant], as_it_is, "as it is", replicates)})
    for way in ("stay", "leave"):
        ours, control = f"domain terms {way}", f"as many other words' tokens {way}"
        against = {name: None for name in rows[0] if name not in nothing}
        rows.append({**against, "variant": ours, **compared(right[ours], right[control], control, replicates)})
    return rows


def mean_of(right: np.ndarray, replicates: int) -> dict[str, float]:
    """Compute an accuracy and its interval."""
    mean, low, high = difference_of_means(right, np.zeros_like(right), replicates)
    return {"accuracy": mean, "accuracy_low": low, "accuracy_high": high}


def compared(ours: np.ndarray, theirs: np.ndarray, with_what: str, replicates: int) -> dict[str, Any]:
    """Compute a difference of accuracies over the same examples and its interval."""
    value, low, high = difference_of_means(ours, theirs, replicates)
    return {"compared_with": with_what, "difference": value, "difference_low": low, "difference_high": high}


def cost_of_pruning(passes: Mapping[str, Tensor], labels: np.ndarray, replicates: int) -> Claim:
    """Compare the accuracies of the same weights with pruning and without."""
    pruned, unpruned = (right_answers(passes[name], labels) for name in ("pruned", "unpruned"))
    numbers = difference_of_means(pruned, unpruned, replicates)
    return Claim("pruning changes accuracy", "accuracy, pruned, minus unpruned, same weights", "all", *numbers, 0.0)


def state_rows(subject: Subject, texts: AnalysedTexts, replicates: int) -> Rows:
    """Take and write the states of some examples; return their silhouettes, where there are classes."""
    model, split = subject.classifier.model, subject.split
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[sample(split, EXAMPLES)] = True
    special = read_columns(subject.directory / "tokens.parquet", ["special"])["special"].to_numpy()
    in_text = ~special[chosen.repeat_interleave(split.lengths).numpy()]
    few, labels = split.where(chosen), texts.labels[chosen.numpy()]
    states = {"unpruned": states_of(model, few, in_text, prune=False)}
    if model.pruning is not None:
        states["pruned"] = states_of(model, few, in_text, prune=True)
    answers = subject.observed.logits[chosen]
    predicted = answers.argmax(1) if texts.task.labels else answers[:, 0]
    rows = [row for row, is_chosen in zip(texts.rows, chosen.tolist(), strict=True) if is_chosen]
    save_states(subject.directory / "states.safetensors", states, rows, labels, predicted)
    return silhouette_rows(states, labels, replicates) if texts.task.labels else []
