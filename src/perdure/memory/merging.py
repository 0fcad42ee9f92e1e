"""Fewer atoms in place of many: near-duplicates joined into one, with the loss stated, and shares of a limited bank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .routing import routing_dtype


class MergeReport(NamedTuple):
    """What a merge cost.

    Attributes:
        removed: items fewer than before.
        residual: sum over the merged groups of ||sum_i pi_i a_i b_i^T - a b^T||_F. For an input x, each group changes
            the layer's output by at most its part times ||x|| times the group's weight, as long as the weight of the
            group stays what its members had together and is spread like pi. Not bounded by it: the change of
            routing, since the merged atom enters the joint norm and the softmax once.
        measured: ||y_after - y_before|| / ||y_before|| under the real routing on the inputs given, or None.
    """

    removed: int
    residual: float
    measured: float | None


def _groups(keys: Tensor, owners: Tensor | None, cosine: float) -> list[list[int]]:
    # Greedy in item order: an item joins the first group whose founder is near enough. Deterministic.
    unit = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_min(torch.finfo(keys.dtype).tiny)
    near = unit @ unit.t() >= cosine
    if owners is not None:
        near &= owners.unsqueeze(0) == owners.unsqueeze(1)
    near_cpu = near.cpu()
    free = torch.ones(len(keys), dtype=torch.bool)
    groups: list[list[int]] = []
    for founder in range(len(keys)):
        if not free[founder]:
            continue
        members = near_cpu[founder] & free
        members[founder] = True
        free &= ~members
        groups.append(members.nonzero().flatten().tolist())
    return groups


def merge_duplicates(
    keys: Tensor, values: Tensor, usage: Tensor, owners: Tensor | None, cosine: float
) -> tuple[Tensor, Tensor, list[list[int]], float]:
    """Merges items whose keys have at least this cosine with the first item of their group.

    With shares pi_i (usage of the members, plus one count each, normalised): a = sum_i pi_i a_i, and b is the
    least-squares value for it, b = sum_i pi_i (a_i . a) b_i / ||a||^2, which minimises
    ||sum_i pi_i a_i b_i^T - a b^T||_F. Duplicates share one softmax weight, so their mean, not their sum, stands in.

    Args:
        keys: [n, d_in]. values: [n, d_out]. usage: [n]. owners: [n] ids that keep items apart, or None.
        cosine: in (0, 1].
    Returns:
        keys [m, d_in], values [m, d_out], the groups of old item numbers in order of their first member, and the
        residual of `MergeReport`.
    Raises:
        ValueError: cosine is out of (0, 1].
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"cosine: found {cosine}; expected a value above 0 and at most 1")
    if keys.shape[0] == 0:
        return keys, values, [], 0.0
    dtype = routing_dtype(keys)
    groups = _groups(keys.to(dtype), owners, cosine)
    first = torch.tensor([group[0] for group in groups], device=keys.device)
    merged_keys, merged_values = keys[first], values[first]
    residual = 0.0
    for row, group in enumerate(groups):
        if len(group) == 1:
            continue
        a, b = keys[group].double(), values[group].double()
        share = usage[group].double() + 1.0
        share = share / share.sum()
        key = share @ a
        value = ((share * (a @ key)) @ b) / key.square().sum()
        # ||A^T C B||_F = ||R_A C R_B^T||_F with the merged atom as one more term of coefficient -1; a product of Gram
        # matrices would lose half the digits.
        r_a = torch.linalg.qr(torch.cat([a, key[None]]).t(), mode="r").R
        r_b = torch.linalg.qr(torch.cat([b, value[None]]).t(), mode="r").R
        residual += float(torch.linalg.matrix_norm((r_a * torch.cat([share, share.new_tensor([-1.0])])) @ r_b.t()))
        merged_keys[row], merged_values[row] = key.to(keys.dtype), value.to(values.dtype)
    return merged_keys, merged_values, groups, residual


def fair_shares(worth: Tensor, owners: Tensor, size: int) -> Tensor:
    """Which items a bank of `size` places keeps: the best of every owner, then the second best of every one, ...

    The places of the last round go to the largest worth, among equals to the lowest index.

    Args:
        worth: [n], not-a-number the least. owners: int64 [n], on the same device.
    Returns:
        bool [n] with min(size, n) True.
    """
    falling = torch.sort(worth.nan_to_num(nan=-torch.inf), descending=True, stable=True).indices
    by_owner = falling[torch.sort(owners[falling], stable=True).indices]
    _, counts = torch.unique_consecutive(owners[by_owner], return_counts=True)
    rounds = torch.empty_like(owners)
    rounds[by_owner] = torch.cat([torch.arange(int(count), device=owners.device) for count in counts] or [rounds])
    order = falling[torch.sort(rounds[falling], stable=True).indices]
    kept = torch.zeros_like(owners, dtype=torch.bool)
    kept[order[:size]] = True
    return kept
