"""What every method shares: the training step, the metric that chooses epochs, the optimizer. No method's maths."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.model import PrunedClassifier


@dataclass
class Terms:
    """A loss, the terms it was put together from, each before its weight, and figures worth a curve."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass
class Stage:
    """One training: its own Trainer, its own checkpoints, its own prefix in the logs."""

    name: str
    module: "PruningModule"
    epochs: int
    keeps: Literal["best", "last"] = "best"
    """Which epoch's weights count: the best by the first metric on the selection slice, or the last."""
    before: Callable[[TaskData, torch.device], None] | None = None
    """Runs on the training device when the earlier stages have ended and before this one starts or resumes."""
    data: TaskData | None = None
    """The texts of this training, where they are not the task's."""
    chooses_by: str | None = None
    """Name of a logged error whose smallest value chooses the epoch; None: the largest first metric."""
    patience: int | None = None
    """Epochs without a better one after which the training ends early."""
    shared: Callable[[TaskData, Trainer], tuple[Path, nn.Module]] | None = None
    """Where weights lie that other runs may have trained with such a Trainer, and the module that they are for."""


class PruningModule(LightningModule):
    """Trains one classifier; a method says with which loss, in which stages.

    `optimizer` builds the optimizer from parameter groups. The learning rate rises over the first `warmup_fraction` of
    the steps and then falls linearly to 0, or stays (`schedule: constant`). Parameters of scorer and retainer use
    `pruner_lr`.
    """

    fewest_epochs: ClassVar[int] = 1
    schedule: Literal["linear", "constant"] = "linear"

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        epochs: int = 3,
        warmup_fraction: float = 0.1,
        pruner_lr: float | None = None,
    ) -> None:
        super().__init__()
        if epochs < self.fewest_epochs:
            raise ValueError(f"method.epochs={epochs} must be at least {self.fewest_epochs}")
        if pruner_lr is not None and pruner_lr < 0:
            raise ValueError(f"method.pruner_lr={pruner_lr} must not be negative")
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"method.warmup_fraction={warmup_fraction} must be at least 0 and below 1")
        self.model = model
        self.metrics = metrics
        self.build_optimizer = optimizer
        self.epochs, self.warmup_fraction, self.pruner_lr = epochs, warmup_fraction, pruner_lr
        self.prefix = "train"
        self.findings: dict[str, Any] = {}
        """What a stage found out besides its weights, for result.json."""
        self.validated: list[tuple[Tensor, Tensor, Tensor]] = []

    @abstractmethod
    def terms(self, batch: Batch) -> Terms:
        """Compute the loss of a training batch."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """List the trainings of this method, in order."""

    @property
    def dense(self) -> PrunedClassifier | None:
        """The unpruned model that the result is held against; None: the trained model is itself unpruned."""
        return None

    @property
    def progress(self) -> float:
        """Training progress u of the stage, from 0 to 1."""
        return self.trainer.global_step / max(1, int(self.trainer.estimated_stepping_batches))

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this training may change, by name: the model."""
        return self.model.named_parameters()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss, log its terms, and stop at the first one that is not a number."""
        terms = self.terms(batch)
        for name, value in {**terms.parts, "loss": terms.total}.items():
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value.item()} at step {self.trainer.global_step} of stage {self.prefix}; "
                    f"a lower optimizer.lr or a smaller weight of this term may help"
                )
            self.log(f"{self.prefix}/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(batch.labels))
        return terms.total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Collect predictions on the selection slice."""
        output = self.model(batch)
        self.validated.append((output.logits.float(), batch.labels, output.trace.retention.mean(1)))

    def on_validation_epoch_end(self) -> None:
        """Log the task's metrics and the retention on the selection slice; the first metric chooses the epoch."""
        logits, labels, retention = (torch.cat(parts) for parts in zip(*self.validated, strict=True))
        self.validated.clear()
        for name, value in evaluate_metrics(self.metrics, logits.cpu(), labels.cpu()).items():
            self.log(f"{self.prefix}/selection_{name}", value, prog_bar=name == self.metrics[0])
        self.log(f"{self.prefix}/selection_retention", retention.mean())

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of the pruning and those of everything else, each by its own norm.

        Together, LTP's thresholds, with a gradient fifty times that of all weights, would scale the weights' steps too.
        Lightning's clipping, needed for fp16, refuses a fused optimizer, and knows one norm only.
        """
        if self.trainer.precision == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for is_pruner in (False, True):
                parameters = [
                    one for name, one in self.trained_parameters() if name.startswith("pruning.") == is_pruner
                ]
                torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def rate_of(self, name: str) -> float | None:
        """The learning rate of a parameter of the model; None: the optimizer's."""
        return self.pruner_lr if name.startswith("pruning.") else None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build parameter groups (no decay for biases and norms, own rate for the pruning) and the schedule."""
        groups: dict[tuple[float | None, bool], list[Tensor]] = {}
        for name, parameter in self.trained_parameters():
            if parameter.requires_grad:
                groups.setdefault((self.rate_of(name), parameter.dim() > 1), []).append(parameter)
        optimizer = self.build_optimizer(
            [
                {
                    "params": parameters,
                    **({} if lr is None else {"lr": lr}),
                    **({} if decays else {"weight_decay": 0.0}),
                }
                for (lr, decays), parameters in groups.items()
            ]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(self.warmup_fraction * steps))

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 1.0 if self.schedule == "constant" else max(0.0, (steps - step) / max(1, steps - warmup))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}
