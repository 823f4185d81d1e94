"""What travels from the data to the encoder: one right-padded batch of token ids."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Batch:
    """A right-padded batch; nothing in it depends on how much padding it happens to have.

    `labels` are class indices (int64) or, for regression, scores (float32). `index` is the example's row in its split.
    The two teacher fields are there only after `teacher_signals` were attached to the training split.
    """

    input_ids: Int[Tensor, "batch tokens"]
    token_type_ids: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    labels: Int[Tensor, " batch"] | Float[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    teacher_logits: Float[Tensor, "batch classes"] | None = None
    teacher_attribution: Float[Tensor, "batch tokens"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Move every tensor to a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})

    def rows(self, index: Int[Tensor, " some"]) -> "Batch":
        """Return these examples of the batch."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[index] for name, value in there.items() if value is not None})
