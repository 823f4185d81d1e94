"""Integrated gradients: equal to captum's, complete in the limit, and differentiable a second time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from tokprune_exp.attribution import (
    Attribution,
    gold_score,
    integrated_gradients,
    normalise_over_sequence,
    token_magnitude,
)
from tokprune_exp.data.batch import Batch
from tokprune_exp.losses import attribution_distance
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import StaticRatio
from tokprune_exp.pruning.scorers import TokenSaliency

LENGTHS = [13, 1, 2, 6, 20]

Build = Callable[..., Any]


@pytest.fixture
def frozen(random_classifier: Build) -> PrunedClassifier:
    """A small teacher whose parameters do not ask for gradients."""
    return random_classifier(layers=2).requires_grad_(False)


def score_of(model: PrunedClassifier, batch: Batch) -> Callable[[Tensor], Tensor]:
    _, layout = model.start(batch)
    return lambda point: gold_score(model.classify(point, layout).logits, batch.labels)


def parts_of(batch: Batch) -> tuple[Tensor, ...]:
    return batch.token_type_ids, batch.valid, batch.labels


def captums(
    model: PrunedClassifier, batch: Batch, steps: int, baseline: str, scores: bool = False
) -> tuple[np.ndarray, Tensor]:
    """Captum's integrated gradients of the embeddings, and their norms as numpy computes them.

    Captum refuses one step; that is its plain gradient times (input − baseline).
    """

    def forward(embeddings: Tensor, ids: Tensor, types: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        _, layout = model.start(Batch(ids, types, valid, labels, torch.arange(len(ids))))
        logits = model.classify(embeddings, layout).logits
        return logits[:, 0] if scores else logits.log_softmax(-1)[torch.arange(len(ids)), labels]

    embeddings, _ = model.start(batch)
    start = torch.zeros_like(embeddings) if baseline == "zero" else model.padding_embeddings(batch)
    rest = {"additional_forward_args": (batch.input_ids, *parts_of(batch))}
    if steps == 1:
        gradients = captum.attr.Saliency(forward).attribute(embeddings.clone().requires_grad_(), abs=False, **rest)
        values = gradients * (embeddings - start)
    else:
        values = captum.attr.IntegratedGradients(forward).attribute(
            embeddings, baselines=start, method="riemann_right", n_steps=steps, **rest
        )
    return np.linalg.norm(values.detach().numpy(), axis=-1), values.detach()


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("baseline", ["pad", "zero"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_integrated_gradients_equal_captums(
    steps: int, baseline: str, scores: bool, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(layers=2, outputs=1 if scores else 3).requires_grad_(False)
    batch = ragged_batch(model, LENGTHS, extra=2, scores=scores)
    norms, theirs = captums(model, batch, steps, baseline, scores)

    embeddings, _ = model.start(batch)
    start = torch.zeros_like(embeddings) if baseline == "zero" else model.padding_embeddings(batch)
    ours = integrated_gradients(score_of(model, batch), embeddings, start, steps)
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    attribution = model.attribute(batch, Attribution(steps=steps, baseline=baseline))
    expected = norms / np.sqrt((norms**2).sum(1, keepdims=True))
    torch.testing.assert_close(attribution, torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_padding_baseline_equals_captums_layer_attribution_from_padding_ids(
    family: str, steps: int, random_classifier: Build, ragged_batch: Build
) -> None:
    """Captum finds E' itself: it runs the embeddings on a batch of padding ids."""
    model = random_classifier(family=family, layers=2).requires_grad_(False)
    batch = ragged_batch(model, LENGTHS)

    def forward(ids: Tensor, types: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        logits = model(Batch(ids, types, valid, labels, torch.arange(len(ids)))).logits
        return logits.log_softmax(-1)[torch.arange(len(ids)), labels]

    theirs = captum.attr.LayerIntegratedGradients(forward, model.encoder.embeddings).attribute(
        batch.input_ids,
        baselines=torch.full_like(batch.input_ids, model.encoder.shape.pad_token),
        additional_forward_args=parts_of(batch),
        method="riemann_right",
        n_steps=steps,
    )
    norms = theirs.detach().norm(dim=-1)
    ours = model.attribute(batch, Attribution(steps=steps))
    torch.testing.assert_close(ours, norms / norms.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 5, 64, 1000])
