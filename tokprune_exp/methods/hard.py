"""Training under pruning that is in force and not learned: the manual baselines, the last stage of LTP and STTABT."""

import torch

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.losses import task_loss
from tokprune_exp.methods.module import Stage, Terms
from tokprune_exp.methods.student import StudentModule


class HardPruning(StudentModule):
    """L = L_CE on the pruned pass, from the weights of the dense model; `budget` holds the cost.

    With no epochs the dense model's weights are pruned as they are.
    """

    fewest_epochs = 0

    def stages(self) -> list[Stage]:
        """First the dense model, then the training under pruning."""
        return [*self.teacher_stages(), Stage("hard", self, self.epochs, before=self.prune_hard)]

    def prune_hard(self, data: TaskData, device: torch.device) -> None:
        """Start from the dense model, at the budget."""
        self.start_from_teacher()
        self.model.to(device)
        self.aim_at_budget(data, device)

    def aim_at_budget(self, data: TaskData, device: torch.device) -> None:
        """From now on hold the cost at the budget, if one is asked for."""
        if self.budget is not None:
            self.draw_calibration(data, device)
            self.target_share = self.budget
            if not self.epochs:  # no training whose steps would do it
                self.hold_share()

    def terms(self, batch: Batch) -> Terms:
        """Compute the task loss of the pruned pass, which the tokens that leave cost nothing."""
        output = self.model(batch, "gathered")
        loss = task_loss(output.logits.float(), batch.labels).mean()
        return Terms(loss, {"cross_entropy": loss, "retention": output.trace.retention.mean()})
