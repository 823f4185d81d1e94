"""The closed form against published numbers, fvcore, torch's FlopCounterMode and transformers."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig

from tokprune_exp.encoder.cost import dense_encoder_macs, encoder_macs, layer_macs
from tokprune_exp.encoder.trace import LayerTrace, PruningTrace
from tokprune_exp.measure.flops import (
    FlopsReport,
    check_against_fvcore,
    count_with_fvcore,
    ltp_encoder_macs,
)
from tokprune_exp.measure.sttabt_flops import sttabt_approx_net_flops, sttabt_encoder_flops, sttabt_mask_update_flops

BERT_BASE = {"dim": 768, "ff_dim": 3072}


def first(counts: list[int], tokens: int) -> Tensor:
    """Masks of the first `count` tokens of each sequence."""
    return torch.arange(tokens) < torch.tensor(counts)[:, None]


def trace_of(lengths: list[int], kept: list[list[int]]) -> PruningTrace:
    """A trace whose layer l keeps the first `kept[l][example]` tokens after its attention."""
    tokens, sets = max(lengths), [lengths, *kept]
    masks = [first(counts, tokens) for counts in sets]
    layers = [LayerTrace(keys=before, queries=before, outputs=after) for before, after in pairwise(masks)]
    return PruningTrace(valid=masks[0], layers=layers)


def test_bert_base_at_128_tokens_costs_the_published_22_347_gflops() -> None:
    assert dense_encoder_macs(torch.tensor([128]), 12, **BERT_BASE).tolist() == [11_173_625_856]


@pytest.mark.parametrize(("tokens", "published"), [(64, 11.02), (128, 22.35), (256, 45.90), (512, 96.64)])
def test_roberta_base_costs_what_ltp_prints(tokens: int, published: float) -> None:
    macs = dense_encoder_macs(torch.tensor([tokens]), 12, **BERT_BASE)
    assert 2e-9 * macs.item() == pytest.approx(published, abs=0.005)


def test_one_layer_is_the_sum_of_its_matrix_products() -> None:
    keys, queries, outputs = torch.tensor(7), torch.tensor(5), torch.tensor(3)
    products = [7 * 8 * 8, 7 * 8 * 8, 5 * 8 * 8, 5 * 7 * 8, 5 * 7 * 8, 3 * 8 * 8, 3 * 8 * 32, 3 * 32 * 8]
    assert layer_macs(8, 32, keys, queries, outputs) == sum(products)


def test_an_unpruned_trace_costs_what_the_dense_encoder_does() -> None:
    lengths = [9, 4, 1]
    trace = trace_of(lengths, [lengths] * 3)
    dense = dense_encoder_macs(torch.tensor(lengths), 3, dim=8, ff_dim=32)
    assert encoder_macs(trace, 8, 32).tolist() == ltp_encoder_macs(trace, 8, 32).tolist() == dense.tolist()


def test_the_cost_does_not_depend_on_padding() -> None:
    alone, padded = trace_of([5], [[3], [2]]), trace_of([5, 60], [[3, 60], [2, 60]])
    assert encoder_macs(alone, 8, 32)[0] == encoder_macs(padded, 8, 32)[0]


def test_ltp_charges_the_output_projection_for_the_queries() -> None:
    """LTP's own formula: MAC_l = 2·d·n_attn² + 4·d²·n_attn + 8·d²·n_ffn, with a feed-forward of 4d."""
    trace, dim = trace_of([9, 6], [[7, 6], [2, 3]]), 16
    theirs = [
        sum(2 * dim * before**2 + 4 * dim**2 * before + 8 * dim**2 * after for before, after in layers)
        for layers in ([(9, 7), (7, 2)], [(6, 6), (6, 3)])
    ]
    assert ltp_encoder_macs(trace, dim, 4 * dim).tolist() == theirs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fvcore_counts_exactly_the_closed_form_on_the_bert_of_transformers(attention: str) -> None:
    model, ids = small_bert(attention)
    closed_form = int(dense_encoder_macs(torch.tensor([11, 11]), 3, dim=32, ff_dim=80).sum())
    check_against_fvcore(count_with_fvcore(model, (ids,)), closed_form)


def test_torch_counts_exactly_twice_the_closed_form_on_eager_attention() -> None:
    model, ids = small_bert("eager")
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == 2 * int(dense_encoder_macs(torch.tensor([11, 11]), 3, 32, 80).sum())


@pytest.mark.parametrize("fused", [True, False])
def test_both_counters_agree_with_the_trace_of_a_layer_that_gathers_its_survivors(fused: bool) -> None:
    layer = GatheringLayer(fused)
    hidden = torch.randn(1, 10, 16)
    closed_form = layer_macs(16, 48, *torch.tensor([[10], [6], [4]])).item()
    check_against_fvcore(count_with_fvcore(layer, (hidden,)), int(closed_form))
    if not fused:  # on the CPU torch 2.13 counts 0 for fused attention (pytorch #195460)
        with FlopCounterMode(display=False) as counter:
            layer(hidden)
        assert counter.get_total_flops() == 2 * closed_form


