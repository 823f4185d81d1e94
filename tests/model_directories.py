"""Model directories as a finished run leaves them, with random weights and the tiny tokenizer: made in no time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokprune_exp.model import ModelCard, PrunedClassifier, save_model
from tokprune_exp.pruning.retainers import StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass

MAX_TOKENS = 24


def save_random_model(
    directory: Path,
    random_classifier: Callable[..., PrunedClassifier],
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...] = ("negative", "positive"),
    pair: bool = False,
    task: str = "sst2",
    **classifier: Any,
) -> Path:
    """Save a classifier of four layers; its second drops six tokens of ten, by the attention that they receive."""
    retainer = partial(StaticRatio, ratio=0.4, layer=1)
    model = random_classifier(AttentionMass, retainer, outputs=len(labels) or 1, **classifier)
    card = ModelCard(
        task=task,
        backbone="tiny",
        labels=list(labels),
        max_tokens=MAX_TOKENS,
        pair=pair,
        published_length=64,
        method="random",
        metrics=["accuracy"] if labels else ["pearson"],
    )
    save_model(directory, model, card, tokenizer)
    return directory
