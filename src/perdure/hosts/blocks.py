"""A change around one transformer block: new hidden states, tokens that live in this block alone.

Prompts, retrieval layers and block-wise adapters are functions of (hidden, mask, positions, rest). The frozen block
runs on what they return, with masks, position ids and rotary tables made to fit, and the inserted tokens are taken out
of its output.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import BadInput
from . import caches, masks, prefix
from .roles import PREFIX
from .sites import Handle, check_key

Where = Literal["front", "after_first"]
_AT: dict[str, int] = {"front": 0, "after_first": 1}
_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class Insertion:
    """Hidden states into which a function has put tokens.

    Attributes:
        hidden: [B, T + count, D], the inserted tokens at index 0 ("front") or 1 ("after_first", after a CLS token).
        count: inserted tokens n; 0 for none.
        where: the place. In causal hosts "front" is seen by all real tokens, "after_first" by all but the first.
        seen: bool [B, T]; only these of the host's own tokens see the inserted ones. None for all.
        leaving: is given what the block makes of the inserted tokens [B, count, D] before they are taken out, so that a
            function on the next block can put it in there.
    """

    hidden: Tensor
    count: int
    where: Where = "front"
    seen: Tensor | None = None
    leaving: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class Rest:
    """What else a block function may want to know.

    Attributes:
        layer: index of the block.
        causal: whether a token sees only what comes before it.
        past: tokens that the KV cache of this layer held before this call; 0 without a cache.
        arguments: the block's other arguments by name (not to be changed).
        notes: where a function may keep what later calls with the same KV cache need (a decision made on the prompt);
            it lives and dies with the cache. None without a cache.
    """

    layer: int
    causal: bool
    past: int
    arguments: Mapping[str, Any]
    notes: dict[str, Any] | None = None


BlockFunction = Callable[[Tensor, "Tensor | None", "Tensor | None", Rest], "Tensor | Insertion"]
"""(hidden [B, T, D], token mask bool [B, T] or None for all, position ids [B or 1, T] or None, rest) -> new hidden."""


class _Plain(nn.Module):
    """Lets a plain function stand among the block's submodules."""

    def __init__(self, function: BlockFunction):
        super().__init__()
        self.function = function

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor | Insertion:
        return self.function(hidden, mask, positions, rest)


class Inserting(nn.Module):
    """Block function: puts in the tokens [B, n, D] that `maker(hidden [B, T, D], mask)` makes of the block's input.

    On calls with a filled cache, where what is inserted would be left out, none are made.
    """

    def __init__(self, maker: nn.Module, where: Where = "after_first"):
        super().__init__()
        self.maker = maker
        self.where: Where = where

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor | Insertion:
        if rest.past:
            return hidden
        made = self.maker(hidden, mask)
        return Insertion(caches.between(hidden, made, _AT[self.where], 1), made.shape[1], self.where)


class Adding(nn.Module):
    """Block function: adds what `maker(hidden [B, T, D], mask)` makes, [B, 1, D] or [B, T, D], to every token.

    On calls with a filled cache nothing is added: `maker` would see the newest tokens alone.
    """

    def __init__(self, maker: nn.Module):
        super().__init__()
        self.maker = maker

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor:
        return hidden if rest.past else hidden + self.maker(hidden, mask)


@dataclass(frozen=True)
class Block:
    """One transformer block of a host.

    Attributes:
        name: "3", with the tower before it where there are two ("vision.3").
        causal: whether a token sees only what comes before it.
    """

    name: str
    layer: int
    tower: str
    path: str
    module: nn.Module = field(repr=False, compare=False)
    causal: bool = False

    def add(self, key: str, fn: nn.Module | BlockFunction) -> BlockAdapter:
        """Same as `BlockAdapter(self, fn, key)`."""
        return BlockAdapter(self, fn, key)


