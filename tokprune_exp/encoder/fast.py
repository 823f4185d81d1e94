"""Layers for gathered inference: the same mathematics as `EncoderLayer`, by the fastest way that this machine has.

    model = model.for_inference()     # float32; precision="bf16" multiplies in bfloat16

Only layers are exchanged; the loop over them, the pruning and the trace stay those of `PrunedEncoder`. The hidden
states that go from layer to layer, sums, norms and the softmax are float32 in both precisions, and so are head, scorer
and retainer.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tokprune_exp.encoder.encoder import EncoderLayer, PrunedEncoder, PruningRule
from tokprune_exp.encoder.layout import Attended, Layout, Packed, Wants
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.kernels.attention import attention_for
from tokprune_exp.kernels.linear import product_of, rows_to_compute
from tokprune_exp.kernels.panels import PanelBlock, PanelProduct
from tokprune_exp.kernels.plan import compiled_plan
from tokprune_exp.kernels.selection import compiled_selection

Precision = Literal["fp32", "bf16"]
Part = TypeVar("Part", bound=torch.nn.Module)
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FastLayer(EncoderLayer):
    """An `EncoderLayer` for inference on packed tokens: weights in the order of the library, attention in one pass."""

    def __init__(self, layer: EncoderLayer, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.heads, self.dtype = layer.heads, dtype
        self.dim = layer.query.out_features
        # where not all tokens are queries (STTABT) these are products of their own, made when that first happens
        self.ask = cache(partial(product_of, [layer.query], dtype))
        self.answer = cache(partial(product_of, [layer.key, layer.value], dtype))
        self.ask_and_answer = product_of([layer.query, layer.key, layer.value], dtype)
        self.project = product_of([layer.attention_output], dtype)
        self.widen = product_of([layer.intermediate], dtype)
        self.narrow = product_of([layer.output], dtype)
        self.normalise_attended, self.normalise_output = _norm(layer.attention_norm), _norm(layer.output_norm)
        self.block = None
        if isinstance(self.project, PanelProduct) and isinstance(self.widen, PanelProduct):
            assert isinstance(self.narrow, PanelProduct)  # one kind serves for all products
            self.block = PanelBlock(self.project, self.widen, self.narrow, layer.attention_norm, layer.output_norm)
        self.attention_up_to = attention_for(layer.query.out_features // layer.heads, layer.query.weight.device)

    def attend(
        self,
        asking: Float[Tensor, "*queries dim"],
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        queries: Layout,
        wants: Wants,
    ) -> Attended:
        """Mix the tokens of each sequence into the queries; see `EncoderLayer.attend`."""
        layout, queries = _packed(layout), _packed(queries)
        rows = self.filled_up(hidden.to(self.dtype))
        if asking is hidden:
            query, key, value = self.ask_and_answer(rows).split(self.dim, dim=1)
        else:
            query = self.ask()(self.filled_up(asking.to(self.dtype)))
            key, value = self.answer()(rows).split(self.dim, dim=1)
        if wants.scores:
            asked, keys, values = query[: len(asking)].float(), key[: len(hidden)].float(), value[: len(hidden)].float()
            if queries is not layout or wants.received:
                return layout.attend(asked, keys, values, self.heads, wants=wants, queries=queries)
            fits = asked.is_cpu and asked.stride() == keys.stride() and layout.are_first
            plan = compiled_plan() if fits else None
            if plan is not None:
                scores, context = plan.attend(asked, keys, values, layout.starts, self.heads, layout.alive.shape[1])
                assert context is not None
                return Attended(context, scores=scores)
            scores = scores_on_grid(asked, keys, layout, self.heads)
            mixed = scores.softmax(-1) @ on_grid(values, layout, self.heads)
            return Attended(layout.take(mixed.transpose(1, 2).flatten(2)), scores=scores)
        attention = self.attention_up_to(layout.alive.shape[1])
        context, received = attention(query, key, value, queries.starts, layout.starts, self.heads, wants.received)
        return Attended(context[: len(asking)], received_rows=received)

    def choose(
        self,
        pruning: PruningRule,
        hidden: Float[Tensor, "total dim"],
        attended: Attended,
        layout: Layout,
        number: int,
        enforce: bool,
    ) -> tuple[Decision, Layout, Float[Tensor, "kept dim"], Float[Tensor, "kept dim"]]:
        """Ask the pruning after the attention; one that is a bar and nothing else is met in compiled code."""
        layout, received, selection = _packed(layout), attended.received_rows, compiled_selection()
        bar_of = getattr(pruning, "bar", None)  # a rule around the model's own (forced tokens) has none
        bar = None if bar_of is None else bar_of(number)
        if received is None or selection is None or bar is None or not enforce or not hidden.is_cpu:
            spread = None if received is None else layout.to_grid(received[: len(hidden)])
            return super().choose(pruning, hidden, replace(attended, received=spread), layout, number, enforce)
        chosen = selection.choose(
            received, layout.rows, layout.starts, layout.sequences.protected, bar.threshold, bar.norm
        )
        decision = Decision(chosen.importance, chosen.keep, threshold=bar.threshold)
        if len(chosen.index) == len(hidden):
            return decision, layout, hidden, attended.context
        survivors = Packed(layout.sequences, chosen.keep, chosen.places, chosen.starts)
        return decision, survivors, *selection.gather(chosen.index, hidden, attended.context)

    def scores(self, hidden: Float[Tensor, "total dim"], layout: Layout) -> Float[Tensor, "batch heads grid grid"]:
        """Compute the attention scores of the layer, before the softmax, and nothing else."""
        rows = self.filled_up(hidden.to(self.dtype))
        used = len(hidden)
        query, key, _ = self.ask_and_answer(rows)[:used].split(self.dim, dim=1)
        layout = _packed(layout)
        plan = compiled_plan() if query.is_cpu and layout.are_first else None
        if plan is not None:
            return plan.attend(query.float(), key.float(), None, layout.starts, self.heads, layout.alive.shape[1])[0]
        return scores_on_grid(query.float(), key.float(), layout, self.heads)

    def finish(
        self, hidden: Float[Tensor, "total dim"], context: Float[Tensor, "total dim"]
    ) -> Float[Tensor, "total dim"]:
        """Project the context, then the feed-forward block; see `EncoderLayer.finish`."""
        if self.block is not None:
            return self.block(hidden, context)
        rows, context = self.filled_up(hidden), self.filled_up(context)
        if self.dtype == torch.float32:
            attended = self.normalise_attended(self.project(context, other=rows))
            mixed = self.narrow(self.widen(attended, "gelu"), other=attended)
        else:
            attended = self.normalise_attended(rows + self.project(context))
            mixed = attended + self.narrow(self.widen(attended.to(self.dtype), "gelu"))
        return self.normalise_output(mixed)[: len(hidden)]

    def filled_up(self, rows: Float[Tensor, "total dim"]) -> Float[Tensor, "more dim"]:
        """Append rows that mean nothing where the layer's products want them; see `filled_up`."""
        return filled_up(rows) if self.project.fills_up else rows


