"""Linear layers for inference on the CPU, and which library multiplies: what a short self-test finds fastest.

PyTorch's default library for fp32 products reaches less than half of the speed of oneDNN on some CPUs (AMD), and oneDNN
itself is faster on weights that lie in its own order. That order is made once, when a model is loaded.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune_exp.kernels.panels import PanelProduct

Activation = Literal["none", "gelu"]


class PlainProduct:
    """act(x Wᵀ + b) + other, by PyTorch's own operators."""

    fills_up = False
    """Whether rows are best filled up to `rows_to_compute`."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]) -> None:
        self.weight, self.bias = weight, bias

    def __call__(
        self, x: Float[Tensor, "rows in"], activation: Activation = "none", other: Tensor | None = None
    ) -> Float[Tensor, "rows out"]:
        """Multiply; the activation and the sum are made on the way."""
        product = F.linear(x, self.weight, self.bias)
        product = F.gelu(product) if activation == "gelu" else product
        return product if other is None else product + other


class PackedProduct:
    """The same with weights in oneDNN's own order; activation and sum are fused into the product."""

    fills_up = True

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.multiply_and_add = torch.ops.mkldnn._linear_pointwise.binary

    def __deepcopy__(self, memo: object) -> "PackedProduct":
        """A product never changes, and weights in oneDNN's order cannot be copied."""
        return self

    def __call__(
        self, x: Float[Tensor, "rows in"], activation: Activation = "none", other: Tensor | None = None
    ) -> Float[Tensor, "rows out"]:
        """Multiply; the activation and the sum are made on the way."""
        if other is not None and activation == "none":
            return self.multiply_and_add(x, other, self.weight, self.bias, "add")
        product = self.multiply(x, self.weight, self.bias, activation, [], "none")
        return product if other is None else product + other


Product = PlainProduct | PackedProduct | PanelProduct


def product_of(layers: list[nn.Linear], dtype: torch.dtype) -> Product:
    """Return the product with the weights of one linear layer, or of several that read the same input."""
    weight = torch.cat([layer.weight.detach() for layer in layers]).to(dtype)
    bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)
    return fastest_product(dtype)(weight, bias) if weight.device.type == "cpu" else PlainProduct(weight, bias)


@cache
def fastest_product(dtype: torch.dtype) -> type[Product]:
    """Time all on a small product and return the fastest of those that are as exact as the plain one.

    oneDNN's operator has no public name in PyTorch (its compiler uses it), so that it can be missing, as a C++ compiler
    can.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 384, generator=generator).to(dtype) for rows in (64, 384))
    bias = torch.zeros(384, dtype=dtype)
    exact = x.double() @ weight.double().T
    expected = exact, F.gelu(exact), exact + x.double()
    calls: dict[type[Product], Callable[[], Tensor]] = {}
    with torch.inference_mode():
        plain = PlainProduct(weight, bias)
        allowed = 8 * _error(plain(x), exact)
        calls[PlainProduct] = partial(plain, x)
        others: list[type[PackedProduct] | type[PanelProduct]] = [PackedProduct]
        others += [PanelProduct] if dtype == torch.float32 else []
        for kind in others:
            try:
                product = kind(weight, bias)
                answers = product(x), product(x, "gelu"), product(x, other=x)
            except (AttributeError, RuntimeError):
                continue
            errors = [_error(answer, true) for answer, true in zip(answers, expected, strict=True)]
            if max(errors) <= allowed:
                calls[kind] = partial(product, x)
        seconds = _fastest_of(list(calls.values()))
    return min(zip(seconds, calls, strict=True), key=lambda one: one[0])[1]


def _error(answer: Tensor, exact: Tensor) -> float:
    return float((answer.double() - exact).abs().max())


def _fastest_of(calls: Sequence[Callable[[], Tensor]], tries: int = 100) -> list[float]:
    """Seconds of the fastest try of each call: what else runs on the machine only ever adds to a call.

    They take turns, since what else runs may run for as long as all tries of one call take.
    """
    seconds = [float("inf")] * len(calls)
    for _ in range(tries):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            seconds[place] = min(seconds[place], time.perf_counter() - start)
    return seconds


def rows_to_compute(rows: int) -> int:
    """Round a number of rows up to one of about 180 numbers: not at all to 64 rows, then by a tenth at most.

    oneDNN prepares itself anew for every number of rows that it meets, for longer than a small product takes, and
    remembers no more than a thousand of such preparations.
    """
    step = 1 if rows <= 64 else 8 if rows <= 256 else 16 if rows <= 1024 else 64
    return -(-rows // step) * step
