"""PrunedEncoder: a BERT-family Transformer that asks its pruning which tokens go on, and records what was done.

    embed → [ pruning before? → attention (of fewer queries?) → pruning after it? → feed-forward ] × layers

The same loop runs masked (`Padded`) and gathered (`Packed`); see `layout.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune_exp.encoder.layout import Attended, Layout, Padded, Wants
from tokprune_exp.encoder.trace import Decision, LayerTrace, Place, PruningTrace


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of an encoder: everything needed to build one without its weights."""

    vocabulary: int
    dim: int
    heads: int
    layers: int
    ff_dim: int
    positions: int
    """Rows of the position table; RoBERTa's first `position_offset` rows are never used."""
    token_types: int = 2
    """0: the family has none (DistilBERT)."""
    position_offset: int = 0
    """Position of the first token: 0, or 2 in RoBERTa."""
    pad_token: int = 0
    norm_eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse sizes that make no encoder."""
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")

    @property
    def max_tokens(self) -> int:
        """The longest sequence that has positions."""
        return self.positions - self.position_offset


@runtime_checkable
class PruningRule(Protocol):
    """What the encoder needs of a pruning; `pruning/` has the implementations."""

    def decides(self, layer: int, place: Place) -> bool:
        """Whether tokens are chosen at this place of `layer` (0-based)."""
        ...

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Choose tokens from hidden states and, after an attention, from the attention each token received."""
        ...


class Embeddings(nn.Module):
    """Word + position + token-type embedding, normalised: the input of the first layer, E."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.word = nn.Embedding(shape.vocabulary, shape.dim, padding_idx=shape.pad_token)
        self.position = nn.Embedding(shape.positions, shape.dim)
        self.token_type = nn.Embedding(shape.token_types, shape.dim) if shape.token_types else None
        self.norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, words: Int[Tensor, "*tokens"], positions: Int[Tensor, "*tokens"], token_types: Int[Tensor, "*tokens"]
    ) -> Float[Tensor, "*tokens dim"]:
        """Embed tokens in any layout; positions are those before pruning."""
        summed = self.word(words) + self.position(positions)
        if self.token_type is not None:
            summed = summed + self.token_type(token_types)
        return self.dropout(self.norm(summed))


class EncoderLayer(nn.Module):
    """One post-norm Transformer layer, cut in two where token pruning can decide: after the attention."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads, self.attention_dropout = shape.heads, shape.dropout
        self.query = nn.Linear(shape.dim, shape.dim)
        self.key = nn.Linear(shape.dim, shape.dim)
        self.value = nn.Linear(shape.dim, shape.dim)
        self.attention_output = nn.Linear(shape.dim, shape.dim)
        self.attention_norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.intermediate = nn.Linear(shape.dim, shape.ff_dim)
        self.output = nn.Linear(shape.ff_dim, shape.dim)
        self.output_norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def attend(
        self,
        asking: Float[Tensor, "*queries dim"],
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        queries: Layout,
        wants: Wants,
    ) -> Attended:
        """Mix the tokens of each sequence into the queries: the context before its output projection."""
        dropout = self.attention_dropout if self.training else 0.0
        query, key, value = self.query(asking), self.key(hidden), self.value(hidden)
        return layout.attend(query, key, value, self.heads, dropout, wants, queries)

    def scores(self, hidden: Float[Tensor, "*tokens dim"], layout: Layout) -> Float[Tensor, "batch heads grid grid"]:
        """Compute the attention scores of the layer, before the softmax, and nothing else."""
        return layout.scores(self.query(hidden), self.key(hidden), self.heads)

    def choose(
        self,
        pruning: PruningRule,
        hidden: Float[Tensor, "*tokens dim"],
        attended: Attended,
        layout: Layout,
        number: int,
        enforce: bool,
    ) -> tuple[Decision, Layout, Float[Tensor, "*kept dim"], Float[Tensor, "*kept dim"]]:
        """Ask the pruning after the attention; return its decision and the survivors' layout, hidden state, context."""
        where: tuple[int, Place] = (number, "after")
        decision, layout, gather = _choose(pruning, hidden, layout, attended.received, where, enforce)
        return decision, layout, gather(hidden), gather(attended.context)

    def finish(
        self, hidden: Float[Tensor, "*tokens dim"], context: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, "*tokens dim"]:
        """Project the context, then the feed-forward block: work done for the survivors only."""
        attended = self.attention_norm(hidden + self.dropout(self.attention_output(context)))
        mixed = self.output(F.gelu(self.intermediate(attended)))
        return self.output_norm(attended + self.dropout(mixed))


