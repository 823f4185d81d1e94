"""The loop over a method's stages: one Trainer each, resumed at the epoch that was reached, skipped when done.

checkpoints/<stage>/last.ckpt           written after every epoch; a killed run goes on from it
checkpoints/<stage>/best.ckpt           the epoch with the best metric on the selection slice
checkpoints/<stage>/weights.safetensors the chosen weights; that it exists means that the stage is done
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file

from tokprune_exp.data.module import TaskData
from tokprune_exp.data.tokenise import save_at_once
from tokprune_exp.methods.module import Stage

LOGGER = logging.getLogger(__name__)


@dataclass
class StageReport:
    """How a stage went: seconds spent in this process, and whether it was done before."""

    name: str
    seconds: float
    was_done: bool


def run_stage(
    stage: Stage, data: TaskData, build_trainer: Callable[..., Trainer], loggers: list[Logger], directory: Path
) -> StageReport:
    """Train one stage, or load what an earlier process trained; the module ends with the weights of the best epoch."""
    started = time.perf_counter()
    folder = directory / "checkpoints" / stage.name
    weights = folder / "weights.safetensors"
    stage.module.prefix = stage.name
    if weights.is_file():
        LOGGER.info("stage %s: done before, weights from %s", stage.name, weights)
        stage.module.model.load_state_dict(load_file(weights))
        return StageReport(stage.name, time.perf_counter() - started, was_done=True)

    metric = f"{stage.name}/selection_{stage.module.metrics[0]}"
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        filename="best",
        monitor=metric,
        mode="max",
        save_last=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    trainer = build_trainer(
        max_epochs=stage.epochs,
        logger=loggers or False,
        callbacks=[checkpoint],
        default_root_dir=directory,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    if stage.before is not None:
        stage.before(data, trainer.strategy.root_device)
    last = folder / "last.ckpt"
    if last.is_file():
        LOGGER.info("stage %s: goes on from %s", stage.name, last)
    stage.module.train()
    trainer.fit(stage.module, data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)

    best = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)
    stage.module.load_state_dict(best["state_dict"])
    LOGGER.info("stage %s: best epoch has %s = %.4f", stage.name, metric, float(checkpoint.best_model_score or 0))
    stage.module.cpu()
    save_at_once({name: tensor.contiguous() for name, tensor in stage.module.model.state_dict().items()}, weights)
    for file in (last, folder / "best.ckpt"):  # three times the weights in size, and of no more use
        file.unlink(missing_ok=True)
    return StageReport(stage.name, time.perf_counter() - started, was_done=False)
