"""What the teacher says of every training example: logits and attributions, computed once and cached."""

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tokprune_exp.attribution import Attribution
from tokprune_exp.data.batches import BatchLoader, sorted_batches
from tokprune_exp.data.tokenise import EncodedSplit, only_one, save_at_once, sha256_of
from tokprune_exp.model import PrunedClassifier

BATCH_SIZE = 32
VERSION = 2
"""Raised when what is computed here changes, so that no older file is read for it."""


def teacher_signals(
    teacher: PrunedClassifier,
    split: EncodedSplit,
    settings: Attribution,
    cache: Path,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "examples outputs"], Float[Tensor, " tokens"]]:
    """Compute a frozen teacher's logits z_t and attributions A_t for each example of a split.

    Kept under `cache` by what determines them: the teacher's weights, the tokens and labels, the settings.
    """
    key = sha256_of(VERSION, weights_digest(teacher), split.fingerprint, vars(settings))
    file = cache / "teacher_signals" / f"{key}.safetensors"
    with only_one(file):
        if not file.is_file():
            save_at_once(_compute(teacher.to(device).eval(), split, settings, device), file)
    signals = load_file(file)
    return signals["logits"], signals["attribution"]


def weights_digest(model: torch.nn.Module) -> str:
    """Compute the sha256 of all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compute(
    teacher: PrunedClassifier, split: EncodedSplit, settings: Attribution, device: torch.device | str
) -> dict[str, Tensor]:
    attribution = torch.zeros(len(split.input_ids))
    logits = torch.zeros(len(split), teacher.head.classifier.out_features)
    batches = BatchLoader(split, sorted_batches(split.lengths, BATCH_SIZE))
    for batch in tqdm(batches, desc="teacher attributions", unit=" batches", leave=False):
        batch = batch.to(device)
        values, answers = teacher.attribute_and_answer(batch, settings, top_k=settings.top_k)
        logits[batch.index.cpu()] = answers.detach().float().cpu()
        flat = split.offsets[batch.index.cpu(), None] + torch.arange(batch.valid.shape[1])
        attribution[flat[batch.valid.cpu()]] = values.detach()[batch.valid].float().cpu()
    return {"logits": logits, "attribution": attribution}
