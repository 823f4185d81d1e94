"""The race of one batch size: all variants take turns over the same texts, and what is made of their times."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tokprune_exp.bench.points import flops_reduction
from tokprune_exp.bench.texts import Workload
from tokprune_exp.bench.variants import Variant
from tokprune_exp.data.batch import Batch
from tokprune_exp.measure.latency import Timing, interleaved_medians

WARMUP = 1
"""Rounds that are not counted."""


@torch.inference_mode()
def race(
    variants: Sequence[Variant], load: Workload, rounds: int, after_each: Callable[[], Any] = lambda: None
) -> dict[str, Timing]:
    """Time every variant over all batches of one size, the variants taking turns in alternating order."""
    calls = {variant.key: over_all(variant.forward, getattr(load, variant.reads)) for variant in variants}
    return interleaved_medians(calls, rounds, WARMUP, after_each)


def over_all(forward: Callable[[Batch], Any], batches: Sequence[Batch]) -> Callable[[], None]:
    """Return a call that runs the forward pass over all batches."""

    def run() -> None:
        for batch in batches:
            forward(batch)

    return run


def rows_of(variants: Sequence[Variant], load: Workload, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Say for each variant what its times mean, one row each.

    `speedup` is over the variant's `reference`: our dense model, in the same precision where it is ours. Tokens are
    real ones before pruning. `flops_reduction` is that of the very texts timed, unpadded, scorer and retainer charged;
    `attained` the share of it that became speed. It can exceed 1: softmax, no part of FLOPs, falls with the square of
    the tokens.
    """
    rows = []
    for variant in variants:
        timing = timings[variant.key]
        speedup = timings[variant.reference].over(timing)
        row: dict[str, Any] = {
            "batch_size": load.size,
            "variant": variant.key,
            "label": variant.label,
            "side": variant.side,
            "precision": variant.precision,
            "point": variant.point,
            "reads": variant.reads,
            "batches": load.batches,
            "rounds": len(timing.seconds),
            "ms": 1e3 * timing.median_s / load.batches,
            "ms_quartiles": [1e3 * second / load.batches for second in timing.quartiles_s],
            "texts_per_s": load.texts / timing.median_s,
            "tokens_per_s": load.tokens / timing.median_s,
            "reference": variant.reference,
            "speedup": speedup.median,
            "speedup_quartiles": list(speedup.quartiles),
            "flops_reduction": None,
            "attained": None,
        }
        if variant.model is not None:
            row["flops_reduction"] = flops_reduction(variant.model, load.packed)
            row["attained"] = row["speedup"] / row["flops_reduction"]
        rows.append(row)
    return rows


def padding_of(variants: Sequence[Variant], load: Workload, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Say what not computing padding is worth, with nothing pruned: how full batches are, and how slow transformers is.

    `time_over_ours_dense` holds what padding costs and how fast the code is.
    """
    ratios = {
        variant.key: timings[variant.key].over(timings[variant.reference])
        for variant in variants
        if variant.key.startswith("transformers")
    }
    return {
        "batch_size": load.size,
        "filled_sorted": load.filled("sorted"),
        "filled_unsorted": load.filled("unsorted"),
        "time_over_ours_dense": {key: ratio.median for key, ratio in ratios.items()},
        "time_over_ours_dense_quartiles": {key: list(ratio.quartiles) for key, ratio in ratios.items()},
    }


def best_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Find the batch size at which each variant reads the most texts per second.

    `ratios` are our pruned variants' best over this one's best; the two may stand at different batch sizes, so they
    are ratios of medians.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["variant"] not in best or row["texts_per_s"] > best[row["variant"]]["texts_per_s"]:
            best[row["variant"]] = row
    pruned = [row for row in best.values() if row["point"] is not None]
    kept = ("variant", "label", "side", "precision", "point", "batch_size", "texts_per_s", "tokens_per_s")
    return [
        {key: row[key] for key in kept}
        | {"ratios": {ours["variant"]: ours["texts_per_s"] / row["texts_per_s"] for ours in pruned}}
        for row in best.values()
    ]
