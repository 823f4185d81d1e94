"""One run, top to bottom: data, model, method, stages, evaluation, measurement, record."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from tokprune_exp.config import config_hash, instantiate, overrides
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.pretrained import LoadedBackbone, load_backbone, load_tokenizer
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.measure.evaluation import check_flops, evaluate
from tokprune_exp.measure.fidelity import saliency_fidelity
from tokprune_exp.measure.latency import compare_latency, length_sorted_chunks
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import PruningModule
from tokprune_exp.model import ModelCard, PrunedClassifier, load_model, save_model
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.scorers import TokenSaliency
from tokprune_exp.stages import resolve_precision, run_stage, use_fast_exact_float32
from tokprune_exp.tracking import (
    RunRecord,
    close,
    log_result,
    make_loggers,
    print_summary,
    silence_advertisements,
)

LOGGER = logging.getLogger(__name__)


def run(cfg: DictConfig, directory: Path) -> None:
    """Train, evaluate, measure and record one configuration in its directory; a run that was killed goes on."""
    if is_finished(directory, cfg):
        return
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    LOGGER.info("run directory: %s", directory)
    silence_advertisements()

    task: Task = OmegaConf.to_object(cfg.task)  # type: ignore[assignment]
    record = RunRecord(
        directory,
        method=method_name(cfg),
        task=task.name,
        backbone=cfg.backbone.name,
        seed=cfg.seed,
        config_hash=config_hash(cfg),
        overrides=overrides(),
    )
    loggers: list[Any] = []
    with record:
        try:
            loggers = make_loggers(
                cfg.logger, directory, directory.name, None, list(cfg.tags), OmegaConf.to_container(cfg, resolve=True)
            )
            seed_everything(cfg.seed, workers=True, verbose=False)
            if use_fast_exact_float32():
                LOGGER.info("fp32 products: oneDNN (measured: as exact as the default)")

            backbone = load_backbone(as_backbone(cfg.backbone), cfg.data.cache)
            settings = SimpleNamespace(
                **OmegaConf.to_container(cfg.data, resolve=True), tokenizer=backbone.tokenizer, seed=cfg.seed
            )
            data = TaskData(task, settings)
            record.update(data=data.source)

            with bounds_are_user_errors():
                model = build_model(cfg, backbone, task)
                method = build_method(cfg, model, data)
            precision = resolve_precision(cfg.trainer.precision, cfg.trainer.accelerator)
            trainer = partial(instantiate(cfg.trainer), precision=precision)
            for stage in method.stages():
                with record.stage(stage.name):
                    run_stage(replace(stage, epochs=cfg.epochs or stage.epochs), data, trainer, loggers, directory)

            save_model(directory / "model", model, model_card(cfg, task), backbone.tokenizer)
            record.update(**measure(cfg, method, data, task))
            log_result(loggers, record.result)
        except BaseException:
            close(loggers, failed=True)
            raise
        close(loggers)
    print_summary(record)


def is_finished(directory: Path, cfg: DictConfig) -> bool:
    """Whether this very run is complete already; with `overwrite` it is thrown away.

    Raises:
        UserError: the directory holds a run with another configuration.
    """
    file = directory / "result.json"
    if not file.is_file():
        return False
    result = json.loads(file.read_text())
    if cfg.overwrite:
        shutil.rmtree(directory)
        return False
    if result["config_hash"] != config_hash(cfg):
        raise UserError(
            f"run_dir={directory} holds a run with another configuration ({result['method']} on {result['task']}); "
            f"name another directory, or throw that run away with overwrite=true"
        )
    if result["status"] == "completed":
        LOGGER.info("complete already: %s (overwrite=true starts it anew)", file)
        return True
    LOGGER.info("%s earlier; going on", result["status"])
    return False


@contextmanager
def bounds_are_user_errors() -> Iterator[None]:
    """Turn a constructor's complaint about a value of the configuration into an error for the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def as_backbone(node: Any) -> Backbone:
    """Read a backbone node, the student's or the teacher's, into its dataclass."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Backbone), node))  # type: ignore[return-value]


def method_name(cfg: DictConfig) -> str:
    """Return the name of the method's page, e.g. adtp."""
    return cfg.method._target_.split(".")[-2]


