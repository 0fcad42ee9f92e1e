"""Plug-ins that keep more than the protocol grants, wherever they hide it; the budget is counted on what is there."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cheating import Cheat, experiences, learner, registered

from perdure.errors import ProtocolRefused
from perdure.heads.cosine import CosineHead
from perdure.holdings import unsaved_bytes
from perdure.objectives.classification import Classification
from perdure.registry import HEADS, OBJECTIVES
from tests.conformance import cases

Hide = Callable[[Any, Any], None]
HIDING: dict[str, Hide] = {
    "a list": lambda m, b: vars(m).setdefault("kept", []).extend(b.rows),
    "texts alone": lambda m, b: vars(m).setdefault("kept", set()).update(row["text"] for row in b.rows),
    "one long text": lambda m, b: vars(m).update(kept=getattr(m, "kept", "") + "|".join(r["text"] for r in b.rows)),
    "encoded texts": lambda m, b: vars(m).setdefault("kept", []).append(b"|".join(r["text"].encode() for r in b.rows)),
    "batches": lambda m, b: vars(m).setdefault("kept", deque()).append(b),
    "a closure": lambda m, b: vars(m).update(kept=lambda rows=tuple(b.rows): rows),
    "token ids": lambda m, b: vars(m).setdefault("kept", []).append(b.inputs["input_ids"].clone()),
    "lists of numbers": lambda m, b: vars(m).setdefault("kept", []).extend(b.inputs["input_ids"].tolist()),
    "an array": lambda m, b: vars(m).update(kept=b.inputs["input_ids"].numpy()),
    "tensors": lambda m, b: m.tensors.update(kept=b.inputs["input_ids"].float()),
    "a buffer": lambda m, b: m.modules["vector"].register_buffer("kept", b.inputs["input_ids"].short()),
    "a parameter": lambda m, b: m.modules["vector"].register_parameter(
        "kept", torch.nn.Parameter(b.inputs["input_ids"].float(), requires_grad=False)
    ),
    "values": lambda m, b: m.values.update(kept=[row["text"] for row in b.rows]),
    "its class": lambda m, b: type(m).shelf.extend(b.rows),
    "its services": lambda m, b: setattr(m.loop, "kept", list(b.rows)),
    "the host": lambda m, b: setattr(m.loop.host.model, "kept", list(b.rows)),
    "a buffer of the host": lambda m, b: m.loop.host.model.register_buffer("kept", b.inputs["input_ids"]),
}  # fmt: skip


class Hoards(Cheat):
    shelf: list[Any] = []

    def __init__(self, hide: Hide):
        super().__init__()
        type(self).shelf = []
        self.hide = hide

    def before_step(self, batch: Any) -> Any:
        self.hide(self, batch)
        return batch


@pytest.mark.parametrize("where", HIDING)
def test_rows_that_are_kept_beside_the_buffer_are_found(where: str) -> None:
    every, (made, _) = learner(Hoards(HIDING[where]), protocol={"rehearsal": 100}), experiences()
    with pytest.raises(ProtocolRefused, match=r"protocol\.rehearsal: .*cheat .*row.* beside the replay buffer"):
        every.learn(made)


def test_rows_in_a_state_that_is_made_up_are_found() -> None:
    kept: list[str] = []  # nothing hangs on the method; what it saves is looked at

    class Invents(Cheat):
        def before_step(self, batch: Any) -> Any:
            kept.extend(row["text"] for row in batch.rows)
            return batch

        def state_dict(self) -> Any:
            tensors, values = super().state_dict()
            return tensors, {**values, "more": list(kept)}

    every = learner(Invents())
    with pytest.raises(ProtocolRefused, match=r"protocol\.rehearsal: .*saved state"):
        every.learn(experiences()[0])


def test_images_that_are_kept_are_found() -> None:
    for hide in (
        lambda m, b: vars(m).update(kept=list(b.rows)),
        lambda m, b: vars(m).update(kept=[row["image"] for row in b.rows]),
        lambda m, b: m.tensors.update(kept=b.inputs["pixel_values"].clone()),
        lambda m, b: m.tensors.update(kept=torch.stack([torch.tensor(row["image"]) for row in b.rows])),
    ):
        every = learner(Hoards(hide), host="vit")
        with pytest.raises(ProtocolRefused, match=r"protocol\.rehearsal"):
            every.learn(cases.experiences("vit", 1)[0])


def test_heads_and_objectives_may_keep_no_rows_either() -> None:
    with registered(HEADS, "hoarding") as head, registered(OBJECTIVES, "remembering") as objective:

        @head
        class Hoarding(CosineHead):
            def logits(self, features: Any) -> Any:
                self.values.setdefault("kept", list(last))
                return super().logits(features)

        @objective
        class Remembering(Classification):
            def encode(self, rows: Any, *args: Any, **options: Any) -> Any:
                last[:] = [row["text"] for row in rows]
                if self.config.pooling == "cls":
                    vars(self).setdefault("kept", []).extend(last)
                return super().encode(rows, *args, **options)

        last: list[str] = []
        from perdure.learner import Learner

        for pooling, chosen, who in (("auto", "hoarding", "head hoarding"), ("cls", "linear", "objective remembering")):
            model, processor = cases.build_host("bert")
            settings = {"remembering": {"max_length": 32, "pooling": pooling}}
            every = Learner(model, processor, method=Cheat(), head=chosen, objective=settings, seed=3)
            with pytest.raises(ProtocolRefused, match=who):
                every.learn(experiences()[0])


def test_test_rows_that_are_kept_while_they_are_scored_are_found() -> None:
    class Reads(Cheat):
        def predict(self, batch: Any, forward: Callable[..., Any]) -> Any:  # type: ignore[override]
            self.found += [row["text"] for row in batch.rows]
            return forward(batch)

    every, made = learner(Reads()), experiences()
    every.learn(made[0])
    with pytest.raises(ProtocolRefused, match=r"protocol\.evaluate: .*cheat .*test rows of 'domain0'"):
        every.evaluate([made[0]])


# ---- the buffer
@pytest.mark.parametrize("more", ["budget", "rows", "places"])
def test_a_buffer_that_was_widened_is_found(more: str) -> None:
    class Widens(Cheat):
        needs = frozenset({"rehearsal"})

        def requires_rehearsal(self) -> int:
            return 2

        def before_step(self, batch: Any) -> Any:
            buffer = self.loop.replay
            if more == "budget":
                buffer.samples = buffer.places = 1000
                buffer.add(batch.rows)
            elif more == "places":
                buffer.places = 1000
                buffer.add(batch.rows)
            else:
                buffer._rows.extend(dict(row) for row in batch.rows)
            return batch

    every = learner(Widens(), protocol={"rehearsal": 2})
    with pytest.raises(ProtocolRefused, match=r"protocol\.rehearsal: grants 2 samples, .* holds [4-8]"):
        every.learn(experiences()[0])


def test_bytes_are_counted_on_the_rows_that_are_there() -> None:
    class Fattens(Cheat):
        needs = frozenset({"rehearsal"})

        def requires_rehearsal(self) -> int:
            return 2

        def before_step(self, batch: Any) -> Any:
            self.loop.remember(batch)
            for row in self.loop.replay._rows:
                row["more"] = "x" * 5000
            return batch

    every = learner(Fattens(), protocol={"rehearsal": 2, "rehearsal_bytes": 400})
    with pytest.raises(ProtocolRefused, match=r"protocol\.rehearsal_bytes: grants 400 bytes, .* 1\d{4}"):
        every.learn(experiences()[0])


def test_a_method_that_asks_for_no_buffer_has_none() -> None:
    class Adds(Cheat):
        def before_step(self, batch: Any) -> Any:
            self.loop.replay.add(batch.rows)
            self.found.append(len(self.loop.replay))
            return batch

    every = learner(Adds(), protocol={"rehearsal": 100})
    every.learn(experiences()[0])
    assert every.methods[0].found == [0, 0]


# ---- bytes
def test_the_state_may_not_grow_beyond_the_granted_bytes() -> None:
    class Grows(Cheat):
        def before_experience(self, experience: Any) -> None:
            for number in range(3):
                self.tensors[f"{len(self.tensors)}/{number}"] = torch.full((100,), 0.5)

    room = learner(Cheat()).stored_bytes()
    every, made = learner(Grows(), protocol={"stored_bytes": room + 3000}), experiences(3)
    every.learn(made[0])
    refused = rf"protocol\.stored_bytes: grants {room + 3000} bytes, .* after 'domain2'"
    with pytest.raises(ProtocolRefused, match=refused):
        every.learn(made[1]).learn(made[2])
    with pytest.raises(ProtocolRefused, match=r"protocol\.stored_bytes: grants 10 bytes, .* before anything is learnt"):
        learner(Cheat(), protocol={"stored_bytes": 10})


def test_what_is_packed_so_that_no_row_can_be_read_counts_as_bytes() -> None:
    def pack(method: Any, batch: Any) -> None:
        vars(method).setdefault("kept", []).append(zlib.compress(repr(batch.rows).encode()))

    open_end = learner(Hoards(pack))
    open_end.learn(experiences()[0])
    kept = sum(map(len, open_end.methods[0].kept))
    plain = learner(Hoards(lambda m, b: None))
    plain.learn(experiences()[0])
    assert 0 <= unsaved_bytes(open_end) - unsaved_bytes(plain) - kept < 20 < kept
    tight = learner(Hoards(pack), protocol={"stored_bytes": plain.stored_bytes() + unsaved_bytes(plain) + 50})
    with pytest.raises(ProtocolRefused, match=r"protocol\.stored_bytes: .*outside the saved state"):
        tight.learn(experiences()[0])


# ---- who does nothing wrong
def test_honest_rehearsal_is_left_alone() -> None:
    every, made = learner({"er": {"budget": 6, "per_step": 2}}, protocol={"rehearsal": 6}), experiences(3)
    for each in made:
        every.learn(each)
    every.evaluate(made)
    assert len(every.replay) == 6