class BlockAdapter(Handle):
    """Puts `fn` around a block until `remove` is called.

    fn(hidden, mask, positions, rest) returns the block's new input: a tensor [B, T, D], or an `Insertion`. Several
    adapters on one block nest in the order in which they came: a later one sees the tokens of the earlier ones as real.
    An inserted token has the position of its row's first real token. Attention weights that the host is asked to
    return include the inserted tokens; hidden states do not.

    With a KV cache the host's cache never holds inserted tokens. Those of the first call (on an empty cache) are kept
    beside it for this layer and seen by all later tokens; what `fn` inserts in later calls is left out, other changes
    that it makes to the hidden states apply to every call. Generating with and without a cache is therefore the same if
    what `fn` inserts does not depend on generated tokens; without a cache `fn` sees the whole text in each step.

    Attention by "sdpa" and "eager" only: inserting under any other implementation is an error.

    Args:
        fn: an nn.Module (its parameters live in the host while it is attached) or a plain function.
        key: name of the adapter, unique in its block.

    Raises:
        BadInput: `key` is taken or cannot be a name.
    """

    def __init__(self, block: Block, fn: nn.Module | BlockFunction, key: str = "block"):
        name = check_key(key)
        module = block.module
        if name in module._modules:
            raise BadInput(f"block {block.name!r}: an adapter with key {key!r} is there already; choose another key")
        super().__init__(module, name)
        runner = module.__dict__.get("forward")
        if not isinstance(runner, _Runner):
            runner = _Runner(block, runner)
            module.forward = runner
        module.add_module(name, fn if isinstance(fn, nn.Module) else _Plain(fn))
        runner.names.append(name)

    def remove(self) -> None:
        """Takes the function out; with the last one the block's own `forward` is back.

        Raises:
            BadInput: something else has wrapped the block's forward since.
        """
        strip(self.module, self.name)


def strip(module: nn.Module, name: str) -> None:
    """Removes the block function `name` from one module."""
    if name not in module._modules:
        return
    runner = module.__dict__.get("forward")
    if not isinstance(runner, _Runner) or name not in runner.names:
        raise BadInput(
            f"block adapter {name.removeprefix(PREFIX)!r}: the block's forward was wrapped by {type(runner).__name__} "
            "after it was added; take that off first"
        )
    runner.names.remove(name)
    del module._modules[name]
    if not runner.names:
        if runner.inner is None:
            del module.__dict__["forward"]
        else:
            module.forward = runner.inner


def names(module: nn.Module) -> list[str]:
    """Submodule names of the block functions around one module."""
    runner = module.__dict__.get("forward")
    return list(runner.names) if isinstance(runner, _Runner) else []


