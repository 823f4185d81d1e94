"""PrunedClassifier: encoder, pruning and head as one module; and the directory it is saved to and loaded from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokprune_exp.attribution import (
    Attribution,
    gold_score,
    integrated_gradients,
    normalise_over_sequence,
    token_magnitude,
)
from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.encoder import EncoderOutput, EncoderShape, PrunedEncoder
from tokprune_exp.encoder.fast import Precision, fast_encoder, with_fast_linears
from tokprune_exp.encoder.layout import LAYOUTS, Layout, Sequences
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.planning import with_fast_plan
from tokprune_exp.pruning.pruning import RETAINERS, SCORERS, Pruning
from tokprune_exp.pruning.retainers import RatioRetainer

Execution = Literal["masked", "gathered"]
FORMAT = 2
"""Version of the model directory; raised when an old directory can no longer be read."""


@dataclass
class ClassifierOutput:
    """Logits (or one score) per sequence and the record of what was pruned on the way."""

    logits: Float[Tensor, "batch outputs"]
    trace: PruningTrace


class PrunedClassifier(nn.Module):
    """A text classifier that drops tokens; `pruning=None` is the plain encoder.

    `separator` is the id of [SEP] (or </s>), protected when the retainer keeps separators.
    """

    def __init__(self, encoder: PrunedEncoder, head: Head, pruning: Pruning | None, separator: int) -> None:
        super().__init__()
        self.encoder, self.head, self.pruning, self.separator = encoder, head, pruning, separator
        if pruning is not None:
            last = encoder.shape.layers - 1
            pruning.attach(encoder)
            retainer = pruning.retainer
            if isinstance(retainer, RatioRetainer) and retainer.layer > last:
                raise ValueError(f"retainer.layer={retainer.layer}, but this encoder has layers 0 to {last}")

    def sequences(self, batch: Batch) -> Sequences:
        """Describe a batch to scorers and retainers."""
        protected = torch.zeros_like(batch.valid)
        protected[:, 0] = True
        if self.pruning is not None and self.pruning.retainer.keeps_separators:
            protected |= batch.valid & (batch.input_ids == self.separator)
        return Sequences(batch.valid, protected, batch.input_ids, batch.token_type_ids)

    def start(self, batch: Batch, execution: Execution = "masked") -> tuple[Tensor, Layout]:
        """Embed a batch: the input of the first layer and the layout it lies in."""
        layout = LAYOUTS[execution].start(self.sequences(batch))
        return self.encoder.embed(batch.input_ids, batch.token_type_ids, layout), layout

    def classify(
        self, embeddings: Tensor, layout: Layout, prune: bool = True, enforce: bool = True
    ) -> ClassifierOutput:
        """Classify embedded tokens, with or without pruning; `enforce=False` asks the pruning but keeps every token."""
        rule = self.pruning.rule(self.encoder, embeddings, layout) if prune and self.pruning is not None else None
        encoded: EncoderOutput = self.encoder(embeddings, layout, rule, enforce)
        return ClassifierOutput(self.head(encoded.first), encoded.trace)

    def forward(self, batch: Batch, execution: Execution = "masked", prune: bool = True) -> ClassifierOutput:
        """Classify a batch, masked (fixed shapes) or gathered (pruned tokens and padding are gone)."""
        return self.classify(*self.start(batch, execution), prune=prune)

    def choices(self, batch: Batch) -> PruningTrace:
        """Record which tokens would be pruned, gathered, with no layer computed after the last choice."""
        embeddings, layout = self.start(batch, "gathered")
        rule = None if self.pruning is None else self.pruning.rule(self.encoder, embeddings, layout)
        return self.encoder.choices(embeddings, layout, rule)

    def for_inference(self, precision: Precision = "fp32") -> "PrunedClassifier":
        """Return this model with the layers of `encoder/fast.py`: it runs gathered only, and cannot be trained.

        Embeddings, thresholds and the like are shared; a change of a layer's weights after this is not seen.
        """
        ready = copy(self)
        ready._modules = dict(self._modules)
        ready.encoder, ready.head = fast_encoder(self.encoder, precision), with_fast_linears(self.head)
        ready.pruning = None if self.pruning is None else with_fast_plan(with_fast_linears(self.pruning))
        return ready.eval()

    def padding_embeddings(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        """Embed the padding token at every position: the baseline E' of integrated gradients (baseline=pad)."""
        layout = LAYOUTS["masked"].start(self.sequences(batch))
        padding = torch.full_like(batch.input_ids, self.encoder.shape.pad_token)
        return self.encoder.embed(padding, batch.token_type_ids, layout)

    def attribute(
        self, batch: Batch, settings: Attribution, create_graph: bool = False, top_k: int | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """Compute A, the normalised attribution of each token to the gold answer of the unpruned model."""
        return self.attribute_and_answer(batch, settings, create_graph, top_k)[0]

    def attribute_and_answer(
        self, batch: Batch, settings: Attribution, create_graph: bool = False, top_k: int | None = None
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch outputs"]]:
        """Compute A and, at no further cost, the logits of the unpruned model.

        Always in fp32 and without dropout: under autocast a confident model's gradients round to nothing.
        """
        with without_dropout(self), torch.autocast(batch.valid.device.type, enabled=False), torch.enable_grad():
            embeddings, layout = self.start(batch)
            baseline = self.padding_embeddings(batch) if settings.baseline == "pad" else torch.zeros_like(embeddings)
            seen: list[Tensor] = []

            def score(point: Tensor) -> Tensor:
                seen.append(self.classify(point, layout, prune=False).logits)
                return gold_score(seen[-1], batch.labels)

            gradients = integrated_gradients(score, embeddings, baseline, settings.steps, create_graph)
        # the path ends at the input itself, so its last logits are the model's answer
        return normalise_over_sequence(token_magnitude(gradients, top_k), batch.valid), seen[-1]

    def start_from(self, trained: "PrunedClassifier", key: str = "teacher.initialises_student=true") -> None:
        """Copy the weights of a trained model of the same width: its first layers, its head.

        Raises:
            UserError: its sizes do not fit; `key` is the configuration's key that asked for it.
        """
        ours, theirs = self.encoder.shape, trained.encoder.shape
        if replace(theirs, layers=ours.layers, dropout=ours.dropout) != ours or theirs.layers < ours.layers:
            raise UserError(
                f"{key} needs a model of the student's sizes, with at least its layers: "
                f"it is {theirs}, the student {ours}"
            )
        self.encoder.load_state_dict(trained.encoder.first_layers(ours.layers).state_dict())
        self.head.load_state_dict(trained.head.state_dict())


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode for a while, gradients and all."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class ModelCard:
    """What a model directory says of itself besides its weights: enough to use it without any other configuration."""

    task: str
    backbone: str
    labels: list[str]
    max_tokens: int
    pair: bool
    published_length: int
    method: str
    metrics: list[str]


def save_model(directory: Path, model: PrunedClassifier, card: ModelCard, tokenizer: Any) -> None:
    """Write a model directory: config.json, model.safetensors and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    pruning = None
    if model.pruning is not None:
        scorer, retainer = model.pruning.scorer, model.pruning.retainer
        pruning = {
            "scorer": {"type": _type_name(SCORERS, scorer), **scorer.settings()},
            "retainer": {"type": _type_name(RETAINERS, retainer), **retainer.settings()},
        }
    config = {
        "format": FORMAT,
        "encoder": asdict(model.encoder.shape),
        "head": {"outputs": model.head.classifier.out_features},
        "pruning": pruning,
        "separator": model.separator,
        "card": asdict(card),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
    )
    tokenizer.save_pretrained(directory)


def load_model(directory: Path) -> tuple[PrunedClassifier, ModelCard]:
    """Build the model that a directory describes, in evaluation mode.

    Raises:
        UserError: there is no model there, or one of another format.
    """
    if not (directory / "config.json").is_file() or not (directory / "model.safetensors").is_file():
        raise UserError(
            f"no model in {directory}: looked for config.json and model.safetensors, which a run writes to model/"
        )
    config = json.loads((directory / "config.json").read_text())
    if config.get("format") != FORMAT:
        raise UserError(f"{directory}/config.json is not a tokprune_exp model of format {FORMAT}")
    shape = EncoderShape(**config["encoder"])
    pruning = None
    if config["pruning"] is not None:
        scores, retains = (dict(config["pruning"][kind]) for kind in ("scorer", "retainer"))
        pruning = Pruning(
            SCORERS[scores.pop("type")](shape.dim, **scores),
            RETAINERS[retains.pop("type")](shape.dim, shape.layers, **retains),
        )
    model = PrunedClassifier(PrunedEncoder(shape), Head(shape.dim, **config["head"]), pruning, config["separator"])
    model.load_state_dict(load_file(directory / "model.safetensors"))
    retainer = None if model.pruning is None else model.pruning.retainer
    ends = None if retainer is None else retainer.knob_ends
    if retainer is not None and ends is not None and not min(ends) <= float(retainer.knob) <= max(ends):
        raise UserError(f"{directory} was trained by an earlier version, whose budgets were held in another way")
    return model.eval(), ModelCard(**config["card"])


def _type_name(registry: dict[str, Any], part: nn.Module) -> str:
    return next(name for name, cls in registry.items() if type(part) is cls)
