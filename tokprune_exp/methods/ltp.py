"""LTP: learned token pruning. At each layer the tokens leave that receive less attention than a learned threshold.

    s^l     attention received, (1/(H·norm)) Σ_h Σ_j A_h^l[j, i]       eq. 7    scorers.AttentionMass
    M^l     1[s^l > θ^l], first token excepted                         eq. 8    retainers.LearnedThreshold
    M̃^l     σ((s^l − θ^l)/T), multiplies the layer's output            eqs. 9–12
    L_new   L + λ·(1/L) Σ_l ‖M̃^l‖₁                                     eq. 13   losses.token_penalty

Algorithm 1 has three steps, here stages of one command:
    soft    thresholds and weights learn together through M̃
    (binarise: M̃ becomes M, the thresholds are frozen)
    hard    the weights learn what is deployed

The soft model is not the hard one: a token multiplied by almost 0 is still attended to. What that costs is measured
between the stages (`findings.binarisation`). Two options close the gap: with `retainer.relaxation=gated` M̃ multiplies
exp(score) in the attention of all later layers instead, `straight_through` takes the gradient of that through M.

With a `budget`, λ gives way to μ·(soft cost − budget)² in the soft stage, and in the hard stage a common factor of all
thresholds keeps the cost where it was asked for, while the official method's token count drifts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tokprune_exp import losses
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.losses import LTPLoss
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.methods.budget import cost_share, dense_cost, soft_cost, soft_cost_share
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.hard import HardPruning
from tokprune_exp.methods.module import Stage, Terms
from tokprune_exp.model import ClassifierOutput, PrunedClassifier, without_dropout
from tokprune_exp.pruning.retainers import LearnedThreshold


class LTP(HardPruning):
    """Trains LTP's thresholds and weights; its stages are teacher (the dense model it starts from), soft and hard."""

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        loss: LTPLoss,
        teacher: Finetune | None = None,
        teacher_is_trained: bool = False,
        initialises_student: bool = False,
        budget: float | None = None,
        soft_epochs: int = 2,
        epochs: int = 2,
        hard_lr: float | None = None,
        warmup_fraction: float = 0.1,
        pruner_lr: float = 1e-4,
    ) -> None:
        super().__init__(
            model,
            metrics,
            optimizer,
            teacher,
            teacher_is_trained,
            initialises_student,
            budget,
            epochs,
            warmup_fraction,
            pruner_lr,
        )
        if soft_epochs < 1:
            raise ValueError(f"method.soft_epochs={soft_epochs} must be at least 1")
        if hard_lr is not None and hard_lr < 0:
            raise ValueError(f"method.hard_lr={hard_lr} must not be negative")
        if not isinstance(self.retainer, LearnedThreshold):
            raise ValueError("ltp learns thresholds: retainer=learned_threshold")
        self.loss, self.soft_epochs, self.hard_lr = loss, soft_epochs, hard_lr
        self.learns_thresholds = False

    @property
    def learned(self) -> LearnedThreshold:
        """The retainer whose thresholds are learned."""
        assert isinstance(self.retainer, LearnedThreshold)
        return self.retainer

    def stages(self) -> list[Stage]:
        """The dense model, then the two trainings of Algorithm 1.

        Of the soft one the last epoch counts, not the best: it is on its way to fewer tokens.
        """
        return [
            *self.teacher_stages(),
            Stage("soft", self, self.soft_epochs, before=self.soften, keeps="last"),
            Stage("hard", self, self.epochs, before=self.binarise),
        ]

    def soften(self, data: TaskData, device: torch.device) -> None:
        """Start from the dense model with differentiable masks."""
        self.start_from_teacher()
        self.learns_thresholds = True

    def binarise(self, data: TaskData, device: torch.device) -> None:
        """Freeze the thresholds, measure what the step from soft to hard costs, and aim at the budget."""
        self.learns_thresholds = False
        self.learned.offset.requires_grad_(False)
        if self.hard_lr is not None:
            self.build_optimizer = partial(self.build_optimizer, lr=self.hard_lr)
        self.model.to(device)
        self.findings["binarisation"] = self.gap(data, device)
        self.aim_at_budget(data, device)

    def terms(self, batch: Batch) -> Terms:
        """Compute eq. 13 in the soft stage, the task loss of the pruned pass in the hard one."""
        if not self.learns_thresholds:
            return super().terms(batch)
        output = self.relaxed_pass(batch)
        parts = {"cross_entropy": losses.task_loss(output.logits.float(), batch.labels).mean()}
        parts["soft_share"] = soft_cost_share(self.model, output.trace)
        if self.budget is None:
            parts["tokens"] = losses.token_penalty(output.trace, self.loss.penalty)
            total = parts["cross_entropy"] + self.loss.lam * parts["tokens"]
        else:
            parts["budget"] = (parts["soft_share"] - self.budget).square()
            total = parts["cross_entropy"] + self.loss.budget_weight * parts["budget"]
        return Terms(total, parts)

    def relaxed_pass(self, batch: Batch) -> ClassifierOutput:
        """Run the model with M̃ in the place of M."""
        with self.learned.relaxed():
            return self.model(batch)

    @torch.no_grad()
    def gap(self, data: TaskData, device: torch.device) -> dict[str, Any]:
        """Evaluate the selection slice with soft and with hard masks: metrics and share of the unpruned FLOPs."""
        batches = [batch.to(device) for batch in data.val_dataloader()]
        answers: dict[str, list[Tensor]] = {"soft": [], "hard": []}
        costs, dense = 0.0, 0
        with without_dropout(self.model):
            for batch in batches:
                soft = self.relaxed_pass(batch)
                costs += float(soft_cost(self.model, soft.trace))
                dense += int(dense_cost(self.model, soft.trace))
                answers["soft"].append(soft.logits.float().cpu())
                answers["hard"].append(self.model(batch).logits.float().cpu())
        labels = torch.cat([batch.labels for batch in batches]).cpu()
        metrics = {name: evaluate_metrics(self.metrics, torch.cat(logits), labels) for name, logits in answers.items()}
        share = {"soft": costs / dense, "hard": cost_share(self.model, batches)}
        return {name: {**metrics[name], "cost_share": share[name]} for name in ("soft", "hard")}

    def on_train_epoch_end(self) -> None:
        """Log every layer's threshold."""
        for layer, threshold in enumerate(self.learned.thresholds.tolist(), start=1):
            self.log(f"{self.prefix}/threshold_{layer:02d}", threshold)