def on_grid(rows: Float[Tensor, "total dim"], layout: Packed, heads: int) -> Float[Tensor, "batch heads grid head_dim"]:
    """Spread packed rows over the grid, 0 where there is none, and part them by heads."""
    batch, tokens = layout.alive.shape
    grid = rows.new_zeros(batch * tokens, rows.shape[1]).index_copy(0, layout.rows, rows)
    return grid.view(batch, tokens, heads, -1).transpose(1, 2)


def scores_on_grid(
    query: Float[Tensor, "total dim"], key: Float[Tensor, "total dim"], layout: Packed, heads: int
) -> Float[Tensor, "batch heads grid grid"]:
    """Compute what `Packed.scores` does for all sequences at once.

    Scores are put out on the grid in any case, and in batches of like length hardly any of it is padding.
    """
    q, k = on_grid(query * (query.shape[1] // heads) ** -0.5, layout, heads), on_grid(key, layout, heads)
    there = layout.alive[:, None, :, None] & layout.alive[:, None, None, :]
    return (q @ k.transpose(2, 3)).masked_fill_(~there, float("-inf"))


def filled_up(rows: Float[Tensor, "total dim"]) -> Float[Tensor, "more dim"]:
    """Append rows that mean nothing, up to a number of rows that the CPU's library has prepared for.

    Where there is memory behind the rows, as behind what a layer puts out, nothing is copied.
    """
    total, dim = rows.shape
    more = rows_to_compute(total) if rows.is_cpu else total
    if more == total:
        return rows
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    if rows.is_contiguous() and room >= more * dim:
        return rows.as_strided((more, dim), (dim, 1))
    return F.pad(rows, (0, 0, 0, more - total))


def _norm(norm: torch.nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Return a layer norm without the cost of calling a module."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
    return lambda rows: torch.layer_norm(rows, shape, weight, bias, eps)


def _packed(layout: Layout) -> Packed:
    """Return the layout if it is a packed one.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(layout, Packed):
        raise ValueError("a model prepared for inference runs gathered only")
    return layout


def fast_encoder(encoder: PrunedEncoder, precision: Precision) -> PrunedEncoder:
    """Return the encoder with its layers exchanged; embeddings and norms are shared with the original."""
    fast = copy(encoder)
    fast._modules = dict(encoder._modules)
    layers = [FastLayer(layer, DTYPES[precision]) for layer in encoder.layers if isinstance(layer, EncoderLayer)]
    fast.layers = torch.nn.ModuleList(layers)
    return fast


class FastLinear(torch.nn.Module):
    """A linear layer for inference: float32, by the fastest product that this machine has."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.multiply = product_of([linear], torch.float32)

    def forward(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Compute x Wᵀ + b."""
        return self.multiply(filled_up(x) if self.multiply.fills_up else x)[: len(x)]


def with_fast_linears(module: Part) -> Part:
    """Return a head or a pruning with its linear layers and small encoders exchanged; all else is shared with it."""
    parts = {name: part if part is None else _fast(part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    fast = copy(module)
    fast._modules = parts
    return fast


def _fast(part: torch.nn.Module) -> torch.nn.Module:
    if isinstance(part, PrunedEncoder):
        return fast_encoder(part, "fp32")
    return FastLinear(part) if isinstance(part, torch.nn.Linear) else with_fast_linears(part)
