"""What the pruning methods share: a dense model that comes first, and a budget that is kept. No method's maths."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.methods.budget import check_reach, meet_budget
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import PruningModule, Stage
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import Retainer
from tokprune_exp.pruning.scorers import Scorer

CALIBRATION_EXAMPLES = 256
CALIBRATIONS = 5
"""How often in a stage the knob is set anew, besides the end of every epoch."""


class StudentModule(PruningModule):
    """Trains a model that drops tokens, after a dense one: its teacher, or the weights that it starts from.

    With a `target_share` the cost is held during training: the retainer's knob is set on training texts that are, where
    the training split has such, as long as those of the reported split, so that training, the choice of the epoch and
    the result are at that share.
    """

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        teacher: Finetune | None = None,
        teacher_is_trained: bool = False,
        initialises_student: bool = False,
        budget: float | None = None,
        epochs: int = 3,
        warmup_fraction: float = 0.1,
        pruner_lr: float | None = None,
    ) -> None:
        super().__init__(model, metrics, optimizer, epochs, warmup_fraction, pruner_lr)
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"budget={budget} is a share of the unpruned FLOPs: above 0 and below 1")
        # in a tuple, so that the teacher is neither trained nor checkpointed with the student
        self.teachers = (teacher,) if teacher is not None else ()
        self.teacher_is_trained, self.initialises_student = teacher_is_trained, initialises_student
        self.budget = budget
        self.target_share: float | None = None
        self.calibration: list[Batch] = []
        self.held_at = -1

    @property
    def scorer(self) -> Scorer:
        """What gives the importance."""
        assert self.model.pruning is not None
        return self.model.pruning.scorer

    @property
    def retainer(self) -> Retainer:
        """What chooses the tokens."""
        assert self.model.pruning is not None
        return self.model.pruning.retainer

    @property
    def dense(self) -> PrunedClassifier | None:
        """The dense model that was trained first."""
        return self.teachers[0].model if self.teachers else None

    def teacher_stages(self) -> list[Stage]:
        """The training of the dense model, unless it was trained before or there is none."""
        return [] if self.teacher_is_trained else [Stage("teacher", one, one.epochs) for one in self.teachers]

    def check_budget(self, data: TaskData) -> None:
        """See whether the budget can be met, before any time is spent on training."""
        if self.budget is not None:
            self.draw_calibration(data, torch.device("cpu"))
            check_reach(self.model, self.calibration, self.budget)

    def start_from_teacher(self) -> None:
        """Copy the dense model's weights if that is asked for."""
        if self.dense is not None and self.initialises_student:
            self.model.start_from(self.dense)

    def draw_calibration(self, data: TaskData, device: torch.device) -> None:
        """Choose the texts on which the cost is held."""
        rows = data.rows_as_long_as_evaluation(CALIBRATION_EXAMPLES)
        size = data.settings.evaluation_batch_size
        self.calibration = [data.train.collate(part).to(device) for part in rows.split(size)]

    def hold_share(self) -> None:
        """Set the knob such that the model costs the target share, if there is one."""
        if self.target_share is not None:
            meet_budget(self.model, self.calibration, self.target_share)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Hold the share, a few times in a stage."""
        every = max(1, int(self.trainer.estimated_stepping_batches) // CALIBRATIONS)
        if self.trainer.global_step % every == 0 and self.trainer.global_step != self.held_at:
            self.held_at = self.trainer.global_step  # with accumulated gradients several batches make a step
            self.hold_share()

    def on_validation_epoch_start(self) -> None:
        """Hold the share where the epoch is judged and stored."""
        self.hold_share()
