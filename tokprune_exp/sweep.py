"""The jobs of a sweep: each in a process of its own, no more at once than there are cores, and a record of all.

Whatever launches them (Hydra one after the other, joblib, submitit), a job that fails or is killed takes no other with
it, and the same command started again runs only what is missing. Below the sweep's folder lie

    sweep.json          the jobs that were asked for
    jobs/007.json       job 7: its overrides, its folder, how it ended
    shared/             what the jobs have in common: dense models that were trained once
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from tokprune_exp.config import sweep_directory

COMMAND = [sys.executable, "-m", "tokprune_exp"]
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number, what varies, and the folder of its run."""

    number: int
    overrides: list[str]
    directory: Path


class Jobs(Callback):
    """Writes down, before the first one starts, which jobs a sweep has."""

    started_in: Path | None = None
    """Folder of the sweep that this process runs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write sweep.json."""
        sweep = Path(config.hydra.sweep.dir).absolute()
        Jobs.started_in = sweep
        planned = planned_jobs(config)
        (sweep / "jobs").mkdir(parents=True, exist_ok=True)
        for record in (sweep / "jobs").glob("*.json"):  # of an earlier start, perhaps with other jobs
            record.unlink()
        write(sweep / "sweep.json", {"command": sys.argv[1:], "jobs": planned})
        if planned:
            print(f"sweep of {len(planned)} jobs in {sweep}", flush=True)


def with_values(arguments: list[str]) -> list[str]:
    """Let values on the command line take the place of those that the file of `+sweep=NAME` varies.

    `+sweep=frontier budget=0.3,0.6` then has the jobs of two budgets. Hydra itself would add them to the file's: each
    of its six budgets would be composed twice and be overridden both times.
    """
    name = next((one.removeprefix("+sweep=") for one in arguments if one.startswith("+sweep=")), None)
    file = sweep_directory() / "sweep" / f"{name}.yaml"
    is_one_job = "hydra.mode=RUN" in arguments or not {"--cfg", "-c"}.isdisjoint(arguments)
    if not file.is_file() or is_one_job:
        return arguments
    varied = OmegaConf.load(file).hydra.sweeper.params
    return [part for one in arguments for part in in_place_of(varied, one)]


def in_place_of(varied: DictConfig, argument: str) -> list[str]:
    """Write an argument such that it takes the place of what a sweep file varies, if it does.

    Hydra composes a sweep once without what varies. One choice of a group is taken out of that, so that the settings
    beside it, which other choices may not have, are checked against this one.
    """
    key, _, values = argument.partition("=")
    if key not in varied:
        return [argument]
    if "." not in key and not OverridesParser.create().parse_override(argument).is_sweep_override():
        return [f"~hydra.sweeper.params.{key}", argument]
    return [f"hydra.sweeper.params={{{key}:{in_quotes(values)}}}"]


def in_quotes(values: str) -> str:
    """Write a text as a string of Hydra's grammar."""
    return "'" + values.replace("'", "\\'") + "'"


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """Return the overrides of every job; nothing where the sweeper makes them up as it goes (Optuna)."""
    if config.hydra.sweeper._target_.rpartition(".")[2] != "BasicSweeper":
        return []
    params = config.hydra.sweeper.params or {}
    arguments = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(arguments), None)
    return [list(job) for job in jobs]


def run_job(job: Job, sweep: Path, launcher: DictConfig, config_hash: str) -> int:
    """Run one job in a process of its own; returns its exit code. One that is complete already is not started."""
    record = sweep / "jobs" / f"{job.number:03d}.json"
    about = {"number": job.number, "overrides": job.overrides, "directory": str(job.directory)}
    if is_complete(job.directory, config_hash):
        write(record, {**about, "code": 0, "seconds": 0.0})
        print(f"{title(job, sweep)}: complete already", flush=True)
        return 0
    at_once, threads = share_of_the_machine(launcher)
    with one_of(at_once, sweep) if at_once else ExitStack():
        write(record, {**about, "code": None, "seconds": None})
        print(f"{title(job, sweep)}", flush=True)
        start = time.monotonic()
        code = run_alone(job, sweep, threads, is_shown=at_once == 1)
    write(record, {**about, "code": code, "seconds": time.monotonic() - start})
    return code


def run_alone(job: Job, sweep: Path, threads: int | None, is_shown: bool) -> int:
    """Start the command line for this job alone and wait; its output is shown, or written to job.log in its folder."""
    place = (
        f"run_dir={in_quotes(str(job.directory))}",
        f"shared_dir={in_quotes(str(sweep / 'shared'))}",
        "hydra.mode=RUN",
    )
    command = [*COMMAND, *job.overrides, *place]
    environment = dict(os.environ)
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if is_shown:
        return subprocess.run(command, env=environment).returncode
    job.directory.mkdir(parents=True, exist_ok=True)
    with (job.directory / "job.log").open("w") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


