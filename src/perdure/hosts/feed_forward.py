"""The feed-forward of a block: what reads its input, what writes its output, and how to add to it or replace it.

Most families have one module for it (`mlp`). BERT's kin have two, `intermediate` and `output.dense`, with the residual
and a norm around the second; there the input is carried from the first to the second within one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import BadInput
from .roles import is_linear
from .sites import Add, Handle, Hook, Site, check_key, strip

if TYPE_CHECKING:
    from .host import Host

# Of this thread alone, so that concurrent forward passes do not mix; empty outside a feed-forward.
_carried: ContextVar[dict[tuple[str, str], Tensor] | None] = ContextVar("perdure_carried", default=None)


class _Carry(Hook):
    """Forward pre-hook of the entry: keeps its input for the exit of the same feed-forward."""

    def __init__(self, name: str, place: str):
        self.name, self.place = name, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _carried.set({**(_carried.get() or {}), (self.place, self.name): args[0]})


class _AddCarried(Add):
    """Forward hook of the exit: output + adapter(input of the entry)."""

    def __init__(self, name: str, place: str):
        super().__init__(name, None)
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        carried = dict(_carried.get() or {})
        z = carried.pop((self.place, self.name), None)
        _carried.set(carried)
        if z is None:
            raise RuntimeError(f"feed-forward {self.place}: its second part was called without its first")
        return output + self.answer(module, (z,), output)


@dataclass
class _Pair(Handle):
    """Handle of an adapter whose input comes from another module than the one it adds to."""

    entry: nn.Module

    def remove(self) -> None:
        strip(self.entry, self.name)
        super().remove()


@dataclass
class Replacement:
    """What `FeedForward.replace` put in; `remove` puts the originals back, the very same modules."""

    host: Host
    originals: list[tuple[nn.Module, str, nn.Module]]
    sites: list[Site]

    def remove(self) -> None:
        for parent, leaf, module in self.originals:
            setattr(parent, leaf, module)
        self.originals = []
        self.host.give_back(self.sites)


@dataclass(frozen=True)
class FeedForward:
    """One block's feed-forward.

    Attributes:
        name: "3.ffn", with the tower before it where there are two ("vision.3.ffn").
        layer, tower: as in `Site`.
        entry, exit: dotted paths of the module that gets its input z [..., in_features] and of the one that gives its
            output [..., out_features], before dropout, norm and residual of the block; often the same.
        sites: its linear maps.
    """

    name: str
    layer: int
    tower: str
    entry: str
    exit: str
    in_features: int
    out_features: int
    sites: tuple[Site, ...] = field(repr=False)
    host: Host = field(repr=False, compare=False)

    def add(self, key: str, adapter: nn.Module) -> Handle:
        """Adds adapter(z) to the output in every forward pass of the host.

        Raises:
            BadInput: `key` is taken here, or cannot be a name.
        """
        name = check_key(key)
        model = self.host.model
        entry, exit_ = model.get_submodule(self.entry), model.get_submodule(self.exit)
        if name in exit_._modules or name in entry._modules:
            raise BadInput(f"{self.name!r}: an adapter with key {key!r} is there already; choose another key")
        exit_.add_module(name, adapter)
        if entry is exit_:
            exit_.register_forward_hook(Add(name, None))
            return Handle(exit_, name)
        entry.add_module(name, nn.Identity())  # the mark by which `Host.strip` finds the hook
        entry.register_forward_pre_hook(_Carry(name, self.exit))
        exit_.register_forward_hook(_AddCarried(name, self.exit))
        return _Pair(exit_, name, entry)

    def replace(self, layer: nn.Module) -> Replacement:
        """Puts layer(z) in the place of the output; the block's dropout, norm and residual stay.

        The replaced linear maps are no sites of the host until the replacement is removed.

        Raises:
            BadInput: the feed-forward is no module of its own.
        """
        model = self.host.model
        if self.entry != self.exit and is_linear(model.get_submodule(self.entry)):
            raise BadInput(
                f"{self.name!r}: cannot be replaced, because {self.entry} and {self.exit} stand directly in the block "
                "with the activation between them; add beside it instead"
            )
        new = {self.entry: nn.Identity(), self.exit: layer} if self.entry != self.exit else {self.exit: layer}
        originals = []
        for path, module in new.items():
            head, _, leaf = path.rpartition(".")
            parent = model.get_submodule(head)
            originals.append((parent, leaf, parent.get_submodule(leaf)))
            setattr(parent, leaf, module)
        self.host.take_away(self.sites)
        return Replacement(self.host, originals, list(self.sites))


def find(host: Host, block_path: str, name: str, layer: int, tower: str, sites: Sequence[Site]) -> FeedForward:
    """The feed-forward of one block, from the linear maps in it.

    Raises:
        BadInput: the block has not exactly one map into and one out of the feed-forward.
    """
    mine = [site for site in sites if site.role in ("ffn_in", "ffn_gate", "ffn_out")]
    ins, outs = ([site for site in mine if site.role == role] for role in ("ffn_in", "ffn_out"))
    if len(ins) != 1 or len(outs) != 1:
        raise BadInput(
            f"model: block {block_path} of {type(host.model).__name__} has {len(ins)} maps into a feed-forward and "
            f"{len(outs)} out of it, one of each is needed (no mixture of experts, no fused map); choose other layers "
            "or a method that adapts linear maps"
        )
    common = _common([site.path for site in mine])
    if len(common) > len(block_path):
        entry = exit_ = common
    else:
        entry = f"{block_path}.{ins[0].path[len(block_path) + 1 :].split('.')[0]}"
        exit_ = outs[0].path
    return FeedForward(
        name, layer, tower, entry, exit_, ins[0].in_features, outs[0].out_features, tuple(mine), host
    )  # fmt: skip


def _common(paths: Sequence[str]) -> str:
    """The longest dotted path that all paths begin with."""
    parts = [path.split(".") for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
