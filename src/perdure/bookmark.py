"""What the loop was before an experience was offered: one that fails before its first step leaves no trace."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from .memory.parts import as_held
from .state import generator_state, rng_state, set_generator_state, set_rng_state

if TYPE_CHECKING:
    from .heads import Head
    from .loop import Loop


class HeadMark:
    """A head as it is: parameters by reference, since only steps write into them; sums of a closed form by value."""

    def __init__(self, head: Head):
        self.head = head
        self._parts = [
            (part, dict(part._parameters), {n: None if b is None else b.clone() for n, b in part._buffers.items()})
            for part in head.module.modules()
        ]
        self._rest = {
            name: copy.deepcopy(value) if name == "values" else list(value) if isinstance(value, list) else value
            for name, value in vars(head).items()
        }

    def restore(self) -> None:
        vars(self.head).update(self._rest)
        for part, parameters, buffers in self._parts:
            part._parameters.update(parameters)
            part._buffers.update(buffers)


class Bookmark:
    """The loop between two experiences.

    Args:
        loop: where nothing of the next experience has been done yet.
        told: whether methods will be told of it. What they keep is then copied, as they may grow.
    """

    def __init__(self, loop: Loop, told: bool):
        self._loop = loop
        self._plain = {
            "labels": dict(loop.labels), "history": list(loop.history), "writes": list(loop.writes),
            "position": replace(loop.position), "counters": replace(loop.counters), "current": loop.current,
            "optimization": loop.optimization, "_features": dict(loop._features), "_finite": None,
            "_early": None,
        }  # fmt: skip
        self._heads = [HeadMark(head) for head in (loop.head, loop.auxiliary_head) if head is not None]
        self._replay = {name: copy.copy(value) for name, value in vars(loop.replay).items() if name != "generator"}
        self._services, self._router = dict(vars(loop.services)), loop.services.router_log.state_dict()
        self._values = [copy.deepcopy(method.values) for method in loop.methods]
        self._methods = []
        for method in loop.methods if told else ():
            with as_held():
                tensors, values = method.state_dict()
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._methods.append((method, copies, copy.deepcopy(values)))
        self._generator, self._rng = generator_state(loop.generator), rng_state()

    def restore(self) -> None:
        """Makes the loop what it was; used once."""
        loop = self._loop
        for head in self._heads:
            head.restore()
        vars(loop).update(self._plain)
        vars(loop.replay).update(self._replay)
        vars(loop.services).update(self._services)
        loop.services.router_log.load_state_dict(*self._router)
        for method, values in zip(loop.methods, self._values, strict=True):
            method.values = values
        with as_held():
            for method, tensors, values in self._methods:
                method.load_state_dict(tensors, values)
        loop.system.to(loop.device)
        if loop.optimization is not None:
            loop.wrapped = loop._wrap()
        set_generator_state(loop.generator, self._generator)
        set_rng_state(*self._rng)
