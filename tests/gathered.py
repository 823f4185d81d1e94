"""What the gathered = masked tests of several methods share: the assertion, real sentences, encoders loaded once."""

from functools import cache
from pathlib import Path

import torch

from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.pretrained import LoadedBackbone, load_backbone
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.model import PrunedClassifier

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


def assert_same_tokens(ours: PruningTrace, theirs: PruningTrace) -> None:
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for kind in ("keys", "queries", "outputs"):
            assert torch.equal(getattr(one, kind), getattr(other, kind))