def test_a_count_that_disagrees_stops_the_run_with_both_numbers() -> None:
    with pytest.raises(RuntimeError, match=r"fvcore counts 1,500 multiply-adds .*linear 1,500.* trace 1,400"):
        check_against_fvcore({"linear": 1500}, 1400)


def test_the_report_names_every_convention() -> None:
    lengths, kept = [8, 4], [[4, 4], [2, 1]]
    report = FlopsReport(dim=16, ff_dim=64)
    report.update(trace_of(lengths, kept), pruner_macs=torch.tensor([100, 50]), head_macs=32)
    ours = report.summary(published_length=6)

    executed = [cost(8, 4) + cost(4, 2), cost(4, 4) + cost(4, 1)]
    dense = [2 * cost(8, 8), 2 * cost(4, 4)]
    padded = [2 * cost(8, 8), 2 * cost(6, 6)]  # 8 > 6 keeps its own length
    ltp = [sum_ + 16**2 * late for sum_, late in zip(executed, (4 + 2, 0 + 3), strict=True)]
    expected = {
        "examples": 2,
        "mean_length": 6,
        "published_length": 6,
        "gmacs_per_example": (sum(executed) + 150) / 2e9,
        "gmacs_dense": sum(dense) / 2e9,
        "gflops_per_example": (sum(executed) + 150) / 1e9,
        "gflops_encoder": sum(executed) / 1e9,
        "gflops_pruner": 150 / 1e9,
        "gflops_head": 2 * 32 / 1e9,
        "gflops_dense": sum(dense) / 1e9,
        "gflops_dense_padded": sum(padded) / 1e9,
        "gflops_ltp_convention": sum(ltp) / 1e9,
        "reduction_unpadded": sum(dense) / (sum(executed) + 150),
        "reduction_padded": sum(padded) / (sum(executed) + 150),
        "reduction_ltp_convention": sum(dense) / sum(ltp),
        "retention_mean": (0.75 + 0.25) / 2,
        "retention_per_layer": [(0.5 + 1) / 2, (0.25 + 0.25) / 2],
        "tokens_per_layer": [4, 1.5],
        "retention_padded_sttabt": ((8 + 4 + 1) / (3 * 8) + (4 + 4 + 1) / (3 * 8)) / 2,
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value), name


def test_the_report_does_not_depend_on_how_the_split_was_batched() -> None:
    lengths, kept = [8, 4, 6, 5], [[4, 4, 1, 2], [2, 1, 1, 1]]
    whole, parts = FlopsReport(16, 64), FlopsReport(16, 64)
    whole.update(trace_of(lengths, kept))
    for rows in ([2], [0, 3], [1]):
        part = trace_of([lengths[row] for row in rows], [[layer[row] for row in rows] for layer in kept])
        parts.update(part, index=torch.tensor(rows))
    for name, value in parts.summary(6).items():
        assert whole.summary(6)[name] == pytest.approx(value), name


def test_the_report_of_some_examples_is_that_of_a_split_that_holds_no_others() -> None:
    lengths, kept = [8, 4, 6, 5, 4], [[4, 4, 1, 2, 3], [2, 1, 1, 1, 3]]
    whole, alone = FlopsReport(16, 64), FlopsReport(16, 64)
    for rows in ([4, 2], [0], [3, 1]):
        part = trace_of([lengths[row] for row in rows], [[layer[row] for row in rows] for layer in kept])
        whole.update(part, pruner_macs=10 * torch.tensor(rows), head_macs=7, index=torch.tensor(rows))
    assert whole.lengths.tolist() == lengths
    rows = [1, 2, 4]
    alone.update(
        trace_of([lengths[row] for row in rows], [[layer[row] for row in rows] for layer in kept]),
        pruner_macs=10 * torch.tensor(rows),
        head_macs=7,
    )
    some = whole.where(torch.tensor([False, True, True, False, True]))
    assert some.lengths.tolist() == [4, 6, 4]
    for name, value in alone.summary(6).items():
        assert some.summary(6)[name] == pytest.approx(value), name
    assert whole.summary(6)["examples"] == 5


