"""The Triton attention against the plain loop: interpreted on the CPU, compiled for a GPU, and run on one if there is.

Triton decides at its import whether kernels are interpreted, so this file is also the program of those processes:

    python test_triton_attention.py interpret|compile OUTPUT
"""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""For processes of their own: the package need not be installed."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


class Case(NamedTuple):
    """Sequences, how many of their tokens are queries, and the bound that is known of their lengths."""

    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    heads: int = 2
    queries: str = "all"
    lengths: tuple[int, ...] = (1, 2, 16, 17, 33, 63, 64, 65, 203)
    longest: int = 211
    spare: int = 5
    """Rows behind the last sequence."""


CASES = {
    **{
        f"{head_dim}-{str(dtype).removeprefix('torch.')}": Case(head_dim, dtype)
        for head_dim in (32, 64, 128)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "64-float16": Case(64, torch.float16),
    "every length to 70": Case(heads=1, lengths=tuple(range(1, 71)), longest=80),
    "three heads": Case(heads=3),
    "fewer queries": Case(64, queries="a third"),
    "fewer queries in bfloat16": Case(64, torch.bfloat16, queries="a third"),
    "one query": Case(queries="the first"),
    "a sequence without queries or keys": Case(lengths=(3, 0, 40), longest=40),
    "blocks that are full": Case(64, torch.bfloat16, lengths=(64, 128), longest=128, spare=0),
    "short, and many rows too many": Case(lengths=(1, 7, 16, 3), longest=16, spare=40),
    "nothing but rows too many": Case(lengths=(), longest=16, spare=20),
    "longest is 1": Case(lengths=(1, 1, 1), longest=1, spare=1),
}


class Inputs(NamedTuple):
    """What an attention is called with; rows behind the last sequence hold NaN, so that reading one shows."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    heads: int


def inputs_of(case: Case) -> Inputs:
    """Random rows; keys and values are halves of the same rows, as a joint product leaves them."""
    counts = {"all": lambda n: n, "a third": lambda n: n // 3, "the first": lambda n: min(n, 1)}[case.queries]
    query_starts, key_starts = (
        torch.tensor([0, *numbers]).cumsum(0).int() for numbers in ([*map(counts, case.lengths)], case.lengths)
    )
    generator, dim = torch.Generator().manual_seed(7), case.heads * case.head_dim
    query = torch.randn(int(query_starts[-1]) + case.spare, dim, generator=generator)
    answer = torch.randn(int(key_starts[-1]) + case.spare, 2 * dim, generator=generator)
    query[query_starts[-1] :] = float("nan")
    answer[key_starts[-1] :] = float("nan")
    key, value = answer.to(case.dtype).chunk(2, dim=1)
    return Inputs(2 * query.to(case.dtype), key, value, query_starts, key_starts, case.heads)


def expected_of(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain loop in float64, on the rows in use only."""
    from tokprune_exp.kernels.attention import attend_in_loop

    queries, keys = int(inputs.query_starts[-1]), int(inputs.key_starts[-1])
    rows = inputs.query[:queries].double(), inputs.key[:keys].double(), inputs.value[:keys].double()
    context, received = attend_in_loop(*rows, inputs.query_starts, inputs.key_starts, inputs.heads, True)
    assert received is not None
    return context, received


def assert_near(inputs: Inputs, context: torch.Tensor, received: torch.Tensor) -> None:
    """Compare with the plain loop; rows that are no query or no key are 0; every query gives away 1."""
    expected_context, expected_received = expected_of(inputs)
    queries, keys = len(expected_context), len(expected_received)
    assert context.dtype == inputs.query.dtype and context.shape == inputs.query.shape
    assert received.dtype == torch.float32 and received.shape == (len(inputs.key),)
    tolerance = 2 * torch.finfo(context.dtype).eps if context.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(context[:queries].double(), expected_context, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(received[:keys], expected_received, atol=1e-5, rtol=1e-5)
    assert not context[queries:].any() and not received[keys:].any()
    begins, query_counts = inputs.key_starts.tolist(), inputs.query_starts.diff().tolist()
    for begin, end, count in zip(begins, begins[1:], query_counts, strict=False):
        assert received[begin:end].sum().item() == pytest.approx(count, rel=1e-5)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the interpreted kernel computed for every case."""
    return run_here("interpret", tmp_path_factory.mktemp("interpreted") / "answers.safetensors", TRITON_INTERPRET="1")


def run_here(mode: str, output: Path, **environment: str) -> dict[str, torch.Tensor]:
    """Run this file as a program, and read what it leaves."""
    command = [sys.executable, "-W", "error", __file__, mode, str(output)]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(output.parent), "PYTHONPATH": PYTHONPATH}
    made = subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    return load_file(output)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_is_the_plain_loop(interpreted: dict[str, torch.Tensor], name: str) -> None:
    assert_near(inputs_of(CASES[name]), interpreted[f"{name} context"], interpreted[f"{name} received"])


@needs_triton
def test_the_context_is_the_same_where_nobody_asks_what_is_received(interpreted: dict[str, torch.Tensor]) -> None:
    assert torch.equal(interpreted["alone context"], interpreted["64-bfloat16 context"])


@needs_triton
def test_the_same_bits_come_out_twice(interpreted: dict[str, torch.Tensor]) -> None:
    for part in ("context", "received"):
        assert torch.equal(interpreted[f"again {part}"], interpreted[f"64-bfloat16 {part}"])


@needs_triton
def test_what_the_kernel_would_read_wrongly_is_refused(interpreted: dict[str, torch.Tensor]) -> None:
    # the program of `interpreted` tries each, and notes whether a ValueError came
    refused = {name for name, tensor in interpreted.items() if name.startswith("refused") and tensor.item()}
    assert refused == {"refused: heads of 16", "refused: float64", "refused: two types", "refused: gaps"}


@needs_triton
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    sizes = run_here("compile", tmp_path / "sizes.safetensors")
    assert set(sizes) == {"bf16 with received", "bf16", "fp32 with received"}
    assert all(size.item() > 0 for size in sizes.values())


@pytest.mark.parametrize("hidden", ["triton", "nothing"])
def test_without_triton_or_without_a_gpu_there_is_no_attention_and_no_error(hidden: str) -> None:
    program = (
        f"import sys; sys.modules[{hidden!r}] = None\n"
        "from tokprune_exp.kernels.attention_triton import triton_attention\n"
        "assert triton_attention(64) is None"
    )
    settings = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", program], env=os.environ | settings, check=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_is_the_plain_loop_and_the_host_never_waits(name: str) -> None:
    from tokprune_exp.kernels.attention_triton import TritonAttention, triton_attention

    case = CASES[name]
    assert triton_attention(case.head_dim) is TritonAttention
    inputs = inputs_of(case)
    on_gpu = [one.cuda() if isinstance(one, torch.Tensor) else one for one in inputs]
    first = TritonAttention(case.longest)(*on_gpu, True)
    try:
        set_sync_debug_mode("error")
        second = TritonAttention(case.longest)(*on_gpu, True)
        alone, _ = TritonAttention(case.longest)(*on_gpu, False)
    finally:
        set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(alone, first[0])
    assert_near(inputs, *(one.cpu() for one in second))


def set_sync_debug_mode(mode: str) -> None:
    """Say what happens when the host waits for the GPU; torch warns that it does not notice every such wait."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def interpret() -> dict[str, torch.Tensor]:
    """Run every case through the interpreter, type checks of the arguments included."""
    from jaxtyping import install_import_hook

    with install_import_hook("tokprune_exp", "beartype.beartype"):
        from tokprune_exp.kernels.attention_triton import TritonAttention
    multiply_bfloat16_as_numbers()
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote holds NaN
    answers = {}
    for name, case in {**CASES, "again": CASES["64-bfloat16"]}.items():
        context, received = TritonAttention(case.longest)(*inputs_of(case), True)
        assert received is not None
        answers |= {f"{name} context": context, f"{name} received": received}
    case = CASES["64-bfloat16"]
    answers["alone context"], nothing = TritonAttention(case.longest)(*inputs_of(case), False)
    assert nothing is None
    good, wide = inputs_of(Case(spare=0)), torch.zeros(10, 128)
    bad = {
        "heads of 16": good._replace(heads=4),
        "float64": good._replace(query=good.query.double(), key=good.key.double(), value=good.value.double()),
        "two types": good._replace(value=good.value.half()),
        "gaps": Inputs(*[wide[:, ::2]] * 3, *[torch.tensor([0, 10], dtype=torch.int32)] * 2, 2),
        "nothing": good,
    }
    for name, inputs in bad.items():
        try:
            TritonAttention(211)(*inputs, True)
            answers[f"refused: {name}"] = torch.tensor(False)
        except ValueError:
            answers[f"refused: {name}"] = torch.tensor(True)
    return answers


def multiply_bfloat16_as_numbers() -> None:
    """Mend Triton 3.9's interpreter: it keeps bfloat16 as 16 bits and would multiply these as whole numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    multiply = interpreter_builder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter_builder.create_dot = lambda a, b, *more: multiply(widened(a), widened(b), *more)


def compile_for_hopper() -> dict[str, torch.Tensor]:
    """Compile three of the kernels for compute capability 9.0; returns the bytes of their machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokprune_exp.kernels.attention_triton import attend_block

    sizes = {}
    for name, number, columns, parts in (
        ("bf16 with received", "*bf16", 64, "*fp32"),
        ("bf16", "*bf16", 64, "constexpr"),
        ("fp32 with received", "*fp32", 32, "*fp32"),
    ):
        constants = {"HEADS": 12, "SIZE": 64, "ROWS": 64, "COLUMNS": columns}
        signature = dict.fromkeys(attend_block.arg_names, "i32")
        signature |= dict.fromkeys(["query", "key", "value", "context"], number)
        signature |= {"query_starts": "*i32", "key_starts": "*i32", "scale": "fp32", "parts": parts}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(attend_block, signature, constants | ({} if parts == "*fp32" else {"parts": None}))
        options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        sizes[name] = torch.tensor(len(compiled.asm["cubin"]))
    return sizes


if __name__ == "__main__":
    mode, output = sys.argv[1:]
    save_file({"interpret": interpret, "compile": compile_for_hopper}[mode](), output)
