"""The encoder without pruning: masked = gathered, no padding is computed, nothing depends on the batch."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.encoder.layout import Packed, Padded, Sequences, Wants
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.pruning import Prescribed

FAMILIES = ["bert", "roberta", "distilbert"]
LENGTHS = [23, 1, 2, 3, 40, 11, 5]

Build = Callable[..., Any]


def sequences_of(lengths: list[int], extra: int = 0) -> Sequences:
    valid = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(valid)
    protected[:, 0] = True
    return Sequences(valid, protected)


def rows_through_linears(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[int]]:
    """Rows (tokens) that each kind of linear layer of the encoder computed, layer by layer."""
    rows: dict[str, list[int]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = name.rpartition(".")[2]

            def count(_: nn.Module, args: tuple[Any, ...], kind: str = kind) -> None:
                rows.setdefault(kind, []).append(args[0].shape[:-1].numel())

            hooks.append(module.register_forward_pre_hook(count))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_equals_masked_without_pruning(
    family: str, size: int, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family=family)
    batch = ragged_batch(model, (LENGTHS * 5)[:size], extra=3)
    with torch.no_grad():
        masked, gathered = model(batch), model(batch, "gathered")
    assert masked.logits.std() > 0.3 or size == 1
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    for kind in ("keys", "queries", "outputs"):
        assert torch.equal(gathered.trace.counts(kind), masked.trace.counts(kind))
        assert torch.equal(masked.trace.counts(kind), batch.valid.sum(1, keepdim=True).expand(-1, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_surviving_hidden_state_is_the_same_in_both_ways_of_running(
    family: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family=family)
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        masked, gathered = (model.encoder(*model.start(batch, execution)) for execution in ("masked", "gathered"))
    torch.testing.assert_close(gathered.hidden, masked.hidden[batch.valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(gathered.first, masked.first, atol=1e-5, rtol=0)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_columns_change_no_logit(
    family: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family=family)
    with torch.no_grad():
        narrow, wide = (model(ragged_batch(model, LENGTHS, extra), execution) for extra in (0, 17))
    torch.testing.assert_close(wide.logits, narrow.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_what_padding_holds_changes_no_logit(execution: str, random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier()
    clean, dirty = (ragged_batch(model, LENGTHS, extra=5) for _ in range(2))
    dirty.input_ids[~dirty.valid] = 77
    dirty.token_type_ids[~dirty.valid] = 1
    with torch.no_grad():
        assert torch.equal(model(dirty, execution).logits, model(clean, execution).logits)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_a_sequence_gets_the_same_logits_in_any_company(
    execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier()
    with torch.no_grad():
        together = model(ragged_batch(model, LENGTHS), execution).logits
        alone = [model(ragged_batch(model, [n], seeds=[seed]), execution).logits for seed, n in enumerate(LENGTHS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_gathered_running_never_computes_a_row_of_padding(random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier()
    batch = ragged_batch(model, LENGTHS, extra=20)
    rows = rows_through_linears(model.encoder, lambda: model(batch, "gathered"))
    assert set(rows) == {"query", "key", "value", "attention_output", "intermediate", "output"}
    assert all(counted == [sum(LENGTHS)] * 4 for counted in rows.values())
    masked = rows_through_linears(model.encoder, lambda: model(batch))
    assert masked["query"] == [len(LENGTHS) * (max(LENGTHS) + 20)] * 4


def test_dropout_acts_in_training_and_not_in_evaluation(random_classifier: Build, ragged_batch: Build) -> None:
    model: PrunedClassifier = random_classifier()
    batch = ragged_batch(model, LENGTHS)
    for execution in ("masked", "gathered"):
        model.eval()
        assert torch.equal(model(batch, execution).logits, model(batch, execution).logits)
        model.train()
        assert not torch.allclose(model(batch, execution).logits, model(batch, execution).logits, atol=1e-3)


def test_attention_dropout_acts_on_the_attention_weights_in_both_layouts() -> None:
    """With all other dropout off, only the attention is left to differ from run to run."""
    shape = EncoderShape(vocabulary=20, dim=16, heads=4, layers=1, ff_dim=32, positions=16, dropout=0.5)
    layer = PrunedEncoder(shape).layers[0].train()
    layer.dropout.p = 0.0
    hidden = torch.randn(2, 5, 16)
    sequences = sequences_of([5, 5])
    for layout, flat in ((Padded.start(sequences), hidden), (Packed.start(sequences), hidden.flatten(0, 1))):
        for received in (False, True):
            wants = Wants(received)
            first, second = (layer.attend(flat, flat, layout, layout, wants).context for _ in range(2))
            assert not torch.allclose(first, second)


@pytest.mark.parametrize("wants_received", [False, True])
def test_attention_equals_a_plain_loop_over_heads_and_queries(wants_received: bool) -> None:
    torch.manual_seed(0)
    lengths, heads, size = [4, 1, 6], 3, 5
    sequences = sequences_of(lengths, extra=2)
    query, key, value = (torch.randn(3, 8, heads * size) * 1.5 for _ in range(3))

    theirs, sums = torch.zeros(3, 8, heads * size), torch.zeros(3, 8)
    for row, length in enumerate(lengths):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for j in range(length):
                scores = torch.stack([query[row, j, part] @ key[row, i, part] for i in range(length)]) / size**0.5
                weights = scores.exp() / scores.exp().sum()
                for i in range(length):
                    theirs[row, j, part] += weights[i] * value[row, i, part]
                    sums[row, i] += weights[i] / heads

    padded, packed = Padded.start(sequences), Packed.start(sequences)
    attended = padded.attend(query, key, value, heads, wants=Wants(wants_received))
    ours, received = attended.context, attended.received
    torch.testing.assert_close(ours[sequences.valid], theirs[sequences.valid])
    flat = (packed.take(x) for x in (query, key, value))
    attended = packed.attend(*flat, heads, wants=Wants(wants_received))
    ours_flat, received_flat = attended.context, attended.received
    torch.testing.assert_close(ours_flat, theirs[sequences.valid])
    if wants_received:
        torch.testing.assert_close(received, sums)
        torch.testing.assert_close(received_flat, sums)
    else:
        assert received is None and received_flat is None


def test_what_goes_to_the_grid_and_back_is_the_same_in_both_layouts() -> None:
    sequences = sequences_of([3, 1, 4])
    grid = torch.arange(12.0).view(3, 4) + 1
    for layout in (Padded.start(sequences), Packed.start(sequences)):
        assert torch.equal(layout.to_grid(layout.take(grid)), grid * sequences.valid)


def test_first_and_mean_read_each_sequence_and_no_padding() -> None:
    torch.manual_seed(0)
    sequences = sequences_of([3, 1, 4], extra=2)
    hidden = torch.randn(3, 6, 5)
    means = torch.stack([hidden[row, :length].mean(0) for row, length in enumerate([3, 1, 4])])
    for layout in (Padded.start(sequences), Packed.start(sequences)):
        taken = layout.take(hidden)
        torch.testing.assert_close(layout.first(taken), hidden[:, 0])
        torch.testing.assert_close(layout.mean(taken), means)


def test_keeping_twice_keeps_what_both_choices_keep() -> None:
    torch.manual_seed(0)
    sequences = sequences_of([5, 3])
    values = torch.randn(2, 5, 4)
    one = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    two = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).bool()
    padded, packed = Padded.start(sequences), Packed.start(sequences)
    flat = packed.take(values)
    for keep in (one, two):
        padded, _ = padded.keep(keep)
        packed, gather = packed.keep(keep)
        flat = gather(flat)
    assert torch.equal(padded.alive, one & two) and torch.equal(packed.alive, one & two)
    assert torch.equal(flat, values[one & two])
    assert packed.counts == [3, 2]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_gate_hides_tokens_exactly_as_a_hard_mask_does(scale: float) -> None:
    """Also where the hidden tokens would have drawn nearly all attention (scale 30)."""
    torch.manual_seed(0)
    sequences = sequences_of([9, 6, 2])
    query, key, value = torch.randn(3, 9, 8) * scale, torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    keep = sequences.valid & (torch.rand(3, 9) < 0.4) | sequences.protected
    start = Padded.start(sequences)
    hard = start.keep(keep)[0].attend(query, key, value, 2, wants=Wants(received=True))
    gated = start.keep(keep, keep.float())[0].attend(query, key, value, 2, wants=Wants(received=True))
    torch.testing.assert_close(gated.context, hard.context, atol=1e-5, rtol=0)
    torch.testing.assert_close(gated.received, hard.received, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_gate_carries_a_finite_gradient_to_every_real_token_dropped_ones_included(scale: float) -> None:
    torch.manual_seed(0)
    sequences = sequences_of([9, 6], extra=1)
    query, key, value = (torch.randn(2, 10, 8) * factor for factor in (scale, 1.0, 1.0))
    keep = sequences.valid & (torch.rand(2, 10) < 0.4) | sequences.protected
    gate = keep.float().requires_grad_()
    context = Padded.start(sequences).keep(keep, gate)[0].attend(query, key, value, 2).context
    (gradient,) = torch.autograd.grad(context[sequences.valid].square().sum(), gate)
    assert gradient.isfinite().all()
    assert (gradient[~sequences.valid] == 0).all()
    if scale == 1.0:
        assert (gradient[sequences.valid] != 0).all()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_prescribed_mask_is_what_the_trace_records_from_that_layer_on(
    layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier()
    batch = ragged_batch(model, LENGTHS)
    keep = batch.valid & (torch.arange(40) % 3 == 0)
    for execution in ("masked", "gathered"):
        trace = model.encoder(*model.start(batch, execution), Prescribed(keep, layer)).trace
        for number, one in enumerate(trace.layers):
            expected = keep if number >= layer else batch.valid
            assert torch.equal(one.keys, expected) and torch.equal(one.outputs, expected)
            assert (one.importance is not None) == (number == layer)


def test_without_enforcing_a_pruning_is_recorded_but_changes_nothing(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier()
    batch = ragged_batch(model, LENGTHS)
    keep = batch.valid & (torch.arange(40) % 3 == 0)
    for execution in ("masked", "gathered"):
        start = model.start(batch, execution)
        plain = model.encoder(*start)
        asked = model.encoder(*start, Prescribed(keep, 1), enforce=False)
        assert torch.equal(plain.hidden, asked.hidden)
        assert (asked.trace.retention == 1).all() and asked.trace.layers[1].importance is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_longer_than_the_position_table_is_refused(
    family: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(family=family)
    assert model.encoder.shape.max_tokens == 128
    model(ragged_batch(model, [128]))
    with pytest.raises(ValueError, match="a sequence of 129 tokens, but this encoder has positions for 128"):
        model(ragged_batch(model, [129]))


def test_sizes_that_make_no_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="dim=30 is not a multiple of heads=4"):
        EncoderShape(vocabulary=20, dim=30, heads=4, layers=1, ff_dim=32, positions=16)


COMPILED = """
from contextlib import nullcontext
import torch
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.encoder.layout import Padded, Sequences

torch.manual_seed(0)
encoder = PrunedEncoder(EncoderShape(vocabulary=50, dim=32, heads=2, layers=2, ff_dim=64, positions=16, dropout=0.0))
answers = []
for tokens in (7, 12):
    valid = torch.arange(tokens) < torch.tensor([[tokens], [3]])
    layout = Padded.start(Sequences(valid, valid & False))
    hidden = torch.randn(2, tokens, 32)
    for is_compiled in (False, True):
        encoder.zero_grad()
        with encoder.compiled("aot_eager") if is_compiled else nullcontext():
            output = encoder(hidden, layout).hidden
            output[valid].square().sum().backward()
        answers.append([output.detach()[valid], *(p.grad.clone() for p in encoder.layers.parameters())])
for eager, compiled in zip(answers[::2], answers[1::2]):
    for one, other in zip(eager, compiled):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
assert not any("finish" in vars(layer) for layer in encoder.layers)
"""


def test_a_compiled_encoder_computes_the_same_and_learns_the_same() -> None:
    """In a process of its own: the run-time check of types in this one cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
