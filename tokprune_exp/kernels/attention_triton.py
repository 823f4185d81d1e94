"""The attention of packed sequences on a GPU, written in Triton: `attend_in_loop` in one launch, no T×T matrix written.

    attention = triton_attention(head_dim)  # None: no Triton, no GPU, or not the same numbers
    context, received = attention(longest)(query, key, value, query_starts, key_starts, heads, wants_received=True)

One program is a block of queries of one head of one sequence. It goes over the keys a first time for the peak and the
sum of each row's softmax, then a second time to mix the values and to sum up the weights of each key. The last block of
keys is still at hand after the first time, so a sequence of one block is gone over once. Each program writes its sums
to a place of its own, and these are added in a fixed order: the same bits every time.

The host never waits: it launches as many programs as the longest sequence could need, and those without queries stop.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from subprocess import SubprocessError
from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokprune_exp.kernels.attention import Attended, AttentionOfPacked, attend_in_loop

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
except ImportError:
    IS_INSTALLED = False
else:
    IS_INSTALLED = True

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the context of normally distributed values may lie from the plain one; what a key receives, always 1e-5."""

if IS_INSTALLED:
    # Triton reads the source of a kernel, which the type checks of the tests would wrap: hence no_type_check.

    @triton.jit
    @no_type_check
    def scores_against(asked, key, key_stride, first, keys, scale, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
        """Multiply a block of queries by the keys from `first` on; -inf where there is no key.

        `tf32x3` makes float32 products of three on the matrix units; plain ones would leave registers for memory.
        """
        column = first + tl.arange(0, COLUMNS)[None, :]
        block = tl.load(key + column * key_stride + tl.arange(0, SIZE)[:, None], mask=column < keys, other=0.0)
        return tl.where(column < keys, tl.dot(asked, block, input_precision="tf32x3") * scale, float("-inf"))

    @triton.jit
    @no_type_check
    def mix(
        mixed, weights, value, value_stride, first, keys, parts, part, HEADS: tl.constexpr, SIZE: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Add the weighted values from `first` on, and write down what each of these keys received."""
        column = first + tl.arange(0, COLUMNS)
        if parts is not None:
            tl.store(parts + part + column, tl.sum(weights, 0) / HEADS, mask=column < keys)
        places = value + column[:, None] * value_stride + tl.arange(0, SIZE)[None, :]
        block = tl.load(places, mask=column[:, None] < keys, other=0.0)
        return tl.dot(weights.to(block.dtype), block, mixed, input_precision="tf32x3")

    @triton.jit(do_not_specialize=["rows", "total", "sequences", "blocks"])  # else each batch could mean a compilation
    @no_type_check
    def attend_block(
        query, key, value, query_starts, key_starts, context, parts, query_stride, key_stride, value_stride, rows,
        total, sequences, blocks, scale, HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """Attend for ROWS queries of one head of one sequence; a sequence too many stands for the rows behind the last.

        `scale` is log2(e)/√SIZE, for powers of two; `parts`, (blocks · HEADS, total), is None if nobody asks for it.
        """
        program = tl.program_id(0)
        block, head, sequence = program % blocks, program // blocks % HEADS, program // (blocks * HEADS)
        size = tl.arange(0, SIZE)[None, :]
        begin = tl.load(query_starts + sequence)
        if sequence == sequences:
            nothing = tl.zeros([ROWS, SIZE], context.dtype.element_ty)
            for first in range(begin + block * ROWS, rows, blocks * ROWS):
                row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
                tl.store(context + row * (HEADS * SIZE) + head * SIZE + size, nothing, mask=row < rows)
            return
        queries = tl.load(query_starts + sequence + 1) - begin
        if block * ROWS >= queries:
            return
        key_begin = tl.load(key_starts + sequence)
        keys = tl.load(key_starts + sequence + 1) - key_begin
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        query += begin.to(tl.int64) * query_stride + head * SIZE
        key += key_begin.to(tl.int64) * key_stride + head * SIZE
        value += key_begin.to(tl.int64) * value_stride + head * SIZE
        context += begin.to(tl.int64) * (HEADS * SIZE) + head * SIZE
        part = (block * HEADS + head).to(tl.int64) * total + key_begin

        asked = tl.load(query + row * query_stride + size, mask=row < queries, other=0.0)
        peak = tl.full([ROWS, 1], float("-inf"), tl.float32)
        summed = tl.zeros([ROWS, 1], tl.float32)
        raised = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, keys, COLUMNS):
            scores = scores_against(asked, key, key_stride, first, keys, scale, SIZE, COLUMNS)
            higher = tl.maximum(peak, tl.max(scores, 1, keep_dims=True))
            raised = tl.exp2(scores - higher)
            summed = summed * tl.exp2(peak - higher) + tl.sum(raised, 1, keep_dims=True)
            peak = higher
        share = tl.where(row < queries, 1.0 / summed, 0.0)
        last = (keys - 1) // COLUMNS * COLUMNS
        mixed = tl.zeros([ROWS, SIZE], tl.float32)
        mixed = mix(mixed, raised * share, value, value_stride, last, keys, parts, part, HEADS, SIZE, COLUMNS)
        for first in range(0, last, COLUMNS):
            scores = scores_against(asked, key, key_stride, first, keys, scale, SIZE, COLUMNS)
            weights = tl.exp2(scores - peak) * share
            mixed = mix(mixed, weights, value, value_stride, first, keys, parts, part, HEADS, SIZE, COLUMNS)
        tl.store(context + row * (HEADS * SIZE) + size, mixed.to(context.dtype.element_ty), mask=row < queries)


@dataclass(frozen=True)
class TritonAttention:
    """`attend_in_loop` on a GPU, without a wait of the host.

    `longest` is a number of tokens that no sequence exceeds, such as the width of the padded batch; what a longer
    sequence has behind it would be left out. Programs are launched for it, but work only where there are tokens.
    """

    longest: int

    def __call__(
        self,
        query: Float[Tensor, "queries dim"],
        key: Float[Tensor, "total dim"],
        value: Float[Tensor, "total dim"],
        query_starts: Int[Tensor, " starts"],
        key_starts: Int[Tensor, " starts"],
        heads: int,
        wants_received: bool,
    ) -> Attended:
        """See `attend_in_loop`. Scores, softmax and sums are float32; a sequence with queries must have keys.

        Rows behind the last sequence are not read and their context is 0. `received` is as long as `key`, 0 there.

        Raises:
            ValueError: tensors that the kernel would read wrongly.
        """
        (rows, dim), total, sequences, size = query.shape, len(key), len(key_starts) - 1, query.shape[1] // heads
        if size not in HEAD_DIMS or dim != heads * size:
            raise ValueError(f"the Triton attention knows heads of {HEAD_DIMS}, not {heads} heads of {dim} numbers")
        if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"the Triton attention reads rows of one type, not {query.dtype} and {key.dtype}")
        if not query.stride(1) == key.stride(1) == value.stride(1) == 1 or len(query_starts) != len(key_starts):
            raise ValueError("the Triton attention reads rows without gaps, and as many starts of queries as of keys")
        row_block, column_block = _blocks(self.longest, query.dtype)
        blocks = -(-self.longest // row_block)
        context = torch.empty(rows, dim, dtype=query.dtype, device=query.device)
        parts = torch.zeros(blocks * heads, total, device=query.device) if wants_received else None
        with torch.cuda.device_of(query):
            attend_block[(blocks * heads * (sequences + 1),)](
                query, key, value, query_starts, key_starts, context, parts,
                query.stride(0), key.stride(0), value.stride(0), rows, total, sequences, blocks,
                1 / (math.log(2) * math.sqrt(size)), HEADS=heads, SIZE=size, ROWS=row_block, COLUMNS=column_block,
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
        return context, None if parts is None else parts.sum(0)


def _blocks(longest: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many queries and keys meet at a time: no more than there can be, than registers hold, never under 16.

    The matrix units multiply no fewer than 16 rows.
    """
    power = 1 << max(4, (longest - 1).bit_length())
    return min(power, 64), min(power, 32 if dtype == torch.float32 else 64)


@cache
def triton_attention(head_dim: int) -> Callable[[int], AttentionOfPacked] | None:
    """Return what makes the attention for sequences up to some length, with heads of this size.

    None without Triton or a GPU, with TOKPRUNE_KERNELS=0, or where it cannot be built or computes something else: it is
    compared once with the plain loop, in float32 and bfloat16.
    """
    is_wanted = os.environ.get("TOKPRUNE_KERNELS") != "0" and head_dim in HEAD_DIMS
    if not (is_wanted and IS_INSTALLED and torch.cuda.is_available()):
        return None
    try:
        is_right = all(_is_right(head_dim, dtype, tolerance) for dtype, tolerance in TOLERANCES.items())
    except (TritonError, RuntimeError, OSError, SubprocessError):  # no C compiler, or a GPU that Triton does not know
        return None
    return TritonAttention if is_right else None


def _is_right(head_dim: int, dtype: torch.dtype, tolerance: float) -> bool:
    """Compare with the plain loop, in float64 on the CPU, on short sequences and one of several blocks."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 6, 40, 200], dtype=torch.int32)
    q, k, v = torch.randn(3, 200, 2 * head_dim, generator=generator).to(dtype)
    context, received = TritonAttention(160)(q.cuda(), k.cuda(), v.cuda(), starts.cuda(), starts.cuda(), 2, True)
    plain, plainly_received = attend_in_loop(q.double(), k.double(), v.double(), starts, starts, 2, True)
    assert received is not None and plainly_received is not None
    is_near = torch.allclose(context.cpu().double(), plain, atol=tolerance, rtol=0)
    return is_near and torch.allclose(received.cpu(), plainly_received, atol=1e-5, rtol=1e-5)
