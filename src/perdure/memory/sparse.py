"""A bank of sparse weight deltas: supports, values and importance of all experts at one linear map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.sparse import Entries

_FROZEN = ("frozen_index", "frozen_expert", "frozen_values", "frozen_importance")
_NEW = ("new_index", "new_expert", "new_values", "new_importance", "anchor", "pull")


class Support(NamedTuple):
    """All entries of a bank.

    Attributes:
        index: int32 [n], position i * d_in + j of each entry of [d_out, d_in].
        expert: int32 [n], the expert it belongs to.
        values: [n], the delta itself, detached.
        importance: [n], summed sensitivity of the tasks before.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    expert: Tensor
    values: Tensor
    importance: Tensor


class SparseBank(nn.Module):
    """Sparse deltas of experts at one map; entries of experts at rest are buffers, the others' values are parameters.

    Attributes:
        frozen_index, frozen_expert int32 [n], frozen_values, frozen_importance [n]: experts at rest.
        new_values [m]: parameter, replaced by another object whenever m changes: build the optimizer anew after `set`,
            `freeze` or a load of other sizes.
        new_index, new_expert int32 [m], new_importance [m]: the same of the experts that train.
        anchor [m]: values when training began. pull [m]: weight of each entry's squared distance from there.
    """

    frozen_index: Tensor
    frozen_expert: Tensor
    frozen_values: Tensor
    frozen_importance: Tensor
    new_index: Tensor
    new_expert: Tensor
    new_importance: Tensor
    anchor: Tensor
    pull: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        if in_features * out_features >= 2**31:
            raise ValueError(f"found {out_features} x {in_features} weights; positions are 32-bit numbers")
        self.in_features, self.out_features = in_features, out_features
        for name in (*_FROZEN, *_NEW):
            kind = torch.int32 if name.endswith(("index", "expert")) else torch.float32
            empty = torch.empty(0, dtype=kind)
            if name == "new_values":
                self.new_values = nn.Parameter(empty)
            else:
                self.register_buffer(name, empty)
        self._entries: tuple[Entries, Entries] | None = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, entries={self.size}"

    @property
    def size(self) -> int:
        return self.frozen_index.numel() + self.new_index.numel()

    def support(self) -> Support:
        return Support(
            torch.cat([self.frozen_index, self.new_index]), torch.cat([self.frozen_expert, self.new_expert]),
            torch.cat([self.frozen_values, self.new_values.detach()]),
            torch.cat([self.frozen_importance, self.new_importance]),
        )  # fmt: skip

    def entries(self) -> tuple[Entries, Entries]:
        """Rows, columns and segments of the frozen and of the new part; made once per layout and device."""
        if self._entries is None or self._entries[0].rows.device != self.frozen_index.device:
            self._entries = (
                self._at(self.frozen_index, self.frozen_expert), self._at(self.new_index, self.new_expert)
            )  # fmt: skip
        return self._entries

    def _at(self, index: Tensor, expert: Tensor) -> Entries:
        experts, counts = torch.unique_consecutive(expert, return_counts=True)
        segments, start = [], 0
        for number, count in zip(experts.tolist(), counts.tolist(), strict=True):
            segments.append((number, start, start + count))
            start += count
        index = index.long()
        rows, columns = index // self.in_features, index % self.in_features
        each = torch.arange(self.out_features + 1, device=index.device)
        starts = [torch.searchsorted(rows[start:stop], each) for _, start, stop in segments]
        row_starts = torch.stack(starts) if starts else index.new_empty(0, self.out_features + 1)
        return Entries(rows, columns, tuple(segments), row_starts)

    # ---- layout
    @torch.no_grad()
    def set(self, support: Support, training: Sequence[int], pull: Tensor | None = None) -> None:
        """Takes over all entries; those of the experts `training` become parameters, anchored where they are now.

        Args:
            support: entries in any order.
            training: experts.
            pull: [n], see the class; 0 where absent.
        """
        pull = torch.zeros_like(support.values) if pull is None else pull
        order = torch.argsort(support.index.long(), stable=True)
        order = order[torch.argsort(support.expert[order], stable=True)]
        index, expert, values, importance = (part[order] for part in support)
        chosen = torch.isin(expert, torch.tensor(list(training), dtype=expert.dtype, device=expert.device))
        rest = ~chosen
        self.frozen_index, self.frozen_expert = index[rest], expert[rest]
        self.frozen_values, self.frozen_importance = values[rest], importance[rest]
        self.new_index, self.new_expert, self.new_importance = index[chosen], expert[chosen], importance[chosen]
        self._set_values(values[chosen])
        self.anchor, self.pull = values[chosen].clone(), pull[order][chosen]
        self._entries = None

    def freeze(self) -> None:
        """Nothing trains: all entries become buffers."""
        self.set(self.support(), ())

    def _set_values(self, values: Tensor) -> None:
        self.new_values = nn.Parameter(values, requires_grad=self.new_values.requires_grad)

    def pulled(self) -> Tensor:
        """sum_j pull_j (value_j - anchor_j)^2: exactly zero until the values move."""
        return (self.pull * (self.new_values - self.anchor).square()).sum()

    # ---- state
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        found = {name: state_dict[prefix + name] for name in (*_FROZEN, *_NEW) if prefix + name in state_dict}
        if len(found) == len(_FROZEN) + len(_NEW):
            for part in (_FROZEN, _NEW):
                sizes = {name: found[name].numel() for name in part}
                if len(set(sizes.values())) > 1:
                    error_msgs.append(f"sparse bank {prefix!r}: entries disagree in number, {sizes}; damaged state")
                    return
            index = torch.cat([found["frozen_index"], found["new_index"]])
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.in_features * self.out_features:
                error_msgs.append(
                    f"sparse bank {prefix!r}: entries lie outside [{self.out_features}, {self.in_features}]"
                )
                return
            for part in ("frozen", "new"):
                place = found[f"{part}_expert"].long() * (self.in_features * self.out_features)
                if bool(((place + found[f"{part}_index"].long()).diff() <= 0).any()):  # the sparse products rely on it
                    error_msgs.append(f"sparse bank {prefix!r}: entries are not in order; damaged state")
                    return
            for name in (*_FROZEN, *_NEW):
                size = found[name].shape
                if getattr(self, name).shape == size:
                    continue  # a parameter that fits stays the same object, for an optimizer built on it
                if name == "new_values":
                    self._set_values(self.new_values.new_empty(size))
                else:
                    setattr(self, name, getattr(self, name).new_empty(size))
        self._entries = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_entries": None}


