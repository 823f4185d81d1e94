"""What STTABT does before the first layer, compiled: scores of the ApproxNet, and a plan made from them: `plan.cpp`.

It is many small steps for few numbers, in less time than it takes to ask PyTorch to do them. Where it is missing, the
layers and the retainers (`pruning/retainers/backtracking.py`, `concrete.py`) do the same by PyTorch's operators.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokprune_exp.kernels.compiler import compiled

SOURCE = Path(__file__).with_name("plan.cpp")

Chosen = tuple[Float[Tensor, "steps batch tokens"], Bool[Tensor, "steps batch tokens"]]
"""Importance and set of tokens of every step: those of layers 1 … L, and at last what the classifier reads."""


class _Texts(ctypes.Structure):
    _fields_ = (
        ("scores", ctypes.POINTER(ctypes.c_void_p)),
        ("valid", ctypes.c_void_p),
        ("always", ctypes.c_void_p),
        ("layers", ctypes.c_int),
        ("count", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("width", ctypes.c_long),
    )


class CompiledPlan:
    """Scores on the grid and plans in machine code, in float32 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
        library.attend_on_grid.restype = None
        library.attend_on_grid.argtypes = [*[pointer] * 3, long, pointer, *[integer] * 3, long, pointer, pointer]
        library.plan_most_attended.argtypes = [ctypes.POINTER(_Texts), real, *[pointer] * 3]
        library.plan_concrete.argtypes = [ctypes.POINTER(_Texts), real, pointer, real, *[pointer] * 2]

    def attend(
        self,
        query: Float[Tensor, "queries dim"],
        key: Float[Tensor, "total dim"],
        value: Float[Tensor, "total dim"] | None,
        starts: Int[Tensor, " starts"],
        heads: int,
        width: int,
    ) -> tuple[Float[Tensor, "batch heads grid grid"], Float[Tensor, "in_use dim"] | None]:
        """Return q·k/√d_head of packed texts on a grid of this width, -inf where no token is, and their contexts.

        Rows behind the last text are not read.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        rows = [one for one in (query, key, value) if one is not None]
        if any(one.dtype != torch.float32 or one.stride() != (query.stride(0), 1) for one in rows):
            raise ValueError("the compiled scores are of rows of float32 with one stride")
        if starts.dtype != torch.int32 or int(starts[-1]) > min(len(one) for one in rows):
            raise ValueError("the compiled scores read starts in int32, and all rows that they name")
        batch, dim = len(starts) - 1, query.shape[1]
        scores = torch.empty(batch, heads, width, width)
        context = None if value is None else torch.empty(int(starts[-1]), dim)
        self.library.attend_on_grid(
            query.data_ptr(),
            key.data_ptr(),
            None if value is None else value.data_ptr(),
            query.stride(0),
            starts.data_ptr(),
            batch,
            heads,
            dim // heads,
            width,
            scores.data_ptr(),
            None if context is None else context.data_ptr(),
        )
        return scores, context

    def most_attended(
        self,
        scores: Sequence[Float[Tensor, "batch heads grid grid"]],
        valid: Bool[Tensor, "batch grid"],
        always: Bool[Tensor, "batch grid"] | None,
        propagation: float,
        counts: Int[Tensor, " batch"],
    ) -> Chosen | None:
        """Run Algorithm 1 with k = `counts`; None where a text's tokens are not the first ones of its row."""
        counts = counts.long().contiguous()
        return self._plan(self.library.plan_most_attended, scores, valid, always, propagation, counts.data_ptr())

    def concrete(
        self,
        scores: Sequence[Float[Tensor, "batch heads grid grid"]],
        valid: Bool[Tensor, "batch grid"],
        always: Bool[Tensor, "batch grid"] | None,
        propagation: float,
        logits: Float[Tensor, " layers"],
        floor: float,
    ) -> Chosen | None:
        """Choose by Concrete masks, hard, with `logits` of p_θ; None where a text's tokens are not the first ones."""
        logits = logits.detach().float().contiguous()
        return self._plan(self.library.plan_concrete, scores, valid, always, propagation, logits.data_ptr(), floor)

    def _plan(
        self,
        function: Callable[..., int],
        scores: Sequence[Tensor],
        valid: Tensor,
        always: Tensor | None,
        propagation: float,
        *rule: object,
    ) -> Chosen | None:
        """Call one of the two ways back.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        batch, heads, width, _ = scores[0].shape
        if any(one.dtype != torch.float32 or one.shape != scores[0].shape or one.is_cuda for one in scores):
            raise ValueError("a compiled plan is made from scores in float32, of one size in all layers, on the CPU")
        scores, valid = [one.contiguous() for one in scores], valid.contiguous()
        always = None if always is None else (always & valid).contiguous()
        importance = torch.empty(len(scores) + 1, batch, width)
        keep = torch.empty(len(scores) + 1, batch, width, dtype=torch.bool)
        texts = _Texts(
            (ctypes.c_void_p * len(scores))(*(one.data_ptr() for one in scores)),
            valid.data_ptr(),
            None if always is None else always.data_ptr(),
            len(scores),
            batch,
            heads,
            width,
        )
        failed = function(ctypes.byref(texts), propagation, *rule, importance.data_ptr(), keep.data_ptr())
        return None if failed else (importance, keep)


@cache
def compiled_plan() -> CompiledPlan | None:
    """Build or find the compiled plan; None where there is no compiler."""
    library = compiled(SOURCE)
    return None if library is None else CompiledPlan(library)
