"""The query pass: what the frozen host makes of the input, before the forward pass that uses it.

A hook in front of the tower (the module that takes token ids or pixels and gives hidden states) runs that module once
more: without gradients, without dropout, without a cache. So every way of calling the model has the query: training,
scoring, `generate`, a call of the user's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from . import masks
from .blocks import Call
from .host import Host
from .sites import Handle, Hook, check_key

_BY_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask", "cache_position")


class _Before(Hook):
    """Forward pre-hook of the tower. It holds a name only, so that a copy of the host uses the copied module."""

    def __init__(self, name: str, pooling: str, limit: int | None):
        self.name, self.pooling, self.limit = name, pooling, limit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taker: Any = module._modules[self.name]
        call = Call(type(module), args, kwargs)
        cache = call.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            return  # the decision of the first call stands; a block function finds it beside the cache
        with taker.away(), still(module):
            query, seen = _look(module, call, self.pooling, self.limit)
        taker.take(query, seen)


class QueryPass(Handle):
    """Runs a tower of the host once more before each forward pass, and gives the result to a module.

    The module is called as `take(query [B, D], seen)` and has a context manager `away()`, inside which it, and all that
    it steers, must leave the host alone. `seen` is None, or with a limit bool [B, T]: tokens to which nothing of the
    query's tokens lies in the future.

    Args:
        tower: name of the tower. key: name of the module in the host.
        limit: the query is that of the first `limit` real tokens (of all where a text has fewer), and only as much is
            run; for language models, whose tokens must not look ahead. The whole input when None.

    Raises:
        BadInput: the tower has no module that takes ids or pixels.
    """

    def __init__(self, host: Host, tower: str, taker: nn.Module, key: str, limit: int | None = None):
        owner, name = _owner(host, tower), check_key(key)
        if name in owner._modules:
            raise BadInput(f"query {key!r}: {type(owner).__name__} has one already; choose another key")
        super().__init__(owner, name)
        owner.add_module(name, taker)
        pooling = host.pool_default(tower or None)
        owner.register_forward_pre_hook(_Before(name, pooling, limit), with_kwargs=True)


def _owner(host: Host, tower: str) -> nn.Module:
    """The nearest module around a tower's blocks that takes ids or pixels."""
    parts = host.towers[tower].path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = host.model.get_submodule(".".join(parts[:end]))
        if {"input_ids", "pixel_values"} & set(inspect.signature(module.forward).parameters):
            return module
    raise BadInput(
        f"model: {type(host.model).__name__} has no module that takes input_ids or pixel_values and holds the blocks, "
        "so that no query can be taken before they run"
    )


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _look(module: nn.Module, call: Call, pooling: str, limit: int | None) -> tuple[Tensor, Tensor | None]:
    real, seen, counted = _real(call), None, None
    if limit is not None:
        if real is None:
            first = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
            real = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        order = real.cumsum(1)
        wanted = order[:, -1:].clamp(max=limit)
        seen, counted = real & (order >= wanted), real & (order <= wanted)
        end = int((counted * torch.arange(1, real.shape[1] + 1, device=real.device)).max())
        call, counted = _cut(call, max(end, 1)), counted[:, : max(end, 1)]
    for name, value in (("use_cache", False), ("past_key_values", None), ("return_dict", True)):
        if name in call.names or name in call.kwargs:
            call.set(name, value)
    for name in ("output_hidden_states", "output_attentions"):
        if call.get(name):
            call.set(name, False)
    output: Any = module.forward(*call.args, **call.kwargs)
    pooled = getattr(output, "pooler_output", None)
    if pooling == "cls" and pooled is not None and type(module).__name__.startswith("CLIPVision"):
        return pooled.detach(), seen  # the first token behind the last norm, which hidden states lack there
    return pool(output[0], real if counted is None else counted, pooling).detach(), seen


def _real(call: Call) -> Tensor | None:
    mask = call.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise BadInput(f"attention_mask: is a {type(mask).__name__}; give a tensor, or let generate compile nothing")
    ids = call.get("input_ids")
    tokens = ids.shape[1] if ids is not None else mask.shape[-1] if mask.ndim == 2 else mask.shape[-2]
    return masks.token_mask(mask if mask.ndim != 2 else mask > 0, mask.shape[0], tokens)


def _cut(call: Call, end: int) -> Call:
    """The call for the first `end` tokens."""
    short = call.copy()
    for name in _BY_TOKEN:
        value = call.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 4:
            short.set(name, value[:, :, :end, :end])
        else:
            short.set(name, value[:end] if value.ndim == 1 else value[:, :end])
    return short


def pool(states: Tensor, real: Tensor | None, pooling: Literal["mean", "cls", "last"] | str) -> Tensor:
    """[B, T, D] and bool [B, T] (None for all) -> [B, D]: the mean, the first or the last real token."""
    if real is None:
        real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if pooling == "mean":
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    order = torch.arange(states.shape[1], device=states.device)
    at = torch.where(real, order, states.shape[1] - 1).amin(1) if pooling == "cls" else (real * order).amax(1)
    return states[torch.arange(len(states), device=states.device), at]
