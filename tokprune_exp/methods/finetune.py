"""The unpruned encoder fine-tuned on the task: the dense reference, and what the other methods start or learn from."""

from tokprune_exp.data.batch import Batch
from tokprune_exp.losses import task_loss
from tokprune_exp.methods.module import PruningModule, Stage, Terms


class Finetune(PruningModule):
    """L = L_CE (or the squared error), nothing pruned."""

    def terms(self, batch: Batch) -> Terms:
        """Compute the task loss."""
        loss = task_loss(self.model(batch).logits.float(), batch.labels).mean()
        return Terms(loss, {"cross_entropy": loss})

    def stages(self) -> list[Stage]:
        """One training."""
        return [Stage("finetune", self, self.epochs)]
