"""The loop over a method's stages: one Trainer each, resumed at the epoch that was reached, skipped when done.

checkpoints/<stage>/last.ckpt           written after every epoch; a killed run goes on from it
checkpoints/<stage>/best.ckpt           the epoch with the best metric on the selection slice
checkpoints/<stage>/findings.json       what the stage found out besides its weights
checkpoints/<stage>/weights.safetensors the chosen weights; that it exists means that the stage is done

With several devices Lightning starts this command once more for each other one when the first stage is fitted. All of
them walk through the same stages; the first process alone waits for other runs, decides and writes.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch import nn

from tokprune_exp.data.module import TaskData
from tokprune_exp.data.tokenise import only_one, save_at_once
from tokprune_exp.methods.module import Stage
from tokprune_exp.tracking import write_json

LOGGER = logging.getLogger(__name__)


def run_stage(
    stage: Stage,
    data: TaskData,
    build_trainer: Callable[..., Trainer],
    loggers: list[Logger],
    directory: Path,
    each_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Train one stage, or load what an earlier process trained; the module ends with the weights of `stage.keeps`."""
    folder = directory / "checkpoints" / stage.name
    weights = folder / "weights.safetensors"
    stage.module.prefix = stage.name
    metric = f"{stage.name}/selection_{stage.chooses_by or stage.module.metrics[0]}"
    mode = "max" if stage.chooses_by is None else "min"
    best = ModelCheckpoint(
        dirpath=folder, filename="best", monitor=metric, mode=mode, save_last=False, enable_version_counter=False
    )
    # on its own, since save_last would only be written when the best is
    last = ModelCheckpoint(dirpath=folder, filename="last", monitor=None, save_last=False, enable_version_counter=False)
    patience = [] if stage.patience is None else [EarlyStopping(metric, mode=mode, patience=stage.patience)]

    def ends_epoch(trainer: Trainer, _: LightningModule) -> None:
        each_epoch()
        if not sys.stdout.isatty():  # Lightning draws its bar on a terminal only; a log file gets a line instead
            epoch, reached = trainer.current_epoch + 1, float(trainer.callback_metrics[metric])
            LOGGER.info("stage %s: epoch %d of %d, %s = %.4f", stage.name, epoch, stage.epochs, metric, reached)

    trainer = build_trainer(
        max_epochs=stage.epochs,
        logger=loggers or False,
        callbacks=[best, last, *patience, LambdaCallback(on_train_epoch_end=ends_epoch)],
        default_root_dir=directory,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    if trainer.strategy.broadcast(weights.is_file()):
        if trainer.is_global_zero:
            _forget_checkpoints(folder)
        LOGGER.info("stage %s: done before, weights from %s", stage.name, weights)
        stage.module.model.load_state_dict(load_file(weights))
        found = folder / "findings.json"
        stage.module.findings.update(json.loads(found.read_text()) if found.is_file() else {})
        return

    if stage.before is not None:
        stage.before(data, trainer.strategy.root_device)
    shared = None if stage.shared is None else stage.shared(data, trainer)
    # of the runs that share it one trains it, the others wait
    with nullcontext() if shared is None or not trainer.is_global_zero else only_one(shared[0]):
        if shared is not None and trainer.strategy.broadcast(shared[0].is_file()):
            LOGGER.info("stage %s: trained by an earlier run, weights from %s", stage.name, shared[0])
            shared[1].load_state_dict(load_file(shared[0]))
        elif stage.epochs:
            train(stage, trainer, data, folder)
            score = best.best_model_score if stage.keeps == "best" else trainer.callback_metrics.get(metric)
            value = float("nan") if score is None else float(score)  # a fit that had ended before logs nothing anew
            LOGGER.info("stage %s: %s epoch has %s = %.4f", stage.name, stage.keeps, metric, value)
            if shared is not None and trainer.is_global_zero:
                save_weights(shared[1], shared[0])
    stage.module.cpu()
    if trainer.is_global_zero:
        write_json(folder / "findings.json", stage.module.findings)
        save_weights(stage.module.model, weights)
        _forget_checkpoints(folder)


def train(stage: Stage, trainer: Trainer, data: TaskData, folder: Path) -> None:
    """Fit the module, from where an earlier process left it, and give it the weights of the epoch that counts."""
    stage.module.train()
    # every device validates the whole selection slice, so that what they log is the same
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    trainer.fit(stage.module, data, ckpt_path=_reached(folder / "last.ckpt", stage.name), weights_only=True)
    chosen = torch.load(folder / f"{stage.keeps}.ckpt", map_location="cpu", weights_only=True)
    stage.module.load_state_dict(chosen["state_dict"])
    trainer.strategy.barrier()  # the first process deletes the checkpoint when all have read it


def save_weights(module: nn.Module, file: Path) -> None:
    """Write a module's weights such that a reader sees all of them or none."""
    save_at_once({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)


def _reached(checkpoint: Path, stage: str) -> str | None:
    """Return the checkpoint to go on from; one that a kill left half-written is put aside."""
    if not checkpoint.is_file():
        return None
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        aside = checkpoint.rename(checkpoint.with_suffix(".unreadable"))
        LOGGER.warning("stage %s: starts again, its checkpoint cannot be read (%s), see %s", stage, error, aside)
        return None
    LOGGER.info("stage %s: goes on from %s", stage, checkpoint)
    return str(checkpoint)


def _forget_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a stage that is done: three times its weights in size, and of no more use."""
    for file in folder.glob("*.ckpt"):
        file.unlink()
