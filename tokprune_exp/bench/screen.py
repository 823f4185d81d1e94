"""The screen: wide enough for the tables, and what is being done while it takes minutes."""

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

WIDTH = 100
"""Columns of a table where the screen does not say how many it has."""


def screen() -> Console:
    """Return the console that everything is printed on."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if has_width else WIDTH)


class Steps:
    """A line that says what is being done and how far it is, gone when the block is left; of a terminal only."""

    def __init__(self, console: Console, what: str, total: int | None) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.progress.add_task(what, total=total)

    def __enter__(self) -> "Steps":
        """Show it."""
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take it away."""
        self.progress.stop()

    def advance(self) -> None:
        """One step is done."""
        self.progress.advance(self.task)

    def say(self, what: str) -> None:
        """Say what is being done now."""
        self.progress.update(self.task, description=what)
