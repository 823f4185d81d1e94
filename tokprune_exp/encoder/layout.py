"""How the tokens of a batch lie in memory: `Padded` for masked running, `Packed` for gathered running.

The encoder is written once and asks its layout for everything that differs between the two:

* `Padded` keeps the shape (batch, tokens, dim) for ever; a pruned token is only masked as a key. What is dropped can
  have a gradient.
* `Packed` holds (total, dim): the tokens that are still there, sequence after sequence. A pruned token and padding
  are gone. Used to evaluate, time and deploy, and to train where no gradient asks what a pruned token would have done;
  there the attention alone fills its sequences up to the longest that is left.

Importance and keep masks are one number per token and always lie on the grid (batch, tokens) of the padded batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from tokprune_exp.kernels.linear import rows_to_compute


@dataclass
class Attended:
    """What an attention leaves: the context of every query, and on request what pruning reads.

    `received` is Σ_{alive j} mean_h A_h[j, i] of each token i; fast layers leave it as `received_rows`, in the order of
    the packed tokens. `scores` are those before the softmax, -inf at keys that are not alive (and at queries that are
    not, in a packed layout).
    """

    context: Float[Tensor, "*queries dim"]
    received: Float[Tensor, "batch grid"] | None = None
    scores: Float[Tensor, "batch heads grid grid"] | None = None
    received_rows: Float[Tensor, " total"] | None = None


@dataclass(frozen=True)
class Wants:
    """Which by-products of an attention are asked for."""

    received: bool = False
    scores: bool = False


def at_least_float32(tensor: Shaped[Tensor, "*any"]) -> torch.dtype:
    """Return the dtype in which attention is summed to importances: fp32, or fp64 where all is fp64.

    Under autocast scores are bf16. A softmax that stayed in it would round each weight to eight bits: importances of
    different tokens would become equal, and their sum would not be the number of tokens that attend.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


GATE_CEILING = 20.0
"""How far a dropped token's score may stand above all alive ones in gated attention, so that exp and the gate's
gradient stay finite. It touches dropped tokens only, so no value."""
SMALLEST_SUM = 1e-30
"""What a row of attention of which dropout has left nothing is divided by."""


@dataclass(frozen=True)
class Sequences:
    """What a scorer or a retainer may know of a batch besides hidden states.

    `protected` tokens are never pruned: the first position always is, separators on request. A pruning with an encoder
    of its own (STTABT) reads the ids.
    """

    valid: Bool[Tensor, "batch tokens"]
    protected: Bool[Tensor, "batch tokens"]
    input_ids: Int[Tensor, "batch tokens"] | None = None
    token_type_ids: Int[Tensor, "batch tokens"] | None = None

    @cached_property
    def fingerprint(self) -> Int[Tensor, " batch"]:
        """A number that depends on the real tokens of a sequence only: random choices are those of the text.

        Raises:
            ValueError: the ids were not given.
        """
        if self.input_ids is None:
            raise ValueError("a random choice needs the ids of the tokens")
        places = torch.arange(1, self.valid.shape[1] + 1, device=self.valid.device)
        return ((self.input_ids.long() + 1) * places.square() * self.valid).sum(1)

    @cached_property
    def prunable(self) -> Bool[Tensor, "batch tokens"]:
        """V: the real tokens that may be pruned."""
        return self.valid & ~self.protected


