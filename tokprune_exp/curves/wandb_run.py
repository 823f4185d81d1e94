"""The curves as one W&B run: a table of the points, the figures, and each curve against its cost."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokprune_exp.config import LoggerConfig
from tokprune_exp.curves.points import TaskCurves
from tokprune_exp.curves.tables import columns
from tokprune_exp.errors import UserError
from tokprune_exp.tracking.weights_and_biases import log_rows, log_table, start_run


def log_to_wandb(
    directory: Path,
    tasks: Sequence[TaskCurves],
    table: Sequence[dict[str, Any]],
    figures: Mapping[str, Path],
    group: str,
    offline: bool,
    left_out: int,
) -> Path | None:
    """Log everything into one run of job type `curves`; returns the directory of an offline run.

    `points` is the table, `figure/<name>` a picture, and `<task>/<curve>` is drawn against `<task>/<axis>`.

    Raises:
        UserError: W&B starts no run.
    """
    import wandb  # half a second, and only where W&B is used

    group = group[:120]  # W&B takes 128 characters
    try:
        run = start_run(
            LoggerConfig(offline=offline),
            directory,
            f"curves-{group}",
            group,
            "curves",
            [task.task for task in tasks],
        )
    except UserError as error:
        raise UserError(
            f"--wandb {'offline' if offline else 'online'}: Weights & Biases starts no run ({error.__cause__}); "
            f"everything else is written to {directory}"
        ) from error
    run.config.update({"tasks": [task.task for task in tasks], "x": tasks[0].axis.key})
    names = columns(table)
    log_table(run, "points", names, [[row.get(name) for name in names] for row in table])
    for name, path in figures.items():
        run.log({f"figure/{name}": wandb.Image(str(path))})
    for task in tasks:
        log_curves(run, task)
    run.summary.update({"left_out": left_out, "points": sum(len(task.points) for task in tasks)})
    place = Path(run.dir).parent if offline else None
    run.finish()
    return place


def log_curves(run: Any, task: TaskCurves) -> None:
    """One row of history per point, cheapest first, each curve a column of its own; dense metrics in the summary."""
    key = task.axis.key
    x = f"{task.task}/{plain(key)}"
    log_rows(
        run,
        x,
        [
            {x: point.costs[key].mean, f"{task.task}/{plain(curve.label)}": point.metric.mean}
            for curve in task.curves
            for point in curve.points
            if key in point.costs
        ],
    )
    run.summary.update({f"{task.task}/{plain(one.label)}": one.metric.mean for one in task.references})


def plain(label: str) -> str:
    """A curve's name without characters that mean something to W&B: a dot would make a nested key."""
    return re.sub(r"[^\w =·-]", "_", label)
