"""A site: one linear map of the host, or one slice of its output, to which adapters add."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..memory.observe import is_observed, report_written
from .roles import PREFIX

_KEY = re.compile(r"[A-Za-z0-9_]+")


class Hook:
    """A hook of ours on a module of the host, found again by the name of its adapter."""

    name: str


class Add(Hook):
    """Forward hook: output[..., slice] + adapter(input).

    It holds names only and looks the adapter up in the module that it is called with, so that a deep copy of the host
    uses the copied adapters.
    """

    def __init__(self, name: str, out_slice: tuple[int, int] | None):
        self.name, self.out_slice = name, out_slice

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.out_slice is None:
            return output + self.answer(module, args, output)
        beside = _beside(module, self)
        if beside[0] is not self:
            return None
        # One sum for all slices of a fused map: each by itself would write the whole output anew.
        answers = {hook.out_slice or (0, 0): hook.answer(module, args, output) for hook in beside}
        pieces, at, width = [], 0, output.shape[-1]
        for start, stop in sorted(answers):
            if start > at:
                pieces.append(output.new_zeros((*output.shape[:-1], start - at)))
            pieces.append(answers[start, stop].expand(*output.shape[:-1], stop - start))
            at = stop
        if at < width:
            pieces.append(output.new_zeros((*output.shape[:-1], width - at)))
        return output + torch.cat(pieces, dim=-1)

    def answer(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """What the adapter adds to its slice, in the output's dtype."""
        adapter = module._modules[self.name]
        assert adapter is not None
        delta = adapter(args[0]).to(output.dtype)
        start, stop = self.out_slice or (0, output.shape[-1])
        if is_observed():
            report_written(getattr(adapter, "site", self.name), delta, output[..., start:stop])
        return delta


def _beside(module: nn.Module, hook: Add) -> list[Add]:
    """The hooks on slices of one module that can answer together with `hook`, itself among them.

    They stand one behind the other among the module's hooks, and no slice overlaps another.
    """
    groups: list[list[Add]] = [[]]
    for each in module._forward_hooks.values():
        if not isinstance(each, Add) or each.out_slice is None:
            groups.append([])
            continue
        start, stop = each.out_slice
        if any(start < other.out_slice[1] and other.out_slice[0] < stop for other in groups[-1] if other.out_slice):
            groups.append([])
        groups[-1].append(each)
    return next((group for group in groups if hook in group), [hook])  # itself, if it was removed meanwhile


@dataclass
class Handle:
    """What `Site.add` put into a module; `remove` takes it out again.

    A handle that is deep-copied together with the host belongs to the copy.
    """

    module: nn.Module
    name: str

    @property
    def adapter(self) -> nn.Module:
        adapter = self.module._modules.get(self.name)
        if adapter is None:
            raise BadInput(f"handle {self.name.removeprefix(PREFIX)!r}: was removed; call `add` again")
        return adapter

    def remove(self) -> None:
        """Takes hook and submodule out; a second call does nothing."""
        strip(self.module, self.name)


def strip(module: nn.Module, name: str) -> None:
    """Removes the adapter `name` and its hooks from one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, Hook) and hook.name == name:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    module._modules.pop(name, None)


def check_key(key: str) -> str:
    """Returns the submodule name for `key`; raises BadInput where it cannot be one."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise BadInput(f"key: {key!r} cannot name an adapter; use letters, digits and underscores")
    return PREFIX + key


@dataclass(frozen=True)
class Site:
    """One linear map y = W x + b of the host, seen through its role.

    Attributes:
        name: "3.query", with the tower before it where there are two ("vision.3.query"). Unique in its host.
        role: one of `roles.ROLES`, or "other".
        layer: index of the block, -1 outside the blocks.
        tower: "" unless the host has two ("vision", "text").
        path: dotted path of the module in the model.
        in_features, out_features: widths d_in and d_out of this site (of the slice, for a fused projection).
        transposed: True where the module stores its weight as [d_in, d_out] (GPT-2's Conv1D).
        out_slice: the outputs [start, stop) that belong to this site; None for all.
        tied: paths of other modules that share the weight.
    """

    name: str
    role: str
    layer: int
    tower: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    in_features: int
    out_features: int
    transposed: bool = False
    out_slice: tuple[int, int] | None = None
    tied: tuple[str, ...] = ()

    def add(self, key: str, adapter: nn.Module) -> Handle:
        """Adds adapter(x) to this site's output in every forward pass of the host.

        The adapter sees the module's own input x [..., d_in] and gives [..., d_out]. Adapters on one module all see the
        same x and are added in the order in which they came. Weights are not touched, so that tied and quantised
        weights are fine.

        Raises:
            BadInput: `key` is taken at this site, or cannot be a name.
        """
        name = check_key(key) + (f"_{self.role}" if self.out_slice is not None else "")
        if name in self.module._modules:
            raise BadInput(f"site {self.name!r}: an adapter with key {key!r} is there already; choose another key")
        self.module.add_module(name, adapter)
        self.module.register_forward_hook(Add(name, self.out_slice))
        return Handle(self.module, name)

    @property
    def device(self) -> torch.device:
        """Where the module's tensors are."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def parameter(self, operation: str) -> nn.Parameter:
        """The whole module's weight, for an operation that has to write it.

        Args:
            operation: what is to be done, for the error message.

        Raises:
            BadInput: the weight is quantised, not on this machine, or shared with another module.
        """
        weight = self._float_weight(operation)
        if self.tied:
            raise BadInput(
                f"site {self.name!r} ({self.path}): {operation} would also change {', '.join(self.tied)}, which share "
                "its weight; choose other sites or untie the weights first"
            )
        return weight

    def weight(self, operation: str = "reading the weight") -> Tensor:
        """W of this site as [d_out, d_in], detached, whatever way the module stores it.

        Raises:
            BadInput: the weight is quantised or not on this machine.
        """
        return self.part(self._float_weight(operation).detach())

    def part(self, tensor: Tensor) -> Tensor:
        """This site's [d_out, d_in] of a tensor that is stored as the module's whole weight is, e.g. a gradient."""
        tensor = tensor.t() if self.transposed else tensor
        return tensor if self.out_slice is None else tensor[slice(*self.out_slice)]

    def _float_weight(self, operation: str) -> nn.Parameter:
        module: Any = self.module
        while hasattr(module, "base_layer"):
            module = module.base_layer
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise BadInput(
                f"site {self.name!r} ({self.path}): {operation} needs a floating-point weight, found "
                f"{type(module).__name__} with {getattr(weight, 'dtype', type(weight).__name__)}; load the model "
                "without quantisation or choose a method that only adds to outputs"
            )
        if weight.is_meta:
            raise BadInput(
                f"site {self.name!r} ({self.path}): {operation} needs the weight in memory, found device meta"
            )
        return weight