class Multiplied(nn.Module):
    """A linear map whose output is multiplied by a mask of its tokens."""

    def __init__(self, linear: nn.Module, mask: Float[Tensor, "*tokens"]) -> None:
        super().__init__()
        self.linear, self.mask = linear, mask[..., None]

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """Compute m·(x Wᵀ + b)."""
        return self.linear(x) * self.mask


def softened(layer: EncoderLayer, keys: Float[Tensor, "*tokens"], outputs: Float[Tensor, "*tokens"]) -> EncoderLayer:
    """Return the layer, with its weights, under soft masks as STTABT's official code has them.

    Keys and values are multiplied by m^l; queries, attention output and both maps of the feed-forward block by m^{l+1};
    the residual stream is not. That attention weights, after dropout, count m^l is the layout's part, its gate.
    """
    soft = EncoderLayer.__new__(EncoderLayer)
    nn.Module.__init__(soft)
    soft.training, soft.heads, soft.attention_dropout = layer.training, layer.heads, layer.attention_dropout
    soft._modules = dict(layer._modules)
    for name in ("key", "value", "query", "attention_output", "intermediate", "output"):
        soft._modules[name] = Multiplied(getattr(layer, name), keys if name in ("key", "value") else outputs)
    return soft


@dataclass
class EncoderOutput:
    """Hidden states of the survivors, the layout they lie in, the record of what was pruned, and scores on request."""

    hidden: Float[Tensor, "*tokens dim"]
    layout: Layout
    trace: PruningTrace
    scores: list[Float[Tensor, "batch heads grid grid"]] = field(default_factory=list)
    """A_score of every layer, before the softmax (STTABT, eq. 1), if the inner life was asked for."""
    layer_outputs: list[Float[Tensor, "*tokens dim"]] = field(default_factory=list)
    """Hidden states that leave every layer, if the inner life was asked for."""

    @property
    def first(self) -> Float[Tensor, "batch dim"]:
        """The last hidden state of the first position, which is never pruned."""
        return self.layout.first(self.hidden)


