"""The states that a classifier decides by, dense and pruned: what a t-SNE draws, and how well they fall into classes.

Of each example two vectors: the first token's state behind the last layer, and the mean over the text's tokens that
the last layer read, of their states as it read them (behind it LTP and STTABT leave little but the first token).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from tokprune_exp.analysis.passes import Wrap, flat_places, forwards
from tokprune_exp.analysis.resampling import Bootstrap, interval
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.encoder.encoder import PruningRule
from tokprune_exp.encoder.layout import Layout, Packed
from tokprune_exp.encoder.trace import Decision, Place
from tokprune_exp.model import PrunedClassifier

EXAMPLES = 1000
"""States are taken of no more examples than this."""


@dataclass
class Watching:
    """A rule that looks at what the last layer is about to read, and changes nothing."""

    rule: PruningRule | None
    last: int
    seen: list[tuple[Tensor, Layout]] = field(default_factory=list)

    def decides(self, layer: int, place: Place) -> bool:
        """Where the watched rule does, and where the last layer has its keys but has not attended yet."""
        return (layer, place) == (self.last, "queries") or self._rule_decides(layer, place)

    def _rule_decides(self, layer: int, place: Place) -> bool:
        return self.rule is not None and self.rule.decides(layer, place)

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Return what the watched rule says, or keep all."""
        if (layer, place) == (self.last, "queries"):
            self.seen.append((hidden, layout))
        if self.rule is not None and self.rule.decides(layer, place):
            return self.rule.decide(hidden, layout, received, layer, place)
        return Decision(layout.alive.float(), layout.alive)


@dataclass
class States:
    """States of the first token and means over the text's tokens that were read; `read` says how many these were.

    Where it was none, the mean is the state of the first token as the last layer read it.
    """

    first: Float[Tensor, "examples dim"]
    mean: Float[Tensor, "examples dim"]
    read: Tensor


def states_of(
    model: PrunedClassifier, split: EncodedSplit, in_text: Bool[np.ndarray, " tokens"], prune: bool
) -> States:
    """Run the model over a split and take the two vectors of each example; `in_text` is False at special tokens."""
    last, dim = model.encoder.shape.layers - 1, model.encoder.shape.dim
    first, mean = torch.zeros(len(split), dim), torch.zeros(len(split), dim)
    read = torch.zeros(len(split), dtype=torch.long)
    watching: list[Watching] = []

    def wrap(rule: PruningRule | None, batch: Batch) -> PruningRule:
        watching.append(Watching(rule, last))
        return watching[-1]

    watch: Wrap = wrap
    for batch, _, encoded in forwards(model, split, f"states {'pruned' if prune else 'dense'}", prune, watch):
        ((hidden, layout),) = watching.pop().seen
        assert isinstance(layout, Packed)
        counted = torch.zeros_like(batch.valid)
        counted[batch.valid] = torch.from_numpy(in_text[flat_places(split, batch)])
        counted &= layout.alive
        none = ~counted.any(1)
        read[batch.index] = counted.sum(1)
        counted[none, 0] = True
        weight = layout.take(counted).float()
        example = layout.rows // counted.shape[1]
        sums = torch.zeros(len(batch.labels), dim).index_add(0, example, hidden.float() * weight[:, None])
        mean[batch.index] = sums / counted.sum(1, keepdim=True)
        first[batch.index] = encoded.first.float()
    return States(first, mean, read)


def save_states(file: Path, states: dict[str, States], rows: list[int], labels: np.ndarray, predicted: Tensor) -> None:
    """Write the states as safetensors: `example`, `label`, `predicted`, and `<pass>_first`, `_mean`, `_read` each."""
    tensors = {"example": torch.tensor(rows), "label": torch.as_tensor(labels), "predicted": predicted}
    for name, some in states.items():
        tensors |= {f"{name}_first": some.first, f"{name}_mean": some.mean, f"{name}_read": some.read}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def silhouette_rows(states: dict[str, States], labels: np.ndarray, replicates: int) -> list[dict[str, Any]]:
    """Make a row per pass and vector: the mean silhouette of the examples by their gold class, with its interval.

    The silhouette of an example is (b − a)/max(a, b), a the mean Euclidean distance to its own class and b to the
    nearest other one: 1 is well apart, 0 is none. The interval resamples the examples' silhouettes. Examples of which
    no token was read are left out of the means' rows. Nothing is returned where a class has fewer than two examples.
    """
    from sklearn.metrics import silhouette_samples

    rows = []
    for name, some in states.items():
        for vector, values, used in (
            ("first", some.first, torch.ones(len(labels), dtype=torch.bool)),
            ("mean", some.mean, some.read > 0),
        ):
            classes, sizes = np.unique(labels[used.numpy()], return_counts=True)
            if len(classes) < 2 or sizes.min() < 2:
                continue
            each = silhouette_samples(values[used].numpy(), labels[used.numpy()]).astype(float)
            low, high = interval(Bootstrap(len(each), replicates).sums(each) / len(each))
            row = {"pass": name, "states": vector, "examples": len(each), "silhouette": each.mean()}
            rows.append({**row, "silhouette_low": float(low), "silhouette_high": float(high)})
    return rows
