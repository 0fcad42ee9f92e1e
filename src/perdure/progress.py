"""What a person sees while a run works: bars on a terminal, one line an experience elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Args:
    enabled: False shows nothing at all.
    console: where to; standard error by default.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.enabled = enabled
        self._bars: Bars | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, TextColumn("{task.fields[loss]}"), console=self.console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def message(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, style="dim", highlight=False)

    def start(self, name: str) -> None:
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(name, total=None, loss="")

    def step(self, done: int, total: int, loss: float | None) -> None:
        if self._bars is not None and self._task is not None:
            shown = {} if loss is None else {"loss": f"loss {loss:.3f}"}
            self._bars.update(self._task, completed=done, total=total, **shown)

    def note(self, text: str) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, loss=text)

    def experience_done(self, experience: Any, row: list[float | None], metric: str) -> None:
        known = [value for value in row[: experience.index + 1] if value is not None]
        if known:
            self.message(f"  experience {experience.index + 1} {experience.name}: mean {metric} {sum(known) / len(known):.3f}")
