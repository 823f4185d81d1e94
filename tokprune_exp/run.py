"""One run, top to bottom: data, model, method, stages, evaluation, measurement, record."""

import json
import logging
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from tokprune_exp.build import (
    as_backbone,
    bounds_are_user_errors,
    build_data,
    build_method,
    build_model,
    method_name,
    model_card,
    plain,
    shared_teacher,
)
from tokprune_exp.config import config_hash, instantiate, overrides
from tokprune_exp.encoder.pretrained import load_backbone
from tokprune_exp.errors import UserError
from tokprune_exp.examples import answered, log_examples
from tokprune_exp.measure.report import measure
from tokprune_exp.methods.student import StudentModule
from tokprune_exp.model import save_model
from tokprune_exp.precision import resolve_accelerator, resolve_precision, use_fast_exact_float32
from tokprune_exp.serving import TextClassifier
from tokprune_exp.stages import run_stage
from tokprune_exp.tracking import (
    RunRecord,
    close,
    log_result,
    make_loggers,
    print_summary,
    quieten_lightning,
    wandb_runs,
)

LOGGER = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(days=1)
"""Of one device for another: the first one may be waiting for another run that trains what they share."""


def run(cfg: DictConfig, directory: Path) -> None:
    """Train, evaluate, measure and record one configuration in its directory; a run that was killed goes on.

    With several devices this is called once in the process of each; the first one records and measures.
    """
    if not is_first_process():
        train_beside(cfg, directory)
        return
    if is_finished(directory, cfg):
        return
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, directory / "config.yaml", resolve=True)
    LOGGER.info("run directory: %s", directory)
    record = record_of(cfg, directory)
    loggers: list[Logger] = []
    try:
        with record:
            quieten_lightning()
            loggers += make_loggers(cfg.logger, record, list(cfg.tags), plain(cfg))
            train_and_measure(cfg, directory, record, loggers)
    finally:  # completed or not, the record now says so
        log_result(loggers, record.result)
        close(loggers, failed=record.result["status"] != "completed")
    print_summary(record.result, directory)


def record_of(cfg: DictConfig, directory: Path) -> RunRecord:
    """Open the record of a run."""
    return RunRecord(
        directory,
        method=method_name(cfg),
        task=cfg.task.name,
        backbone=cfg.backbone.name,
        seed=cfg.seed,
        config_hash=config_hash(cfg),
        overrides=overrides(),
    )


def is_first_process() -> bool:
    """Whether this process records the run; with several devices there is one for each of them."""
    return getattr(rank_zero_only, "rank", 0) == 0


def train_beside(cfg: DictConfig, directory: Path) -> None:
    """Train on another device than the first one, whose process records the run; nothing is said and written here."""
    quieten_lightning()
    logging.getLogger("tokprune_exp").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        train_and_measure(cfg, directory, record_of(cfg, Path(scratch)), [])


def build_trainer(cfg: DictConfig, **settings: Any) -> Trainer:
    """Build a Trainer; with several devices each has the whole model and a share of the batches."""
    if (cfg.trainer.devices or 1) > 1:  # a stage trains parts of the model, and no loss need reach all of them
        settings["strategy"] = DDPStrategy(find_unused_parameters=True, timeout=LONGEST_WAIT)
    trainer = instantiate(cfg.trainer)(**settings)
    assert isinstance(trainer, Trainer)
    return trainer


def train_and_measure(cfg: DictConfig, directory: Path, record: RunRecord, loggers: list[Logger]) -> None:
    """Do the work of a run, in the order in which the data flow."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    if use_fast_exact_float32():
        LOGGER.info("fp32 products: oneDNN (measured: as exact as the default)")

    with bounds_are_user_errors():
        backbone = load_backbone(as_backbone(cfg.backbone), cfg.data.cache)
    data = build_data(cfg, backbone.tokenizer, cfg.task)
    record.update(data={**data.source, "weights": backbone.source})

    with bounds_are_user_errors():
        model = build_model(cfg, backbone, data.task)
        method = build_method(cfg, model, data)

    if isinstance(method, StudentModule):
        method.check_budget(data)

    accelerator = resolve_accelerator(cfg.trainer.accelerator)
    precision = resolve_precision(cfg.trainer.precision, accelerator)
    LOGGER.info("training on %s in %s", accelerator, precision)
    record.update(hardware={"accelerator": accelerator, "precision": precision})
    trainer = partial(build_trainer, cfg, accelerator=accelerator, precision=precision)
    for stage in method.stages():
        seed_everything(cfg.seed, workers=True, verbose=False)  # whatever was trained, loaded or resumed before
        if stage.name == "teacher" and cfg.shared_dir is not None:
            stage = replace(stage, shared=shared_teacher(cfg, stage.module))
        with record.stage(stage.name):
            epochs = min(stage.epochs, 1) * (cfg.epochs or stage.epochs)  # a stage without training stays without
            with model.encoder.compiled() if cfg.compile else nullcontext():
                stage = replace(stage, epochs=epochs)
                run_stage(stage, stage.data or data, trainer, loggers, directory, each_epoch=record.update)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_first_process():
        return

    save_model(directory / "model", model, model_card(cfg), backbone.tokenizer)
    if method.dense is not None and cfg.teacher.path is None:  # trained here, and of use to other runs: teacher.path
        save_model(directory / "teacher", method.dense, model_card(cfg, of_teacher=True), backbone.tokenizer)
    record.update(findings=method.findings)
    attribution = instantiate(cfg.method.attribution) if "attribution" in cfg.method else None
    record.update(
        **measure(method, data, cfg.measure, "cuda" if accelerator in ("gpu", "cuda") else "cpu", attribution)
    )
    runs = list(wandb_runs(loggers))
    if runs:
        log_examples(runs, answered(TextClassifier(method.model.cpu(), model_card(cfg), backbone.tokenizer), data))


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
        throw_away(directory)
        return False
    if result["config_hash"] != config_hash(cfg):
        raise UserError(
            f"run_dir={directory} holds a run with another configuration ({result['method']} on {result['task']}); "
            f"name another directory, or throw that run away with overwrite=true"
        )
    if result["status"] == "completed":
        print_summary(result, directory)
        LOGGER.info("complete already: %s (overwrite=true starts it anew)", file)
        return True
    LOGGER.info("this run was %s before; it goes on", result["status"])
    return False


def throw_away(directory: Path) -> None:
    """Delete what a run writes, and nothing else that may lie in its directory."""
    for name in ("checkpoints", "csv", "wandb", "model", "teacher"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("config.yaml", "result.json"):
        (directory / name).unlink(missing_ok=True)
