"""The texts that are analysed, with the rows that they have in their split, and the training texts of the same task."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset

from tokprune_exp.config import choices, load_task
from tokprune_exp.data.sources import hold_out, load_source, texts_of
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import Text
from tokprune_exp.errors import UserError

SELECTION_EXAMPLES = 1000
"""As many as runs hold out by default, so that `train` and `selection` are the slices that a run had."""


@dataclass(frozen=True)
class AnalysedTexts:
    """Texts of one split; `rows` are their places in it, `labels` class indices or scores. `source` is their record."""

    task: Task
    texts: list[Text]
    rows: list[int]
    labels: np.ndarray
    training_texts: list[Text]
    training_labels: list[int]
    source: dict[str, Any]


def load_texts(task: str, split: str, examples: int | None, data_root: str | None) -> AnalysedTexts:
    """Read a task and choose `examples` texts of one of its splits, always the same ones, in the order of their rows.

    In a regression there are no classes, so that no training texts are read.

    Raises:
        UserError: there is no such task, or its data are not there.
    """
    if task not in choices("task"):
        raise UserError(f"--task {task}: there is no such task; there are {', '.join(choices('task'))}")
    about = load_task(task)
    settings = SimpleNamespace(
        root=data_root,
        source=None,
        cache=cache_directory(),
        selection_examples=SELECTION_EXAMPLES,
        max_train_examples=None,
        max_evaluation_examples=None,
        cut_missing_split=True,
    )
    source = load_source(about, settings)
    whole = getattr(source, split)
    rows = list(range(len(whole)))
    if examples is not None and examples < len(rows):
        rows = hold_out(Dataset.from_dict({"row": rows}), examples, None)[1]["row"][:]
    used = whole.select(rows)
    training = source.train if about.labels else source.train.select([])
    return AnalysedTexts(
        task=about,
        texts=texts_of(used, about),
        rows=rows,
        labels=np.asarray(used[about.label_column][:]),
        training_texts=texts_of(training, about),
        training_labels=training[about.label_column][:],
        source=source.description,
    )


def cache_directory() -> str:
    """Where fetched wheels are kept, the same place as for runs."""
    return os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp")


def parts(text: Text) -> Sequence[str]:
    """Return the text, or the two of a pair, as a sequence."""
    return (text,) if isinstance(text, str) else text
