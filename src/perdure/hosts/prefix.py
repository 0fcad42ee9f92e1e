"""Keys and values in front of a block's own (prefix tuning): attention softmax(q [P_K; K]ᵀ / √d) [P_V; V].

transformers looks its attention function up by the name in the attention module's config. A module that carries a
prefix gets a config of its own that names `extended_attention` and is otherwise the model's; that function puts the
prefix in front and calls the one that the model names. What it is given are final keys and values: rotated, normed and
read from the KV cache. So prefix keys take no rotary position and no norm (as in PEFT's prefix tuning), the cache never
holds them, masks and positions of the host's own tokens stay as they are, and no query, feed-forward or residual is
computed for a prefix.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from . import masks
from .sites import Handle, check_key

if TYPE_CHECKING:
    from .blocks import Block

IMPLEMENTATION = "perdure_prefix"
_ABLE = ("sdpa", "eager")


@dataclass(frozen=True)
class Prefix:
    """What a maker gives for one call.

    Attributes:
        keys, values: [B or 1, n, H_kv d], as wide as the host's own keys (fewer heads than queries under GQA).
        seen: bool [B, T], which of the call's tokens see it; None for all.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor | None = None


class Extended:
    """An attention module's config while it carries prefixes: the model's own but for the name of the function."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, inner: Any):
        self.inner = inner
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "names") or name.startswith("__"):  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Extended:
        made = Extended(copy.deepcopy(self.inner, memo))
        made.names = list(self.names)
        return made


def implementation(attention: nn.Module) -> str | None:
    """Name of the attention function that the model itself asks for."""
    config = getattr(attention, "config", None)
    return getattr(config.inner if isinstance(config, Extended) else config, "_attn_implementation", None)


class PrefixAdapter(Handle):
    """Lets maker(rows, tokens) put keys and values in front of a block's self-attention until `remove` is called.

    The maker returns a `Prefix`, or None for none in this call; it is asked again in every call, with a KV cache too,
    and must then give the same. Of several prefixes on one block the first added is nearest to the host's own keys.
    Every token sees the prefix, also in causal and sliding-window attention, unless `Prefix.seen` says less; attention
    weights that the host is asked to return include it. Works under "sdpa" and "eager".

    Raises:
        BadInput: the key is taken, or the block's attention is none of transformers' that can be extended.
    """

    def __init__(self, block: Block, maker: nn.Module, key: str = "prefix"):
        attention, name = _attention_of(block), check_key(key)
        if name in attention._modules:
            raise BadInput(f"block {block.name!r}: a prefix with key {key!r} is there already; choose another key")
        super().__init__(attention, name)
        _announce()
        if not isinstance(attention.config, Extended):
            attention.config = Extended(attention.config)  # type: ignore[assignment]
        attention.add_module(name, maker)
        attention.config.names.append(name)

    def remove(self) -> None:
        """Takes the prefix out; with the last one the module has the model's own config again."""
        strip(self.module, self.name)


def _attention_of(block: Block) -> nn.Module:
    from .blocks import attention_path

    path = attention_path(block.module)
    attention = block.module.get_submodule(path)
    found = implementation(attention)
    if not path or found is None or _eager(attention) is None:
        raise BadInput(
            f"block {block.name!r}: keys and values go in front of the attention of transformers' models alone, "
            f"found {type(block.module).__name__} without such an attention; use a method that inserts tokens"
        )
    if found not in _ABLE or getattr(attention, "reorder_and_upcast_attn", False):
        raise BadInput(
            f"attn_implementation: keys and values can be put in front under {' and '.join(map(repr, _ABLE))}, found "
            f"{found!r}{' with reorder_and_upcast_attn' if found in _ABLE else ''}; load the model with "
            "attn_implementation='sdpa' and without that option"
        )
    return attention


def names(module: nn.Module) -> list[str]:
    """Submodule names of the prefixes of one attention module."""
    config = module.__dict__.get("config")
    return list(config.names) if isinstance(config, Extended) else []


def strip(module: nn.Module, name: str) -> None:
    """Removes one prefix from an attention module; a second call does nothing."""
    config = module.__dict__.get("config")
    if not isinstance(config, Extended) or name not in config.names:
        return
    config.names.remove(name)
    del module._modules[name]
    if not config.names:
        module.config = config.inner


def _announce() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, extended_attention)


def _eager(attention: nn.Module) -> Callable[..., Any] | None:
    """The plain attention function beside the module's class; each family has its own."""
    for kind in type(attention).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def extended_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own attention over prefix and keys: query [B, H, T, d], key and value [B, H_kv, K, d]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    wanted = config.inner._attn_implementation
    if wanted not in _ABLE:  # it was changed after the prefix was added
        raise BadInput(f"attn_implementation: is {wanted!r}, under which no keys can be put in front; set it to 'sdpa'")
    inner = _eager(module) if wanted == "eager" else ALL_ATTENTION_FUNCTIONS[wanted]
    assert inner is not None
    for name in config.names:
        made = module._modules[name](query.shape[0], query.shape[2])  # type: ignore[misc]
        if made is None or not made.keys.shape[1]:
            continue
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        if attention_mask is None and causal and wanted == "sdpa" and query.shape[2] > 1:
            # sdpa aligns causality with the first key. A static cache has spare keys behind.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            attention_mask = key.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
            kwargs["is_causal"] = False
        attention_mask = _extended(attention_mask, made, query, key.shape[2])
        key, value = _front(made.keys, key), _front(made.values, value)
    return inner(module, query, key, value, attention_mask, **kwargs)


def _front(prefix: Tensor, own: Tensor) -> Tensor:
    """[B or 1, n, H_kv d] in front of [B, H_kv, K, d], in the dtype of these."""
    batch, heads, _, width = own.shape
    if prefix.shape[-1] != heads * width:
        raise BadInput(f"prefix: is {prefix.shape[-1]} wide, the host's keys are {heads} heads of {width}")
    split = prefix.to(own.dtype).unflatten(-1, (heads, width)).transpose(1, 2)
    return torch.cat((split.expand(batch, -1, -1, -1), own), dim=2)


def _extended(mask: Tensor | None, made: Prefix, query: Tensor, keys: int) -> Tensor | None:
    """The mask [B, H, T, K] with n columns in front; None where nothing is hidden."""
    rows, tokens, count = query.shape[0], query.shape[2], made.keys.shape[1]
    if mask is None and made.seen is None:
        return None
    if mask is None:
        mask = query.new_zeros(1, 1, tokens, keys)
    masks.check(mask)
    if mask.ndim != 4:
        raise BadInput(f"attention_mask: shape {list(mask.shape)} reached an attention that takes [B, H, T, K]")
    seen = made.seen if made.seen is not None else torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
    mask = mask.expand(rows, -1, tokens, -1)
    return torch.cat((masks.columns(mask, seen, count), mask), dim=-1)
