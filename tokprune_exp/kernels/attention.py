"""The compiled attention of packed sequences: `attention.cpp`, built where a compiler is, and its plain twin.

It is checked against the plain loop each time it is loaded; without it the plain loop is used (`compiler.py`).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokprune_exp.kernels.compiler import compiled

SOURCE = Path(__file__).with_name("attention.cpp")
HEAD_DIMS = (32, 64)
TOLERANCE = 1e-5

Attended = tuple[Float[Tensor, "queries dim"], Float[Tensor, " in_use"] | None]
AttentionOfPacked = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], Attended]


def attend_in_loop(
    query: Float[Tensor, "queries dim"],
    key: Float[Tensor, "total dim"],
    value: Float[Tensor, "total dim"],
    query_starts: Int[Tensor, " starts"],
    key_starts: Int[Tensor, " starts"],
    heads: int,
    wants_received: bool,
) -> Attended:
    """Attend within each sequence, one after the other; the last entry of `*_starts` is the number of rows in use.

    Returns the context of every query and, on request, received_j = Σ_i mean_h softmax(q·k/√d_head)_ij of every key.
    """
    rows, dim = query.shape
    context = query.new_zeros(rows, dim)
    received = torch.zeros(int(key_starts[-1]), device=key.device) if wants_received else None
    q, k, v = (x.unflatten(1, (heads, dim // heads)).transpose(0, 1) for x in (query, key, value))  # (H, ·, dim / H)
    q_ends, k_ends = query_starts.tolist(), key_starts.tolist()
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        scores = q[:, q0:q1] @ k[:, k0:k1].transpose(1, 2) / (dim // heads) ** 0.5
        weights = scores.float().softmax(-1)
        if received is not None:
            received[k0:k1] = weights.mean(0).sum(0)
        context[q0:q1] = (weights.to(v.dtype) @ v[:, k0:k1]).transpose(0, 1).flatten(1)
    return context, received


class CompiledAttention:
    """`attend_in_loop` in machine code, for heads of 32 or 64 numbers in float32 or bfloat16 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = {torch.float32: library.attend_float32, torch.bfloat16: library.attend_bfloat16}
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
        for function in self.functions.values():
            function.argtypes = [
                pointer,
                long,
                pointer,
                pointer,
                long,
                pointer,
                pointer,
                *[integer] * 3,
                *[pointer] * 3,
            ]

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
        """See `attend_in_loop`. Rows behind the last sequence are not read, and their context is 0.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        function, (rows, dim), stride = self.functions.get(query.dtype), query.shape, key.stride(0)
        is_readable = query.stride(1) == key.stride(1) == value.stride(1) == 1 and value.stride(0) == stride
        if function is None or not is_readable or not query.dtype == key.dtype == value.dtype:
            raise ValueError("the compiled attention reads rows of one type, keys and values with the same stride")
        if query_starts.dtype != torch.int32 or key_starts.dtype != torch.int32:
            raise ValueError("the compiled attention reads starts in int32")
        total, in_use = int(key_starts[-1]), int(query_starts[-1])
        if in_use > rows or total > len(key) or len(query_starts) != len(key_starts):
            raise ValueError(f"starts end at {in_use} queries and {total} keys, but there are {rows} and {len(key)}")
        context = torch.empty(rows, dim, dtype=query.dtype)
        if rows > in_use:
            context[in_use:] = 0
        received = torch.empty(heads + 1, total) if wants_received else None  # of all heads, and of each
        failed = function(
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            value.data_ptr(),
            stride,
            query_starts.data_ptr(),
            key_starts.data_ptr(),
            len(key_starts) - 1,
            heads,
            dim // heads,
            context.data_ptr(),
            None if received is None else received.data_ptr(),
            None if received is None else received.data_ptr() + 4 * total,
        )
        if failed:
            raise ValueError(f"the compiled attention knows heads of {HEAD_DIMS}, not of {dim // heads}")
        return context, None if received is None else received[0]


def attention_for(head_dim: int, device: torch.device) -> Callable[[int], AttentionOfPacked]:
    """Return what makes the fastest attention of packed sequences that there is for such heads on this device.

    It is given a length that no sequence of the batch exceeds; a GPU's kernel is laid out by it.
    """
    if device.type == "cuda":
        from tokprune_exp.kernels.attention_triton import triton_attention

        fused = triton_attention(head_dim)
        if fused is not None:
            return fused
    fast = compiled_attention() if head_dim in HEAD_DIMS and device.type == "cpu" else None
    return lambda longest: attend_in_loop if fast is None else fast


@cache
def compiled_attention() -> CompiledAttention | None:
    """Build or find the compiled attention; None where there is no compiler, or where it does not compute the same."""
    library = compiled(SOURCE)
    attention = None if library is None else CompiledAttention(library)
    return attention if attention is not None and _is_right(attention) else None


def _is_right(attention: CompiledAttention) -> bool:
    """Compare with the plain loop on short ragged sequences."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, 1, 6, 40, 107], dtype=torch.int32)
    for head_dim in HEAD_DIMS:
        q, k, v = torch.randn(3, 107, 2 * head_dim, generator=generator)
        ours, plain = (attend(q, k, v, starts, starts, 2, True) for attend in (attention, attend_in_loop))
        for one, other in zip(ours, plain, strict=True):
            if one is None or other is None or not torch.allclose(one, other, atol=TOLERANCE, rtol=0):
                return False
    return True
