"""What the gathered = masked tests of several methods share: the assertion, real sentences, encoders loaded once."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.pretrained import LoadedBackbone, load_backbone
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.losses import task_loss
from tokprune_exp.model import Execution, PrunedClassifier

SENTENCES = [
    "dull",
    "a gripping, beautifully acted film that never once lets go of you",
    "two hours of nothing. " * 12,
    "it is not the worst of its kind , but its charms are few and its jokes are old",
    "Why?",
    "the plot, which wanders from Lisbon to Vladivostok, is a pretext for photography of the very first order",
    "an utterly charming film",
]


@cache
def loaded_once(directory: Path) -> LoadedBackbone:
    return load_backbone(Backbone(name="real", path=str(directory)), "")


def assert_gathered_equals_masked(model: PrunedClassifier, batch: Batch) -> PruningTrace:
    with torch.no_grad():
        masked, gathered = model(batch), model(batch, "gathered")
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    assert_same_tokens(gathered.trace, masked.trace)
    return gathered.trace


def assert_gathered_has_the_gradients_of_masked(model: PrunedClassifier, batch: Batch) -> None:
    """Of the loss and of what the tokens are chosen by; a pruned token has none in either."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert (model(batch).trace.layers[-1].outputs != batch.valid).any()
    wanted = dict(gradients(model, batch, "masked"))
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3
    for name, gradient in gradients(model, batch, "gathered"):
        torch.testing.assert_close(gradient, wanted[name], atol=2e-5, rtol=1e-4)


def gradients(model: PrunedClassifier, batch: Batch, execution: Execution) -> Iterator[tuple[str, torch.Tensor]]:
    model.zero_grad()
    output = model(batch, execution)
    loss = task_loss(output.logits, batch.labels).mean()
    for decision in output.trace.decisions:
        if decision.importance.requires_grad:
            slope = torch.linspace(-0.1, 0.1, decision.importance.shape[1])
            loss = loss + (decision.importance * batch.valid * slope).sum()
        if decision.ratio_logits is not None:
            loss = loss + decision.ratio_logits.square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def assert_same_tokens(ours: PruningTrace, theirs: PruningTrace) -> None:
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for kind in ("keys", "queries", "outputs"):
            assert torch.equal(getattr(one, kind), getattr(other, kind))
