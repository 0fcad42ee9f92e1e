"""The bank of rank-1 atoms: old items are buffers, only the newest rows are parameters, every item has an owner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .merging import MergeReport, fair_shares, merge_duplicates
from .parts import Share, is_as_held
from .routing import routing_dtype

SHARED = -1
"""Owner of an item that several writes made together: no single owner."""


class AtomView(NamedTuple):
    """Tensors to read from: items of a bank, frozen ones first.

    Attributes:
        index: [N] int64 item numbers in the bank, or None if the view is the whole bank.
    """

    frozen_keys: Tensor
    frozen_values: Tensor
    new_keys: Tensor
    new_values: Tensor
    index: Tensor | None  # pyright: ignore[reportIncompatibleMethodOverride]


_Call = TypeVar("_Call", bound=Callable[..., Any])


def _on_whole(changes: bool) -> Callable[[_Call], _Call]:
    """For functions that need every frozen item also where this process keeps a part of them."""

    def wrap(function: _Call) -> _Call:
        @functools.wraps(function)
        def inner(self: AtomBank, *given: Any, **named: Any) -> Any:
            with self.whole(changes):
                return function(self, *given, **named)

        return inner  # type: ignore[return-value]

    return wrap


class AtomBank(nn.Module):
    """Keys and values of rank-1 atoms (MoRAM), growing with the stream.

    After `split` a process keeps a part of the frozen items alone. All functions work as before, but those that need
    every item (all that change the bank, `view`, `keys`, `values`, `state_dict`) then wait for all other processes.

    Attributes:
        frozen_keys [n, d_in], frozen_values [n, d_out]: buffers; this process's part of them after `split`.
        new_keys [r, d_in], new_values [r, d_out]: parameters, replaced by other objects whenever their number of rows
            changes: build the optimizer anew after `grow`, `freeze`, `drop`, `keep`, `prune` or a load of other sizes.
        owners: int64 [n + r], write id of each item, old ones first; `SHARED` for none.
        usage: float64 [n + r], counts committed by `add_usage`; nothing is counted in a forward pass.
    """

    frozen_keys: Tensor
    frozen_values: Tensor
    owners: Tensor
    usage: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"found in_features={in_features}, out_features={out_features}; both must be at least 1")
        self.in_features, self.out_features = in_features, out_features
        keys = torch.empty(0, in_features, dtype=dtype, device=device)
        values = torch.empty(0, out_features, dtype=dtype, device=device)
        self.register_buffer("frozen_keys", keys)
        self.register_buffer("frozen_values", values)
        self.new_keys = nn.Parameter(keys.clone())
        self.new_values = nn.Parameter(values.clone())
        self.register_buffer("owners", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("usage", torch.empty(0, dtype=torch.float64, device=device))
        self._share: Share | None = None
        self._rows: int | None = None  # of all frozen items, while the buffers hold a part
        self._read: tuple[Tensor, Tensor] | None = None  # while they hold all, to be read: keys, and the part of them

    def extra_repr(self) -> str:
        sizes = f"frozen={self.frozen_size}, new={self.new_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {sizes}"

    @property
    def frozen_size(self) -> int:
        return self.frozen_keys.shape[0] if self._rows is None else self._rows

    @property
    def new_size(self) -> int:
        return self.new_keys.shape[0]

    @property
    def size(self) -> int:
        return self.frozen_size + self.new_size

    @_on_whole(changes=False)
    def keys(self) -> Tensor:
        """[N, d_in], frozen items first; differentiable in the new ones."""
        return torch.cat([self.frozen_keys, self.new_keys])

    @_on_whole(changes=False)
    def values(self) -> Tensor:
        """[N, d_out], as `keys`; the scale of the layer is not applied to the new ones."""
        return torch.cat([self.frozen_values, self.new_values])

    # ---- parts
    def split(self, rank: int, processes: int) -> None:
        """From now on this process keeps its share of the frozen items alone; all must have the same bank and call it.

        Raises:
            ValueError: it is split already.
        """
        if self._share is not None:
            raise ValueError("the bank is split already")
        self._share = Share(rank, processes)
        self._cut()

    @property
    def in_parts(self) -> bool:
        return self._share is not None

    def _cut(self) -> None:
        assert self._share is not None
        self._rows = self.frozen_keys.shape[0]
        self.frozen_keys = self._share.part(self.frozen_keys)
        self.frozen_values = self._share.part(self.frozen_values)

    @contextmanager
    def whole(self, changes: bool = True) -> Iterator[None]:
        """Inside, the buffers hold all frozen items in every process; what is changed there is kept if `changes`.

        Raises:
            RuntimeError: a change inside one that is told that there is none.
        """
        if self._share is None or self._rows is None:
            if changes and self._read is not None:
                raise RuntimeError("the bank is being read and must not change meanwhile")
            yield
            return
        rows, parts = self._rows, (self.frozen_keys, self.frozen_values)
        self.frozen_keys, self.frozen_values = (self._share.whole(part, rows) for part in parts)
        self._rows, self._read = None, None if changes else (self.frozen_keys, parts[0])
        try:
            yield
        finally:
            self._read = None
            if changes:
                self._cut()
            else:
                self._rows = rows
                self.frozen_keys, self.frozen_values = parts

    def stays(self, keys: Tensor) -> Tensor | None:
        """What lives as long as the frozen keys `keys` of a view: they themselves, or the part they came from."""
        if self._share is None:
            return keys
        return self._read[1] if self._read is not None and keys is self._read[0] else None

    # ---- growth
    @_on_whole(changes=True)
    @torch.no_grad()
    def grow(self, r: int, owner: int, generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        """Freezes what is new (see `freeze`) and adds r atoms: keys U(-1/sqrt(d_in), 1/sqrt(d_in)), values zero.

        Keys are drawn on the generator's device (CPU without one) in float32, so that a seed gives the same keys
        on every device and in every precision.

        Args:
            owner: write id of the new atoms, at least 0.
        Raises:
            ValueError: r < 1 or owner < 0; nothing was changed.
        """
        if r < 1:
            raise ValueError(f"r: found {r}; at least one atom must be added")
        if owner < 0:
            raise ValueError(f"owner: found {owner}; write ids start at 0")
        self.freeze(scale)
        where = generator.device if generator is not None else torch.device("cpu")
        draw = torch.rand(r, self.in_features, generator=generator, dtype=torch.float32, device=where)
        keys = ((draw * 2 - 1) * self.in_features**-0.5).to(self.frozen_keys)
        self._set_new(keys, self.frozen_values.new_zeros(r, self.out_features))
        self.owners = torch.cat([self.owners, self.owners.new_full((r,), owner)])
        self.usage = torch.cat([self.usage, self.usage.new_zeros(r)])

    @_on_whole(changes=True)
    @torch.no_grad()
    def freeze(self, scale: float = 1.0) -> Tensor | None:
        """Makes the new atoms old: their values times `scale` join the buffers and no parameter row is left.

        Atoms whose value is all zero then are dropped, with owner and usage: they were never trained (an atom that
        wins no place gets no gradient on its value, and decay leaves zero at zero), say nothing, and as old atoms
        would compete in all later training.

        Returns:
            bool [N], True for the items that stayed; None if all did.
        """
        if self.new_size == 0:
            return None
        alive = (self.new_values.detach() * scale != 0).any(-1)
        kept = torch.cat([alive.new_ones(self.frozen_size), alive])
        dropped = self.keep(kept)
        self.frozen_keys = torch.cat([self.frozen_keys, self.new_keys.detach()])
        self.frozen_values = torch.cat([self.frozen_values, self.new_values.detach() * scale])
        self._set_new(self.new_keys[:0].detach().clone(), self.new_values[:0].detach().clone())
        return kept if dropped else None

    @torch.no_grad()
    def own_new(self, owner: int) -> None:
        """Gives the new items to another write, or to `SHARED` where several writes have trained them."""
        self.owners = torch.cat([self.owners[: self.frozen_size], self.owners.new_full((self.new_size,), owner)])

    def _set_new(self, keys: Tensor, values: Tensor) -> None:
        wanted = self.new_keys.requires_grad
        self.new_keys = nn.Parameter(keys, requires_grad=wanted)
        self.new_values = nn.Parameter(values, requires_grad=wanted)

    # ---- removal
    @_on_whole(changes=True)
    @torch.no_grad()
    def keep(self, mask: Tensor) -> int:
        """Keeps the items where mask [N] is True, in their order; returns how many were removed.

        Raises:
            ValueError: the mask is not a bool vector of length N.
        """
        if mask.shape != (self.size,) or mask.dtype != torch.bool:
            raise ValueError(f"mask: found {mask.dtype} {tuple(mask.shape)}; expected bool ({self.size},)")
        mask = mask.to(self.owners.device)
        removed = int((~mask).sum())
        if removed == 0:
            return 0
        old, new = mask[: self.frozen_size], mask[self.frozen_size :]
        self.frozen_keys, self.frozen_values = self.frozen_keys[old], self.frozen_values[old]
        if not bool(new.all()):
            self._set_new(self.new_keys.detach()[new], self.new_values.detach()[new])
        self.owners, self.usage = self.owners[mask], self.usage[mask]
        return removed

    def drop(self, owner: int) -> int:
        """Removes the items of one write, old and new; returns their number.

        Structural removal: items learnt later in their presence stay as they are.
        """
        return self.keep(self.owners != owner)

    @_on_whole(changes=True)
    def prune(self, *, usage_below: float | None = None, strength_below: float | None = None) -> int:
        """Removes old items used less than `usage_below` or with ||key|| ||value|| below `strength_below`.

        Items still being trained are never pruned. Returns the number removed.
        """
        bad = torch.zeros(self.frozen_size, dtype=torch.bool, device=self.owners.device)
        if usage_below is not None:
            bad |= self.usage[: self.frozen_size] < usage_below
        if strength_below is not None:
            bad |= self.frozen_keys.norm(dim=-1) * self.frozen_values.norm(dim=-1) < strength_below
        return self.keep(torch.cat([~bad, torch.ones(self.new_size, dtype=torch.bool, device=bad.device)]))

    @_on_whole(changes=True)
    @torch.no_grad()
    def limit(self, size: int, recent: int = 0, usage: Tensor | None = None) -> Tensor | None:
        """Keeps at most `size` of n old items, the most used: of every owner the best, then the second best, ...

        The latest `recent` ones get the ceil(size recent / n) places of their proportion beforehand: else what was
        just learnt could be the first to go. Items still being trained stay.

        Args:
            usage: [N], counts to go by in place of the bank's own.
        Returns:
            bool [N], True for the items that stayed; None if all did.
        Raises:
            ValueError: size < 1; nothing was changed.
        """
        if size < 1:
            raise ValueError(f"size: found {size}; at least one item must be kept")
        n = self.frozen_size
        if n <= size:
            return None
        usage, owners = (self.usage if usage is None else usage)[:n], self.owners[:n]
        kept, entering = torch.zeros_like(owners, dtype=torch.bool), -(-size * recent // n)
        kept[n - recent :] = fair_shares(usage[n - recent :], owners[n - recent :].new_zeros(recent), entering)
        rest = ~kept
        kept[rest] = fair_shares(usage[rest], owners[rest], size - entering)
        kept = torch.cat([kept, kept.new_ones(self.new_size)])
        self.keep(kept)
        return kept

    @_on_whole(changes=True)
    @torch.no_grad()
    def merge(
        self,
        cosine: float = 0.99,
        *,
        across_owners: bool = False,
        read: Callable[[AtomView], Tensor] | None = None,
    ) -> MergeReport:
        """Joins old atoms whose keys point the same way into one; see `merge_duplicates` for the rule and the loss.

        Args:
            cosine: least cosine of two keys that are merged.
            across_owners: also merges items of different writes; the result belongs to `SHARED`, so that taking one
                write back no longer reaches it.
            read: gives the layer's output for some inputs of the caller's; called before and after, it measures the
                loss under the real routing.
        """
        before = read(self.view()) if read is not None else None
        n = self.frozen_size
        keys, values, groups, residual = merge_duplicates(
            self.frozen_keys, self.frozen_values, self.usage[:n], None if across_owners else self.owners[:n], cosine
        )
        first = torch.tensor([group[0] for group in groups], dtype=torch.int64, device=self.owners.device)
        owners, usage = self.owners[:n][first], self.usage[:n][first]
        for row, group in enumerate(groups):
            if len(group) > 1:
                usage[row] = self.usage[group].sum()
                owners[row] = self.owners[group[0]] if bool((self.owners[group] == owners[row]).all()) else SHARED
        self.frozen_keys, self.frozen_values = keys, values
        self.owners = torch.cat([owners, self.owners[n:]])
        self.usage = torch.cat([usage, self.usage[n:]])
        measured = None
        if read is not None and before is not None:
            change = (read(self.view()) - before).double().square().sum()
            energy = before.double().square().sum()
            measured = float((change / energy.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        return MergeReport(n - len(groups), residual, measured)

    # ---- use
    @_on_whole(changes=False)
    def view(self) -> AtomView:
        """All items, without a copy."""
        return AtomView(self.frozen_keys, self.frozen_values, self.new_keys, self.new_values, None)

    @_on_whole(changes=False)
    def without_empty(self) -> AtomView:
        """The items to infer with: atoms whose value is all zero were never trained and would only dilute the norm.

        Without a copy if no item is empty or only new ones are and all of them.
        """
        old = (self.frozen_values != 0).any(-1)
        new = (self.new_values.detach() != 0).any(-1)
        whole_old, whole_new = bool(old.all()), bool(new.all())
        if whole_old and whole_new:
            return self.view()
        keys, values = self.frozen_keys, self.frozen_values
        if not whole_old:
            keys, values = keys[old], values[old]
        new_keys, new_values = self.new_keys, self.new_values
        if not whole_new:
            any_new = bool(new.any())
            new_keys = new_keys[new] if any_new else new_keys[:0]
            new_values = new_values[new] if any_new else new_values[:0]
        return AtomView(keys, values, new_keys, new_values, torch.cat([old, new]).nonzero().flatten())

    @torch.no_grad()
    def add_usage(self, counts: Tensor, index: Tensor | None = None) -> None:
        """Commits counts [N] (or of the items `index` of a view) that a `RouterLog` collected.

        Raises:
            ValueError: the number of counts differs from the number of items.
        """
        expected = self.size if index is None else index.numel()
        if counts.shape != (expected,):
            raise ValueError(f"counts: found shape {tuple(counts.shape)}; expected ({expected},)")
        counts = counts.to(self.usage)
        self.usage = self.usage + counts if index is None else self.usage.index_add(0, index, counts)

    # ---- state
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.in_parts or is_as_held():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        with self.whole(changes=False):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            # A device that holds parts only might not hold all banks at once.
            for name in ("frozen_keys", "frozen_values"):
                destination[prefix + name] = destination[prefix + name].cpu()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("frozen_keys", "frozen_values", "new_keys", "new_values", "owners", "usage")
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if len(found) == len(names):
            held = self.in_parts and is_as_held()
            old, new, size = (len(found[name]) for name in ("frozen_keys", "new_keys", "owners"))
            rows = {name: len(found[name]) for name in names}
            expected = size if held else old + new
            if rows != dict(zip(names, (old, old, new, new, expected, expected), strict=True)):
                error_msgs.append(f"atom bank {prefix!r}: items disagree in number, found {rows}; the state is damaged")
                return
            widths = {name: found[name].shape[1] for name in names[:4]}
            if widths != dict.fromkeys(names[:4:2], self.in_features) | dict.fromkeys(names[1:4:2], self.out_features):
                error_msgs.append(
                    f"atom bank {prefix!r}: found widths {widths}; "
                    f"this layer has in_features={self.in_features}, out_features={self.out_features}"
                )
                return
            self._resize(old, new, size)
            self._rows = size - new if held else None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._share is not None and self._rows is None:
            self._cut()  # without an exchange: every process has loaded all items

    @torch.no_grad()
    def _resize(self, old: int, new: int, size: int) -> None:
        # Parameters whose shape fits stay the same objects, so that an optimizer built on them keeps its meaning.
        if old != self.frozen_keys.shape[0]:
            self.frozen_keys = self.frozen_keys.new_empty(old, self.in_features)
            self.frozen_values = self.frozen_values.new_empty(old, self.out_features)
        if new != self.new_size:
            self._set_new(
                self.new_keys.new_empty(new, self.in_features), self.new_values.new_empty(new, self.out_features)
            )
        if size != self.owners.numel():
            self.owners = self.owners.new_empty(size)
            self.usage = self.usage.new_empty(size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AtomBank:
        # Counts stay float64 when the model is cast: bfloat16 stops counting at 256.
        usage = self.usage
        super()._apply(fn, recurse)
        self.usage = usage.to(self.usage.device)
        return self

    def compute_dtype(self) -> torch.dtype:
        """The precision that routing and sums run in."""
        return routing_dtype(self.frozen_keys)
