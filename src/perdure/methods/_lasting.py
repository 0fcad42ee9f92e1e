"""Which of the parameters that train now live on from the last experience: what penalties on parameters share. Ours.

A penalty pulls a parameter to a value it had; that is meant only where the parameter is still the same thing. Names do
not tell: a bank that grows or is merged trains new tensors under an old name. So at each boundary the bits that
training left behind are noted (shape and checksum), and at the first step of the next experience a parameter lives on
if it has them still. Of one that got more rows (a head's new classes) the old rows do. What trains no more is
forgotten, and what is new has no anchor before the next boundary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BadInput
from ._refusals import refuse_joint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ._method import Method


class Lasting:
    """Keeps in `owner.values` what lives on, and in `owner.tensors` (`kind/name`) only what belongs to it.

    Args:
        owner: the method that holds parameters.
        chosen: whether it would hold the parameter of this name at all.
    """

    def __init__(self, owner: Method, chosen: Callable[[str, nn.Parameter], bool]):
        self.owner, self._chosen = owner, chosen

    def check(self, head: bool) -> None:
        """Raises BadInput where nothing in the list of methods could ever be held."""
        loop, name = self.owner.loop, self.owner.name
        refuse_joint(self.owner)
        renewing = [method.name for method in loop.methods if method.adapts and method.renews]
        lasting = [method.name for method in loop.methods if method.adapts and not method.renews]
        if renewing and not lasting and not (head and loop.needs_head):
            raise BadInput(
                f"method.{name}: {' and '.join(renewing)} trains new parameters in every experience and freezes or "
                f"merges the old ones, so there is nothing that {name} could hold; remove {name}, or hold an adapter "
                "that goes on training (lora, finetune)"
            )

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What trains now and would be held, but for what is known to be new next time."""
        loop = self.owner.loop
        new = tuple(f"method/{number}/" for number, method in enumerate(loop.methods) if method.renews)
        return [(name, p) for name, p in loop.trained() if not name.startswith(new) and self._chosen(name, p)]

    def leave(self, named: list[tuple[str, nn.Parameter]]) -> None:
        """A boundary: notes what training has left."""
        self.owner.values["left"] = {name: [list(p.shape), checksum(p)] for name, p in named}

    def begin(self) -> bool:
        """Before the first step of an experience: who lives on? Returns whether it is the first step.

        Raises:
            BadInput: all that could be held was replaced since the boundary.
        """
        values, loop = self.owner.values, self.owner.loop
        if values.get("begun") == loop.write_id:
            return False
        named = self.trained()
        left = values.pop("left", None)
        if left is None:  # an experience was given up: what lived on in it does so still
            found = [name for name, _ in named if name in values.get("lasting", [])]
        else:
            found = [name for name, p in named if name in left and _same(p, *left[name])]
        replaced = [name for name, _ in named if name in (left or {}) and name not in found]
        if replaced and not found:
            raise BadInput(
                f"method.{self.owner.name}: nothing that trains now ({replaced[0]}, ...) has the values that the last "
                f"experience left, so there is nothing to hold; put {self.owner.name} last in the list, or remove it"
            )
        values |= {"begun": loop.write_id, "lasting": found}
        for key in [key for key in self.owner.tensors if key.partition("/")[2] not in found]:
            del self.owner.tensors[key]
        held = sum(p.numel() for name, p in named if name in found)
        values["held_share"] = held / max(1, sum(p.numel() for _, p in loop.trained()))
        return True

    def now(self, kind: str) -> list[tuple[str, nn.Parameter]]:
        """What lives on and has a tensor of this kind."""
        names = set(self.owner.values.get("lasting", []))
        return [(n, p) for n, p in self.owner.loop.trained() if n in names and f"{kind}/{n}" in self.owner.tensors]

    def tensor(self, kind: str, name: str, parameter: nn.Parameter) -> Tensor:
        """The owner's tensor, where the parameter is."""
        key, tensors = f"{kind}/{name}", self.owner.tensors
        if tensors[key].device != parameter.device:
            tensors[key] = tensors[key].to(parameter.device)
        return tensors[key]


def old_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """The part of a parameter for which there are `rows`: all of it, unless it got more of them."""
    return parameter[: rows.shape[0]] if parameter.dim() else parameter


def _same(parameter: Tensor, shape: list[int], check: int) -> bool:
    if list(parameter.shape[1:]) != shape[1:] or parameter.dim() != len(shape):
        return False
    if shape and parameter.shape[0] < shape[0]:
        return False
    return checksum(parameter[: shape[0]] if shape else parameter) == check


def checksum(tensor: Tensor) -> int:
    """Of the bits and their order; the same on every device, since whole numbers are summed."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(whole).long()
    return int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())
