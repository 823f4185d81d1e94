"""AD-TP: tokens leave at one layer, by a saliency that learns integrated gradients; the share adapts to the text.

    a_t, a_s   attributions of teacher (cached) and student: integrated gradients, L2 per token, L2 over the sequence
    a_c        (1−κ)·a_t + κ·a_s, κ = κ_max·u at training progress u: from the teacher's view to the student's own
    S          saliency of each token (the scorer), taught by a_c:                               L_TSP
    ρ          share that is kept (an adaptive retainer), taught by how concentrated a_c is:     L_ARP
    L          (1−α)·L_CE + α·L_logit + β·L_IG + γ·(L_ARP + L_TSP)

L_CE and L_logit are computed on the pruned pass (what is deployed), the attributions on the full one: a pruned token
would get attribution 0 and could never come back. Attributions are computed in fp32 with dropout off.

docs/adtp.md says, equation by equation, what the slides give, what was chosen and why. What teaches ρ is not in the
slides; here, by `ratio_target`:
    mass    the smallest ratio whose top tokens hold the share η of a_c; η is set once so that the mean ratio is ρ*
    oracle  the smallest ratio at which the student's loss, keeping the top of a_c, is within δ of the full loss
    gumbel  no label: the task loss itself, through a straight-through sample, held by loss.budget_weight
and, against the slides, ρ is read from the mean hidden state (at the input layer [CLS] is the same for every text), and
is a quantile of the predicted distribution, set such that the cost is held, instead of its argmax.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from tokprune_exp import losses
from tokprune_exp.attribution import Attribution
from tokprune_exp.data.attributions import teacher_signals
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.losses import ADTPLoss
from tokprune_exp.methods.budget import cost_share, meet_budget
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import Stage, Terms
from tokprune_exp.methods.student import StudentModule
from tokprune_exp.model import ClassifierOutput, PrunedClassifier, without_dropout
from tokprune_exp.pruning.pruning import Prescribed, Pruning
from tokprune_exp.pruning.retainers import AdaptiveRatio, RatioRetainer, SelfAdapting, StaticRatio
from tokprune_exp.pruning.scorers import TokenSaliency


class ADTP(StudentModule):
    """Trains the student of AD-TP; its stages are teacher (unless one is given trained, or none) and student."""

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        loss: ADTPLoss,
        attribution: Attribution,
        teacher: Finetune | None = None,
        teacher_is_trained: bool = False,
        initialises_student: bool = False,
        budget: float | None = None,
        ratio_target: Literal["mass", "oracle", "gumbel"] = "mass",
        oracle_tolerance: float = 0.05,
        epochs: int = 3,
        warmup_fraction: float = 0.1,
        dense_fraction: float = 0.1,
        attributed_share: float = 1.0,
        pruner_lr: float = 1e-3,
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
        if not 0 <= dense_fraction <= 1:
            raise ValueError(f"method.dense_fraction={dense_fraction} must lie between 0 and 1")
        if not 0 < attributed_share <= 1:
            raise ValueError(f"method.attributed_share={attributed_share} must be above 0 and at most 1")
        if oracle_tolerance < 0:
            raise ValueError(f"method.oracle_tolerance={oracle_tolerance} must not be negative")
        if ratio_target not in ("mass", "oracle", "gumbel"):
            raise ValueError(f"method.ratio_target={ratio_target}: mass, oracle or gumbel")
        if model.pruning is None or not isinstance(model.pruning.retainer, RatioRetainer):
            raise ValueError(
                "adtp needs a scorer and a retainer that prunes: adaptive, nucleus, min_p, static or random"
            )
        self.loss, self.attribution = loss, attribution
        self.ratio_target, self.oracle_tolerance, self.dense_fraction = ratio_target, oracle_tolerance, dense_fraction
        self.attributed_share = attributed_share
        self.eta: float | None = None
        if isinstance(self.retainer, AdaptiveRatio):
            self.retainer.explores = ratio_target == "gumbel"

    @property
    def one_ratio(self) -> RatioRetainer:
        """The retainer, which prunes once and by a share."""
        assert isinstance(self.retainer, RatioRetainer)
        return self.retainer

    def stages(self) -> list[Stage]:
        """First the teacher, then the student."""
        return [*self.teacher_stages(), Stage("student", self, self.epochs, before=self.prepare)]

    def prepare(self, data: TaskData, device: torch.device) -> None:
        """Start the student from the teacher if asked, and fix what is known before: the cost, the teacher's view."""
        self.start_from_teacher()
        self.model.to(device)
        self.aim_at_share(data, device)
        if self.dense is None:
            return
        logits, attributions = teacher_signals(self.dense, data.train, self.attribution, data.cache, device)
        data.train.attach_teacher(logits, attributions)
        if isinstance(self.retainer, AdaptiveRatio) and self.ratio_target == "mass":
            self.eta = self.calibrated_eta(data)

    def aim_at_share(self, data: TaskData, device: torch.device) -> None:
        """Hold the cost at the budget; without one, hold it, where ρ adapts, at that of the same ρ* for all texts.

        With a budget ρ* follows from it: it is the ratio at which keeping the same share of every text costs as much.
        """
        learns_from_labels = isinstance(self.retainer, AdaptiveRatio) and self.ratio_target != "gumbel"
        if self.budget is None and not (learns_from_labels or isinstance(self.retainer, SelfAdapting)):
            return
        self.draw_calibration(data, device)
        assert self.model.pruning is not None
        shape, retainer = self.model.encoder.shape, self.one_ratio
        static = StaticRatio(shape.dim, shape.layers, retainer.ratio, retainer.layer, retainer.keeps_separators)
        same_for_all = PrunedClassifier(
            self.model.encoder, self.model.head, Pruning(self.scorer, static), self.model.separator
        ).to(device)
        if self.budget is None:
            self.target_share = cost_share(same_for_all, self.calibration)
        else:
            self.target_share = meet_budget(same_for_all, self.calibration, self.budget)
            retainer.ratio = self.findings["ratio_asked"] = float(static.knob)

    def calibrated_eta(self, data: TaskData) -> float:
        """Find η such that the mean pseudo-labelled ratio of the training set, by the teacher's view, is ρ*."""
        assert isinstance(self.retainer, AdaptiveRatio)
        masses = []
        for batch in data.in_order(data.train):
            assert batch.teacher_attribution is not None
            prunable = self.model.sequences(batch).prunable
            masses.append(losses.mass_by_ratio(batch.teacher_attribution, prunable, self.retainer.ratios.cpu()))
        return losses.calibrate_eta(torch.cat(masses), self.retainer.ratios.cpu(), self.retainer.ratio)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep η, which follows the student's attributions where there is no teacher."""
        checkpoint["eta"] = self.eta

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the η that was reached; checkpoints of earlier versions have none."""
        self.eta = checkpoint.get("eta", self.eta)

    def terms(self, batch: Batch) -> Terms:
        """Compute AD-TP's loss: one full pass for the attributions, one pruned pass for the task."""
        weights, kappa = self.loss, self.loss.kappa_max * self.progress if self.teachers else 1.0
        rows = self.attributed_rows(batch, kappa)
        attributed = batch.rows(rows)
        prunable = self.model.sequences(attributed).prunable

        own = self.own_attribution(attributed, kappa)  # A_s
        taught = own if attributed.teacher_attribution is None else attributed.teacher_attribution  # A_t
        target = losses.joint_attribution(taught, own, kappa, prunable)  # a_c

        pruned = self.pruned_pass(batch)
        (decision,), logits = pruned.trace.decisions, pruned.logits.float()  # it prunes at one layer

        parts = {"cross_entropy": losses.task_loss(logits, batch.labels).mean()}
        total = (1 - weights.alpha) * parts["cross_entropy"]
        if batch.teacher_logits is not None:
            parts["logit"] = losses.logit_distillation(logits, batch.teacher_logits, weights.temperature)
            total = total + weights.alpha * parts["logit"]
        if batch.teacher_logits is not None and weights.beta:
            parts["attribution"] = losses.attribution_distance(own, taught, attributed.valid)
            total = total + weights.beta * parts["attribution"]
        if isinstance(self.scorer, TokenSaliency):
            saliency = decision.importance[rows]
            parts["saliency"] = losses.saliency_loss(saliency, target, prunable, weights.listwise_weight)
            total = total + weights.gamma * parts["saliency"]
        if decision.ratio_logits is not None:
            parts["ratio"] = self.ratio_loss(decision.ratio_logits, rows, target, attributed)
            total = total + weights.gamma * parts["ratio"]
        parts["retention"] = pruned.trace.retention[:, -1].mean()
        return Terms(total, parts)

    def attributed_rows(self, batch: Batch, kappa: float) -> Int[Tensor, " some"]:
        """Draw the texts on which L_IG, L_TSP and the labels' part of L_ARP are means: all, or an attributed share.

        Two thirds of a step are spent on their attribution: twice differentiated, in fp32, nothing pruned.
        """
        size = len(batch.labels)
        if self.attributed_share == 1 or not self.reads_own_attribution(kappa):
            return torch.arange(size, device=batch.labels.device)
        some = max(1, round(self.attributed_share * size))
        return torch.randperm(size, device=batch.labels.device)[:some]

    def reads_own_attribution(self, kappa: float) -> bool:
        """Whether any term depends on A_s."""
        return self.distils_attribution or (kappa > 0 and self.loss.gamma > 0)

    @property
    def distils_attribution(self) -> bool:
        """Whether L_IG is in force, so that A_s must be differentiable."""
        return self.loss.beta > 0 and bool(self.teachers)

    def own_attribution(self, batch: Batch, kappa: float) -> Float[Tensor, "batch tokens"]:
        """Compute A_s, differentiable when L_IG needs it; zeros when nothing does."""
        if not self.reads_own_attribution(kappa):
            return torch.zeros_like(batch.valid, dtype=torch.float32)
        return self.model.attribute(batch, self.attribution, create_graph=self.distils_attribution)

    def pruned_pass(self, batch: Batch) -> ClassifierOutput:
        """Run the deployed computation; in the first `dense_fraction` of the steps every token is still kept.

        Gathered, unless a gate has a gradient for the tokens that are dropped.
        """
        if isinstance(self.retainer, AdaptiveRatio):
            self.retainer.gumbel_temperature = 1 - 0.9 * self.progress  # τ_g, 1 → 0.1
        embeddings, layout = self.model.start(batch, "masked" if self.one_ratio.has_gate else "gathered")
        return self.model.classify(embeddings, layout, enforce=self.progress >= self.dense_fraction)

    def ratio_loss(
        self,
        ratio_logits: Float[Tensor, "batch ratios"],
        rows: Int[Tensor, " some"],
        target: Float[Tensor, "some tokens"],
        attributed: Batch,
    ) -> Float[Tensor, ""]:
        """Compute L_ARP = CE(q, y(a_c)) + μ·(mean Σ_c q_c r_c − ρ*)²; gumbel has the second term only.

        The labels are those of the `attributed` rows, the mean is over all.
        """
        assert isinstance(self.retainer, AdaptiveRatio)
        ratios = self.retainer.ratios
        loss = self.loss.budget_weight * losses.budget_loss(ratio_logits, ratios, self.retainer.ratio)
        if self.ratio_target == "mass":
            mass = losses.mass_by_ratio(target, self.model.sequences(attributed).prunable, ratios)
            if self.eta is None or not self.teachers:  # no teacher's view to set η by: it follows the student's own
                now = losses.calibrate_eta(mass, ratios, self.retainer.ratio)
                self.eta = now if self.eta is None else 0.98 * self.eta + 0.02 * now
            loss = loss + F.cross_entropy(ratio_logits[rows], losses.smallest_sufficient_ratio(mass, self.eta))
        if self.ratio_target == "oracle":
            loss = loss + F.cross_entropy(ratio_logits[rows], self.oracle_ratio(target, attributed))
        return loss

    @torch.no_grad()
    def oracle_ratio(self, target: Float[Tensor, "batch tokens"], batch: Batch) -> Int[Tensor, " batch"]:
        """Find the smallest ratio whose loss on the top tokens of a_c is within δ of the full loss: C extra passes.

        Dropout is off: between two passes with different dropout, δ would measure nothing.
        """
        assert isinstance(self.retainer, AdaptiveRatio)
        assert self.model.pruning is not None
        with without_dropout(self.model):
            embeddings, layout = self.model.start(batch)
            full = losses.task_loss(self.model.classify(embeddings, layout, prune=False).logits.float(), batch.labels)
            sufficient = []
            for ratio in self.retainer.ratios:
                keep = self.retainer.keep(target, float(ratio), layout)
                encoded = self.model.encoder(
                    embeddings, layout, Prescribed(keep, self.retainer.layer, self.model.pruning.layerwise.place)
                )
                pruned = losses.task_loss(self.model.head(encoded.first).float(), batch.labels)
                sufficient.append(pruned <= full + self.oracle_tolerance)
        enough = torch.stack([*sufficient[:-1], torch.ones_like(sufficient[-1])], dim=1)  # everything always suffices
        return enough.int().argmax(1)
