"""STTABT: sparse token Transformers with attention back-tracking. The plan is known before the first layer.

    Â       attention of every layer, from a small distilled network              scorers.ApproxAttention, approx.py
    plan    from [CLS] in the last layer back to the first: who was attended to   retainers.Backtracking (Algorithm 1)
            or with a learned number of tokens per layer                          retainers.Concrete (eqs. 3 to 5)
    L       L_CE + λ_p Σ_l (θ^l − θ_init)² + λ_mask (mean_l mean_t m_t^l − p_init)²      eq. 6 (Concrete only)
            the mean over the inputs m^1 … m^L of the layers (`loss.mask_layers: code`: over m^2 … m^{L+1})

so that a layer computes keys for its own tokens, but queries, outputs and feed-forward only for those of the next one;
the last layer only for [CLS]. Stages: approx_text (with +text), teacher (the dense model), approx (ApproxNet, shared by
all runs that would train the same one), then, with Concrete, soft and hard as in LTP. Back-tracking with a fixed k
needs no training of the model (`method.epochs=0`); a number of epochs fine-tunes it under its plan.

`scorer=exact_attention` plans from the attention of the unpruned model itself: the reference, at a whole pass's cost.
With a `budget`, μ·(soft cost − budget)² takes the place of the second regulariser, and the knob (k, or a shift of θ)
holds the cost. The ApproxNet's own cost is in it.

In the hard stage L is L_CE alone and θ is fixed. `regularises_hard` adds the two regularisers, on the soft masks, which
then move θ without regard to the task, as the official code does in its last epoch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from tokprune_exp import losses
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.encoder.encoder import PrunedEncoder
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.losses import STTABTLoss
from tokprune_exp.methods.approx import ApproxDistillation
from tokprune_exp.methods.budget import soft_cost_share
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.hard import HardPruning
from tokprune_exp.methods.module import Stage, Terms
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import Concrete, Plan, Planner
from tokprune_exp.pruning.scorers import ApproxAttention


class STTABT(HardPruning):
    """Distils the ApproxNet, then trains the model under its plan."""

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        loss: STTABTLoss,
        teacher: Finetune | None = None,
        teacher_is_trained: bool = False,
        initialises_student: bool = False,
        budget: float | None = None,
        text: TaskData | None = None,
        approx_text_epochs: int = 1,
        approx_epochs: int = 10,
        approx_patience: int | None = 3,
        approx_lr: float = 1e-3,
        approx_hidden: Literal["paper", "code"] = "paper",
        approx_prediction: Literal["paper", "code"] = "paper",
        trains_approx: bool = False,
        regularises_hard: bool = False,
        schedule: Literal["linear", "constant"] = "linear",
        soft_epochs: int = 2,
        epochs: int = 1,
        warmup_fraction: float = 0.1,
        pruner_lr: float = 1e-2,
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
        if not isinstance(self.retainer, Planner):
            raise ValueError("sttabt plans ahead: retainer=backtracking or concrete")
        for name, value, least in (
            ("soft_epochs", soft_epochs, 1),
            ("approx_epochs", approx_epochs, 1),
            ("approx_text_epochs", approx_text_epochs, 1),
            ("approx_patience", approx_patience, 0),
            ("approx_lr", approx_lr, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"method.{name}={value} must be at least {least}")
        self.loss, self.soft_epochs, self.schedule = loss, soft_epochs, schedule
        self.trains_approx, self.approx_lr = trains_approx, approx_lr
        self.regularises_hard = regularises_hard
        self.learns_theta = False
        self.distillation: tuple[ApproxDistillation, ...] = ()
        self.text_stage: list[Stage] = []
        if isinstance(self.scorer, ApproxAttention):
            distil = partial(
                ApproxDistillation,
                model,
                metrics,
                partial(optimizer, lr=approx_lr),
                hidden=approx_hidden,
                warmup_fraction=warmup_fraction,
                schedule=schedule,
            )
            self.distillation = (distil(approx_epochs, approx_patience, prediction=approx_prediction),)
            if text is not None:
                self.text_stage = [
                    replace(
                        distil(approx_text_epochs, None, prediction=None).stages()[0],
                        name="approx_text",
                        data=text,
                        before=self.initialise_approx,
                    )
                ]

    def stages(self) -> list[Stage]:
        """The dense model, the ApproxNet, then soft and hard masks, or one training under the plan, or none."""
        own = [replace(one.stages()[0], before=self.start_approx) for one in self.distillation]
        if isinstance(self.retainer, Concrete):
            own.append(Stage("soft", self, self.soft_epochs, before=self.soften, keeps="last"))
        own.append(Stage("hard", self, self.epochs, before=self.prune_hard))
        return [*self.text_stage, *self.teacher_stages(), *own]

    def start_approx(self, data: TaskData, device: torch.device) -> None:
        """Start from the dense model, and the ApproxNet unless text has taught it before; measure how far off it is.

        `untrained` is the network before any training, `after_text` what the texts have made of it, `random` one of its
        sizes with random weights: all held against the dense model of the task, on the task's texts.
        """
        (distillation,) = self.distillation
        approx, encoder = distillation.approx, self.model.encoder
        nets: dict[str, PrunedEncoder] = {}
        with torch.random.fork_rng(devices=[]):  # what is only measured changes nothing of what is trained
            if self.text_stage:  # until here the encoder is the pretrained one, from which that stage had started
                nets["untrained"] = approx.another(encoder)
            if approx.initialisation != "random":
                nets["random"] = approx.another(encoder, "random")
        self.start_from_teacher()
        if not self.text_stage:
            self.initialise_approx(data, device)
        nets["after_text" if self.text_stage else "untrained"] = approx.net
        distillation.findings["approximation"] = {
            name: distillation.approximation_error(data, device, net) for name, net in nets.items()
        }

    def initialise_approx(self, data: TaskData, device: torch.device) -> None:
        """Set the ApproxNet where its initialisation says."""
        (distillation,) = self.distillation
        distillation.approx.initialise(self.model.encoder)

    def soften(self, data: TaskData, device: torch.device) -> None:
        """Learn θ through the concrete mask."""
        if not self.distillation:  # else that stage has started from the dense model
            self.start_from_teacher()
        self.take_over_approx(data, device)
        for distillation in self.distillation:
            distillation.approx.requires_grad_(self.trains_approx)
        self.learns_theta = True

    def prune_hard(self, data: TaskData, device: torch.device) -> None:
        """From now on the plan is hard, and no gradient of the task's loss reaches what makes it."""
        if not self.distillation and not isinstance(self.retainer, Concrete):  # no stage before this one
            self.start_from_teacher()
        self.take_over_approx(data, device)
        self.scorer.requires_grad_(False)
        self.retainer.requires_grad_(self.regularises_hard)
        self.learns_theta = False
        self.aim_at_budget(data, device)

    def take_over_approx(self, data: TaskData, device: torch.device) -> None:
        """Measure the distilled ApproxNet, once, beside what was found out before its distillation."""
        self.model.to(device)
        for distillation in self.distillation:
            if "approximation" not in self.findings:
                distilled = distillation.approximation_error(data, device)
                self.findings["approximation"] = {
                    **distillation.findings.get("approximation", {}),
                    "distilled": distilled,
                }

    def rate_of(self, name: str) -> float | None:
        """An ApproxNet that trains along keeps the rate of its distillation."""
        return self.approx_lr if name.startswith("pruning.scorer.") else super().rate_of(name)

    def terms(self, batch: Batch) -> Terms:
        """Compute eq. 6 in the soft stage, the task loss under the plan in the hard one."""
        if not self.learns_theta:
            return self.regularised(super().terms(batch), batch) if self.regularises_hard else super().terms(batch)
        assert isinstance(self.retainer, Concrete)
        with self.retainer.relaxed():
            output = self.model(batch)
        parts = {"cross_entropy": losses.task_loss(output.logits.float(), batch.labels).mean()}
        parts["soft_share"] = soft_cost_share(self.model, output.trace)
        parts["theta"] = self.distance_of_theta()
        total = parts["cross_entropy"] + self.loss.lam_theta * parts["theta"]
        if self.budget is None:
            assert output.trace.entry is not None
            parts["mask"] = self.distance_of_masks([output.trace.entry, *output.trace.decisions], batch)
            total = total + self.loss.lam_mask * parts["mask"]
        else:
            parts["budget"] = (parts["soft_share"] - self.budget).square()
            total = total + self.loss.budget_weight * parts["budget"]
        return Terms(total, parts)

    def regularised(self, terms: Terms, batch: Batch) -> Terms:
        """Add the two regularisers of eq. 6, on the soft masks of a plan that nothing runs by."""
        pruning = self.model.pruning
        assert pruning is not None and isinstance(self.retainer, Concrete)
        with torch.no_grad():
            embeddings, layout = self.model.start(batch)
        with self.retainer.relaxed():
            plan = pruning.rule(self.model.encoder, embeddings, layout)
        assert isinstance(plan, Plan)
        parts = {"theta": self.distance_of_theta(), "mask": self.distance_of_masks(plan.decisions, batch)}
        total = terms.total + self.loss.lam_theta * parts["theta"] + self.loss.lam_mask * parts["mask"]
        return Terms(total, {**terms.parts, **parts})

    def distance_of_theta(self) -> Float[Tensor, ""]:
        """Compute Σ_l (θ^l − θ_init)²."""
        assert isinstance(self.retainer, Concrete)
        return (self.retainer.theta - self.retainer.theta_init).square().sum()

    def distance_of_masks(self, plan: list[Decision], batch: Batch) -> Float[Tensor, ""]:
        """Compute (mean_l mean_t m_t^l − p_init)²."""
        assert isinstance(self.retainer, Concrete)
        wanted = torch.tensor(self.retainer.theta_init).sigmoid().item()
        masks = [one.soft for one in plan if one.soft is not None]
        return (losses.mean_mask(masks, batch.valid.sum(1), self.loss.mask_layers) - wanted).square()
