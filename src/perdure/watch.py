"""What the loop looks after while plug-ins work, so that what was not granted is refused and not only declared.

What a plug-in could learn from is withheld (`Loop._withheld`, `data.without_answers`, `Services`); what is here
measures what it does: rows that it keeps, rows that it trains on beside the loop, predictions that hang on the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import ProtocolRefused
from .holdings import Marks, kept_rows, unsaved_bytes
from .loading import granted
from .replay import row_bytes
from .streams.rows import row_key

if TYPE_CHECKING:
    from .data import Batch, Output, Row, Rows
    from .learner import Learner
    from .loop import Loop
    from .streams.experience import Experience

VOTERS = 8
"""Rows of a batch that are scored alone at the most."""


# ---- what is kept
def check_kept(loop: Loop, rows: Rows, name: str) -> None:
    """After an experience was learnt: rows are in the buffer alone, and buffer and state are within what is granted.

    Raises:
        ProtocolRefused: names the budget, who exceeds it and by how much.
    """
    kept = kept_rows(loop, Marks(loop, rows, alive=True), saved=True)
    if kept is not None:
        who, count = kept
        raise ProtocolRefused(
            f"protocol.rehearsal: {who} keeps at least {count} row{'s' * (count > 1)} of {name!r} beside the replay "
            "buffer, whose budget is all that is granted; keep rows with `loop.remember`, or let them go before the "
            "experience ends"
        )
    _check_buffer(loop)
    check_bytes(loop, f"after {name!r}")


def _check_buffer(loop: Loop) -> None:
    granted, held = loop.protocol, loop.replay
    if any("all_data" in method.needs for method in loop.methods):
        return
    if len(held) > granted.rehearsal:
        raise ProtocolRefused(
            f"protocol.rehearsal: grants {granted.rehearsal} samples, but the replay buffer holds {len(held)}; a "
            "method has widened it"
        )
    size = sum(map(row_bytes, held.rows))
    if granted.rehearsal_bytes is not None and size > granted.rehearsal_bytes:
        raise ProtocolRefused(
            f"protocol.rehearsal_bytes: grants {granted.rehearsal_bytes} bytes, but the rows in the replay buffer have "
            f"{size}; a method has changed them"
        )


def check_bytes(loop: Loop, when: str) -> None:
    """Raises ProtocolRefused where the state, and what is packed beside it, is larger than `protocol.stored_bytes`."""
    granted = loop.protocol.stored_bytes
    if granted is None:
        return
    saved, beside = loop.stored_bytes(), unsaved_bytes(loop)  # pyright: ignore[reportAttributeAccessIssue]
    if saved + beside > granted:
        raise ProtocolRefused(
            f"protocol.stored_bytes: grants {granted} bytes, but {saved} are in the state and {beside} of text, bytes "
            f"and arrays outside the saved state {when}; take smaller settings, or raise it"
        )


# ---- passes
def check_sampler(loop: Loop, train: Rows, chosen: Rows, epochs: int) -> None:
    """What methods chose to train on is no more often there than `protocol.passes` grants.

    Raises:
        ProtocolRefused: names the method.
    """
    granted = loop.protocol.passes
    if granted is None:
        return
    given = Counter(map(row_key, train))
    for key, times in Counter(map(row_key, chosen)).items():
        if key in given and times * epochs > granted * given[key]:
            raise ProtocolRefused(
                f"protocol.passes: grants {granted}, but the sampler of {_names(loop)} gives a row of the experience "
                f"{times // given[key] * epochs} times; give it once, or raise protocol.passes"
            )


def check_rehearsed(loop: Loop, rows: Sequence[Row]) -> None:
    """Rows that a method adds to a batch are those of the buffer, or none of the current experience's own.

    Raises:
        ProtocolRefused: they would be seen once more than the protocol grants.
    """
    if loop.protocol.passes is None:
        return
    buffered = {id(row) for row in (*loop.replay.given, *loop.replay.rows)}
    others = [row for row in rows if id(row) not in buffered]
    if not others:
        return
    own = {row_key(row) for row in loop.training_rows}
    again = sum(row_key(row) in own for row in others)
    if again:
        raise ProtocolRefused(
            f"protocol.passes: grants {loop.protocol.passes}, but {_names(loop)} adds {again} rows of the current "
            "experience to a batch once more; rehearse rows of `loop.replay`, or raise protocol.passes"
        )


def check_batch(loop: Loop, before: Batch, after: Batch, added: int) -> None:
    """A method adds rows through its services alone. Raises ProtocolRefused where it has added others."""
    more = len(after) - len(before) - added
    if more > 0 and loop.protocol.passes is not None:
        raise ProtocolRefused(
            f"protocol.passes: grants {loop.protocol.passes}, but {_names(loop)} adds {more} rows to a batch by "
            "itself; use `loop.extend` with rows of `loop.replay`"
        )


def check_views(loop: Loop, views: int) -> None:
    """One more view of each row in its step belongs to the pass; raises ProtocolRefused where there are more."""
    granted = loop.protocol.passes
    if granted is not None and views > 1:
        raise ProtocolRefused(
            f"protocol.passes: grants {granted}, but {_names(loop)} repeats the rows of a batch {views} times in one "
            "step; repeat them once, or raise protocol.passes"
        )


class OwnPasses:
    """Counts rows that methods send through the host with gradients, beside the passes that the loop asks for.

    Listens only while hooks of methods run, through a hook of torch's on all modules, so that nothing of it stands in
    the user's model.
    """

    def __init__(self, loop: Loop):
        self._loop, self._expected, self._rows = loop, 0, 0
        towers = [name or None for name in loop.host.towers]
        firsts = [loop.host.blocks(tower=tower)[0].module for tower in towers] or [loop.model]
        self._firsts = {id(module) for module in firsts}

    def _listen(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if id(module) in self._firsts and not self._expected and torch.is_grad_enabled():
            self._rows += len(args[0]) if args and isinstance(args[0], Tensor) else 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks of methods run inside.

        Raises:
            ProtocolRefused: one of them has run rows through the host for gradients of its own.
        """
        granted = self._loop.protocol.passes
        if granted is None:
            yield
            return
        handle = register_module_forward_pre_hook(self._listen)
        try:
            yield
        finally:
            handle.remove()
        rows, self._rows = self._rows, 0
        if rows:
            raise ProtocolRefused(
                f"protocol.passes: grants {granted}, but {_names(self._loop)} has run {rows} rows through the host for "
                "gradients of its own; ask `loop.gradients`, which counts them, or use torch.no_grad"
            )

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Passes inside are counted elsewhere."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1


