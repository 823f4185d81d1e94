"""Accuracy against FLOPs: every result of some sweeps in one picture, table and page.

    python -m tokprune_exp.curves multirun/NAME
    python -m tokprune_exp.curves multirun/NAME outputs --x reduction_padded --published --output results
    python -m tokprune_exp.curves multirun/NEW OLD/curves.csv    # beside the points of an earlier table

Nothing heavy is imported before the results are read, so that a mistake is answered at once.
"""

import argparse
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tokprune_exp.curves.axes import SPEEDUP, axis_named
from tokprune_exp.curves.earlier import read_tables, with_earlier
from tokprune_exp.curves.points import TaskCurves, collect
from tokprune_exp.curves.published import published_panels
from tokprune_exp.curves.read import LeftOut, read_runs
from tokprune_exp.curves.tables import rows, screen_table, write_csv
from tokprune_exp.errors import UserError, told_in_a_sentence

WIDTH = 100
"""Columns of everything that is printed, but for paths."""


def main() -> None:
    """Run the command line; what the user can mend is one sentence and exit code 2."""
    arguments = read_arguments()
    with told_in_a_sentence():
        curves(arguments)


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokprune_exp.curves",
        description="Draw accuracy against FLOPs from the result.json files of sweeps, with Pareto fronts.",
        epilog=f"--x: flops_share (default), gflops_per_example, reduction_unpadded, reduction_padded, "
        f"reduction_ltp_convention, retention, {SPEEDUP}N (the measured speed-up at batch size N), or a setting "
        f"whose values are numbers, such as loss.alpha.",
    )
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="SWEEP_DIR",
        help="searched for result.json, any depth; or a curves.csv whose points are drawn as well",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: curves/ in the first SWEEP_DIR")
    parser.add_argument("--metric", metavar="NAME", help="default: the first metric of each task")
    parser.add_argument("--x", default="flops_share", metavar="KEY", help="what a point costs, or a setting")
    parser.add_argument("--by", nargs="+", default=[], metavar="KEY", help="settings that make curves of their own")
    parser.add_argument("--published", action="store_true", help="also the papers' points, under their own conventions")
    parser.add_argument("--wandb", choices=["offline", "online", "none"], default="offline")
    parser.add_argument("--title", metavar="TEXT", help="default: the name of the sweep")
    return parser.parse_args(arguments)


def curves(arguments: argparse.Namespace) -> None:
    """Read, draw, write, and say what was written and what was left out.

    Raises:
        UserError: there is no usable result, no such axis, or nothing can be written.
    """
    tables = [source for source in arguments.sources if source.suffix == ".csv"]
    sweeps = [source for source in arguments.sources if source not in tables]
    if not sweeps and arguments.output is None:
        raise UserError("there are tables only: say with --output DIR where the new ones are to be written")
    runs, left_out = read_runs(sweeps)
    earlier = read_tables(tables)
    axis = axis_named(arguments.x, runs)
    tasks, without_points = collect(runs, axis, arguments.metric, arguments.by)
    tasks, unusable_lines = with_earlier(tasks, earlier, axis, arguments.metric)
    left_out += without_points + unusable_lines
    if not tasks:
        raise UserError(nothing_usable(arguments.sources, left_out))
    if not any(axis.key in point.costs for task in tasks for point in task.points):
        raise UserError(f"--x {axis.key}: no result holds a value for it")
    check_installed("matplotlib", "plotly")
    group = group_name(sweeps or [arguments.output])
    output = writable(arguments.output or sweeps[0] / "curves")
    console = Console(width=WIDTH, highlight=False)
    for task in tasks:
        console.print(screen_table(task))
        without_cost = [point for point in task.points if axis.key not in point.costs]
        if without_cost:
            console.print(f"{task.task}: {len(without_cost)} points have no {axis.key} and are in the table only.")
    written = write_all(output, tasks, left_out, arguments, group)
    if arguments.wandb != "none" and not is_installed("wandb"):
        console.print("wandb is not installed, so there is no W&B run.")
    if left_out:
        console.print(Text(f"Left out: {len(left_out)} of the results found."))
        for each in left_out:
            console.print(Text(f"  {each.path}: {each.why}"), soft_wrap=True)
    console.print("Written:")
    for path in written:
        console.print(Text(f"  {path}"), soft_wrap=True)


def write_all(
    output: Path, tasks: list[TaskCurves], left_out: list[LeftOut], arguments: argparse.Namespace, group: str
) -> list[Path]:
    """Write table, pictures, page and W&B run; returns their paths."""
    from tokprune_exp.curves.figure import write_figure, write_published_figure
    from tokprune_exp.curves.page import write_page

    table = rows(tasks)
    write_csv(output / "curves.csv", table)
    methods = sorted({curve.method for task in tasks for curve in task.curves})
    panels = {task.task: published_panels(task.task) for task in tasks} if arguments.published else None
    figures = {}
    for name, task in zip(file_names(task.task for task in tasks), tasks, strict=True):
        title = f"{arguments.title} · {task.task}" if arguments.title else task.task
        figures[name] = output / f"{name}.png"
        write_figure(figures[name], task, methods, title)
        if panels and panels[task.task]:
            figures[f"{name}_published"] = output / f"{name}_published.png"
            write_published_figure(figures[f"{name}_published"], task, panels[task.task], methods, title)
    write_page(output / "index.html", tasks, panels, methods, left_out, arguments.title or f"Curves: {group}")
    written = [output / "curves.csv", *figures.values(), output / "index.html"]
    if arguments.wandb != "none" and is_installed("wandb"):
        from tokprune_exp.curves.wandb_run import log_to_wandb

        offline = arguments.wandb == "offline"
        run = log_to_wandb(output, tasks, table, figures, group, offline, len(left_out))
        written += [run] if run else []
    return written


def group_name(sweeps: Sequence[Path]) -> str:
    """The name of the sweep; of several, the names of at most three."""
    names = list(dict.fromkeys(sweep.resolve().name for sweep in sweeps))
    return "+".join(names[:3]) + (f"+{len(names) - 3} more" if len(names) > 3 else "")


def nothing_usable(sweeps: Sequence[Path], left_out: Sequence[LeftOut]) -> str:
    """Say why there is nothing to draw, with the first reasons."""
    where = ", ".join(map(str, sweeps))
    reasons = "; ".join(f"{each.path.parent.name}: {each.why}" for each in left_out[:3])
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"none of the results below {where} can be drawn: {reasons}{more}"


def check_installed(*packages: str) -> None:
    """Refuse to begin without what the pictures are drawn with.

    Raises:
        UserError: a package is missing.
    """
    for package in packages:
        if not is_installed(package):
            raise UserError(
                f"the pictures need {package}, which is not installed: pip install 'tokprune_exp[analysis]'"
            )


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def writable(directory: Path) -> Path:
    """Make the output directory.

    Raises:
        UserError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {directory} cannot be made: {error.strerror}") from error
    return directory


def file_names(names: Iterable[str]) -> list[str]:
    """One file name per task, without anything that could lead out of the directory, none twice."""
    found: list[str] = []
    for name in names:
        safe = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "task"
        while safe in found:
            safe += "_"
        found.append(safe)
    return found


if __name__ == "__main__":
    main()
