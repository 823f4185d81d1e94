"""Where the time of one forward goes: how much of it is scoring, choosing and gathering, and what scores cost.

    scoring     attention with scores − attention without them, both in the run itself; the scorer's own call
    selection   the retainer's call
    gathering   the survivors' layout, and fetching their rows

Each part is timed inside a pass of the model at its own point, and divided by the time of a pass without stop-watches.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tokprune_exp.bench.points import with_own_pruning
from tokprune_exp.bench.race import WARMUP, over_all
from tokprune_exp.bench.texts import Workload
from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.fast import FastLayer
from tokprune_exp.encoder.layout import Layout, Packed
from tokprune_exp.encoder.trace import Decision, Place
from tokprune_exp.kernels.attention import Attended, AttentionOfPacked, attend_in_loop
from tokprune_exp.kernels.selection import CompiledSelection
from tokprune_exp.measure.latency import Ratio, interleaved_medians
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import Planner

PARTS = ("scoring", "selection", "gathering")


@dataclass
class Watch:
    """Seconds by part of the work."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call with its time added to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


@torch.inference_mode()
def shares(
    model: PrunedClassifier, loads: Sequence[Workload], rounds: int, after_each: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Measure the shares of a model prepared for inference, a row per batch size and way of attending.

    `attention` is compiled or loop. `scoring`, `selection` and `gathering` are medians over rounds of part / pass.
    `scores_of_layer` is what a dense pass takes longer if every layer is asked for scores and nothing is dropped, as a
    share of the pass without: of a layer's time, as all layers do the same.
    """
    ways = attentions_of(model)
    return [row for load in loads for row in _shares(ways, load, rounds, after_each)]


def attentions_of(model: PrunedClassifier) -> dict[str, PrunedClassifier]:
    """Return the model with the compiled attention, where it has it, and with the plain loop."""
    ways = {"loop": with_attention(model, lambda _: attend_in_loop)}
    has_compiled = any(layer.attention_up_to(1) is not attend_in_loop for layer in _layers(model))
    return {"compiled": model, **ways} if has_compiled else ways


def with_attention(
    model: PrunedClassifier, exchange: Callable[[AttentionOfPacked], AttentionOfPacked]
) -> PrunedClassifier:
    """Return the model with the attention of its layers exchanged; weights are shared, its pruning is a copy."""
    changed = with_own_pruning(model)
    encoder = copy(model.encoder)
    layers = []
    for layer in _layers(model):
        twin = copy(layer)
        twin.attention_up_to = partial(_exchanged, exchange, layer.attention_up_to)
        layers.append(twin)
    encoder._modules = {**model.encoder._modules, "layers": nn.ModuleList(layers)}
    changed._modules["encoder"] = encoder
    return changed


def _exchanged(
    exchange: Callable[[AttentionOfPacked], AttentionOfPacked],
    attention_up_to: Callable[[int], AttentionOfPacked],
    longest: int,
) -> AttentionOfPacked:
    """Return what a layer attends with, for sequences of at most `longest` tokens, exchanged."""
    return exchange(attention_up_to(longest))


def _layers(model: PrunedClassifier) -> list[FastLayer]:
    return [layer for layer in model.encoder.layers if isinstance(layer, FastLayer)]


def _shares(
    ways: dict[str, PrunedClassifier], load: Workload, rounds: int, after_each: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Measure one batch size, all ways and passes taking turns."""
    calls, laps = {}, {}
    for way, model in ways.items():
        calls[f"{way} dense"] = over_all(partial(model, execution="gathered", prune=False), load.packed)
        calls[f"{way} scored"] = over_all(partial(run_scored, model), load.packed)
        if model.pruning is not None:
            calls[f"{way} whole"] = over_all(partial(model, execution="gathered"), load.packed)
            laps[way] = WatchedPass(model, load.packed)
            calls[f"{way} watched"] = laps[way]
    timings = interleaved_medians(calls, rounds, WARMUP, after_each)
    rows = []
    for way in ways:
        cost = timings[f"{way} scored"].over(timings[f"{way} dense"])
        row: dict[str, Any] = {"batch_size": load.size, "attention": way, "rounds": rounds}
        row["scores_of_layer"] = cost.median - 1
        row["scores_of_layer_quartiles"] = [quartile - 1 for quartile in cost.quartiles]
        if way in laps:
            whole = timings[f"{way} whole"].seconds
            for part in PARTS:
                seconds = [lap[part] for lap in laps[way].laps[WARMUP:]]
                share = Ratio.of([one / all_of for one, all_of in zip(seconds, whole, strict=True)])
                row |= {part: share.median, f"{part}_quartiles": list(share.quartiles)}
        rows.append(row)
    return rows


class WatchedPass:
    """A pass over batches with stop-watches in it; `laps` holds the seconds of each part, an entry per pass."""

    def __init__(self, model: PrunedClassifier, batches: Sequence[Batch]) -> None:
        self.watch, self.batches = Watch(), batches
        self.laps: list[dict[str, float]] = []
        self.turn = 0
        self.model = with_attention(model, self.both_ways)
        assert self.model.pruning is not None
        scorer, retainer = self.model.pruning.scorer, self.model.pruning.retainer
        is_plan = isinstance(retainer, Planner)
        for part, module, name in (
            ("scorer", scorer, "scores" if is_plan else "forward"),
            ("selection", retainer, "plan" if is_plan else "forward"),
        ):
            setattr(module, name, self.watch.around(part, getattr(module, name)))

    def __call__(self) -> None:
        """Run all batches and note the seconds."""
        self.watch.seconds.clear()
        with watched_layout(self.watch):
            for batch in self.batches:
                self.model(batch, "gathered")
        seconds = self.watch.seconds
        scoring = seconds["scorer"] + seconds["with scores"] - seconds["without scores"] + seconds["onto the grid"]
        self.laps.append(
            {"scoring": scoring, "selection": seconds["selection"], "gathering": seconds["gathering"]},
        )

    def both_ways(self, attention: AttentionOfPacked) -> AttentionOfPacked:
        """Return an attention that, where scores are asked for, also runs without them, each first every other time."""

        def attend(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, heads: int, wants: bool) -> Attended:
            if not wants:
                return attention(q, k, v, q_at, k_at, heads, False)
            self.turn += 1
            answers = {}
            for scored in (True, False) if self.turn % 2 else (False, True):
                part = "with scores" if scored else "without scores"
                answers[scored] = self.watch.around(part, attention)(q, k, v, q_at, k_at, heads, scored)
            return answers[True]

        return attend


@contextmanager
def watched_layout(watch: Watch) -> Iterator[None]:
    """Within this block the time of gathering, and of bringing scores onto the grid, is added to the watch."""
    keep = Packed.keep

    def timed_keep(*args: Any) -> tuple[Packed, Callable[[Tensor], Tensor]]:
        survivors, gather = keep(*args)
        _ = survivors.starts  # every attention reads it, so it belongs to gathering
        return survivors, watch.around("gathering", gather)

    with (
        patch.object(Packed, "keep", watch.around("gathering", timed_keep)),
        patch.object(Packed, "to_grid", watch.around("onto the grid", Packed.to_grid)),
        patch.object(CompiledSelection, "choose", watch.around("selection", CompiledSelection.choose)),
        patch.object(CompiledSelection, "gather", watch.around("gathering", CompiledSelection.gather)),
    ):
        yield


@dataclass(frozen=True)
class ScoresOnly:
    """A rule that asks every layer for the attention that tokens receive, and drops none."""

    def decides(self, layer: int, place: Place) -> bool:
        """After every attention."""
        return place == "after"

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Keep everything."""
        assert received is not None
        return Decision(received, layout.alive)


def run_scored(model: PrunedClassifier, batch: Batch) -> Tensor:
    """Compute the logits of the dense model while every layer is asked for scores."""
    embeddings, layout = model.start(batch, "gathered")
    return model.head(model.encoder(embeddings, layout, ScoresOnly(), enforce=False).first)
