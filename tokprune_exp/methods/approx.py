"""ApproxNet learns to attend as the large encoder does: the first stage of STTABT (3.2; TinyBERT's distillation).

    L_att   1/(L·H·n) Σ_l Σ_h Σ_j KL(A_prob^l[h, j] ‖ Â_prob^l[h, j])    eq. 2, rows and keys of real tokens
    L_hid   1/L Σ_l mean (W_l ĥ^l − h^l)²                            outputs of layers 1 … L
    L_emb   mean (W_e ê − e)²
    L_pred  −mean_B Σ_c softmax(z)_c log softmax(ẑ)_c                 TinyBERT's, at temperature 1
    L       their sum

On texts without labels (`+text=wikitext2`) the teacher is the pretrained encoder, and L_pred is left out. The
projections W and a head of its own are used in training only. The means are over the real tokens. As the official code
does, `hidden: code` compares h^0 … h^{L−1} (off by one), takes ê without token types, and counts padding in both means;
`prediction: code` takes mean (softmax ẑ − softmax z)² for L_pred; of scores (regression) both are mean (ẑ − z)². The
epoch with the smallest KL on the selection slice counts.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tokprune_exp.data.attributions import weights_digest
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.tokenise import sha256_of
from tokprune_exp.encoder.encoder import PrunedEncoder
from tokprune_exp.head import Head
from tokprune_exp.losses import logit_distillation
from tokprune_exp.methods.module import PruningModule, Stage, Terms
from tokprune_exp.model import PrunedClassifier, without_dropout
from tokprune_exp.pruning.scorers import ApproxAttention

VERSION = 3
"""Raised when a cached ApproxNet would no longer be the one that is trained now."""


class ApproxDistillation(PruningModule):
    """Trains the ApproxNet of a model's scorer; everything else of the model is the frozen teacher.

    `prediction` says how answers are compared; None: they are not, since the texts have none (L_pred is left out).
    """

    def __init__(
        self,
        model: PrunedClassifier,
        metrics: list[str],
        optimizer: Callable[..., Optimizer],
        epochs: int,
        patience: int | None,
        hidden: Literal["paper", "code"] = "paper",
        prediction: Literal["paper", "code"] | None = "paper",
        warmup_fraction: float = 0.1,
        schedule: Literal["linear", "constant"] = "linear",
    ) -> None:
        super().__init__(model, metrics, optimizer, epochs, warmup_fraction)
        self.patience, self.hidden, self.prediction, self.schedule = patience, hidden, prediction, schedule
        large, small = model.encoder.shape, self.approx.net.shape
        self.projections = nn.ModuleList(nn.Linear(small.dim, large.dim) for _ in range(large.layers + 1))
        self.small_head = Head(small.dim, model.head.classifier.out_features)
        self.errors: list[tuple[Tensor, Tensor]] = []

    @property
    def approx(self) -> ApproxAttention:
        """The scorer whose network is trained."""
        assert self.model.pruning is not None and isinstance(self.model.pruning.scorer, ApproxAttention)
        return self.model.pruning.scorer

    def stages(self) -> list[Stage]:
        """One training, or none where another run has done it."""
        return [
            Stage(
                "approx",
                self,
                self.epochs,
                chooses_by="attention_kl",
                patience=self.patience,
                shared=self.shared_weights,
            )
        ]

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The small network and what is used in its training only."""
        return chain(
            self.approx.net.named_parameters(), self.projections.named_parameters(), self.small_head.named_parameters()
        )

    def shared_weights(self, data: TaskData, trainer: Trainer) -> tuple[Path, nn.Module]:
        """Say where this ApproxNet lies once it is trained: named by all that determines it, whatever k is.

        Where no answers are compared the head plays no part: one ApproxNet, distilled on text, serves every task.
        """
        teacher = [self.model.encoder] if self.prediction is None else [self.model.encoder, self.model.head]
        key = sha256_of(
            VERSION,
            weights_digest(nn.ModuleList(teacher)),
            weights_digest(self.approx.net),  # where it starts
            asdict(self.approx.net.shape),  # its dropout too, which is in no weight
            data.train.fingerprint,
            data.selection.fingerprint,
            self.approx.settings(),
            {"patience": self.patience, "hidden": self.hidden, "prediction": self.prediction},
            [trainer.max_epochs, trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.precision],
            [str(trainer.limit_train_batches), trainer.world_size],
            {
                "seed": data.settings.seed,
                "batch_size": data.settings.batch_size,
                "optimizer": str(self.build_optimizer),
                "warmup_fraction": self.warmup_fraction,
                "schedule": self.schedule,
            },
        )
        return data.cache / "approxnets" / f"{key}.safetensors", self.approx.net

    def terms(self, batch: Batch) -> Terms:
        """Compute the four distillation losses."""
        valid = batch.valid
        with torch.no_grad(), without_dropout(self.model.encoder), without_dropout(self.model.head):
            embeddings, layout = self.model.start(batch)
            large = self.model.encoder(embeddings, layout, wants_inner=True)
            answer = self.model.head(large.first)
        net = self.approx.net
        small_embeddings = net.embed(batch.input_ids, batch.token_type_ids, layout)
        small = net(small_embeddings, layout, wants_inner=True)

        is_code = self.hidden == "code"
        first, last = (0, -1) if is_code else (1, None)
        counted = torch.ones_like(valid) if is_code else valid
        own = net.embed(batch.input_ids, torch.zeros_like(batch.input_ids), layout) if is_code else small_embeddings
        theirs = [embeddings, *large.layer_outputs][first:last]
        ours = [small_embeddings, *small.layer_outputs][first:last]
        pairs = zip(self.projections[1:], ours, theirs, strict=True)
        distances = [masked_mean_square(project(one) - other, counted) for project, one, other in pairs]
        kl = [attention_kl(a, b, valid).mean() for a, b in zip(large.scores, small.scores, strict=True)]
        parts = {
            "attention": torch.stack(kl).mean(),
            "hidden": torch.stack(distances).mean(),
            "embedding": masked_mean_square(self.projections[0](own) - embeddings, counted),
        }
        if self.prediction is not None:
            guess = self.small_head(small.first).float()
            parts["prediction"] = prediction_distance(guess, answer.float(), self.prediction)
        return Terms(torch.stack(list(parts.values())).sum(), parts)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Collect the approximation error on the selection slice."""
        embeddings, layout = self.model.start(batch)
        large = self.model.encoder(embeddings, layout, wants_inner=True).scores
        small = self.approx.scores(self.model.encoder, embeddings, layout)
        kl = torch.stack([attention_kl(a, b, batch.valid) for a, b in zip(large, small, strict=True)])
        mse = torch.stack([attention_mse(a, b, batch.valid) for a, b in zip(large, small, strict=True)])
        self.errors.append((kl.mean(0), mse.mean(0)))

    def on_validation_epoch_end(self) -> None:
        """Log KL and mean squared error of the attention, means over texts, layers and heads."""
        kl, mse = (torch.cat(parts).mean() for parts in zip(*self.errors, strict=True))
        self.errors.clear()
        self.log(f"{self.prefix}/selection_attention_kl", kl, prog_bar=True)
        self.log(f"{self.prefix}/selection_attention_mse", mse)

    @torch.no_grad()
    def approximation_error(
        self, data: TaskData, device: torch.device | str, net: PrunedEncoder | None = None
    ) -> dict[str, float]:
        """Measure the error on the selection slice (STTABT, Table A.1), of the ApproxNet or of another of its sizes."""
        own = self.approx.net
        self.approx.net = own if net is None else net
        self.to(device)
        with without_dropout(self):
            for index, batch in enumerate(data.val_dataloader()):
                self.validation_step(batch.to(device), index)
        self.approx.net = own
        kl, mse = (float(torch.cat(parts).mean()) for parts in zip(*self.errors, strict=True))
        self.errors.clear()
        return {"kl": kl, "mse": mse}


def attention_kl(
    large: Float[Tensor, "batch heads tokens tokens"],
    small: Float[Tensor, "batch heads tokens tokens"],
    valid: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, " batch"]:
    """Compute 1/(H·n) Σ_h Σ_{j real} KL(A_prob[h, j] ‖ Â_prob[h, j]) of scores before the softmax (eq. 2)."""
    rows = valid[:, None, :, None]
    log_large, log_small = (x.float().masked_fill(~rows, 0.0).log_softmax(-1) for x in (large, small))
    keys = valid[:, None, None, :]
    gap = (log_large - log_small).masked_fill(~(rows & keys), 0.0)
    divergence = (log_large.exp() * gap).sum(-1)
    return divergence.mean(1).sum(-1) / valid.sum(1)


def attention_mse(
    large: Float[Tensor, "batch heads tokens tokens"],
    small: Float[Tensor, "batch heads tokens tokens"],
    valid: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, " batch"]:
    """Compute 1/(H·n²) Σ (A_prob − Â_prob)² over real rows and keys."""
    rows = valid[:, None, :, None]
    ours, theirs = (x.float().masked_fill(~rows, 0.0).softmax(-1) for x in (small, large))
    squares = (ours - theirs).square() * (rows & valid[:, None, None, :])
    return squares.mean(1).sum((-1, -2)) / valid.sum(1).square()


def masked_mean_square(
    difference: Float[Tensor, "batch tokens dim"], counted: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Compute the mean square over the tokens that count."""
    return difference.float()[counted].square().mean()


def prediction_distance(
    small: Float[Tensor, "batch outputs"], large: Float[Tensor, "batch outputs"], prediction: str = "paper"
) -> Float[Tensor, ""]:
    """Compute L_pred: the soft cross-entropy −mean_B Σ_c softmax(z)_c log softmax(ẑ)_c of TinyBERT, which STTABT names.

    `code` is the official code's mean squared distance of the probabilities. A single output is a score: its squared
    distance, in both.
    """
    if prediction == "paper" or small.shape[1] == 1:
        return logit_distillation(small, large, temperature=1.0)
    return F.mse_loss(small.softmax(-1), large.softmax(-1))