def test_the_teachers_magnitude_counts_the_largest_dimensions_only(
    top_k: int, frozen: PrunedClassifier, ragged_batch: Build
) -> None:
    batch = ragged_batch(frozen, LENGTHS)
    _, values = captums(frozen, batch, 3, "pad")
    largest = np.sort(np.abs(values.numpy()), axis=-1)[..., -top_k:]
    norms = np.sqrt((largest**2).sum(-1))
    torch.testing.assert_close(token_magnitude(values, top_k), torch.from_numpy(norms))
    ours = frozen.attribute(batch, Attribution(steps=3), top_k=top_k)
    expected = norms / np.sqrt((norms**2).sum(1, keepdims=True))
    torch.testing.assert_close(ours, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_integrated_gradients_become_complete_as_the_steps_grow(frozen: PrunedClassifier, ragged_batch: Build) -> None:
    """Σ_ij IG_ij → F(E) − F(E'), with an error that falls like 1/m."""
    model = frozen.double()
    batch = ragged_batch(model, [9, 1, 5], extra=2)
    embeddings, _ = model.start(batch)
    baseline, score = model.padding_embeddings(batch), score_of(model, batch)
    difference = score(embeddings) - score(baseline)
    assert difference.abs().min() > 1e-3

    def error(steps: int) -> float:
        total = integrated_gradients(score, embeddings, baseline, steps).sum((1, 2))
        return (total - difference).abs().mean().item()

    errors = [error(steps) for steps in (1, 8, 64, 512)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.01 and errors[2] / errors[3] == pytest.approx(8, rel=0.2)


def test_attributions_have_unit_norm_and_are_zero_on_padding(frozen: PrunedClassifier, ragged_batch: Build) -> None:
    batch = ragged_batch(frozen, LENGTHS, extra=3)
    ours = frozen.attribute(batch, Attribution())
    torch.testing.assert_close(ours.square().sum(1), torch.ones(len(LENGTHS)), atol=1e-5, rtol=0)
    assert (ours[~batch.valid] == 0).all() and (ours[batch.valid] > 0).all()


def test_normalising_leaves_out_what_is_not_asked_for() -> None:
    values = torch.tensor([[3.0, 4.0, 5.0], [0.0, 0.0, 7.0]])
    tokens = torch.tensor([[True, True, False], [True, True, False]])
    ours = normalise_over_sequence(values, tokens)
    torch.testing.assert_close(ours, torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]))


def test_padding_and_company_change_no_attribution(frozen: PrunedClassifier, ragged_batch: Build) -> None:
    settings = Attribution(steps=3)
    narrow = frozen.attribute(ragged_batch(frozen, LENGTHS), settings)
    wide = frozen.attribute(ragged_batch(frozen, LENGTHS, extra=11), settings)
    torch.testing.assert_close(wide[:, : narrow.shape[1]], narrow, atol=1e-5, rtol=0)
    for seed, length in enumerate(LENGTHS):
        alone = frozen.attribute(ragged_batch(frozen, [length], seeds=[seed]), settings)
        torch.testing.assert_close(alone[0], narrow[seed, :length], atol=1e-5, rtol=0)


def test_attributions_are_those_of_the_unpruned_model(random_classifier: Build, ragged_batch: Build) -> None:
    plain, pruned = random_classifier(), random_classifier(TokenSaliency, StaticRatio)
    batch = ragged_batch(plain, LENGTHS)
    assert torch.equal(plain.attribute(batch, Attribution()), pruned.attribute(batch, Attribution()))


