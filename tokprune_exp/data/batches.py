"""Which examples stand together in a batch: those of similar length, so that little is padded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.errors import UserError

WINDOW = 50
"""Batches within which examples are sorted by length: enough to save padding, few enough to keep batches random."""


def length_grouped_batches(lengths: Int[Tensor, " examples"], batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The indices of each training batch of one epoch: every example once, a new order every epoch.

    Examples are shuffled, sorted by length inside windows of 50 batches, cut into batches, and the batches shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = torch.from_numpy(random.permutation(len(lengths)))
    batches = [
        batch
        for window in shuffled.split(WINDOW * batch_size)
        for batch in window[lengths[window].argsort(stable=True)].split(batch_size)
    ]
    return [batches[place] for place in random.permutation(len(batches))]


def share_of(batches: list[Tensor], rank: int, devices: int) -> list[Tensor]:
    """The batches of one of several devices: `rank`, `rank` + `devices` and so on.

    Each gets as many as every other, since a device without a batch would keep the others waiting: up to `devices` − 1
    batches are left out, others in every epoch.

    Raises:
        UserError: there are fewer batches than devices.
    """
    each = len(batches) // devices
    if not each:
        raise UserError(
            f"trainer.devices={devices}, but training has {len(batches)} batches only: choose fewer devices, or a "
            f"smaller data.batch_size"
        )
    return batches[rank : each * devices : devices]


def sorted_batches(lengths: Int[Tensor, " examples"], batch_size: int) -> list[Tensor]:
    """The indices of each evaluation batch, longest first: if memory does not suffice, that shows at once."""
    return list(lengths.argsort(descending=True, stable=True).split(batch_size))


def token_batches(lengths: Int[Tensor, " examples"], max_tokens: int) -> list[Tensor]:
    """The indices of batches for inference, longest texts first, each of at most `max_tokens` tokens or of one text.

    Some thousand tokens keep a CPU busy; with more, what one layer leaves no longer lies in its cache for the next.
    """
    batches: list[list[int]] = []
    room = 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        room -= int(lengths[row])
        if room < 0 or not batches:
            batches.append([])
            room = max_tokens - int(lengths[row])
        batches[-1].append(row)
    return [torch.tensor(rows) for rows in batches]


@dataclass
class BatchLoader:
    """The batches of a split, put together when they are asked for.

    Collating costs a few gathers, less than handing a batch over from another process: so no torch `DataLoader`.
    """

    split: EncodedSplit
    batches: list[Tensor]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.split.collate, self.batches)