class Shares(NamedTuple):
    """What a new task's masks make of the experts so far.

    Attributes:
        experts: tasks T_e of every expert, old and new ones.
        parents: for each new expert the one that it was split off, -1 for the new unique one.
        moved: by site, int64 [n]: the expert of each old entry from now on.
        fresh: by site, int64: positions of the new unique expert, the last one.
        overlap: share of the masks that the old supports held already.
    """

    experts: list[list[int]]
    parents: list[int]
    moved: dict[str, Tensor]
    fresh: dict[str, Tensor]
    overlap: float


def share_out(
    experts: Sequence[list[int]], supports: dict[str, Support], masks: dict[str, Tensor], task: int,
    least: float, smallest: int = 1, split: bool = True,
) -> Shares:  # fmt: skip
    """Split-on-share (SETA-style, INFERRED). Values stay where they are; only who owns them changes.

    An overlap O of the mask M_t with the support M_e, over all maps, of at least `least` min(|M_t|, |M_e|) entries
    becomes an expert of T_e and t: e itself where O is all of it, else, from `smallest` entries on, a new one, and e
    keeps the rest. What no expert holds of M_t is a new unique expert.

    Args:
        experts: T_e. supports: entries so far by site. masks: M_t by site, positions. task: t.
        split: False leaves all experts alone and makes all of M_t unique.
    """
    sizes, overlaps = torch.zeros(2, len(experts), dtype=torch.int64)
    hits: dict[str, Tensor] = {}
    for site, support in supports.items():
        hits[site] = torch.isin(support.index.long(), masks[site])
        sizes += torch.bincount(support.expert.long(), minlength=len(experts)).cpu()
        overlaps += torch.bincount(support.expert[hits[site]].long(), minlength=len(experts)).cpu()
    asked = sum(mask.numel() for mask in masks.values())
    children, parents, tasks = [-1] * len(experts), [], [list(each) for each in experts]
    for expert, (size, overlap) in enumerate(zip(sizes.tolist(), overlaps.tolist(), strict=True)):
        if not split or not overlap or overlap < least * min(asked, size):
            continue
        if overlap == size:
            children[expert] = expert
            tasks[expert].append(task)
        elif overlap >= smallest:
            children[expert] = len(tasks)
            parents.append(expert)
            tasks.append([*experts[expert], task])
    moved, fresh = {}, {}
    for site, support in supports.items():
        owner = support.expert.long()
        child = torch.tensor(children, dtype=torch.int64, device=owner.device)[owner]
        moved[site] = torch.where(hits[site] & (child >= 0), child, owner)
        fresh[site] = masks[site][~torch.isin(masks[site], support.index.long())] if split else masks[site]
    if any(positions.numel() for positions in fresh.values()):
        parents.append(-1)
        tasks.append([task])
    return Shares(tasks, parents, moved, fresh, int(overlaps.sum()) / asked)