def test_the_retention_of_sttabt_is_inflated_by_pads_as_published() -> None:
    """SST-2, BERT-base: 41.6 % printed at θ_init = 1 is 98.2 % of the real tokens (reference/methods.md, A2.8, D3).

    872 texts of 25.16 tokens on average, padded to 55 (a share of 0.4575): 110 of 26 tokens, one of 55, 761 of 25.
    """
    lengths = [55, *[26] * 110, *[25] * 761]
    assert sum(lengths) / 872 == pytest.approx(25.16, abs=0.005)
    assert sum(lengths) / (872 * 55) == pytest.approx(0.4575, abs=5e-5)
    gone = round((1 - 0.982) * sum(lengths))
    kept = [length - (row < gone) for row, length in enumerate(lengths)]
    plan = [LayerTrace(*[first(kept, 55)] * 3) for _ in range(12)]
    report = FlopsReport(16, 64)
    report.update(PruningTrace(first(lengths, 55), plan))
    assert sum(kept) / sum(lengths) == pytest.approx(0.982, abs=5e-5)
    assert round(100 * report.summary(128)["retention_padded_sttabt"], 1) == 41.6


def test_the_token_sets_are_what_enters_and_what_leaves_every_layer_in_the_order_of_the_index() -> None:
    report = FlopsReport(16, 64)
    for rows in ([2, 0], [1]):
        lengths, leave = [9 - row for row in rows], [[5 - row for row in rows], [1 for _ in rows]]
        report.update(trace_of(lengths, leave), index=torch.tensor(rows))
    assert report.token_sets.tolist() == [[9, 5, 1], [8, 4, 1], [7, 3, 1]]


def test_chunks_of_1024_are_padded_apart_in_the_order_of_the_split() -> None:
    lengths = [2] * 1024 + [8]
    order = torch.randperm(1025, generator=torch.Generator().manual_seed(0))
    report = FlopsReport(16, 64)
    shuffled = [lengths[row] for row in order]
    report.update(trace_of(shuffled, [shuffled]), index=order)
    assert report.summary(8)["retention_padded_sttabt"] == pytest.approx((1024 * 3 / 4 + 9 / 16) / 1025)


# What STTABT counts


def unpruned(*lengths: int) -> Tensor:
    """The token sets of BERT-base's 12 layers where nothing is pruned."""
    return torch.tensor(lengths)[:, None].expand(-1, 13)


def test_bert_base_at_128_tokens_costs_22_421_gflops_as_sttabt_counts() -> None:
    flops = sttabt_encoder_flops(unpruned(128), **BERT_BASE, heads=12)
    assert flops.tolist() == [22_421_078_016]
    assert (flops - 2 * dense_encoder_macs(torch.tensor([128]), 12, **BERT_BASE)).tolist() == [73_826_304]


@pytest.mark.parametrize(
    ("factor", "mflops", "digits", "percent"), [(4, 1539, 0, 6.86), (8, 436.85, 2, 1.95), (16, 140.57, 2, 0.63)]
)
def test_the_approx_net_costs_what_sttabt_prints(factor: int, mflops: float, digits: int, percent: float) -> None:
    small = sttabt_approx_net_flops(torch.tensor(128), 12, **BERT_BASE, heads=12, factor=factor).item()
    assert round(small / 1e6, digits) == mflops
    assert round(100 * small / sttabt_encoder_flops(unpruned(128), **BERT_BASE, heads=12).item(), 2) == percent


@pytest.mark.parametrize(
    ("chunks", "published"),
    [
        ({55: 872}, 9.483),  # SST-2
        ({253: 277}, 45.510),  # RTE
        ({78: 1024, 87: 476}, 14.020),  # STS-B
        ({35: 1024, 13: 19}, 5.939),  # CoLA
    ],
    ids=["sst2", "rte", "stsb", "cola"],
)
def test_the_unpruned_tasks_cost_what_sttabt_stores(chunks: dict[int, int], published: float) -> None:
    """saves_plot/glue_bert_flops.json: every example as long as the longest of its 1024 (methods.md, A2.8)."""
    flops = sttabt_encoder_flops(unpruned(*chunks), **BERT_BASE, heads=12)
    mean = float((flops * torch.tensor(list(chunks.values()))).sum() / sum(chunks.values()))
    assert round(mean / 1e9, 3) == published


