"""The command line: compose the configuration, check it, run it; nothing heavy is imported before it is checked."""

import os
import re
import sys
import traceback
from pathlib import Path

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
    method_needed,
    run_directory,
    unknown_key,
)
from tokprune_exp.errors import UserError

USER_ERROR, ANY_OTHER_ERROR = 2, 1
"""Exit codes."""


class JobFailed(Exception):
    """A job of a sweep has failed and has said why; its argument is the exit code. The other jobs go on."""


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="config")
def job(cfg: DictConfig) -> None:
    """Check and run one configuration; of a sweep, one of its jobs."""
    settings = HydraConfig.get()
    is_sweep = settings.mode == RunMode.MULTIRUN
    name = f"job {settings.job.num} ({settings.job.override_dirname}): " if is_sweep else ""
    failed = JobFailed if is_sweep else SystemExit
    try:
        check_config(cfg)
        from tokprune_exp.run import run

        run(cfg, run_directory(cfg, Path(settings.sweep.dir if is_sweep else "outputs")).absolute())
    except UserError as error:
        say(*(name + line for line in str(error).splitlines()))
        raise failed(USER_ERROR) from None
    except Exception as error:
        traceback.print_exception(error)
        say(f"{name}failed: {error}")
        raise failed(ANY_OTHER_ERROR) from None


def main() -> None:
    """Run the command line; every mistake in it is answered by one line and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, so that it can be said better here
    try:
        job()
    except JobFailed as failure:
        sys.exit(failure.args[0])
    except (HydraException, OmegaConfBaseException) as error:
        say(in_words(error, sys.argv[1:]))
        sys.exit(USER_ERROR)


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
