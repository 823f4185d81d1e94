"""The precision of training: what is resolved is what Lightning trains in, and so what a run records."""

import pytest
import torch
from lightning.pytorch import Trainer

from tokprune_exp.config import PRECISIONS
from tokprune_exp.precision import resolve_precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_cpu_what_is_resolved_is_what_lightning_trains_in(precision: str) -> None:
    """Lightning warns where it exchanges a precision, and here a warning is an error."""
    resolved = resolve_precision(precision, "cpu")
    trainer = Trainer(accelerator="cpu", precision=resolved, logger=False, enable_checkpointing=False)
    assert trainer.precision == resolved
    assert precision in (resolved, "auto", "16-mixed")


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "resolved"),
    [("cpu", True, "bf16-mixed"), ("auto", False, "bf16-mixed"), ("auto", True, "16-mixed"), ("gpu", True, "16-mixed")],
)
def test_16_mixed_stays_on_a_gpu_alone(
    accelerator: str, has_gpu: bool, resolved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolve_precision("16-mixed", accelerator) == resolved
