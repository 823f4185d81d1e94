"""The fast parts of gathered inference against plain ones: the compiled attention, the packed products."""

import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokprune_exp.kernels import attention, compiler, linear, panels, plan, selection
from tokprune_exp.kernels.attention import HEAD_DIMS, CompiledAttention, attend_in_loop, attention_for
from tokprune_exp.kernels.linear import PackedProduct, PlainProduct, fastest_product, product_of, rows_to_compute
from tokprune_exp.kernels.panels import PanelBlock, PanelProduct, compiled_panels
from tokprune_exp.kernels.selection import CompiledSelection, compiled_selection

COUNTS = [1, 2, 7, 31, 32, 33, 64, 65, 200]
HEADS = 3


@pytest.fixture(scope="module")
def compiled() -> CompiledAttention:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler on this machine")
    built = attention.compiled_attention()
    assert built is not None
    return built


def starts_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def packed(counts: list[int], head_dim: int, spare: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Query, and key and value as halves of one tensor, as a layer makes them; `spare` rows stand behind all."""
    generator = torch.Generator().manual_seed(sum(counts) + head_dim)
    rows, dim = sum(counts) + spare, HEADS * head_dim
    query = scale * torch.randn(rows, dim, generator=generator)
    return query, *torch.randn(rows, 2 * dim, generator=generator).chunk(2, dim=1)


def by_sdpa(query, key, value, query_starts, key_starts):
    """PyTorch's own attention of each sequence, and its weights by a softmax written out, in float64."""
    contexts, received = [], []
    for place in range(len(key_starts) - 1):
        q = query[query_starts[place] : query_starts[place + 1]]
        k, v = (x[key_starts[place] : key_starts[place + 1]] for x in (key, value))
        q, k, v = (x.double().unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
        contexts.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1))
        weights = (torch.einsum("hid,hjd->hij", q, k) / q.shape[2] ** 0.5).exp()
        received.append((weights / weights.sum(2, keepdim=True)).sum((0, 1)) / HEADS)
    return torch.cat(contexts), torch.cat(received)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("spare", [0, 5])
def test_both_attentions_equal_the_softmax_of_each_sequence(compiled, head_dim, spare):
    query, key, value = packed(COUNTS, head_dim, spare)
    starts = starts_of(COUNTS)
    context, received = by_sdpa(query, key, value, starts, starts)
    for attend in (compiled, attend_in_loop):
        ours, column_sums = attend(query, key, value, starts, starts, HEADS, True)
        torch.testing.assert_close(ours[: sum(COUNTS)].double(), context, atol=1e-5, rtol=0)
        torch.testing.assert_close(column_sums.double(), received, atol=1e-5, rtol=0)
        assert not ours[sum(COUNTS) :].any()
        assert attend(query, key, value, starts, starts, HEADS, False)[1] is None


def test_what_a_sequence_hands_out_is_as_much_as_it_has_queries(compiled):
    queries = [1, 1, 3, 31, 5, 0, 64, 9, 17]
    query, _, _ = packed(queries, 32)
    _, key, value = packed(COUNTS, 32)
    _, received = compiled(query, key, value, starts_of(queries), starts_of(COUNTS), HEADS, True)
    sums = torch.stack([part.sum() for part in received.split(COUNTS)])
    torch.testing.assert_close(sums, torch.tensor(queries, dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fewer_queries_than_keys(compiled, head_dim):
    queries = [1, 1, 3, 31, 5, 1, 64, 9, 17]
    query, _, _ = packed(queries, head_dim)
    _, key, value = packed(COUNTS, head_dim)
    arguments = query, key, value, starts_of(queries), starts_of(COUNTS)
    context, received = by_sdpa(*arguments)
    ours = compiled(*arguments, HEADS, True)
    torch.testing.assert_close(ours[0].double(), context, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1].double(), received, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 30.0, 300.0])
def test_scores_near_and_far_apart_are_exact(compiled, scale):
    """With large scores the softmax is nearly one-hot, with none it is even: neither may overflow or round away."""
    query, key, value = packed([9, 40], 32, scale=scale)
    starts = starts_of([9, 40])
    # beyond exp's range only a softmax relative to the largest score is finite
    expected = [
        F.scaled_dot_product_attention(
            *(x[a:b].double().unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (query, key, value))
        )
        for a, b in ((0, 9), (9, 49))
    ]
    context, received = compiled(query, key, value, starts, starts, HEADS, True)
    torch.testing.assert_close(
        context.double(), torch.cat([one.transpose(0, 1).flatten(1) for one in expected]), atol=1e-4, rtol=0
    )
    assert torch.isfinite(received).all()


