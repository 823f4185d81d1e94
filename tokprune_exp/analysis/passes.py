"""Passes of a model over a split, gathered and batch by batch, under whatever rule decides which tokens go on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import BatchLoader, token_batches
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.encoder.encoder import EncoderOutput, PruningRule
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.serving import BATCH_TOKENS

Wrap = Callable[[PruningRule | None, Batch], PruningRule | None]
"""From the model's own rule on a batch (None: it prunes nothing) to the one that is in force."""


@dataclass
class Observed:
    """What a pruned pass left of each token; flat arrays lie as `EncodedSplit.input_ids` does.

    `survived` is the number of layers whose feed-forward block a token went through, `read` whether the last layer
    could still attend to it. `importance` is what it was chosen by in each layer, NaN where nothing was chosen or the
    token had gone before. `thresholds` are those of the layers that have one.
    """

    logits: Float[Tensor, "examples outputs"]
    survived: Int[np.ndarray, " tokens"]
    read: Bool[np.ndarray, " tokens"]
    importance: Float[np.ndarray, "tokens layers"]
    tokens_kept: Int[np.ndarray, "examples layers"]
    thresholds: list[float | None]


def forwards(
    model: PrunedClassifier, split: EncodedSplit, what: str, prune: bool = True, wrap: Wrap | None = None
) -> Iterator[tuple[Batch, Tensor, EncoderOutput]]:
    """Yield each batch, its logits and what the encoder put out; `what` stands beside the progress bar."""
    batches = BatchLoader(split, token_batches(split.lengths, BATCH_TOKENS))
    with progress(len(split), what) as bar:
        for batch in batches:
            with torch.inference_mode():
                hidden, layout = model.start(batch, "gathered")
                pruning = model.pruning if prune else None
                rule = None if pruning is None else pruning.rule(model.encoder, hidden, layout)
                encoded = model.encoder(hidden, layout, rule if wrap is None else wrap(rule, batch))
                logits = model.head(encoded.first).float()
            yield batch, logits, encoded
            bar.update(len(batch.labels))


def observe(model: PrunedClassifier, split: EncodedSplit) -> Observed:
    """Run the model as it prunes and record every token."""
    layers, total = model.encoder.shape.layers, len(split.input_ids)
    survived, read = np.zeros(total, np.int16), np.zeros(total, bool)
    importance = np.full((total, layers), np.nan, np.float32)
    kept = np.zeros((len(split), layers), np.int32)
    logits = torch.zeros(len(split), model.head.classifier.out_features)
    thresholds: list[float | None] = [None] * layers
    for batch, answers, encoded in forwards(model, split, "pruned"):
        places, trace = flat_places(split, batch), encoded.trace
        logits[batch.index] = answers
        kept[batch.index.numpy()] = trace.counts("outputs").numpy()
        survived[places] = sum(layer.outputs[batch.valid].numpy().astype(np.int16) for layer in trace.layers)
        read[places] = trace.layers[-1].keys[batch.valid].numpy()
        importance[places] = importance_of(trace)[batch.valid].numpy()
        for number, layer in enumerate(trace.layers):
            if layer.decision is not None and layer.decision.threshold is not None:
                thresholds[number] = float(layer.decision.threshold)
    return Observed(logits, survived, read, importance, kept, thresholds)


def logits_of(
    model: PrunedClassifier, split: EncodedSplit, what: str, prune: bool = True, wrap: Wrap | None = None
) -> Float[Tensor, "examples outputs"]:
    """Compute the logits of all texts, in their order."""
    logits = torch.zeros(len(split), model.head.classifier.out_features)
    for batch, answers, _ in forwards(model, split, what, prune, wrap):
        logits[batch.index] = answers
    return logits


def importance_of(trace: PruningTrace) -> Float[Tensor, "batch tokens layers"]:
    """Collect the importance by which each layer chose, NaN for tokens that were not there any more.

    A plan (STTABT) chooses the tokens that a layer reads, before the first layer for all of them: there the importance
    stands with the layer that reads.
    """
    if trace.entry is not None:
        decisions = [trace.entry, *(layer.decision for layer in trace.layers[:-1])]
        there = [trace.valid, *(layer.keys for layer in trace.layers[:-1])]
    else:
        decisions = [layer.decision for layer in trace.layers]
        there = [trace.valid, *(layer.outputs for layer in trace.layers[:-1])]
    nothing = torch.full(trace.valid.shape, torch.nan)
    chosen_by = [
        nothing if decision is None else decision.importance.float().masked_fill(~alive, torch.nan)
        for decision, alive in zip(decisions, there, strict=True)
    ]
    return torch.stack(chosen_by, dim=-1)


def flat_places(split: EncodedSplit, batch: Batch) -> Int[np.ndarray, " tokens"]:
    """Return where the real tokens of a batch lie in the split's flat arrays, in the order of `batch.valid`."""
    columns = torch.arange(batch.valid.shape[1])
    return (split.offsets[batch.index][:, None] + columns)[batch.valid].numpy()


def on_grid(flat: Bool[np.ndarray, " total"], split: EncodedSplit, batch: Batch) -> Bool[Tensor, "batch tokens"]:
    """Bring a flat mask of tokens onto the grid of a batch, False at padding."""
    grid = torch.zeros_like(batch.valid)
    grid[batch.valid] = torch.from_numpy(flat[flat_places(split, batch)])
    return grid


def progress(total: int, what: str, unit: str = " texts") -> Any:
    """Return a progress bar that shows on a terminal only and is gone when it is full."""
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None)
