"""Errors meant for the person at the keyboard: one clear sentence each, exit code 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend; its message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """Everything `check_config` found in one configuration: one line per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataUnavailableError(UserError):
    """Data or weights are not there; the message names where they were looked for and the command that gets them."""


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Within this block, all that a command line does, a `UserError` is printed and ends it with exit code 2."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