def test_bfloat16_is_rounded_only_where_it_is_read_and_written(compiled):
    query, key, value = (x.bfloat16() for x in packed(COUNTS, 32))
    starts = starts_of(COUNTS)
    context, received = by_sdpa(query, key, value, starts, starts)
    ours, column_sums = compiled(query, key, value, starts, starts, HEADS, True)
    assert ours.dtype == torch.bfloat16 and column_sums.dtype == torch.float32
    assert torch.equal(ours, context.bfloat16()) or (ours.double() - context).abs().max() < 2**-7 * context.abs().max()
    torch.testing.assert_close(column_sums.double(), received, atol=1e-5, rtol=0)


def test_the_number_of_threads_changes_no_bit(compiled):
    query, key, value = packed(COUNTS, 32)
    starts, before, answers = starts_of(COUNTS), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(compiled(query, key, value, starts, starts, HEADS, True))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_what_the_compiled_code_would_read_wrongly_is_refused(compiled):
    query, key, value = packed([3, 4], 32)
    starts = starts_of([3, 4])
    with pytest.raises(ValueError, match="starts end at 8 queries and 7 keys, but there are 7 and 7"):
        compiled(query, key, value, starts_of([4, 4]), starts, HEADS, False)
    with pytest.raises(ValueError, match="rows of one type"):
        compiled(query, key.bfloat16(), value, starts, starts, HEADS, False)
    with pytest.raises(ValueError, match="the same stride"):
        compiled(query, key.contiguous(), value, starts, starts, HEADS, False)
    with pytest.raises(ValueError, match="starts in int32"):
        compiled(query, key, value, starts.long(), starts, HEADS, False)
    with pytest.raises(ValueError, match=r"heads of \(32, 64\), not of 16"):
        compiled(query, key, value, starts, starts, 2 * HEADS, False)


# ---------------------------------------------------------------------------------------------------------------
# Building


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKPRUNE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_it_is_built_once_and_found_again(compiled, fresh_cache, monkeypatch):
    library = compiler._built(attention.SOURCE)
    assert [file.name for file in fresh_cache.iterdir()] == [library.name]
    written = library.stat().st_mtime_ns
    assert compiler._built(attention.SOURCE) == library and library.stat().st_mtime_ns == written
    monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DOTHER"])
    assert compiler._built(attention.SOURCE) != library


