"""The whole analysis, top to bottom: `python -m tokprune_exp.analyze MODEL_DIR`."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tokprune_exp.analysis.examine import Findings, Rows, examine
from tokprune_exp.analysis.figures.present import present
from tokprune_exp.analysis.passes import observe, progress
from tokprune_exp.analysis.report import print_findings
from tokprune_exp.analysis.tagging import Tagger
from tokprune_exp.analysis.terms import Term, domain_terms
from tokprune_exp.analysis.texts import AnalysedTexts, cache_directory, load_texts, parts
from tokprune_exp.analysis.tokens import Subject, write_tables
from tokprune_exp.analysis.units import LAST_READ
from tokprune_exp.bench.arguments import writable
from tokprune_exp.bench.screen import screen
from tokprune_exp.data.tokenise import EncodedSplit, tokenise
from tokprune_exp.errors import UserError
from tokprune_exp.serving import TextClassifier, load
from tokprune_exp.tracking import hardware, versions, write_json


def analyze(arguments: argparse.Namespace) -> None:
    """Analyse a model, and those that it is compared with on the same texts; write all tables, print the short ones.

    Raises:
        UserError: a model, the data or the tagger is not there, or they do not fit each other.
    """
    if missing := [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]:  # needed at the end
        raise UserError(f"{' and '.join(missing)} is not installed: pip install 'tokprune_exp[analysis]'")
    directories = [arguments.model_dir, *arguments.compare]
    classifiers = [load(directory, arguments.threads) for directory in directories]
    output = writable(arguments.output or arguments.model_dir / "analysis")
    tagger = Tagger(arguments.spacy, cache_directory())
    task = arguments.task or classifiers[0].card.task
    texts = load_texts(task, arguments.split, arguments.examples, arguments.data_root)
    for directory, classifier in zip(directories, classifiers, strict=True):
        check_fit(directory, classifier, texts)
    terms = find_terms(texts, tagger, arguments.domain_terms)

    folders = [output, *(output / "compare" / name for name in names_of(classifiers[1:]))]
    subjects = [look_at(*pair, texts) for pair in zip(classifiers, folders, strict=True)]
    write_tables(subjects, texts, tagger, (term.word for term in terms))

    console, about = screen(), about_texts(texts, tagger, arguments)
    written: list[Path] = []
    retention: list[tuple[str, Rows]] = []
    for subject, directory in zip(subjects, directories, strict=True):
        findings = examine(subject, texts, terms, arguments)
        card = subject.classifier.card
        model = {"directory": directory, "method": card.method, "backbone": card.backbone}
        model["thresholds"] = subject.observed.thresholds
        written += write_findings(subject.directory, findings, about | {"model": model})
        print_findings(findings.tables, findings.claims, f"{card.method} · {task} · {len(texts.texts)} texts", console)
        retention.append((card.method, findings.tables["retention"]))
    if len(subjects) > 1:
        written.append(write_csv(output / "comparison.csv", comparison_rows(retention)))
    written += present(output, "offline")
    console.print("Written:")
    for path in written:
        console.print(f"  {path}", soft_wrap=True)


def about_texts(texts: AnalysedTexts, tagger: Tagger, arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what was analysed, and how."""
    return {
        "command": shlex.join(["python", "-m", "tokprune_exp.analyze", *sys.argv[1:]]),
        "task": texts.task.name,
        "labels": texts.task.labels,
        "split": arguments.split,
        "examples": len(texts.texts),
        "source": texts.source,
        "tagger": {"pipeline": tagger.name, "version": tagger.version},
        "random_draws": arguments.random_draws,
        "bootstrap": arguments.bootstrap,
        "versions": versions(),
        "hardware": hardware(),
    }


def check_fit(directory: Path, classifier: TextClassifier, texts: AnalysedTexts) -> None:
    """Refuse a model that answers another question than the task asks."""
    card, task = classifier.card, texts.task
    if card.pair != (len(task.text) == 2) or len(card.labels) != len(task.labels):

        def kind(pair: bool, labels: Sequence[str]) -> str:
            return f"{'pairs' if pair else 'single texts'}, {len(labels) or 'no'} classes"

        raise UserError(
            f"{directory} is a model of {card.task} ({kind(card.pair, card.labels)}), which does not fit task "
            f"{task.name} ({kind(len(task.text) == 2, task.labels)}): name a task of its kind with --task, "
            "or compare models of one task"
        )


def names_of(classifiers: Sequence[TextClassifier]) -> list[str]:
    """Name each compared model by its method, numbered where a method stands there more than once."""
    methods = [classifier.card.method for classifier in classifiers]
    total, seen = Counter(methods), Counter[str]()
    names = []
    for method in methods:
        seen[method] += 1
        names.append(method if total[method] == 1 else f"{method}_{seen[method]}")
    return names


def find_terms(texts: AnalysedTexts, tagger: Tagger, number: int) -> list[Term]:
    """Find the domain terms of the task by its training split; none where there are no classes."""
    if not texts.task.labels:
        return []
    with progress(len(texts.training_texts), "domain terms") as bar:

        def words() -> Any:
            for text in texts.training_texts:
                bar.update()
                yield [form for some in tagger.forms(parts(text)) for form in some]

        return domain_terms(words(), texts.training_labels, len(texts.task.labels), number, tagger.is_term)


def look_at(classifier: TextClassifier, folder: Path, texts: AnalysedTexts) -> Subject:
    """Run a model over the texts as it prunes."""
    is_regression = texts.task.is_regression
    split = EncodedSplit(
        texts=texts.texts,
        **tokenise(classifier.backend, texts.texts, classifier.has_types),
        labels=torch.as_tensor(texts.labels, dtype=torch.float32 if is_regression else torch.int64),
        pad_id=classifier.model.encoder.shape.pad_token,
        fingerprint="",
    )
    return Subject(classifier, split, observe(classifier.model, split), folder)


def write_findings(folder: Path, findings: Findings, about: Mapping[str, Any]) -> list[Path]:
    """Write the tables as CSV, the claims and what was analysed as JSON; return all files of this model."""
    written = [folder / name for name in ("tokens.parquet", "examples.parquet", "states.safetensors")]
    written += [write_csv(folder / f"{name}.csv", rows) for name, rows in findings.tables.items() if rows]
    record = {name: about[name] for name in ("task", "split", "examples", "random_draws", "bootstrap")}
    write_json(folder / "claims.json", {**record, "claims": [claim.record() for claim in findings.claims]})
    write_json(folder / "about.json", dict(about))
    return [*written, folder / "claims.json", folder / "about.json"]


def write_csv(file: Path, rows: Rows) -> Path:
    """Write rows as CSV; what is unknown is empty."""
    pd.DataFrame(rows).to_csv(file, index=False, float_format="%.6g")
    return file


def comparison_rows(retention: Sequence[tuple[str, Rows]]) -> Rows:
    """Make a row per class of words: what the last layer of each model read of it, lift and over_random beside it."""
    beside: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (method, rows) in enumerate(retention, start=1):
        for row in rows:
            if (row["unit"], row["group"], row["layer"]) == ("word", "all", LAST_READ):
                both = beside.setdefault((row["kind"], row["class"]), {"kind": row["kind"], "class": row["class"]})
                both |= {f"{number}_{method}_{name}": row[name] for name in ("retention", "lift", "over_random")}
    return list(beside.values())