def test_attributions_are_without_dropout_and_leave_the_model_in_its_mode(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(layers=2)
    batch = ragged_batch(model, LENGTHS)
    settled = model.attribute(batch, Attribution())
    model.train()
    torch.testing.assert_close(model.attribute(batch, Attribution()), settled)
    assert all(module.training for module in model.modules())


def test_attributions_stay_fp32_under_autocast(frozen: PrunedClassifier, ragged_batch: Build) -> None:
    batch = ragged_batch(frozen, LENGTHS)
    plain = frozen.attribute(batch, Attribution())
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(batch).logits.dtype == torch.bfloat16
        ours = frozen.attribute(batch, Attribution())
    assert ours.dtype == torch.float32 and torch.equal(ours, plain)


# The second derivative


def copy_in_double(model: PrunedClassifier) -> PrunedClassifier:
    return model.double().train()


def distance(model: PrunedClassifier, batch: Batch, taught: Tensor, settings: Attribution) -> Tensor:
    """L_IG of a student against given attributions."""
    return attribution_distance(model.attribute(batch, settings, create_graph=True), taught, batch.valid)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("settings", [Attribution(), Attribution(steps=3, baseline="zero")])
def test_the_gradient_of_the_attribution_loss_equals_finite_differences(
    settings: Attribution, scores: bool, random_classifier: Build, ragged_batch: Build
) -> None:
    """In double precision, for every parameter tensor along a random direction."""
    build = partial(random_classifier, layers=2, dim=16, heads=2, outputs=1 if scores else 3)
    model = copy_in_double(build())
    batch = ragged_batch(model, [7, 1, 2, 5], extra=1, scores=scores)
    taught = normalise_over_sequence(torch.rand(batch.valid.shape, dtype=torch.float64), batch.valid)
    distance(model, batch, taught, settings).backward()

    generator, step, checked = torch.Generator().manual_seed(0), 1e-6, 0
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name == "encoder.embeddings.word.weight":
            direction[model.encoder.shape.pad_token] = 0  # nn.Embedding never trains its padding row
        analytic = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            losses.append(distance(model, batch, taught, settings).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        numeric = (losses[0] - losses[1]) / (2 * step)
        assert analytic == pytest.approx(numeric, rel=1e-4, abs=1e-7), name
        checked += abs(numeric) > 1e-4
    assert checked > 20  # most parameters do matter


def test_the_attribution_loss_and_its_gradient_are_zero_where_the_student_is_the_teacher(
    random_classifier: Build, ragged_batch: Build
) -> None:
    teacher, student = (random_classifier(layers=2) for _ in range(2))
    batch = ragged_batch(student, LENGTHS, extra=2)
    loss = distance(student, batch, teacher.attribute(batch, Attribution()).detach(), Attribution())
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


def test_descending_the_attribution_loss_brings_the_attributions_together(
    random_classifier: Build, ragged_batch: Build
) -> None:
    student = random_classifier(layers=2, dim=16, heads=2)
    batch = ragged_batch(student, LENGTHS)
    taught = normalise_over_sequence(torch.rand(batch.valid.shape) ** 2, batch.valid)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = distance(student, batch, taught, Attribution())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("confidence", ["no_opinion", "certain"])
def test_a_sequence_without_any_gradient_gets_zero_and_no_nan(
    confidence: str, create_graph: bool, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(layers=2)
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        model.head.classifier.weight.zero_()
        model.head.classifier.bias.zero_()
        if confidence == "certain":
            model.head.classifier.bias[:] = torch.tensor([300.0, 0.0, 0.0])
            model.head.classifier.weight.normal_()
            batch.labels[:] = 0
    ours = model.attribute(batch, Attribution(), create_graph=create_graph)
    assert (ours == 0).all()
    if create_graph:
        taught = normalise_over_sequence(torch.rand(batch.valid.shape), batch.valid)
        attribution_distance(ours, taught, batch.valid).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_a_confident_model_still_gets_attributions_of_unit_norm(random_classifier: Build, ragged_batch: Build) -> None:
    """log p(gold) of the order of −1e-4: the gradient is tiny, but its direction is not noise."""
    model = random_classifier(layers=2).double()
    batch = ragged_batch(model, LENGTHS)
    batch.labels[:] = 0
    plain = model.attribute(batch, Attribution())
    with torch.no_grad():
        model.head.classifier.bias[0] += 9.0 + (model(batch).logits[:, 1:].max() - model(batch).logits[:, 0].min())
    assert model(batch).logits.log_softmax(-1)[:, 0].min() > -5e-4
    ours = model.attribute(batch, Attribution())
    torch.testing.assert_close(ours.square().sum(1), plain.square().sum(1), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, r"method\.attribution\.steps=0 must be at least 1"),
        ({"top_k": 0}, r"method\.attribution\.top_k=0 must be at least 1"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_key(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attribution(**wrong)
