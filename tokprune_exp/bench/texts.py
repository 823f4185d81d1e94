"""The texts that are timed, and the batches that they stand in, all put together before any clock runs."""

import argparse
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from tokprune_exp.config import choices, load_task
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import token_batches
from tokprune_exp.data.sources import load_source, texts_of
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import EncodedSplit, encode_texts
from tokprune_exp.encoder.pretrained import load_tokenizer
from tokprune_exp.errors import UserError
from tokprune_exp.measure.latency import length_sorted_chunks
from tokprune_exp.model import ModelCard
from tokprune_exp.serving import BATCH_TOKENS

Reads = Literal["packed", "sorted", "unsorted"]
"""How a variant wants its batches: for packing, or padded among neighbours in length, or padded as they come."""


@dataclass(frozen=True)
class TimedTexts:
    """Encoded texts of a task's reported split; the model can be judged by them if the task is its own."""

    split: EncodedSplit
    task: Task
    is_own_task: bool
    source: dict[str, Any]

    def about(self) -> dict[str, Any]:
        """Return what the record says of the texts."""
        lengths = self.split.lengths
        return {
            "task": self.task.name,
            "is_own_task": self.is_own_task,
            "examples": len(lengths),
            "tokens": {"shortest": int(lengths.min()), "median": int(lengths.median()), "longest": int(lengths.max())},
            "source": self.source,
        }


def timed_texts(arguments: argparse.Namespace, card: ModelCard, longest: int) -> TimedTexts:
    """Encode some texts of the reported split of the model's own task, or of the one that --texts-of names.

    Texts of another task are cut at that task's own number of tokens, or at `longest`, where positions end.

    Raises:
        UserError: there is no such task, or its texts are not there.
    """
    is_own_task = arguments.texts_of in (None, card.task)
    if not is_own_task and arguments.texts_of not in choices("task"):
        raise UserError(
            f"--texts-of {arguments.texts_of}: there is no such task; there are {', '.join(choices('task'))}"
        )
    task = load_task(card.task if is_own_task else arguments.texts_of)
    settings = SimpleNamespace(
        root=arguments.data_root,
        source=None,
        cache=os.environ.get("TOKPRUNE_CACHE", "~/.cache/tokprune_exp"),
        selection_examples=1,
        max_train_examples=1,
        max_evaluation_examples=arguments.examples,
        cut_missing_split=True,
    )
    source = load_source(task, settings)
    rows = source.evaluation
    kind = torch.float32 if task.is_regression else torch.int64
    split = encode_texts(
        load_tokenizer(arguments.model_dir),
        texts_of(rows, task),
        card.max_tokens if is_own_task else min(task.max_tokens, longest),
        torch.tensor(rows[task.label_column][:], dtype=kind),
    )
    return TimedTexts(split, task, is_own_task, source.description["evaluation"])


@dataclass(frozen=True)
class Workload:
    """The same texts in full batches of one size, in each of the ways that a variant may read them.

    `packed` holds the batches of `sorted`, those of more than `BATCH_TOKENS` tokens in the micro-batches in which they
    are served.
    """

    size: int
    packed: list[Batch]
    sorted: list[Batch]
    unsorted: list[Batch]

    @property
    def batches(self) -> int:
        """Number of batches of `size` texts."""
        return len(self.sorted)

    @property
    def texts(self) -> int:
        """Number of texts."""
        return self.size * self.batches

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(int(batch.valid.sum()) for batch in self.sorted)

    def filled(self, reads: Reads) -> float:
        """Compute real tokens / tokens computed, padding included."""
        return self.tokens / sum(batch.valid.numel() for batch in getattr(self, reads))


def workloads(split: EncodedSplit, sizes: list[int]) -> list[Workload]:
    """Put the batches together, for each size that the texts fill.

    Raises:
        UserError: there are fewer texts than the smallest batch holds.
    """
    loads = [_workload(split, size) for size in sorted(set(sizes)) if size <= len(split)]
    if not loads:
        raise UserError(f"{len(split)} texts fill no batch of {min(sizes)}: raise --examples")
    return loads


def _workload(split: EncodedSplit, size: int) -> Workload:
    chunks = length_sorted_chunks(split.lengths.tolist(), size)
    in_order = torch.tensor(chunks).flatten().sort().values  # the same texts, as they come
    return Workload(
        size,
        packed=[split.collate(part) for chunk in chunks for part in micro_batches(split, torch.tensor(chunk))],
        sorted=[split.collate(chunk) for chunk in chunks],
        unsorted=[split.collate(chunk) for chunk in in_order.split(size)],
    )


def micro_batches(split: EncodedSplit, rows: Tensor) -> list[Tensor]:
    """Cut rows into parts of at most `BATCH_TOKENS` tokens, as serving does."""
    return [rows[part] for part in token_batches(split.lengths[rows], BATCH_TOKENS)]