class PrunedEncoder(nn.Module):
    """A Transformer encoder whose tokens can be pruned before or inside any layer."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.layers))

    def embed(
        self, input_ids: Int[Tensor, "batch tokens"], token_type_ids: Int[Tensor, "batch tokens"], layout: Layout
    ) -> Float[Tensor, "*tokens dim"]:
        """Embed a padded batch of ids into the given layout.

        Raises:
            ValueError: a sequence is longer than the position table.
        """
        tokens = input_ids.shape[1]
        if tokens > self.shape.max_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens, but this encoder has positions for {self.shape.max_tokens}"
            )
        positions = torch.arange(tokens, device=input_ids.device).expand_as(input_ids) + self.shape.position_offset
        return self.embeddings(*(layout.take(grid) for grid in (input_ids, positions, token_type_ids)))

    def forward(
        self,
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        pruning: PruningRule | None = None,
        enforce: bool = True,
        wants_inner: bool = False,
    ) -> EncoderOutput:
        """Run the layers on embedded tokens.

        With `enforce=False` the pruning is asked and recorded but every token is kept (the warm-up of AD-TP).
        `wants_inner` also returns every layer's attention scores and hidden states.
        """
        return self._run(hidden, layout, pruning, self.shape.layers, enforce, wants_inner)

    def choices(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout, pruning: PruningRule | None
    ) -> PruningTrace:
        """Record what a pruning chooses; a layer after the last choice is recorded and not computed."""
        places: tuple[Place, ...] = ("before", "queries", "after")
        numbers = range(self.shape.layers)
        chosen_in = [n for n in numbers if pruning is not None and any(pruning.decides(n, place) for place in places)]
        output = self._run(hidden, layout, pruning, until=max(chosen_in, default=-1) + 1)
        alive = output.layout.alive
        output.trace.layers += [LayerTrace(alive, alive, alive) for _ in numbers[len(output.trace.layers) :]]
        return output.trace

    def _run(
        self,
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        pruning: PruningRule | None,
        until: int,
        enforce: bool = True,
        wants_inner: bool = False,
    ) -> EncoderOutput:
        """Run the first `until` layers."""
        trace = PruningTrace(layout.sequences.valid)
        scores: list[Tensor] = []
        outputs: list[Tensor] = []
        for number, layer in enumerate(self.layers[:until]):
            assert isinstance(layer, EncoderLayer)
            decision = None
            if pruning is not None and pruning.decides(number, "before"):
                decision, layout, gather = _choose(pruning, hidden, layout, None, (number, "before"), enforce)
                hidden = gather(hidden)
            keys, queries, asking = layout, layout, hidden
            if pruning is not None and pruning.decides(number, "queries"):
                trace.entry = trace.entry or decision
                decision, queries, gather = _choose(pruning, hidden, layout, None, (number, "queries"), enforce)
                asking = gather(hidden)
                if decision.multiplies:
                    before = trace.decisions[-1] if number else trace.entry
                    assert before is not None and before.soft is not None and decision.soft is not None
                    layer = softened(layer, layout.take(before.soft), layout.take(decision.soft))
                    assert isinstance(layout, Padded)  # soft masks drop nothing
                    keys = replace(layout, drops_first=True)
            decides_after = pruning is not None and pruning.decides(number, "after")
            attended = layer.attend(asking, hidden, keys, queries, Wants(decides_after, wants_inner))
            hidden, layout, context = asking, queries, attended.context
            if pruning is not None and decides_after:
                decision, layout, hidden, context = layer.choose(pruning, hidden, attended, layout, number, enforce)
            hidden = layer.finish(hidden, context)
            if enforce and decision is not None and decision.gate is None and decision.soft is not None:
                hidden = hidden * layout.take(decision.soft)[..., None]  # x_out = M̃·x (LTP, eq. 12)
            trace.layers.append(LayerTrace(keys.alive, queries.alive, layout.alive, decision))
            if attended.scores is not None:
                scores.append(attended.scores)
                outputs.append(hidden)
        return EncoderOutput(hidden, layout, trace, scores, outputs)

    def attention_scores(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout
    ) -> list[Float[Tensor, "batch heads grid grid"]]:
        """Compute the attention scores of every layer before the softmax, and nothing else of the last layer."""
        *before, last = self.layers
        scores = []
        for layer in before:
            assert isinstance(layer, EncoderLayer)
            attended = layer.attend(hidden, hidden, layout, layout, Wants(scores=True))
            hidden = layer.finish(hidden, attended.context)
            scores.append(attended.scores)
        assert isinstance(last, EncoderLayer)
        scores.append(last.scores(hidden, layout))
        return [one for one in scores if one is not None]

    @contextmanager
    def compiled(self, backend: str = "inductor") -> Iterator[None]:
        """Within this block `torch.compile` fuses what follows the attention in each layer, for any number of tokens.

        The choice of tokens stays outside: it changes the shapes. There are no second derivatives.
        """
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            vars(layer)["finish"] = torch.compile(layer.finish, dynamic=True, backend=backend)
        try:
            yield
        finally:
            for layer in self.layers:
                del vars(layer)["finish"]

    def first_layers(self, count: int) -> "PrunedEncoder":
        """Return a student of the first `count` layers; the weights are shared with this encoder.

        Raises:
            ValueError: `count` (config key backbone.layers) is not between 1 and the number of layers.
        """
        if not 1 <= count <= self.shape.layers:
            raise ValueError(f"backbone.layers={count}, but this backbone has layers 1 to {self.shape.layers}")
        student = PrunedEncoder.__new__(PrunedEncoder)
        nn.Module.__init__(student)
        student.shape = replace(self.shape, layers=count)
        student.embeddings = self.embeddings
        student.layers = self.layers[:count]
        return student


def _choose(
    pruning: PruningRule,
    hidden: Tensor,
    layout: Layout,
    received: Tensor | None,
    where: tuple[int, Place],
    enforce: bool,
) -> tuple[Decision, Layout, Callable[[Tensor], Tensor]]:
    """Ask the pruning; return its decision, the layout of the survivors, and what reduces a tensor to them."""
    decision = pruning.decide(hidden, layout, received, *where)
    if not enforce:
        return decision, layout, lambda tensor: tensor
    return decision, *layout.keep(decision.keep, decision.gate)
