"""All the data of one run: three encoded splits and the batches that Lightning asks for."""

import logging
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from datasets import Dataset
from jaxtyping import Int
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokprune_exp.data.batches import BatchLoader, length_grouped_batches, share_of, sorted_batches
from tokprune_exp.data.sources import SourceSettings, count_known, load_source, texts_of
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import EncodedSplit, encode_texts
from tokprune_exp.encoder.pretrained import load_tokenizer
from tokprune_exp.errors import UserError

log = logging.getLogger(__name__)


@runtime_checkable
class DataSettings(SourceSettings, Protocol):
    """The group `data` of the configuration, the run's seed, and a tokenizer: loaded, or a folder, or a hub id."""

    batch_size: int
    evaluation_batch_size: int
    train_shorter_than: float | None
    tokenizer: str | Path | PreTrainedTokenizerBase
    seed: int


class TaskData(LightningDataModule):
    """The task's examples in three roles: `train`, `selection` (chooses epochs) and `evaluation` (reported once).

    `source` records where they came from, for result.json. Training batches differ from epoch to epoch if the Trainer
    runs with `reload_dataloaders_every_n_epochs=1`.

    With `train_shorter_than` training and selection hold short texts only, see `_keep_shorter_than`; the evaluation
    split stays whole.

    Raises:
        DataUnavailableError: a file is not there; the message names where it was looked for and how to get it.
        UserError: `train_shorter_than` leaves no example.
    """

    def __init__(self, task: Task, settings: DataSettings) -> None:
        super().__init__()
        self.task = task
        self.settings = settings
        tokenizer = settings.tokenizer
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        rows = load_source(task, settings)
        self.source: dict[str, Any] = rows.description
        self.train = self._encode(rows.train)
        self.selection = self._encode(rows.selection)
        self.evaluation = self._encode(rows.evaluation)
        if settings.train_shorter_than is not None:
            self._keep_shorter_than(settings.train_shorter_than)

    def _encode(self, rows: Dataset) -> EncodedSplit:
        labels = torch.tensor(
            rows[self.task.label_column][:], dtype=torch.float32 if self.task.is_regression else torch.int64
        )
        cache = self.cache / "tokenised"
        return encode_texts(self.tokenizer, texts_of(rows, self.task), self.task.max_tokens, labels, cache)

    def _keep_shorter_than(self, quantile: float) -> None:
        """Keep the training examples with fewer tokens than this quantile of the lengths of all of them.

        The selection slice is cut from the training split and stands in for it, so it is held to the same number of
        tokens: else the epoch would be chosen by lengths that training was not to see.
        """
        # of lengths, which are whole numbers, "higher" leaves the same ones below it as interpolation does
        limit = int(self.train.lengths.double().quantile(quantile, interpolation="higher"))
        train, selection = (split.where(split.lengths < limit) for split in (self.train, self.selection))
        found = (
            f"{len(train)} of {len(self.train)} for training and {len(selection)} of {len(self.selection)} to select by"
        )
        if not (len(train) and len(selection)):
            raise UserError(
                f"data.train_shorter_than={quantile} keeps the examples with fewer than {limit} tokens, and these are "
                f"{found}: raise it, or read more examples (data.max_train_examples, data.selection_examples)"
            )
        log.info("data.train_shorter_than=%s: fewer than %d tokens: %s", quantile, limit, found)
        for role, before, after in (("train", self.train, train), ("selection", self.selection, selection)):
            self.source[role] |= {"rows_used": len(after), "rows_of_any_length": len(before), "tokens_below": limit}
        self.source["evaluation_texts_also_in_train"] = count_known(self.evaluation.texts, train.texts, selection.texts)
        self.train, self.selection = train, selection

    @property
    def cache(self) -> Path:
        """Where what was computed from the data is kept for the next run."""
        return Path(self.settings.cache).expanduser()

    def train_dataloader(self) -> BatchLoader:
        """Every training example once, in batches of similar length, ordered by the seed and the current epoch.

        With several devices each has a share of the same batches.
        """
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        settings = self.settings
        batches = length_grouped_batches(self.train.lengths, settings.batch_size, settings.seed, epoch)
        if self.trainer is not None:
            batches = share_of(batches, self.trainer.global_rank, self.trainer.world_size)
        return BatchLoader(self.train, batches)

    def val_dataloader(self) -> BatchLoader:
        """The selection slice, by which an epoch is chosen; never the split that is reported. Whole on every device."""
        return self.in_order(self.selection)

    def evaluation_batches(self) -> BatchLoader:
        """The split that is reported, longest sequences first."""
        return self.in_order(self.evaluation)

    def rows_as_long_as_evaluation(self, examples: int) -> Int[Tensor, " rows"]:
        """Rows of the training split whose lengths are distributed like those of the reported split, longest first.

        What a text costs depends on its length, and the training texts may be of another kind (SST-2's are phrases). Of
        the reported split only the lengths are looked at.
        """
        wanted = self.evaluation.lengths.sort().values
        wanted = wanted[torch.linspace(0, len(wanted) - 1, min(examples, len(wanted), len(self.train))).long()]
        order = self.train.lengths.argsort(stable=True)
        places = torch.searchsorted(self.train.lengths[order], wanted).clamp(max=len(order) - 1)
        steps = torch.arange(len(places))
        places = (places - steps).cummax(0).values + steps  # no row twice
        places = torch.minimum(places, len(order) - len(places) + steps)
        return order[places].flip(0)

    def in_order(self, split: EncodedSplit) -> BatchLoader:
        """The batches of a split without any chance in them, longest sequences first."""
        return BatchLoader(split, sorted_batches(split.lengths, self.settings.evaluation_batch_size))
