"""A Weights & Biases run that lies in one folder, whole: nothing of it, and no path in it, leads out of there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger, WandbLogger

from tokprune_exp.errors import UserError

if TYPE_CHECKING:
    from wandb import Run

SELECTION = "selection_"
"""What the names of the figures on the selection slice begin with; there is one of each in an epoch."""


@runtime_checkable
class WandbSettings(Protocol):
    """Where the configuration's `logger` group sends a W&B run."""

    project: str
    entity: str | None
    group: str | None
    offline: bool


def start_run(
    settings: WandbSettings, directory: Path, name: str, group: str, job_type: str, tags: Sequence[str]
) -> "Run":
    """Start a run of its own, written below `directory`/wandb; `settings.group` goes before `group`.

    Raises:
        UserError: it is to be online, and W&B takes no run.
    """
    import wandb  # half a second, and only where W&B is used

    try:
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group or group,
            job_type=job_type,
            name=name,
            tags=list(dict.fromkeys(tags)),
            dir=str(directory),
            mode="offline" if settings.offline else "online",
            reinit="finish_previous",  # else the next job of a multirun logs into this one
            settings=wandb.Settings(silent=True),  # the path of the run is printed with all others at the end
        )
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"logger.offline={str(settings.offline).lower()}: Weights & Biases starts no run ({reason}); "
            f"logger.offline=true writes it here, to be uploaded later by `wandb sync`"
        ) from error


def log_table(run: "Run", key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Log a table of plain values as a file of the run, `files/media/table/`, and nowhere else.

    `run.log` alone would also make an artifact of it, staged in the user's home and found again by its absolute path,
    so that a run copied to another machine could not be uploaded; a table that is bound already is logged as it is.
    """
    import wandb

    table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    table.bind_to_run(run, key, run.step)
    run.log({key: table})


def log_rows(run: "Run", axis: str, rows: Iterable[Mapping[str, float | None]]) -> None:
    """Log rows as curves against one of their columns; the summary keeps none of them."""
    run.define_metric(axis, summary="none")
    seen: set[str] = set()
    for row in rows:
        given = {name: value for name, value in row.items() if value is not None}
        for name in given.keys() - {axis} - seen:
            run.define_metric(name, step_metric=axis, summary="none")
            seen.add(name)
        run.log(given)


def wandb_runs(loggers: Iterable[Logger]) -> Iterator["Run"]:
    """The W&B runs among the loggers."""
    return (logger.experiment for logger in loggers if isinstance(logger, WandbLogger))


class StagewiseWandbLogger(WandbLogger):
    """A WandbLogger that draws every figure of a stage against that stage's own step or epoch.

    Steps and epochs start again in every stage, so that common axes would fold the stages' curves over each other:
    `soft/loss` is drawn against `soft/step`, and `soft/selection_accuracy` against `soft/epoch`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics and, for each stage among their prefixes, the stage's own step and epoch."""
        if step is None:
            return super().log_metrics(metrics)
        stages = {name.partition("/")[0] for name in metrics if "/" in name}
        axes = {f"{stage}/step": float(step) for stage in stages}
        if "epoch" in metrics:
            axes |= {f"{stage}/epoch": metrics["epoch"] for stage in stages}
        for name in {**axes, **metrics}:
            self._draw_against_its_stage(name)
        super().log_metrics({**metrics, **axes}, step)

    def _draw_against_its_stage(self, name: str) -> None:
        """Define a metric's axis when it is first seen."""
        stage, slash, figure = name.partition("/")
        if not slash or name in self.drawn:
            return
        self.drawn.add(name)
        axis = "epoch" if figure.startswith(SELECTION) else "step"
        self.experiment.define_metric(name, step_metric=None if figure in ("step", "epoch") else f"{stage}/{axis}")
