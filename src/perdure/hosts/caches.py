"""Keys and values of inserted tokens beside a KV cache: the host's cache holds the host's own tokens only.

So lengths, positions and masks that the host derives from its cache stay right in every layer. What belongs to inserted
tokens is kept in an attribute of the cache object (it is copied and dropped with it), per layer and adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput

_STORE = "_perdure_inserted"
_NOTES = "_perdure_notes"
Kept = tuple[Tensor, Tensor] | None
"""Keys and values [B, heads, n, d] of inserted tokens; None where the first call inserted nothing."""


def root(cache: Any) -> Any:
    while isinstance(cache, View):
        cache = cache.inner
    return cache


def past(cache: Any, layer: int, tokens: int) -> tuple[int, int]:
    """(tokens of this layer that the cache has seen, column of the first new token in this layer's mask)."""
    seen = int(root(cache).get_seq_length(layer))
    if not seen:
        return 0, 0
    return seen, seen - int(root(cache).get_mask_sizes(tokens, layer)[1])


def notes(cache: Any, layer: int, key: str) -> dict[str, Any]:
    """What one adapter of one layer keeps with this cache, from call to call; empty at first."""
    return vars(root(cache)).setdefault(_NOTES, {}).setdefault((layer, key), {})


def keep(cache: Any, layer: int, key: str, value: Kept) -> None:
    vars(root(cache)).setdefault(_STORE, {})[layer, key] = value


def kept(cache: Any, layer: int, key: str) -> Kept:
    """What the first call left.

    Raises:
        BadInput: the cache was filled while this adapter was not attached.
    """
    store = vars(root(cache)).get(_STORE, {})
    if (layer, key) not in store:
        raise BadInput(
            f"past_key_values: layer {layer} was filled without the block adapter {key!r}; "
            "start from an empty cache, or pass use_cache=False"
        )
    return store[layer, key]


class View:
    """Stands for the cache inside one call of one block.

    On the first call the n inserted tokens at index `at` are held back from the cache and kept aside. On later calls
    their keys and values are put in front of what the cache returns. All else is the cache's own.
    """

    def __init__(self, inner: Any, layer: int, key: str, inserted: tuple[int, int] | None):
        self.inner, self.layer, self.key, self.inserted = inner, layer, key, inserted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T (+ n), d] of this call in; all that this call attends to out."""
        if self.inserted is None:
            mine = kept(self.inner, self.layer, self.key)
            assert mine is not None
            if mine[0].shape[0] != keys.shape[0]:
                raise BadInput(
                    f"past_key_values: the batch has {keys.shape[0]} rows, but the inserted tokens of layer "
                    f"{self.layer} were made for {mine[0].shape[0]}; caches of adapted blocks cannot be "
                    "repeated or split by row: start from an empty cache, or pass use_cache=False"
                )
            old = self.inner.update(keys, values, layer_idx, *args, **kwargs)
            return torch.cat((mine[0], old[0]), dim=-2), torch.cat((mine[1], old[1]), dim=-2)
        at, count = self.inserted
        mine = keys[..., at : at + count, :], values[..., at : at + count, :]
        keep(self.inner, self.layer, self.key, mine)
        rest = without(keys, at, count, -2), without(values, at, count, -2)
        all_keys, all_values = self.inner.update(*rest, layer_idx, *args, **kwargs)
        return between(all_keys, mine[0], at, -2), between(all_values, mine[1], at, -2)


def without(x: Tensor, at: int, count: int, dim: int) -> Tensor:
    """x without `count` entries from index `at` of dimension `dim`."""
    if at == 0:
        return x.narrow(dim, count, x.shape[dim] - count)
    tail = x.narrow(dim, at + count, x.shape[dim] - at - count)
    return torch.cat((x.narrow(dim, 0, at), tail), dim=dim)


def between(x: Tensor, new: Tensor, at: int, dim: int) -> Tensor:
    """x with `new` at index `at` of dimension `dim`."""
    parts = (x.narrow(dim, 0, at), new, x.narrow(dim, at, x.shape[dim] - at))
    return torch.cat(parts[1:] if at == 0 else parts, dim=dim)
