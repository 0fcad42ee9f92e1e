"""What the tests of the protocol share: rows that can be told apart, and a place for a plug-in that cheats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from loop_methods import Recorder, build

from perdure.registry import Registry
from perdure.streams import Experience

WORDS = ("ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew")


def experiences(count: int = 2, rows: int = 8) -> list[Experience]:
    """Rows of no two equal texts, with fields that no method may see; every experience has validation rows."""
    draw, number, made = random.Random(7), iter(range(10**6)), []

    def some(index: int, rows: int) -> list[dict[str, Any]]:
        return [
            {
                "text": f"{' '.join(draw.choices(WORDS, k=3))} {next(number):03d}", "label": f"kind{index * 2 + n % 2}",
                "domain": f"secret{index}", "task": index, "intent": f"kind{index * 2 + n % 2}",
            }
            for n in range(rows)
        ]  # fmt: skip

    for index in range(count):
        made.append(
            Experience(
                index, f"domain{index}", some(index, rows), some(index, 4), some(index, 4), task=40 + index,
                last=index == count - 1,
            )
        )  # fmt: skip
    return made


class Cheat(Recorder):
    """Trains one vector and cheats where a test says so; `found` is what it got hold of."""

    name = "cheat"
    criterion = None  # type: ignore[assignment]
    predict = None  # type: ignore[assignment]
    needs_before_update = False

    def __init__(self, config: Any = None):
        super().__init__(config)
        self.found: list[Any] = []

    def after_backward(self) -> None: ...

    def after_update(self, before: dict[str, Any]) -> None: ...

    def before_experience(self, experience: Experience) -> None: ...

    def transform(self, sample: Any) -> Any:
        return sample

    def before_step(self, batch: Any) -> Any:
        return batch

    def losses(self, batch: Any, output: Any) -> dict[str, Any]:
        return {"pull": (self.modules["vector"]["v"] - 1).square().sum()}


@contextmanager
def registered(registry: Registry, name: str) -> Iterator[Callable[[type], type]]:
    """A decorator that makes a class known under `name` while the block runs."""
    registry.names()
    try:
        yield registry.register(name)
    finally:
        registry._classes.pop(name, None)


def learner(method: Any = None, **options: Any) -> Any:
    return build(method if method is not None else Cheat(), **options)


def shown(value: Any) -> str:
    """All that can be read in a value, private attributes of rows and experiences included, as text."""
    from collections.abc import Mapping, Sequence

    if isinstance(value, Mapping):
        return " ".join(f"{key}={shown(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(shown(each) for each in value)
    if hasattr(value, "__dict__"):
        return shown(vars(value))
    return str(value)


__all__ = ["WORDS", "Cheat", "experiences", "learner", "registered", "replace", "shown"]