def title(job: Job, sweep: Path) -> str:
    """Name a job and how many there are."""
    planned = read(sweep / "sweep.json").get("jobs") or []
    of = f" of {len(planned)}" if planned else ""
    return f"job {job.number + 1}{of} ({' '.join(job.overrides)})"


# ---------------------------------------------------------------------------------------------------------------
# The machine


def share_of_the_machine(launcher: DictConfig) -> tuple[int | None, int | None]:
    """Return how many jobs run at once and with how many threads each, so that together they fill the cores once.

    OMP_NUM_THREADS, where it is set, is the most that a job takes. On a cluster (submitit's SLURM) the scheduler has
    given each job its cores: there is no limit here.
    """
    kind = launcher._target_.rpartition(".")[2]
    if kind == "SlurmLauncher":
        return None, launcher.cpus_per_task
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = {"JoblibLauncher": "n_jobs", "LocalLauncher": "array_parallelism"}.get(kind)
    wanted = 1 if asked is None else int(OmegaConf.select(launcher, asked) or 1)
    at_once = cores if wanted < 0 else min(max(wanted, 1), cores)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return at_once, min(cores // at_once, int(threads) if threads.isdecimal() and int(threads) else cores)


@contextmanager
def one_of(places: int, sweep: Path) -> Iterator[None]:
    """Wait for one of the places; a process that dies gives its place back."""
    (sweep / "jobs").mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [stack.enter_context((sweep / "jobs" / f".place{place}").open("w")) for place in range(places)]
        while not any(_locked(file) for file in files):
            time.sleep(POLL_S)
        yield


def _locked(file: Any) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------
# The record


def write(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(file)


def read(file: Path) -> dict[str, Any]:
    """Read JSON; nothing where it is not there or was written by halves."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_complete(directory: Path, config_hash: str) -> bool:
    """Whether this very run was done before."""
    result = read(directory / "result.json")
    return result.get("status") == "completed" and result.get("config_hash") == config_hash


def how_it_ended(job: dict[str, Any]) -> str:
    """Say in a few words what became of a job."""
    code, result = job.get("code"), read(Path(job.get("directory", "")) / "result.json")
    if code == 0:
        return "completed"
    if code is None:
        return "stopped with the sweep"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    reason = str(result.get("reason") or result.get("error") or "see above").strip().splitlines()
    return f"failed: {reason[0] if reason else 'see above'}"


def report(sweep: Path, console: Console | None = None) -> bool:
    """Print the table of the jobs and, if some are missing, which and what to do; returns whether all are complete."""
    console = console or Console(highlight=False)
    planned = read(sweep / "sweep.json").get("jobs") or []
    done = {record["number"]: record for file in sweep.glob("jobs/*.json") if "number" in (record := read(file))}
    numbers = sorted({*range(len(planned)), *done})
    table = Table(box=box.SIMPLE, title=f"{sweep.name}: {len(numbers)} jobs")
    for name in ("job", "what varies", "metric", "FLOPs", "s", "status"):
        table.add_column(name, justify="left" if name in ("what varies", "status") else "right", overflow="fold")
    asked = planned or [record.get("overrides") or [] for record in done.values()]
    common = set.intersection(*map(set, asked)) if len(asked) > 1 else set()
    missing = []
    for number in numbers:
        job = done.get(number, {})
        overrides = job.get("overrides") or (planned[number] if number < len(planned) else [])
        status = how_it_ended(job) if job else "not started"
        if status != "completed":
            missing.append((number, status))
        seconds = job.get("seconds")
        table.add_row(
            str(number + 1),
            " ".join(one for one in overrides if one not in common),
            *(written(objectives(Path(job["directory"]))) if status == "completed" else ("", "")),
            "" if not seconds else f"{seconds:.0f}",
            status,
        )
    console.print(table)
    if missing:
        names = "; ".join(f"job {number + 1} ({status})" for number, status in missing)
        console.print(
            f"{len(numbers) - len(missing)} of {len(numbers)} jobs are complete. Missing: {names}.", soft_wrap=True
        )
        console.print("The same command, started again, runs only these.")
    console.print(f"Results: {sweep}", soft_wrap=True)
    return not missing


def written(found: tuple[float, float] | None) -> tuple[str, str]:
    """Write metric and share for the table."""
    return ("", "") if found is None else (f"{found[0]:.4f}", f"{found[1]:.1%}")


def objectives(directory: Path) -> tuple[float, float] | None:
    """Return the first metric of a run's pruned model and its share of the unpruned FLOPs; None without pruning."""
    result = read(directory / "result.json")
    metrics, flops = (result.get("metrics") or {}).get("pruned"), result.get("flops") or {}
    if not metrics or "reduction_unpadded" not in flops:
        return None
    return next(iter(metrics.values())), 1 / flops["reduction_unpadded"]
