"""The loggers of a run: where its curves go."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import CSVLogger, Logger

from tokprune_exp.tracking.record import RunRecord
from tokprune_exp.tracking.weights_and_biases import StagewiseWandbLogger, WandbSettings, start_run, wandb_runs


@runtime_checkable
class LoggerSettings(WandbSettings, Protocol):
    """What `make_loggers` reads of the configuration's `logger` group."""

    csv: bool
    wandb: bool


def make_loggers(
    settings: LoggerSettings, record: RunRecord, tags: Sequence[str], config: dict[str, Any]
) -> list[Logger]:
    """The loggers that the settings ask for, none included, each holding the plain, resolved configuration.

    CSV goes to `csv/version_N/`, a fresh N for a resumed run, since CSVLogger deletes what it finds in its folder.
    W&B goes to `wandb/`; an offline run cannot be resumed, so a resumed run is a new W&B run of the same group. Its
    group is the sweep that the run is a job of, else method, task and backbone; its job type is the method.
    """
    directory, loggers = record.path.parent, list[Logger]()
    if settings.csv:
        loggers.append(CSVLogger(save_dir=directory, name="csv"))
    if settings.wandb:
        names = {key: str(record.result[key]) for key in ("method", "task", "backbone")}
        sweep = sweep_of(record.result["overrides"])
        group = sweep or "-".join(names.values())
        run = start_run(settings, directory, directory.name, group, names["method"], [*tags, *names.values()])
        # the configuration says which classes; filters and axes need names
        run.config.update({"run": {**names, "sweep": sweep, "config_hash": record.result["config_hash"]}})
        # made here: Lightning's own start prints a notice and may fall into another job's run
        place: dict[str, Any] = {"save_dir": directory, "project": settings.project, "offline": settings.offline}
        loggers.append(StagewiseWandbLogger(name=directory.name, experiment=run, **place))
    for logger in loggers:
        logger.log_hyperparams(config)
    return loggers


def sweep_of(overrides: Iterable[str]) -> str | None:
    """The NAME of +sweep=NAME, where that is among the overrides of a job."""
    return next((one.partition("=")[2] for one in overrides if one.startswith("+sweep=")), None)


def close(loggers: Iterable[Logger], failed: bool = False) -> None:
    """Flush and end every logger; belongs into a `finally`, else the next job of a multirun logs into this W&B run."""
    loggers = list(loggers)
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
    for run in wandb_runs(loggers):
        run.finish(exit_code=int(failed))


def quieten_lightning() -> None:
    """Keep Lightning from announcing with every Trainer what hardware there is and what else could be installed."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    # a frozen ApproxNet plans without dropout
    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode at the start of training")
    # raised by Lightning itself on torch 2.13
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