@functools.cache
def _parameters(block_class: type[nn.Module]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(block_class.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in kinds)


class Call:
    """The arguments of one call, by name. What came by position stays there: reentrant checkpointing needs that."""

    def __init__(self, block_class: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names = _parameters(block_class)
        self.args, self.kwargs = list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        index = self.names.index(name) if name in self.names else len(self.args)
        return self.args[index] if index < len(self.args) else None

    def set(self, name: str, value: Any) -> None:
        index = self.names.index(name) if name in self.names else len(self.args)
        if index < len(self.args):
            self.args[index] = value
        else:
            self.kwargs[name] = value

    def copy(self) -> Call:
        made = copy.copy(self)
        made.args, made.kwargs = list(self.args), dict(self.kwargs)
        return made

    def everything(self) -> dict[str, Any]:
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}


class _Runner:
    """Stands as the `forward` of a block that has adapters.

    A forward of the instance, and not a pair of hooks, because hooks of others on the block (transformers collects
    hidden states so) must see neither inserted tokens nor state between calls. It refers to its module as a bound
    method would, so that a deep copy of the module gets a runner of its own.
    """

    def __init__(self, block: Block, inner: Callable[..., Any] | None):
        self.module, self.inner = block.module, inner
        self.layer, self.causal = block.layer, block.causal
        self.names: list[str] = []
        self.attention, self.cache_layer = _attention(block.module, block.layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(0, args, kwargs, None)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _run(self, level: int, args: tuple[Any, ...], kwargs: dict[str, Any], real: Tensor | None) -> Any:
        """Applies the functions from `level` on, then the block. `real` [B, T]: tokens known to the outer levels."""
        if level == len(self.names):
            return self._forward(*args, **kwargs)
        name = self.names[level]
        key = name.removeprefix(PREFIX)
        call = Call(type(self.module), args, kwargs)
        hidden = call.get(call.names[0])
        batch, tokens = hidden.shape[:2]
        cache_name, cache = self._cache(call)
        past, offset = (0, 0) if cache is None else caches.past(cache, self.cache_layer, tokens)
        if real is None:
            real = masks.token_mask(call.get("attention_mask"), batch, tokens, offset)
        causal = bool(self.causal if call.get("is_causal") is None else call.get("is_causal"))
        notes = None if cache is None else caches.notes(cache, self.cache_layer, key)
        rest = Rest(self.layer, causal, past, call.everything(), notes)
        made = _checked(self.module._modules[name](hidden, real, call.get("position_ids"), rest), hidden, key)  # type: ignore[misc]
        at, count, hidden = _AT[made.where], made.count, made.hidden

        if past:
            if count:
                hidden, count = caches.without(hidden, at, count, 1), 0
            mine = caches.kept(cache, self.cache_layer, key)
            if mine is not None:
                call.set("attention_mask", masks.prepend(call.get("attention_mask"), real, mine[0].shape[-2]))
                call.set(cache_name, caches.View(cache, self.cache_layer, key, None))
        elif count:
            self._check_insertion(call)
            call.set("attention_mask", masks.insert(call.get("attention_mask"), real, count, at, causal, made.seen))
            _extend_positions(call, real, count, at)
            real = None if real is None else caches.between(real, real.new_ones(batch, count), at, 1)
            if cache is not None:
                call.set(cache_name, caches.View(cache, self.cache_layer, key, (at, count)))
        elif cache is not None:
            caches.keep(cache, self.cache_layer, key, None)
        call.set(call.names[0], hidden)
        output = self._run(level + 1, tuple(call.args), call.kwargs, real)
        if not count:
            return output
        if made.leaving is not None:
            made.leaving((output[0] if isinstance(output, tuple) else output).narrow(1, at, count))
        if isinstance(output, tuple):
            return (caches.without(output[0], at, count, 1), *output[1:])
        return caches.without(output, at, count, 1)

    def _cache(self, call: Call) -> tuple[str, Any]:
        for name in _CACHES:
            cache = call.get(name)
            if cache is None:
                continue
            if not hasattr(cache, "get_mask_sizes") or hasattr(cache, "self_attention_cache"):
                raise BadInput(
                    f"{name}: a block adapter works with transformers' Cache of a decoder-only model, found "
                    f"{type(caches.root(cache)).__name__}; pass use_cache=False"
                )
            return name, cache
        return "", None

    def _check_insertion(self, call: Call) -> None:
        found = prefix.implementation(self.module.get_submodule(self.attention)) or "eager"
        if found not in ("sdpa", "eager"):
            raise BadInput(
                f"attn_implementation: tokens can be inserted under 'sdpa' and 'eager', found {found!r}; "
                "load the model with attn_implementation='sdpa'"
            )
        if call.get("encoder_hidden_states") is not None:
            raise BadInput("encoder_hidden_states: tokens cannot be inserted into a block with cross-attention")


def _attention(module: nn.Module, layer: int) -> tuple[str, int]:
    """Path of a block's self-attention ("" if not found) and the index under which it writes its KV cache."""
    for name, part in module.named_modules():
        if hasattr(part, "is_causal") and "cross" not in name:
            index = getattr(part, "layer_idx", None)
            return name, layer if index is None else int(index)
    return "", layer


def attention_path(module: nn.Module) -> str:
    """Path of a block's self-attention inside it; "" where none is found."""
    return _attention(module, 0)[0]


def is_causal(module: nn.Module) -> bool:
    """Whether a block's self-attention says that it is causal; False where it says nothing."""
    return bool(getattr(module.get_submodule(_attention(module, 0)[0]), "is_causal", False))


def _checked(made: Any, hidden: Tensor, key: str) -> Insertion:
    made = made if isinstance(made, Insertion) else Insertion(made, 0)
    if made.where not in _AT:
        raise BadInput(f"block adapter {key!r}: where is {made.where!r}; allowed: {', '.join(_AT)}")
    batch, tokens, width = hidden.shape
    expected = [batch, tokens + made.count, width]
    if made.count < 0 or not isinstance(made.hidden, Tensor) or list(made.hidden.shape) != expected:
        found = list(made.hidden.shape) if isinstance(made.hidden, Tensor) else type(made.hidden).__name__
        raise BadInput(
            f"block adapter {key!r}: returned hidden states of shape {found} with {made.count} inserted tokens for an "
            f"input of shape {list(hidden.shape)}; return a tensor of that shape, or Insertion(hidden, count, where) "
            f"with {tokens} + count tokens"
        )
    return made


def _extend_positions(call: Call, real: Tensor | None, count: int, at: int) -> None:
    """Gives inserted tokens the position id and the rotary table row of their row's first real token."""

    def extended(table: Tensor) -> Tensor:
        if real is None:
            first = table[:, :1]
        else:
            table = table.expand(real.shape[0], *table.shape[1:])
            index = real.int().argmax(dim=1).view(-1, 1, *[1] * (table.ndim - 2))
            first = table.gather(1, index.expand(-1, 1, *table.shape[2:]))
        return caches.between(table, first.expand(-1, count, *table.shape[2:]), at, 1)

    positions, rotary = call.get("position_ids"), call.get("position_embeddings")
    if positions is not None:
        if positions.ndim != 2:
            raise BadInput(f"position_ids: tokens can be inserted for shape [B, T], found {list(positions.shape)}")
        call.set("position_ids", extended(positions))
    if rotary is not None:
        if not isinstance(rotary, tuple) or len(rotary) != 2 or any(table.ndim != 3 for table in rotary):
            raise BadInput("position_embeddings: tokens can be inserted for (cos, sin), each [B, T, d]")
        call.set("position_embeddings", (extended(rotary[0]), extended(rotary[1])))
