"""Linear layers whose weights lie in panels, in machine code: `panels.cpp`, for float32 on the CPU.

`fastest_product` (`linear.py`) decides whether they serve, after it has compared their answers and their speed.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune_exp.kernels.compiler import compiled

SOURCE = Path(__file__).with_name("panels.cpp")
TOLERANCE = 1e-5


class _Linear(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Block(ctypes.Structure):
    _fields_ = (
        ("project", _Linear),
        ("widen", _Linear),
        ("narrow", _Linear),
        ("attended", _Norm),
        ("output", _Norm),
    )


@cache
def compiled_panels() -> ctypes.CDLL | None:
    """Build or find the library; None where there is no compiler, or where it does not compute the same."""
    library = compiled(SOURCE)
    if library is None:
        return None
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.panel_width.restype = long
    library.multiply.restype = library.finish.restype = None
    library.multiply.argtypes = [pointer, pointer, long, integer, pointer, pointer]
    library.finish.argtypes = [pointer, pointer, pointer, long, pointer]
    return library if _is_right(library) else None


class PanelProduct:
    """act(x Wᵀ + b) + other, with weights in panels; neither the library nor the panels ever change.

    Raises:
        RuntimeError: there is no library.
    """

    fills_up = False

    def __init__(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"], library: ctypes.CDLL | None = None
    ) -> None:
        library = library or compiled_panels()
        if library is None:
            raise RuntimeError("no compiler, no products in panels")
        self.out_features, self.in_features = weight.shape
        width = library.panel_width()
        missing = -self.out_features % width
        self.panels = F.pad(weight.float(), (0, 0, 0, missing)).unflatten(0, (-1, width)).transpose(1, 2).contiguous()
        self.bias = F.pad(bias.float(), (0, missing))
        self.layer = _Linear(self.panels.data_ptr(), self.bias.data_ptr(), self.in_features, self.out_features)
        self.at, self.library = ctypes.addressof(self.layer), library

    def __deepcopy__(self, memo: object) -> "PanelProduct":
        """A product never changes, and addresses cannot be copied."""
        return self

    def __call__(
        self, x: Float[Tensor, "rows in"], activation: Literal["none", "gelu"] = "none", other: Tensor | None = None
    ) -> Float[Tensor, "rows out"]:
        """Multiply; the activation and the sum are made on the way.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        _check(x, len(x), self.in_features)
        out = torch.empty(len(x), self.out_features)
        if other is not None:
            _check(other, len(x), self.out_features)
        added = None if other is None else other.data_ptr()
        self.library.multiply(self.at, x.data_ptr(), len(x), activation == "gelu", added, out.data_ptr())
        return out


class PanelBlock:
    """What follows the attention in a layer, in one call; see `EncoderLayer.finish`.

    Raises:
        ValueError: the widths of the layers do not follow each other.
    """

    def __init__(
        self,
        project: PanelProduct,
        widen: PanelProduct,
        narrow: PanelProduct,
        attended: nn.LayerNorm,
        output: nn.LayerNorm,
    ) -> None:
        dim, wide = narrow.out_features, narrow.in_features
        widths = (project.out_features, widen.in_features, widen.out_features)
        if widths != (dim, dim, wide) or not attended.normalized_shape == output.normalized_shape == (dim,):
            raise ValueError(f"no block of layers of {dim} numbers that become {wide}: {widths}")
        self.dim, self.context_dim = dim, project.in_features
        self.parts = project, widen, narrow
        tensors = [tensor.detach() for norm in (attended, output) for tensor in (norm.weight, norm.bias)]
        self.norms = [tensor.float().contiguous() for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in self.norms]
        norms = _Norm(*addresses[:2], attended.eps), _Norm(*addresses[2:], output.eps)
        self.block = _Block(*(part.layer for part in self.parts), *norms)
        self.at, self.library = ctypes.addressof(self.block), project.library

    def __deepcopy__(self, memo: object) -> "PanelBlock":
        """A block never changes, and addresses cannot be copied."""
        return self

    def __call__(
        self, hidden: Float[Tensor, "rows dim"], context: Float[Tensor, "rows dim"]
    ) -> Float[Tensor, "rows dim"]:
        """Project the context, then the feed-forward block.

        Raises:
            ValueError: tensors that the compiled code would read wrongly.
        """
        rows = len(hidden)
        _check(hidden, rows, self.dim)
        _check(context, rows, self.context_dim)
        out = torch.empty(rows, self.dim)
        self.library.finish(self.at, hidden.data_ptr(), context.data_ptr(), rows, out.data_ptr())
        return out


def _check(rows: Tensor, count: int, width: int) -> None:
    """Refuse what is not `count` rows of `width` floats, one after the other in memory."""
    if rows.dtype != torch.float32 or rows.shape != (count, width) or not rows.is_contiguous():
        raise ValueError(
            f"the compiled products read {count} rows of {width} float32, one after the other, "
            f"not {tuple(rows.shape)} of {rows.dtype}"
        )


def _is_right(library: ctypes.CDLL) -> bool:
    """Compare a block with the same written in PyTorch's operators, on widths that no panel divides."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layers = [nn.Linear(40, 40), nn.Linear(40, 100), nn.Linear(100, 40)]
        norms = [nn.LayerNorm(40), nn.LayerNorm(40)]
        hidden, context = torch.randn(2, 30, 40)
        project, widen, narrow = layers
        products = [PanelProduct(layer.weight.detach(), layer.bias.detach(), library) for layer in layers]
        ours = PanelBlock(products[0], products[1], products[2], norms[0], norms[1])(hidden, context)
        attended = norms[0](hidden + project(context))
        plain = norms[1](attended + narrow(F.gelu(widen(attended))))
    return torch.allclose(ours, plain, atol=TOLERANCE, rtol=0)