def build_model(cfg: DictConfig, backbone: LoadedBackbone, task: Task) -> PrunedClassifier:
    """Put encoder, pruning and head together; a checkpoint's pooler is used where it has one."""
    shape = backbone.encoder.shape
    head = Head(shape.dim, task.outputs, shape.dropout)
    if backbone.pooler is not None:
        head.pooler.load_state_dict(backbone.pooler)
    pruning = None
    if cfg.scorer is not None and cfg.retainer is not None:
        pruning = Pruning(instantiate(cfg.scorer)(shape.dim), instantiate(cfg.retainer)(shape.dim))
    return PrunedClassifier(backbone.encoder, head, pruning, backbone.tokenizer.sep_token_id)


def build_method(cfg: DictConfig, model: PrunedClassifier, data: TaskData) -> PruningModule:
    """Build the method, with its teacher where it has one."""
    optimizer = instantiate(cfg.optimizer)
    build = partial(instantiate(cfg.method), model=model, metrics=data.task.metrics, optimizer=optimizer)
    if cfg.teacher is None:
        return build()
    if cfg.teacher.path is not None:
        teacher_model, card = load_model(Path(cfg.teacher.path))
        if card.task != data.task.name:
            raise UserError(f"teacher.path={cfg.teacher.path} was trained on {card.task}, not on {data.task.name}")
        tokenizer = load_tokenizer(cfg.teacher.path)
    else:
        backbone = load_backbone(as_backbone(cfg.teacher.backbone), cfg.data.cache)
        teacher_model = build_model(OmegaConf.merge(cfg, {"scorer": None, "retainer": None}), backbone, data.task)
        tokenizer = backbone.tokenizer
    if tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError(
            f"teacher and student must read the same tokens, but {cfg.backbone.name} has another vocabulary than its teacher"
        )
    if cfg.teacher.lr is not None:
        optimizer = partial(optimizer, lr=cfg.teacher.lr)
    teacher = Finetune(teacher_model, data.task.metrics, optimizer, cfg.teacher.epochs, cfg.method.warmup_fraction)
    return build(
        teacher=teacher,
        teacher_is_trained=cfg.teacher.path is not None,
        initialises_student=cfg.teacher.initialises_student,
    )


def model_card(cfg: DictConfig, task: Task) -> ModelCard:
    """Say what whoever loads the model needs to know of its task."""
    return ModelCard(
        task=task.name,
        labels=task.labels,
        max_tokens=task.max_tokens,
        pair=len(task.text) == 2,
        published_length=task.published_length,
        method=method_name(cfg),
        metrics=task.metrics,
    )


def measure(cfg: DictConfig, method: PruningModule, data: TaskData, task: Task) -> dict[str, Any]:
    """Evaluate the dense and the pruned model on the reported split, count, check the count, and time both."""
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    model, fields = method.model.eval(), {}

    def assess(one: PrunedClassifier, prune: bool) -> Any:
        return evaluate(one, data.evaluation_batches(), task.metrics, task.published_length, prune, device)

    pruned = assess(model, prune=True)
    if model.pruning is None:
        fields["metrics"] = {"dense": pruned.metrics}
    else:
        fields["metrics"] = {"unpruned": assess(model, prune=False).metrics, "pruned": pruned.metrics}
    fields["flops"] = pruned.flops
    if method.dense is not None:
        dense = assess(method.dense, prune=False)
        fields["metrics"] = {"dense": dense.metrics, **fields["metrics"]}
        fields["flops"]["gflops_teacher"] = dense.flops["gflops_dense"]

    split, settings = data.evaluation, cfg.measure
    few = torch.arange(min(settings.fvcore_examples, len(split)))
    batches = [split.collate([int(one)]) for one in few] + [split.collate(few)]
    fields["flops"]["fvcore_forwards_equal"] = check_flops(model, batches)

    if model.pruning is not None:
        model.to(device)
        rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: settings.latency_examples]
        lengths = split.lengths[rows].tolist()
        timed = {
            size: [split.collate(rows[chunk]).to(device) for chunk in length_sorted_chunks(lengths, size)]
            for size in settings.latency_batch_sizes
            if size <= len(rows)
        }
        fields["latency"] = compare_latency(
            partial(model, execution="gathered"),
            partial(model, execution="gathered", prune=False),
            timed,
            settings.latency_rounds,
        )
        if isinstance(model.pruning.scorer, TokenSaliency):
            model.cpu()
            examples = [split.collate(part) for part in torch.arange(len(split))[: settings.attribution_examples].split(32)]
            fields["saliency"] = saliency_fidelity(model, examples, instantiate(cfg.method.attribution))
    return fields
