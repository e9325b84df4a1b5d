"""A progress bar on the error stream for work that lasts longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Timer
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

DELAY = 2.0
"""Seconds before a bar is drawn."""


class ProgressBar:
    """Count steps, and draw a bar once the work has lasted two seconds.

    Args:
        description: what is being done.
        total: the number of steps.
        done: steps an earlier run has already made.
        show: ``False`` never draws.

    Example:
        >>> with ProgressBar("score", total=3, show=False) as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """

    def __init__(self, description: str, total: int, *, done: int = 0, show: bool = True) -> None:
        """Prepare a bar; nothing is drawn yet."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(description, total=total, completed=done, note="")
        self._timer = Timer(DELAY, self._progress.start)
        self._timer.daemon = True
        self._show = show

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Count steps done.

        Args:
            steps: how many.
            note: shown behind the bar, such as the current loss.
        """
        self._progress.update(self._task, advance=steps, note=note)

    def over(self, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items, counting each."""
        for item in items:
            yield item
            self.advance()

    def describe(self, description: str) -> None:
        """Replace what is being done."""
        self._progress.update(self._task, description=description)

    def __enter__(self) -> ProgressBar:
        """Start the clock."""
        if self._show:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as a line of its own if it was drawn."""
        if self._show:
            self._timer.cancel()
            self._timer.join()
        if self._progress.live.is_started:
            self._progress.stop()
