"""The command line: compose the configuration, check it, run it; nothing heavy is imported before it is checked."""

import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from tokprune_exp.config import (
    ADDED_GROUPS,
    check_config,
    choices,
    config_directory,
    config_hash,
    method_needed,
    run_directory,
    unknown_key,
)
from tokprune_exp.errors import UserError
from tokprune_exp.sweep import Job, Jobs, objectives, report, run_job, with_values

USER_ERROR, ANY_OTHER_ERROR = 2, 1
"""Exit codes."""


class JobFailed(Exception):
    """A job of a sweep has failed and has said why; its argument is the exit code. The other jobs go on."""


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def job(cfg: DictConfig) -> tuple[float, float] | None:
    """Check and run one configuration; a job of a sweep in a process of its own, which then runs it like any other."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return one_of_a_sweep(cfg, settings)
    try:
        check_config(cfg)
        from tokprune_exp.run import run

        directory = run_directory(cfg, Path("outputs")).absolute()
        run(cfg, directory)
    except UserError as error:
        say(str(error))
        raise SystemExit(USER_ERROR) from None
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors raises no OSError
            say(f"the disk is full; free some space and give the same command again, which goes on from {directory}")
            raise SystemExit(USER_ERROR) from None
        traceback.print_exception(error)
        say(f"failed: {error}")
        raise SystemExit(ANY_OTHER_ERROR) from None
    return None


def one_of_a_sweep(cfg: DictConfig, settings: Any) -> tuple[float, float] | None:
    """Run one job of a sweep; returns what a search for good settings asks for: metric and share of the FLOPs.

    Raises:
        JobFailed: it did not end well; it has said why.
    """
    sweep = Path(settings.sweep.dir).absolute()
    try:
        check_config(cfg)
        this = Job(settings.job.num, list(settings.overrides.task), run_directory(cfg, sweep).absolute())
        code = run_job(this, sweep, settings.launcher, config_hash(cfg))
    except UserError as error:
        say(
            *(
                f"job {settings.job.num + 1} ({settings.job.override_dirname}): {line}"
                for line in str(error).splitlines()
            )
        )
        raise JobFailed(USER_ERROR) from None
    if code:
        raise JobFailed(USER_ERROR if code == USER_ERROR else ANY_OTHER_ERROR)
    return objectives(this.directory)


def main() -> None:
    """Run the command line; every mistake in it is answered by one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, so that it can be said better here
    try:
        sys.argv[1:] = with_values(sys.argv[1:])
        job()
    except JobFailed as failure:
        report_of_sweep()
        sys.exit(failure.args[0])
    except (HydraException, OmegaConfBaseException) as error:
        say(in_words(error, sys.argv[1:]))
        sys.exit(USER_ERROR)
    report_of_sweep()


def report_of_sweep() -> None:
    """Print what became of the jobs, if this was a sweep."""
    if Jobs.started_in is not None:
        report(Jobs.started_in)


def say(*lines: str) -> None:
    """Print to stderr."""
    print(*lines, sep="\n", file=sys.stderr)


def in_words(error: Exception, arguments: list[str]) -> str:
    """What Hydra could not compose, in one line and with what to write instead."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: there is no such {group}; available: {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; write key=value, group=option or +method=NAME"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
        return unknown_key(str(cause.full_key), [str(key) for key in cause.parent_node])
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {first_line(cause)}"
    if match := re.match(r"Could not override '(.*?)'\.\s+No match in the defaults list", str(error)):
        return absent_group(match[1], arguments)
    if match := re.match(r"Multiple values for (\w+)", str(error)):
        return f"{match[1]} is chosen already; to replace it, write {match[1]}=NAME without +"
    if match := re.match(r"(\w+) appears more than once", str(error)):
        return f"{match[1]} is chosen by two methods; to replace the one of an experiment, write method=NAME without +"
    if match := re.match(r"Ambiguous value for argument '(.*?)'", str(error)):
        return f"{match[1]}: several values make a sweep; add -m"
    if match := re.match(r"In '(.*?)': .*\n(.*)", str(error)):
        return f"conf/{match[1]}.yaml: {match[2]}"
    return first_line(error)


def absent_group(group: str, arguments: list[str]) -> str:
    """Why `group=…` has nothing to replace."""
    if group in ADDED_GROUPS:
        return f"{group} is added, not replaced: write +{group}={' | '.join(choices(group))}"
    method = next((argument.partition("=")[2] for argument in arguments if argument.startswith("+method=")), None)
    if method:
        return f"{method} takes no {group}"
    return f"{group} is chosen, but no method that takes one; {method_needed()}"


def first_line(error: Exception) -> str:
    """The first line of a message, without the full stop."""
    return str(error).strip().splitlines()[0].rstrip(".")


if __name__ == "__main__":
    main()
