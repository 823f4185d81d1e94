"""Who takes part in the race: our model, dense and pruned, in each precision and at each point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tokprune_exp.bench.points import Point
from tokprune_exp.bench.texts import Reads
from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.fast import Precision
from tokprune_exp.model import PrunedClassifier


@dataclass(frozen=True)
class Variant:
    """One participant: a forward pass over a batch, and how it is to be read and judged.

    `reference` is the key of the variant that its speed-up is over. `model` is there where tokens are pruned; its FLOPs
    are counted. An `is_exact` variant must put out the logits of our dense fp32 model.
    """

    key: str
    label: str
    side: Literal["ours", "peer"]
    forward: Callable[[Batch], Any]
    reads: Reads
    precision: str
    reference: str
    point: str | None = None
    model: PrunedClassifier | None = None
    is_exact: bool = False


def our_variants(
    prepared: dict[Precision, PrunedClassifier], points: Sequence[Point]
) -> tuple[list[Variant], list[Variant]]:
    """Return the dense and the pruned variants of models that are prepared for inference, by precision."""
    dense, pruned = [], []
    for precision, model in prepared.items():
        reference = f"dense_{precision}"
        forward = partial(model, execution="gathered", prune=False)
        dense.append(Variant(reference, f"ours dense {precision}", "ours", forward, "packed", precision, reference))
        for point in points:
            moved = point.of(model)
            place = "own point" if point.asked is None else f"{point.asked:g}×"
            pruned.append(
                Variant(
                    key=f"pruned_{precision}_{point.name}",
                    label=f"ours pruned {precision}, {place}",
                    side="ours",
                    forward=partial(moved, execution="gathered"),
                    reads="packed",
                    precision=precision,
                    reference=reference,
                    point=point.name,
                    model=moved,
                )
            )
    return dense, pruned
