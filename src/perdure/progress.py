"""What a person sees while a run works: bars on a terminal; plain lines, none too often, elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

QUIET_SECONDS = 30.0
"""Where there is no terminal, a line tells that work goes on at most this often."""


class Progress:
    """A context manager around the work.

    Args:
        enabled: False shows warnings and nothing else.
        console: where to; standard error by default.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None):
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
        self.enabled = enabled
        self._bars: Bars | None = None
        self._task: Any = None
        self._name, self._told = "", time.monotonic()

    def __enter__(self) -> Progress:
        if self.enabled and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def message(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.console.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        """A line that is shown even where progress is not wanted."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def start(self, name: str, total: int | None = None) -> None:
        """A piece of work begins; without `total` its bar moves but has no end until `step` tells one."""
        self._name = name
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(name, total=total, note="")

    def step(self, done: int, total: int, note: str | None = None) -> None:
        """`done` of `total` units of the present work are done."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
            if note is not None:
                self._bars.update(self._task, note=note)
        elif self.enabled and time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
            self.message(f"  {self._name}: {done}/{total}" + (f", {note}" if note else ""))

    def experience_done(self, experience: Any, row: list[float | None], metric: str) -> None:
        """The line that stays of each experience: its mean score over all experiences learnt so far."""
        self._told = time.monotonic()
        known = [value for value in row[: experience.index + 1] if value is not None]
        score = f"mean {metric} {sum(known) / len(known):.3f}" if known else "no test rows"
        self.message(f"  experience {experience.index + 1} {experience.name}: {score}")