def test_a_pruned_pass_in_sttabts_counting_equals_a_plain_sum_over_operations() -> None:
    dim, ff_dim, heads, sets = 24, 40, 3, [9, 7, 4, 1]
    expected = sets[0] * dim * (1 + 1 + 5)  # two sums and a normalisation
    for keys, outputs in pairwise(sets):
        expected += 2 * dim * dim * (outputs + keys + keys)  # query, key, value
        expected += 2 * outputs * keys * dim + heads * outputs * keys * (1 + 5) + 2 * outputs * keys * dim
        expected += outputs * (2 * dim * dim + dim + dim + 5 * dim)  # product, bias, residual, normalisation
        expected += outputs * (2 * dim * ff_dim + ff_dim + 8 * ff_dim)  # product, bias, GELU
        expected += outputs * (2 * ff_dim * dim + dim + dim + 5 * dim)
    assert sttabt_encoder_flops(torch.tensor([sets, sets]), dim, ff_dim, heads).tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("concrete", {0.2: 9.25e6, 0.4: 18.45e6, 1.0: 46.05e6}),
        ("backtracking", {0.2: 0.614e6, 0.4: 1.165e6, 1.0: 2.818e6}),
        ("manual_topk", {0.2: 0.563e6, 0.4: 1.125e6, 1.0: 2.810e6}),
    ],
)
def test_the_update_of_the_masks_costs_what_sttabt_prints(kind: str, published: dict[float, float]) -> None:
    """To the digits of reference/methods.md, D2, at the same retention in every layer."""
    for retention, flops in published.items():
        tokens = torch.full((13,), 128 * retention, dtype=torch.float64)
        ours = sttabt_mask_update_flops(kind, tokens, torch.tensor(128), dim=768, heads=12).item()
        assert round(ours / 1e6, 2 if kind == "concrete" else 3) == flops / 1e6


@pytest.mark.parametrize("kind", ["concrete", "backtracking"])
def test_the_update_of_the_masks_of_a_plan_equals_a_plain_sum_over_its_layers(kind: str) -> None:
    """What a layer reads and what leaves it differ here; texts have lengths of their own."""
    heads, plans = 3, {11: [9, 7, 4, 1], 30: [30, 12, 12, 1]}
    expected = []
    for length, sets in plans.items():
        total = 0.0
        for layer, (keys, outputs) in enumerate(pairwise(sets), start=1):
            if kind == "concrete":
                total += outputs * length * heads * (8 + 10)  # standardised, Φ
                total += outputs * length * (heads + 1 + 5)  # mean of the heads, eq. 4
                total += length * (2 + 2)  # over the largest, floor
                total += length * (5 + 2 * 5 + 3 + 1)  # sigmoid, two logarithms, eq. 5, applied
                total += length * (len(sets) - layer)  # the larger of it and of the masks above
            else:
                total += outputs * length * (heads + 1) + (outputs + 1) * length  # means of heads and of rows
                total += 35 * (length + math.log(length)) + 4 * length + keys  # ranked, united, scaled
        expected.append(total)
    tokens, lengths = torch.tensor(list(plans.values())), torch.tensor(list(plans))
    assert sttabt_mask_update_flops(kind, tokens, lengths, dim=24, heads=heads).tolist() == pytest.approx(expected)


def test_manual_top_k_pays_for_the_queries_of_the_tokens_that_go() -> None:
    tokens, stays = torch.tensor([[100.0, 60, 60], [100, 100, 60]]), torch.tensor([128, 128])
    early, late = sttabt_mask_update_flops("manual_topk", tokens, stays, dim=64, heads=4).tolist()
    row = 128 * (4 + 1) + (128 + 1) + 35
    assert early == pytest.approx(2 * 64**2 * 40 + 160 * row + 35 * math.log(6000))
    assert late == pytest.approx(2 * 64**2 * 40 + 200 * row + 35 * math.log(10000))


def test_an_empty_report_and_an_empty_trace_are_refused() -> None:
    report = FlopsReport(16, 64)
    with pytest.raises(ValueError, match="no batch was counted"):
        report.summary(128)
    with pytest.raises(ValueError, match="no batch was counted"):
        _ = report.lengths
    with pytest.raises(ValueError, match="holds no layer"):
        report.update(PruningTrace(valid=first([3], 3)))


def cost(before: int, after: int, dim: int = 16, ff_dim: int = 64) -> int:
    """Multiply-adds of a layer whose K = Q, spelled out independently."""
    return 3 * dim**2 * before + 2 * dim * before**2 + dim**2 * after + 2 * dim * ff_dim * after


def small_bert(attention: str) -> tuple[nn.Module, Int[Tensor, "batch tokens"]]:
    """A small random BERT of transformers and two sequences of 11 tokens for it."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, pad_token_id=0
    )
    # from_config writes the attention implementation into the config it is given
    model = AutoModel.from_config(copy.deepcopy(config), attn_implementation=attention, add_pooling_layer=False)
    return model.eval(), torch.randint(1, 50, (2, 11))


class GatheringLayer(nn.Module):
    """A layer of 2 heads, width 16 and feed-forward 48, with 6 queries over all tokens and 4 outputs."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.query, self.key, self.value, self.output = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        query = self.query(hidden[:, :6]).unflatten(-1, (2, 8)).transpose(1, 2)
        key, value = (each(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for each in (self.key, self.value))
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(2, 3) / 8**0.5).softmax(-1) @ value
        survivors = self.norm(self.output(mixed.transpose(1, 2).flatten(2)[:, :4]))
        return self.down(nn.functional.gelu(self.up(survivors)))