def test_without_a_compiler_the_plain_loop_serves(fresh_cache, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert attention.compiled_attention.__wrapped__() is None and compiled_selection.__wrapped__() is None
    assert compiled_panels.__wrapped__() is None
    monkeypatch.setattr(attention, "compiled_attention", lambda: None)
    assert attention_for(32, torch.device("cpu"))(40) is attend_in_loop


def test_a_compiler_that_fails_leaves_nothing_behind(compiled, fresh_cache, monkeypatch, tmp_path):
    (tmp_path / "wrong.cpp").write_text("this is no program")
    monkeypatch.setattr(attention, "SOURCE", tmp_path / "wrong.cpp")
    with pytest.raises(subprocess.CalledProcessError):
        compiler._built(attention.SOURCE)
    assert list(fresh_cache.iterdir()) == []
    assert attention.compiled_attention.__wrapped__() is None


def test_a_library_that_computes_something_else_is_not_used(compiled, fresh_cache, monkeypatch, tmp_path):
    source = attention.SOURCE.read_text()
    (tmp_path / "wrong.cpp").write_text(source.replace("1.0f / std::sqrt", "1.01f / std::sqrt"))
    monkeypatch.setattr(attention, "SOURCE", tmp_path / "wrong.cpp")
    assert attention.compiled_attention.__wrapped__() is None
    assert len(list(fresh_cache.glob("*.so"))) == 1


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("TOKPRUNE_KERNELS", "0")
    assert attention.compiled_attention.__wrapped__() is None


def test_heads_of_other_sizes_take_the_plain_loop():
    assert attention_for(8, torch.device("cpu"))(40) is attend_in_loop


def test_building_needs_no_torch_headers():
    """The libraries speak plain C, so a new version of PyTorch needs no new build."""
    sources = [module.SOURCE for module in (attention, panels, plan, selection)]
    assert not any("torch" in source.read_text() for source in sources)


# ---------------------------------------------------------------------------------------------------------------
# Selection


@pytest.fixture(scope="module")
def selecting(compiled) -> CompiledSelection:
    built = compiled_selection()
    assert built is not None
    return built


@pytest.mark.parametrize("norm", [0, 128])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_compiled_choice_is_that_of_a_plain_loop(selecting, norm, share):
    generator = torch.Generator().manual_seed(1)
    width = max(COUNTS) + 3
    received = torch.rand(sum(COUNTS), generator=generator)
    columns = [torch.randperm(width, generator=generator)[:count].sort().values for count in COUNTS]
    places = torch.cat([row * width + column for row, column in enumerate(columns)])
    protected = torch.zeros(len(COUNTS), width, dtype=torch.bool)
    protected[:, 0] = True
    protected.flatten()[places[::11]] = True
    scaled, owner = [], [row for row, count in enumerate(COUNTS) for _ in range(count)]
    for value, row in zip(received, owner, strict=True):
        scaled.append(value / (norm or COUNTS[row]))
    threshold = float(torch.stack(scaled).quantile(1 - share)) if share else 2.0
    chosen = selecting.choose(received, places, starts_of(COUNTS), protected, threshold, norm)
    stays = [i for i, value in enumerate(scaled) if value > threshold or protected.flatten()[places[i]]]
    importance = torch.zeros(protected.numel())
    importance[places] = torch.stack(scaled)
    keep = torch.zeros(protected.numel(), dtype=torch.bool)
    keep[places[stays]] = True
    assert chosen.index.tolist() == stays and torch.equal(chosen.places, places[stays])
    assert torch.equal(chosen.importance.flatten(), importance) and torch.equal(chosen.keep.flatten(), keep)
    assert chosen.starts.tolist() == [sum(owner[i] < row for i in stays) for row in range(len(COUNTS) + 1)]


@pytest.mark.parametrize("count", [1, 64, 65, 300, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_copies_are_the_rows_with_zeros_behind(selecting, count, dtype):
    generator = torch.Generator().manual_seed(count)
    first, second = (
        torch.randn(1200, 48, generator=generator),
        torch.randn(1300, 48, generator=generator).to(dtype)[:1200],
    )
    index = torch.randperm(1200, generator=generator)[:count].sort().values
    copies = selecting.gather(index, first, second)
    for copy, original in zip(copies, (first, second), strict=True):
        assert torch.equal(copy, original[index])
        behind = copy.as_strided((rows_to_compute(count), copy.shape[1]), copy.stride())[count:]
        assert not behind.any()


def test_rows_that_do_not_follow_each_other_are_refused(selecting):
    wide = torch.randn(4, 10)
    with pytest.raises(ValueError, match="one after the other"):
        selecting.gather(torch.tensor([0, 2]), wide[:, :5], torch.randn(4, 5))


# ---------------------------------------------------------------------------------------------------------------
# Products


def layers_of(*sizes: int) -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Linear(48, size) for size in sizes]


@pytest.mark.parametrize("kind", [PlainProduct, PackedProduct, PanelProduct])
@pytest.mark.parametrize("rows", [1, 3, 16, 65])
def test_products_with_activation_and_sum(kind, rows, compiled):
    (layer,) = layers_of(48)
    product = kind(layer.weight.detach(), layer.bias.detach())
    x, other = torch.randn(2, rows, 48, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    for ours, expected in (
        (product(x), exact),
        (product(x, "gelu"), exact * torch.special.ndtr(exact)),
        (product(x, other=other), exact + other.double()),
        (product(x, "gelu", other), exact * torch.special.ndtr(exact) + other.double()),
    ):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_layers_that_read_the_same_input_become_one_product():
    layers = layers_of(16, 32)
    x = torch.randn(5, 48)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], dim=1)
    torch.testing.assert_close(product_of(layers, torch.float32)(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(product_of(layers, torch.bfloat16)(x.bfloat16()).float(), expected, atol=0.05, rtol=0.02)


def test_where_the_packed_product_is_missing_or_wrong_the_plain_one_serves(monkeypatch):
    class Missing(PackedProduct):
        def __init__(self, weight, bias):
            raise RuntimeError("no such operator")

    class Coarse(PackedProduct):
        def __call__(self, x, activation="none", other=None):
            return super().__call__(x.bfloat16().float(), activation, other)

    def seconds(calls: list[partial]) -> list[float]:  # the plain one would be the slowest
        return [1.0 if isinstance(call.func, PlainProduct) else 0.0 for call in calls]

    monkeypatch.setattr(linear, "_fastest_of", seconds)
    monkeypatch.setattr(panels, "compiled_panels", lambda: None)
    for kind in (Missing, Coarse):
        monkeypatch.setattr(linear, "PackedProduct", kind)
        assert fastest_product.__wrapped__(torch.float32) is PlainProduct


@pytest.mark.parametrize("chosen", [PlainProduct, PackedProduct, PanelProduct])
def test_the_fastest_product_is_chosen(chosen, compiled, monkeypatch):
    def seconds(calls: list[partial]) -> list[float]:
        return [1.0 if isinstance(call.func, chosen) else 2.0 for call in calls]

    monkeypatch.setattr(linear, "_fastest_of", seconds)
    assert fastest_product.__wrapped__(torch.float32) is chosen
    in_bfloat16 = PlainProduct if chosen is PanelProduct else chosen
    assert fastest_product.__wrapped__(torch.bfloat16) is in_bfloat16


def test_products_are_timed_by_turns_and_judged_by_their_fastest_try(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0, 30.0, 39.0])
    monkeypatch.setattr(linear.time, "perf_counter", clock.__next__)
    turns: list[str] = []
    assert linear._fastest_of([lambda: turns.append("a"), lambda: turns.append("b")], tries=2) == [3.0, 2.0]
    assert turns == ["a", "b", "a", "b"]


# ---------------------------------------------------------------------------------------------------------------
# Products in panels


@pytest.mark.parametrize("widths", [(1, 1), (33, 7), (48, 50), (40, 97), (384, 1152)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 97, 400])
def test_products_of_every_width_and_number_of_rows(widths, rows, compiled):
    """Outputs that do not fill a panel, rows that do not fill a tile, and more rows than one task has."""
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(*widths[::-1], generator=generator), torch.randn(rows, widths[0], generator=generator)
    bias, other = torch.randn(widths[1], generator=generator), torch.randn(rows, widths[1], generator=generator)
    product = PanelProduct(weight / widths[0] ** 0.5, bias)
    exact = x.double() @ weight.double().T / widths[0] ** 0.5 + bias.double()
    torch.testing.assert_close(product(x).double(), exact, atol=1e-5, rtol=0)
    expected = exact * torch.special.ndtr(exact) + other.double()
    torch.testing.assert_close(product(x, "gelu", other).double(), expected, atol=1e-5, rtol=0)


def test_gelu_is_exact_near_zero_and_far_from_it(compiled):
    x = torch.linspace(-12, 12, 100_001)[:, None]
    ours = PanelProduct(torch.ones(1, 1), torch.zeros(1))(x, "gelu")
    torch.testing.assert_close(ours.double(), x.double() * torch.special.ndtr(x.double()), atol=2e-6, rtol=0)


def block_of(dim: int, wide: int) -> tuple[PanelBlock, partial]:
    """A block, and the same in float64 by PyTorch's operators."""
    with torch.random.fork_rng():
        torch.manual_seed(dim)
        layers = [nn.Linear(dim, dim), nn.Linear(dim, wide), nn.Linear(wide, dim)]
        norms = [nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-5)]
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def plain(hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        project, widen, narrow, first, last = (
            partial(torch.func.functional_call, part, {name: each.double() for name, each in part.named_parameters()})
            for part in (*layers, *norms)
        )
        attended = first((hidden.double() + project((context.double(),)),))
        return last((attended + narrow((F.gelu(widen((attended,))),)),)).detach()

    products = [PanelProduct(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    return PanelBlock(*products, *norms), plain


@pytest.mark.parametrize(("dim", "wide"), [(32, 64), (50, 70), (384, 1536)])
@pytest.mark.parametrize("rows", [1, 5, 8, 65, 384, 385, 900])
def test_a_block_is_what_follows_the_attention(dim, wide, rows, compiled):
    block, plain = block_of(dim, wide)
    hidden, context = torch.randn(2, rows, dim, generator=torch.Generator().manual_seed(rows))
    before = hidden.clone(), context.clone()
    torch.testing.assert_close(block(hidden, context).double(), plain(hidden, context), atol=1e-5, rtol=0)
    assert torch.equal(hidden, before[0]) and torch.equal(context, before[1])


def test_neither_the_threads_nor_the_other_rows_change_a_bit_of_a_block(compiled):
    block, _ = block_of(50, 70)
    hidden, context = torch.randn(2, 500, 50, generator=torch.Generator().manual_seed(0))
    before, answers = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(block(hidden, context))
    torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert torch.equal(block(hidden[100:103], context[100:103]), answers[0][100:103])


def test_what_the_products_would_read_wrongly_is_refused(compiled):
    block, _ = block_of(32, 64)
    product, x = block.parts[1], torch.randn(4, 32)
    for wrong in (x.double(), torch.randn(32, 4).T, torch.randn(4, 64)[:, ::2]):
        with pytest.raises(ValueError, match="one after the other"):
            product(wrong)
        with pytest.raises(ValueError, match="one after the other"):
            block(x, wrong)
    with pytest.raises(ValueError, match="4 rows of 32 float32"):
        product(torch.randn(4, 33))
    with pytest.raises(ValueError, match="3 rows of 64 float32"):
        product(x[:3], other=torch.randn(4, 64))
    norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="no block of layers of 32 numbers that become 64"):
        PanelBlock(product, product, block.parts[2], norm, norm)


def test_a_library_of_panels_that_computes_something_else_is_not_used(compiled, fresh_cache, monkeypatch, tmp_path):
    source = panels.SOURCE.read_text()
    (tmp_path / "wrong.cpp").write_text(source.replace("dim + norm.eps", "dim + 0.01f + norm.eps"))
    monkeypatch.setattr(panels, "SOURCE", tmp_path / "wrong.cpp")
    assert compiled_panels.__wrapped__() is None
    assert len(list(fresh_cache.glob("*.so"))) == 1


def test_without_a_library_there_is_no_product_in_panels(monkeypatch):
    monkeypatch.setenv("TOKPRUNE_KERNELS", "0")
    assert compiled_panels.__wrapped__() is None
    monkeypatch.setattr(panels, "compiled_panels", lambda: None)
    with pytest.raises(RuntimeError, match="no compiler"):
        PanelProduct(torch.randn(2, 2), torch.randn(2))
    assert fastest_product.__wrapped__(torch.float32) in (PlainProduct, PackedProduct)


def test_a_changed_header_is_a_new_library(compiled, fresh_cache, monkeypatch, tmp_path):
    first = compiler._built(selection.SOURCE)
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "vectors.h").write_text("// another")
    monkeypatch.setattr(compiler, "HEADERS", tmp_path / "headers")
    assert compiler._built(selection.SOURCE) != first


def test_rows_are_rounded_up_to_few_numbers():
    numbers = {rows: rows_to_compute(rows) for rows in range(1, 4097)}
    assert all(rows <= computed <= 1.13 * rows for rows, computed in numbers.items())
    assert all(rows_to_compute(computed) == computed for computed in numbers.values())
    assert len(set(numbers.values())) < 200  # times four products of a layer: fewer than oneDNN remembers
    assert [numbers[rows] for rows in (1, 64, 65, 257, 1025)] == [1, 64, 72, 272, 1088]


def test_the_kernels_are_part_of_the_package():
    asked = [sys.executable, "-c", "from tokprune_exp.kernels.attention import SOURCE; print(SOURCE.is_file())"]
    assert subprocess.run(asked, capture_output=True, text=True).stdout == "True\n"


def test_a_choice_from_tensors_that_would_be_read_wrongly_is_refused(selecting):
    received, places, starts = torch.rand(4), torch.arange(4), starts_of([2, 2])
    protected = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="float32, int64, int32 and bool"):
        selecting.choose(received, places, starts.long(), protected, 0.5, 1)
    with pytest.raises(ValueError, match="in one piece"):
        selecting.choose(received, places, starts, torch.zeros(2, 4, dtype=torch.bool)[:, ::2], 0.5, 1)
