"""Batches of an experience in a seeded order that depends on nothing but (seed, experience, epoch).

Because the order is a pure function, a checkpoint needs only the position, and resuming never replays a random stream.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .data import Batch, Row, Rows
from .errors import BadInput
from .streams.rows import CheckedRows, ImageRow

FIELDS = ("text", "image", "label", "prompt", "answer", "messages")
"""What a row may carry into a batch. Other fields of a file (a domain, a date, a task) never reach a method."""


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Plan:
    """Which rows the steps of one experience take.

    Attributes:
        rows: number of rows.
        batch: rows per process and micro-batch.
        accumulation: micro-batches per optimizer step.
        processes, rank: the world.
        epochs, max_steps: the end.
        seed: seed of the order.
    """

    rows: int
    batch: int
    accumulation: int
    processes: int
    rank: int
    epochs: int
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // (self.batch * self.accumulation * self.processes))

    @property
    def steps(self) -> int:
        total = self.steps_per_epoch * self.epochs
        return min(total, self.max_steps) if self.max_steps else total

    def order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        return torch.randperm(self.rows, generator=generator)

    def micro_batches(self, step: int, order: torch.Tensor | None = None) -> list[list[int]]:
        """Row numbers of this process's micro-batches of one optimizer step.

        All processes together take the rows that one process with the same global batch would take. A process for
        which nothing is left gets -1: one row that counts nothing, so that every process takes part in each exchange.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self.order(epoch) if order is None else order
        width = self.batch * self.processes
        start = within * width * self.accumulation
        taken = order[start : start + width * self.accumulation].tolist()
        groups = []
        for first in range(0, len(taken), width):
            block = taken[first : first + width]
            share = -(-len(block) // self.processes)
            groups.append(block[self.rank * share : (self.rank + 1) * share] or [-1])
        return groups

    def from_step(self, step: int) -> Iterator[tuple[int, list[list[int]]]]:
        """Steps with their micro-batches from `step` to the end."""
        epoch_of_order, order = -1, None
        for number in range(step, self.steps):
            epoch = number // self.steps_per_epoch
            if epoch != epoch_of_order:
                epoch_of_order, order = epoch, self.order(epoch)
            yield number, self.micro_batches(number, order)


def make_batch(
    objective, processor, rows: Sequence[Row], labels: dict[str, int] | None, index: Sequence[int], **encode
) -> Batch:
    """Encodes and pads rows into a Batch on the CPU."""
    encoded = objective.encode(rows, processor, **encode)
    return objective.collate(encoded, rows, labels, list(index))


def canonical(row: Row) -> Row:
    """The row with no other than the canonical fields; what is no row is left for the check that says so."""
    if not isinstance(row, Mapping) or all(key in FIELDS for key in row):
        return row
    if isinstance(row, ImageRow):  # stays to be decoded when it is read
        return ImageRow({key: value for key, value in row.fields.items() if key in FIELDS}, row.source, row.where)
    return {key: row[key] for key in FIELDS if key in row}


def evenly(rows: Rows, most: int) -> Rows:
    """`most` rows at the most, evenly spaced over all."""
    if len(rows) <= most:
        return rows
    return [rows[number * len(rows) // most] for number in range(most)]


def drawn(rows: Rows, limit: int) -> Rows:
    """At most `limit` rows, drawn once and for all in their order: the same for every arm and seed."""
    if len(rows) <= limit:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:limit].sort().values.tolist()
    return [rows[number] for number in chosen]


def take(rows: Rows, numbers: Sequence[int]) -> list[Row]:
    """Rows by number with canonical fields; -1 stands for the filler, the first row."""
    return [canonical(rows[max(number, 0)]) for number in numbers]


def granted(rows: Rows, labels: Sequence[str] = ()) -> Rows:
    """Checked rows as a method may see them; those in memory are cut at once: no other field is within reach."""
    return CheckedRows(map(canonical, rows)) if isinstance(rows, tuple) else Granted(rows, labels)


class Granted(Sequence):
    """Rows that are read from disk when their turn comes, cut to the canonical fields then.

    Args:
        rows: checked rows.
        labels: the labels in them.
    """

    checked = True

    def __init__(self, rows: Rows, labels: Sequence[str] = ()):
        self._all, self.labels = rows, tuple(labels)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [canonical(row) for row in self._all[at]]
        return canonical(self._all[at])


def joined(batch: Batch, more: Batch, pad: int) -> Batch:
    """`batch` with the rows of `more` behind it. Sequences are padded on the right; `pad` is the id of padded tokens.

    Raises:
        BadInput: the two hold different kinds of input.
    """
    if set(batch.inputs) != set(more.inputs):
        raise BadInput(
            f"rehearsed rows have inputs {sorted(more.inputs)}, the batch {sorted(batch.inputs)}; use one kind"
        )
    inputs = {
        name: _stacked(tensor, more.inputs[name], pad if name == "input_ids" else 0)
        for name, tensor in batch.inputs.items()
    }
    labels = None
    if batch.labels is not None and more.labels is not None:
        labels = _stacked(batch.labels, more.labels, -100)
    index = None
    if batch.index is not None and more.index is not None:
        index = torch.cat([batch.index, more.index])
    return replace(batch, inputs=inputs, labels=labels, rows=[*batch.rows, *more.rows], index=index)


def _stacked(first: torch.Tensor, second: torch.Tensor, fill: int) -> torch.Tensor:
    if first.ndim == 2 and first.shape[1] != second.shape[1]:
        width = max(first.shape[1], second.shape[1])
        first, second = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in (first, second))
    return torch.cat([first, second])


def without_fillers(batch: Batch, numbers: Sequence[int]) -> Batch:
    """Marks fillers (-1) so that they count nothing."""
    if all(number >= 0 for number in numbers) or batch.labels is None:
        return batch
    labels = batch.labels.clone()
    for position, number in enumerate(numbers):
        if number < 0:
            labels[position] = -100
    return replace(batch, labels=labels)


class Prefetch:
    """Runs an iterator in a thread, a few items ahead, so that preparing data never starves the step.

    The items are pure functions of their position, so running ahead changes nothing that a checkpoint holds.
    """

    def __init__(self, make: Callable[[], Iterator], ahead: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _put(self, item: tuple) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _work(self, make: Callable[[], Iterator]) -> None:
        try:
            for item in make():
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(("error", error))

    def __iter__(self) -> Iterator:
        while True:
            kind, item = self._queue.get()
            if kind == "item":
                yield item
            elif kind == "error":
                raise item
            else:
                return

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
