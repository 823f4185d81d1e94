"""The compiled choice of tokens by a threshold, and the copies of those that stay: `selection.cpp`.

A few hundred numbers are compared and copied in each layer, in less time than it takes to ask PyTorch to do it.
Where it is missing, the retainer and `Packed.keep` do the same by PyTorch's operators.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokprune_exp.kernels.compiler import compiled
from tokprune_exp.kernels.linear import rows_to_compute

SOURCE = Path(__file__).with_name("selection.cpp")


@dataclass(frozen=True)
class Chosen:
    """Importance and keep mask on the grid; of the rows that stay the index, the place on it, the sequences' starts."""

    importance: Float[Tensor, "batch grid"]
    keep: Bool[Tensor, "batch grid"]
    index: Int[Tensor, " kept"]
    places: Int[Tensor, " kept"]
    starts: Int[Tensor, " starts"]


class CompiledSelection:
    """Choice and copies in machine code, for tensors in memory one row after the other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.choose_above, self.gather_two = library.choose_above, library.gather_two
        pointer, integer, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
        self.choose_above.restype = long
        self.choose_above.argtypes = [*[pointer] * 3, integer, long, pointer, real, real, *[pointer] * 5]
        self.gather_two.restype = None
        self.gather_two.argtypes = [pointer, long, long, pointer, long, pointer, long, pointer, pointer]

    def choose(
        self,
        received: Float[Tensor, " total"],
        places: Int[Tensor, " total"],
        starts: Int[Tensor, " starts"],
        protected: Bool[Tensor, "batch grid"],
        threshold: float,
        norm: int,
    ) -> Chosen:
        """Keep the rows above the threshold and the protected ones; see `encoder.trace.Bar`.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        types = [each.dtype for each in (received, places, starts, protected)]
        if types != [torch.float32, torch.int64, torch.int32, torch.bool]:
            raise ValueError(f"the compiled choice reads float32, int64, int32 and bool, not {types}")
        if not all(each.is_contiguous() for each in (received, places, starts, protected)):
            raise ValueError("the compiled choice reads tensors that lie in one piece")
        total, shape = len(places), protected.shape
        importance, keep = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
        kept, kept_starts = torch.empty(2, total, dtype=torch.int64), torch.empty_like(starts)
        count = self.choose_above(
            received.data_ptr(),
            places.data_ptr(),
            starts.data_ptr(),
            len(starts) - 1,
            shape[1],
            protected.data_ptr(),
            threshold,
            norm,
            importance.data_ptr(),
            keep.data_ptr(),
            kept.data_ptr(),
            kept.data_ptr() + 8 * total,
            kept_starts.data_ptr(),
        )
        return Chosen(importance, keep, kept[0, :count], kept[1, :count], kept_starts)

    def gather(
        self, index: Int[Tensor, " kept"], first: Float[Tensor, "total dim"], second: Float[Tensor, "total dim"]
    ) -> tuple[Float[Tensor, "kept dim"], Float[Tensor, "kept dim"]]:
        """Copy the kept rows of two tensors, with zeros behind them as `layout.gathered` leaves them.

        Raises:
            ValueError: rows that the compiled code would read wrongly.
        """
        if not (first.is_contiguous() and second.is_contiguous()):
            raise ValueError("the compiled copies read rows that lie one after the other")
        count = len(index)
        rows = rows_to_compute(count)
        copies = [torch.empty(rows, each.shape[1], dtype=each.dtype) for each in (first, second)]
        self.gather_two(
            index.data_ptr(),
            count,
            rows,
            first.data_ptr(),
            first.stride(0) * first.element_size(),
            second.data_ptr(),
            second.stride(0) * second.element_size(),
            copies[0].data_ptr(),
            copies[1].data_ptr(),
        )
        return copies[0][:count], copies[1][:count]


@cache
def compiled_selection() -> CompiledSelection | None:
    """Build or find the compiled selection; None where there is no compiler."""
    library = compiled(SOURCE)
    return None if library is None else CompiledSelection(library)