@dataclass(frozen=True)
class Padded:
    """Masked running: pruned and padding tokens keep their place and are hidden from the softmax.

    `gate`, if any, says how much of every token is there: attention weights are exp(score)·gate, renormalised, as in
    DynamicViT, and a row counts gate towards what is received. It may equal `alive` in value and carry a gradient to
    every token (straight-through). Dropout comes after that, or, where `drops_first`, before the gate and the
    renormalisation: then what is left of a row still sums to 1.
    """

    sequences: Sequences
    alive: Bool[Tensor, "batch tokens"]
    gate: Float[Tensor, "batch tokens"] | None = None
    drops_first: bool = False

    @classmethod
    def start(cls, sequences: Sequences) -> "Padded":
        """Return the layout before the first layer: every real token is alive."""
        return cls(sequences, sequences.valid)

    def take(self, grid: Tensor) -> Tensor:
        """Bring values of the grid into this layout: here they stay as they are."""
        return grid

    def to_grid(self, values: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Bring one value per token onto the grid, 0 where no token is alive."""
        return values.masked_fill(~self.alive, 0.0)

    def keep(
        self, keep_mask: Bool[Tensor, "batch tokens"], gate: Float[Tensor, "batch tokens"] | None = None
    ) -> tuple["Padded", Callable[[Tensor], Tensor]]:
        """Return the layout of the survivors and the function that reduces a tensor to them (here: the identity)."""
        if self.gate is not None:  # an earlier choice stays in force
            gate = self.gate * (keep_mask if gate is None else gate)
        return replace(self, alive=self.alive & keep_mask, gate=gate), lambda tensor: tensor

    def attend(
        self,
        query: Float[Tensor, "batch tokens dim"],
        key: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch tokens dim"],
        heads: int,
        dropout: float = 0.0,
        wants: Wants = Wants(),
        queries: "Padded | Packed | None" = None,
    ) -> Attended:
        """Mix the values by softmax(q·k/√d_head) over the alive tokens of each sequence.

        `queries` is the layout of the tokens that attend, where they are fewer than the keys: all rows are computed
        and those of no query are never read. Plain products and a softmax: fused kernels have no second derivative.
        """
        batch, tokens, dim = query.shape
        v = value.view(batch, tokens, heads, dim // heads).transpose(1, 2)
        scores = self._products(query, key, heads)
        alive_scores = scores.masked_fill(~self.alive[:, None, None, :], float("-inf"))
        if self.gate is None:
            weights = alive_scores.softmax(-1, dtype=at_least_float32(scores) if wants.received else None)
        else:
            # relative to the largest alive score, so that the alive weights are exact whatever was dropped
            peak = alive_scores.amax(-1, keepdim=True).detach()
            relative = scores.to(at_least_float32(scores)) - peak
            relative = relative.masked_fill(~self.sequences.valid[:, None, None, :], float("-inf"))
            gated = relative.clamp(max=GATE_CEILING).exp() * self.gate[:, None, None, :]
            if self.drops_first:
                gated, dropout = F.dropout(gated, dropout), 0.0
            weights = gated / gated.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
        asking = self if queries is None else queries
        there = asking.alive if not isinstance(asking, Padded) or asking.gate is None else asking.gate
        received = self.to_grid((weights.mean(1) * there[:, :, None]).sum(1)) if wants.received else None
        context = F.dropout(weights.to(v.dtype), dropout) @ v  # (B, H, N, dim / H)
        return Attended(
            context.transpose(1, 2).reshape(batch, tokens, dim),
            received,
            alive_scores if wants.scores else None,
        )

    def scores(
        self, query: Float[Tensor, "batch tokens dim"], key: Float[Tensor, "batch tokens dim"], heads: int
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Compute q·k/√d_head, -inf at keys that are not alive."""
        return self._products(query, key, heads).masked_fill(~self.alive[:, None, None, :], float("-inf"))

    def _products(self, query: Tensor, key: Tensor, heads: int) -> Float[Tensor, "batch heads tokens tokens"]:
        q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key))
        return q @ k.transpose(2, 3) / q.shape[3] ** 0.5

    def first(self, hidden: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Return the hidden state of the first position of each sequence."""
        return hidden[:, 0]

    def mean(self, hidden: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Return the mean hidden state of the alive tokens of each sequence."""
        weight = self.alive[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


@dataclass(frozen=True)
class Packed:
    """Gathered running: only what is alive exists. `rows` are flat positions in the grid.

    On a GPU the host waits once per choice, to learn how many tokens are left, and in training once more, to learn the
    longest sequence.
    """

    sequences: Sequences
    alive: Bool[Tensor, "batch tokens"]
    rows: Int[Tensor, " total"]
    known_starts: Int[Tensor, " starts"] | None = None
    """`starts`, where who made the layout knows them."""

    @classmethod
    def start(cls, sequences: Sequences) -> "Packed":
        """Return the layout before the first layer: the real tokens, without any padding."""
        return cls(sequences, sequences.valid, sequences.valid.flatten().nonzero()[:, 0])

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(self.rows)] if len(self.alive) == 1 else self.alive.sum(1).tolist()

    @cached_property
    def starts(self) -> Int[Tensor, " starts"]:
        """Row at which each sequence starts, and at last the number of rows, as the kernels read it."""
        if self.known_starts is not None:
            return self.known_starts
        if self.alive.is_cuda:  # without asking the host
            return F.pad(self.alive.sum(1).cumsum(0), (1, 0)).int()
        return torch.tensor([0, *accumulate(self.counts)], dtype=torch.int32)

    @cached_property
    def are_first(self) -> bool:
        """Whether the tokens of every sequence are the first ones of its row of the grid."""
        counts = torch.tensor(self.counts, device=self.alive.device)[:, None]
        return torch.equal(self.alive, torch.arange(self.alive.shape[1], device=self.alive.device) < counts)

    def take(self, grid: Tensor) -> Tensor:
        """Bring values of the grid into this layout: (batch, tokens, …) → (total, …)."""
        return grid.flatten(0, 1)[self.rows]

    def to_grid(self, values: Float[Tensor, " total"]) -> Float[Tensor, "batch tokens"]:
        """Bring one value per token onto the grid, 0 where no token is alive."""
        grid = values.new_zeros(self.alive.numel())
        return grid.index_copy(0, self.rows, values).view(self.alive.shape)

    def keep(
        self, keep_mask: Bool[Tensor, "batch tokens"], gate: Float[Tensor, "batch tokens"] | None = None
    ) -> tuple["Packed", Callable[[Tensor], Tensor]]:
        """Return the layout of the survivors and the function that gathers a tensor's survivors.

        Raises:
            ValueError: a gate asks for the gradient of tokens that would be gone.
        """
        if gate is not None:
            raise ValueError("a gate needs the masked layout: in the gathered one what is dropped has no gradient")
        alive = self.alive & keep_mask
        index = self.take(alive).nonzero()[:, 0]
        if len(index) == len(self.rows):
            return self, lambda tensor: tensor
        survivors = Packed(self.sequences, alive, self.rows.index_select(0, index))
        return survivors, lambda tensor: gathered(tensor, index)

    def attend(
        self,
        query: Float[Tensor, "queries dim"],
        key: Float[Tensor, "total dim"],
        value: Float[Tensor, "total dim"],
        heads: int,
        dropout: float = 0.0,
        wants: Wants = Wants(),
        queries: "Padded | Packed | None" = None,
    ) -> Attended:
        """Mix the values within each sequence; see `Padded.attend`. One small attention per sequence, no padding.

        Where gradients are wanted and scores are not, one padded attention of the tokens that are left: fewer, larger
        products.
        """
        attending = queries if isinstance(queries, Packed) else self
        if query.requires_grad and not wants.scores:
            return self._attend_together(query, key, value, heads, dropout, wants, attending)
        dim = query.shape[1]
        q, k, v = (x.unflatten(1, (heads, dim // heads)).transpose(0, 1) for x in (query, key, value))  # (H, total, ·)
        sequences = zip(q.split(attending.counts, 1), k.split(self.counts, 1), v.split(self.counts, 1), strict=True)
        contexts, received, scores = [], [], []
        for one_q, one_k, one_v in sequences:
            if wants.received or wants.scores:
                scores.append(one_q @ one_k.transpose(1, 2) / (dim // heads) ** 0.5)
                weights = scores[-1].softmax(-1, dtype=at_least_float32(scores[-1]) if wants.received else None)
                received.append(weights.mean(0).sum(0))
                contexts.append(F.dropout(weights.to(one_v.dtype), dropout) @ one_v)
            else:
                attended = F.scaled_dot_product_attention(one_q[None], one_k[None], one_v[None], dropout_p=dropout)
                contexts.append(attended[0])
        return Attended(
            torch.cat(contexts, dim=1).transpose(0, 1).reshape(query.shape),
            self.to_grid(torch.cat(received)) if wants.received else None,
            self._on_grid(scores, attending) if wants.scores else None,
        )

    @cached_property
    def block(self) -> tuple[Int[Tensor, " total"], Bool[Tensor, "batch longest"]]:
        """Where each row goes when the sequences are padded to the longest one, and which places there are taken."""
        counts, longest = self.alive.sum(1), max(self.counts)
        sequence = self.rows // self.alive.shape[1]
        rank = torch.arange(len(self.rows), device=self.rows.device) - (counts.cumsum(0) - counts)[sequence]
        taken = torch.arange(longest, device=self.rows.device) < counts[:, None]
        return sequence * longest + rank, taken

    def _attend_together(
        self,
        query: Float[Tensor, "queries dim"],
        key: Float[Tensor, "total dim"],
        value: Float[Tensor, "total dim"],
        heads: int,
        dropout: float,
        wants: Wants,
        attending: "Packed",
    ) -> Attended:
        q, k, v = (layout._in_block(rows, heads) for layout, rows in ((attending, query), (self, key), (self, value)))
        (asking, is_query), (place, is_key) = attending.block, self.block
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        scores = scores.masked_fill(~is_key[:, None, None, :], float("-inf"))
        weights = scores.softmax(-1, dtype=at_least_float32(scores) if wants.received else None)
        context = (F.dropout(weights.to(v.dtype), dropout) @ v).transpose(1, 2).reshape(-1, query.shape[1])
        received = None
        if wants.received:
            received = self.to_grid((weights.mean(1) * is_query[:, :, None]).sum(1).flatten()[place])
        return Attended(context.index_select(0, asking), received)

    def _in_block(self, rows: Float[Tensor, "total dim"], heads: int) -> Float[Tensor, "batch heads longest part"]:
        place, taken = self.block
        block = rows.new_zeros(taken.numel(), rows.shape[1]).index_copy(0, place, rows)
        return block.view(*taken.shape, heads, -1).transpose(1, 2)

    def scores(
        self, query: Float[Tensor, "total dim"], key: Float[Tensor, "total dim"], heads: int
    ) -> Float[Tensor, "batch heads grid grid"]:
        """Compute q·k/√d_head on the grid, -inf where there is no query or no key."""
        q, k = (x.unflatten(1, (heads, -1)).transpose(0, 1).split(self.counts, 1) for x in (query, key))
        products = [one_q @ one_k.transpose(1, 2) / one_q.shape[2] ** 0.5 for one_q, one_k in zip(q, k, strict=True)]
        return self._on_grid(products, self)

    def _on_grid(self, scores: list[Tensor], attending: "Packed") -> Float[Tensor, "batch heads grid grid"]:
        """Spread the scores of each sequence, (heads, queries, keys), over the grid, -inf elsewhere."""
        batch, tokens = self.alive.shape
        grid = scores[0].new_full((batch, scores[0].shape[0], tokens, tokens), float("-inf"))
        for row, one in enumerate(scores):
            rows, columns = (layout.alive[row].nonzero()[:, 0] for layout in (attending, self))
            grid[row, :, rows[:, None], columns] = one
        return grid

    def first(self, hidden: Float[Tensor, "total dim"]) -> Float[Tensor, "batch dim"]:
        """Return the hidden state of the first position of each sequence."""
        return hidden.index_select(0, self.starts[:-1])

    def mean(self, hidden: Float[Tensor, "total dim"]) -> Float[Tensor, "batch dim"]:
        """Return the mean hidden state of the alive tokens of each sequence."""
        batch, tokens = self.alive.shape
        sums = hidden.new_zeros(batch, hidden.shape[1]).index_add(0, self.rows // tokens, hidden)
        return sums / self.alive.sum(1, keepdim=True)


def gathered(rows: Shaped[Tensor, "total dim"], index: Int[Tensor, " survivors"]) -> Shaped[Tensor, "survivors dim"]:
    """Copy the rows that are left, on the CPU with memory behind them for the rows that `filled_up` appends."""
    if rows.requires_grad or not rows.is_cpu:
        return rows.index_select(0, index)
    room = rows.new_empty(rows_to_compute(len(index)), rows.shape[1])
    room[len(index) :] = 0  # whatever lay there could be no number
    return torch.index_select(rows, 0, index, out=room[: len(index)])


Layout = Padded | Packed
LAYOUTS: dict[str, type[Padded] | type[Packed]] = {"masked": Padded, "gathered": Packed}
