"""What bf16 changes in the answers: metrics, labels and probabilities of the timed texts, dense and pruned."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.data.batches import BatchLoader, token_batches
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.serving import BATCH_TOKENS


def accuracy(
    full: PrunedClassifier, half: PrunedClassifier, split: EncodedSplit, metrics: list[str], is_regression: bool
) -> list[dict[str, Any]]:
    """Compare a model in fp32 with itself in bf16, a row for the dense and one for the pruned pass.

    `equal_labels` is a share of the texts, `largest_difference` one of probabilities (in regression of scores).
    """
    rows = []
    for kind in ("dense", "pruned"):
        if kind == "pruned" and full.pruning is None:
            continue
        fp32, bf16 = (logits_of(model, split, kind == "pruned") for model in (full, half))
        answers = (fp32, bf16) if is_regression else (fp32.softmax(-1), bf16.softmax(-1))
        rows.append(
            {
                "model": kind,
                "fp32": evaluate_metrics(metrics, fp32, split.labels),
                "bf16": evaluate_metrics(metrics, bf16, split.labels),
                "equal_labels": None if is_regression else float((fp32.argmax(1) == bf16.argmax(1)).float().mean()),
                "largest_difference": float((answers[0] - answers[1]).abs().max()),
            }
        )
    return rows


@torch.inference_mode()
def logits_of(model: PrunedClassifier, split: EncodedSplit, prune: bool) -> Float[Tensor, "texts outputs"]:
    """Compute the logits of all texts in their order."""
    logits = torch.zeros(len(split), model.head.classifier.out_features)
    for batch in BatchLoader(split, token_batches(split.lengths, BATCH_TOKENS)):
        logits[batch.index] = model(batch, "gathered", prune).logits.float()
    return logits