def _names(loop: Loop) -> str:
    return " and ".join(method.name for method in loop.methods)


# ---- scoring
def check_scored_rows_gone(learner: Learner, experience: Experience, split: str, rows: Rows) -> None:
    """Raises ProtocolRefused where a plug-in keeps rows that were scored."""
    key = (experience.hash, split)
    if key not in learner._marked:
        learner._marked[key] = Marks(learner, granted(tuple(rows) if isinstance(rows, list) else rows))
    kept = kept_rows(learner, learner._marked[key], saved=False)
    if kept is not None:
        who, count = kept
        raise ProtocolRefused(
            f"protocol.evaluate: {who} keeps at least {count} of the {split} rows of {experience.name!r}, which are "
            "there to be scored and for nothing else; keep nothing of a batch that is predicted"
        )


def check_votes(learner: Learner, batch: Batch, output: Output) -> None:
    """Scores of a row do not hang on the other rows of its batch, which are of one experience: that is the task id.

    Rows are scored alone, up to `VOTERS` of them where the first one differs; a choice by a hair may turn one of them.

    Raises:
        ProtocolRefused: more than half of them have other scores.
    """
    logits = output.logits
    if learner.protocol.task_id == "test" or logits is None or len(batch) < 2:
        return
    tolerance = (0.1 if learner.training.bf16 else 0.01) * float(logits.float().abs().max().clamp(min=1e-6))
    differing = looked = 0
    for number in range(min(len(batch), VOTERS)):
        alone = learner.forward(_one_row(batch, number)).logits
        assert alone is not None
        found = float((alone[0].float() - logits[number].float()).abs().max())
        differing, looked = differing + (found > tolerance), looked + 1
        if not differing:
            return
    if 2 * differing > looked:
        raise ProtocolRefused(
            f"protocol.task_id: is {learner.protocol.task_id}, but what {_names(learner)} predicts for a row hangs on "
            f"the other rows of its batch ({differing} of {looked} rows differ when they are scored alone), which come "
            "from one experience; decide row by row, or set protocol.task_id to test"
        )


def _one_row(batch: Batch, number: int) -> Batch:
    def part(value: Any) -> Any:
        return value[number : number + 1] if isinstance(value, Tensor) else value

    return replace(
        batch, inputs={name: part(value) for name, value in batch.inputs.items()}, rows=batch.rows[number : number + 1],
        labels=None, index=part(batch.index), task=part(batch.task), features=part(batch.features),
    )  # fmt: skip
