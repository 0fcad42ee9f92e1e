"""What the routed items do to the host: one function per effect, each with a dispatcher over its paths."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import PatchPath, Path, Search, choose_patch_path, choose_path
from .kernels.atoms import Choice, Respond, dense_values, gather_values, joined
from .kernels.search import KeyIndex, fused_on, grouped
from .kernels.sparse import Entries, SparseDelta
from .routing import Routing, cosine, effective_k, open_items, routing_dtype, select, weight


def sparse_delta(
    x: Tensor,
    gates: Tensor,
    frozen_values: Tensor,
    new_values: Tensor,
    frozen: Entries,
    new: Entries,
    out_features: int,
    path: Literal["auto", "reference", "sparse"] = "auto",
) -> Tensor:
    """Gated sparse weight deltas (SETA-style, INFERRED): dy_t = sum_e g_te (M_e * Delta_e) x_t.

    Sums run in float32 (float64 if x is float64), also under autocast.

    Args:
        x: [N, d_in]. gates: [N, E]. frozen_values [n], new_values [m] with their entries.
        path: "sparse" makes one sparse product per expert; "reference" writes out one weight per token and is
            differentiable twice; "auto" is "sparse".
    Returns:
        dy [N, d_out] in x's dtype (autocast's inside autocast).
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    dtype = routing_dtype(x, gates)
    with torch.autocast(device_type=device, enabled=False):
        tensors = [tensor.to(dtype) for tensor in (x, gates, frozen_values, new_values)]
        if path == "reference":
            deltas = [_dense(v, at, gates.shape[1], out_features, x.shape[1])
                      for v, at in zip(tensors[2:], (frozen, new), strict=True)]  # fmt: skip
            total = deltas[0] + deltas[1]
            dy = reference.modulated_weight(tensors[0], tensors[1], torch.ones_like(total), total)
        else:
            dy = SparseDelta.apply(*tensors, frozen, new, out_features)
    return dy.to(out_dtype)


def _dense(values: Tensor, at: Entries, experts: int, rows: int, columns: int) -> Tensor:
    """[E, d_out, d_in] of one part of a bank."""
    expert = torch.cat([at.rows.new_full((stop - start,), e) for e, start, stop in at.segments] or [at.rows])
    return values.new_zeros(experts, rows, columns).index_put((expert, at.rows, at.columns), values)


def gated_low_rank(x: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
    """Effect of gated rank-1 components (CoDyRA): dy = Σ_i g_i (a_i . x) b_i.

    Args:
        x: [..., d_in]. keys: a_i [r, d_in]. values: b_i [r, d_out]. gates: g [r].
    Returns:
        [..., d_out], in the wider of the dtypes of x and the components (autocast's inside autocast).
    """
    dtype = torch.promote_types(x.dtype, keys.dtype)
    responses = F.linear(x.to(dtype), keys.to(dtype)) * gates.to(dtype)
    return F.linear(responses, values.t().to(dtype))


def low_rank_update(keys: Tensor, values: Tensor) -> Tensor:
    """ΔW = Σ_i b_i a_iᵀ as float64 [d_out, d_in] on the CPU: what merging adds to a weight, the same on every device.

    Args:
        keys: a_i [n, d_in]. values: b_i [n, d_out], gates folded in.
    """
    return values.detach().cpu().double().t() @ keys.detach().cpu().double()


def read_atoms(
    x: Tensor,
    frozen_keys: Tensor,
    frozen_values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    k: int,
    tau: float,
    delta: float | None = None,
    renormalise: bool = False,
    scale: float = 1.0,
    eps: float = 1e-8,
    min_k: int = 1,
    reserve: int = 0,
    path: Path = "auto",
    index: KeyIndex | None = None,
    search: Search = "exact",
) -> tuple[Tensor, Routing]:
    """Rank-1 effect of an atom bank (MoRAM, eqs 3-8).

        p = [A_old; A_new] x      s = p / max(||p||_2, eps)      w = softmax(s_top / tau) over the k largest signed s
        w_i <- w_i 1[s_i >= delta]  (no renormalisation)         dy = sum_i w_i p_i b_i

    Routing and sums run in float32 (float64 if x or a key is float64), also under autocast.

    Args:
        x: [..., d_in], any leading shape and strides.
        frozen_keys: [n, d_in]. frozen_values: [n, d_out]. No gradient is needed; if one is asked for, the
            reference path is taken.
        new_keys: [r, d_in]. new_values: [r, d_out]. n + r = N, frozen first; both may be 0.
        k: atoms per token, at most N are taken. tau: temperature.
        delta: threshold on s, to be given at inference only; None or 0 for none.
        renormalise: lets the open atoms' weights sum to 1.
        scale: factor on the new values, folded into them when they are frozen.
        eps: smallest norm of the responses, above 0.
        min_k: floor on k; 2 in the released code.
        reserve: places among the k that the best new atoms hold whatever their rank (ours; 0 as published).
        path: "reference", "dense", "gather", or "auto" to let the size decide. All give the same values and
            gradients up to rounding; only the reference is differentiable twice.
        index: `index_keys(frozen_keys, ...)`, made once for keys that stay: the joint norm's gradient then costs the
            same whatever n. Left aside where its dtype is not that of the routing.
        search: "exact" scores all keys. "coarse" scores all new ones, and of the frozen ones only the 2 k that 8-bit
            codes find (`index` needs codes); norm, scores and gradients of what is chosen stay exact. A frozen atom
            among the true k best can be missed; recall is measured in benchmarks.atoms. "fused" is exact in one Triton
            kernel, without writing all responses: float32 on a GPU (or in Triton's interpreter), else it is "exact".
    Returns:
        dy [..., d_out] in x's dtype (autocast's inside autocast), and the Routing [..., k].
    Raises:
        ValueError: shapes do not fit together, or a setting is out of its range.
    """
    _check(x, frozen_keys, frozen_values, new_keys, new_values, k, tau, eps, min_k, path)
    if search == "coarse" and (index is None or index.codes is None):
        raise ValueError("search: 'coarse' needs an index with codes; make it with index_keys(..., coarse=True)")
    size = frozen_keys.shape[0] + new_keys.shape[0]
    leading, width = x.shape[:-1], frozen_values.shape[-1]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    dtype = routing_dtype(x, frozen_keys, new_keys)
    if size == 0 or x.numel() == 0:
        return _nothing(x, width, out_dtype, dtype, effective_k(k, size, min_k), size)
    needs_frozen = frozen_keys.shape[0] > 0 and (frozen_keys.requires_grad or frozen_values.requires_grad)
    needs_frozen = needs_frozen and torch.is_grad_enabled()
    if path == "auto":
        path = "reference" if needs_frozen else choose_path(size, effective_k(k, size, min_k), device)
    elif needs_frozen and path != "reference":
        raise ValueError(f"path: found {path!r}, but frozen items ask for a gradient; use 'auto' or 'reference'")
    if search == "fused" and (reserve or dtype != torch.float32 or not fused_on(x.device)):
        search = "exact"
    with torch.autocast(device_type=device, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        old_k, new_k = frozen_keys.to(dtype), new_keys.to(dtype)
        old_v, new_v = frozen_values.to(dtype), new_values.to(dtype)
        if path == "reference":
            values = joined(old_v, new_v if scale == 1.0 else new_v * scale)
            dy, routing = reference.rank_one(
                flat, joined(old_k, new_k), values,
                k=k, tau=tau, delta=delta, renormalise=renormalise, eps=eps, min_k=min_k,
                reserve=reserve, start=old_k.shape[0],
            )  # fmt: skip
        else:
            at_hand = index if index is not None and index.gram.dtype == dtype else None
            p, s, indices = Respond.apply(flat, old_k, new_k, at_hand, Choice(k, eps, min_k, reserve, search))
            w = open_items(weight(s, tau), s, delta, renormalise)
            apply = gather_values if path == "gather" else dense_values
            dy = apply(w * p, indices, old_v, new_v, scale)
            routing = Routing(indices, w, s, size)
    return dy.to(out_dtype).reshape(*leading, width), routing.reshape(*leading)


def _nothing(
    x: Tensor, width: int, out_dtype: torch.dtype, dtype: torch.dtype, k: int, size: int
) -> tuple[Tensor, Routing]:
    leading = x.shape[:-1]
    weights = x.new_zeros((*leading, k), dtype=dtype)
    indices = torch.zeros((*leading, k), dtype=torch.int64, device=x.device)
    return x.new_zeros((*leading, width), dtype=out_dtype), Routing(indices, weights, weights.clone(), size)


def _check(
    x: Tensor, old_k: Tensor, old_v: Tensor, new_k: Tensor, new_v: Tensor,
    k: int, tau: float, eps: float, min_k: int, path: str,
) -> None:  # fmt: skip
    if not (old_k.ndim == old_v.ndim == new_k.ndim == new_v.ndim == 2) or x.ndim < 1:
        raise ValueError("keys and values: expected matrices [items, features]; x: expected [..., features]")
    if not x.shape[-1] == old_k.shape[1] == new_k.shape[1]:
        raise ValueError(
            f"x: found {x.shape[-1]} features; frozen keys have {old_k.shape[1]}, new keys {new_k.shape[1]}"
        )
    if old_v.shape[1] != new_v.shape[1]:
        raise ValueError(f"new_values: found {new_v.shape[1]} features; frozen values have {old_v.shape[1]}")
    if old_k.shape[0] != old_v.shape[0] or new_k.shape[0] != new_v.shape[0]:
        raise ValueError(
            f"keys and values: found {old_k.shape[0]} frozen keys for {old_v.shape[0]} values, "
            f"{new_k.shape[0]} new keys for {new_v.shape[0]}; each key needs one value"
        )
    if k < 1 or min_k < 1 or not tau > 0 or not eps > 0:
        raise ValueError(f"found k={k}, min_k={min_k}, tau={tau}, eps={eps}; k, min_k >= 1 and tau, eps > 0 are needed")
    if path not in ("auto", "reference", "dense", "gather"):
        raise ValueError(f"path: found {path!r}; known: auto, reference, dense, gather")


# ---- low-rank patches
def read_patches(
    x: Tensor, prototypes: Tensor, code: Tensor, gate_scale: Tensor, gate_bias: Tensor, decoders: Tensor,
    *, k: int, tau: float, gamma: float = 1.0, path: PatchPath = "auto",
) -> tuple[Tensor, Routing]:  # fmt: skip
    """Low-rank effect of routed patches (APN, as in the author's released layer).

        s_i = cos(x, p_i) / tau     S = top-k     w = softmax over S     u = V^T x
        y = gamma sum_{i in S} w_i U_i (u * sigmoid(a_i * u + b_i))

    Runs in float32 (float64 if x or a tensor is float64), also under autocast. The gradient of a patch that no token
    selected is exactly zero on every path.

    Args:
        x: [..., C], any leading shape and strides.
        prototypes: p [K, C]. code: V^T [r, C]. gate_scale, gate_bias: a, b [K, r]. decoders: U [K, D, r].
        k: patches per token, at most K are taken. tau: temperature. gamma: factor on the output.
        path: "reference", "dense" (one product over all patches), "grouped" (tokens sorted by patch, one product for
            each patch in use; waits for an accelerator once), "fused" (the same in Triton kernels, without waiting:
            float32 on a GPU, or in Triton's interpreter, else it is "grouped"), or "auto" to let the size decide.
    Returns:
        y [..., D] in x's dtype (autocast's inside autocast), and the Routing [..., k], its scores the cosines.
    Raises:
        ValueError: shapes do not fit together, or a setting is out of its range.
    """
    _check_patches(x, prototypes, code, gate_scale, gate_bias, decoders, k, tau, path)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
    dtype = routing_dtype(x, prototypes, decoders)
    leading, size = x.shape[:-1], prototypes.shape[0]
    if path == "auto":
        path = choose_patch_path(size, effective_k(k, size), device)
    if path == "fused" and (dtype != torch.float32 or not fused_on(x.device)):
        path = "grouped"
    with torch.autocast(device_type=device, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        p, v, a, b, u = (t.to(dtype) for t in (prototypes, code, gate_scale, gate_bias, decoders))
        if path == "reference":
            y, routing = reference.patches(flat, p, v, a, b, u, k=k, tau=tau, gamma=gamma)
        else:
            s = cosine(flat, p)
            top = select(s, k)
            s_top = s.gather(-1, top)
            w = weight(s_top, tau)
            apply = _dense_patches if path == "dense" else partial(_grouped_patches, in_kernels=path == "fused")
            y = apply(flat @ v.transpose(0, 1), w * gamma, top, a, b, u)
            routing = Routing(top, w, s_top, size)
    return y.to(out_dtype).reshape(*leading, decoders.shape[1]), routing.reshape(*leading)


def _dense_patches(u: Tensor, w: Tensor, top: Tensor, a: Tensor, b: Tensor, decoders: Tensor) -> Tensor:
    size, width, rank = decoders.shape
    full = w.new_zeros(w.shape[0], size).scatter(-1, top, w)
    each = u.unsqueeze(1)  # [n, 1, r]
    phi = each * torch.sigmoid(a * each + b) * full.unsqueeze(-1)
    return phi.flatten(1) @ decoders.transpose(1, 2).reshape(size * rank, width)


def _grouped_patches(
    u: Tensor, w: Tensor, top: Tensor, a: Tensor, b: Tensor, decoders: Tensor, in_kernels: bool
) -> Tensor:
    (tokens, k), (size, width, _) = top.shape, decoders.shape
    if not tokens:
        return u[:, :1].expand(0, width)
    each = u.unsqueeze(1)
    phi = each * torch.sigmoid(a[top] * each + b[top]) * w.unsqueeze(-1)  # [n, k, r]
    slots = top.reshape(-1)
    order = torch.argsort(slots, stable=True)
    sorted_phi = phi.flatten(0, 1).index_select(0, order)
    if in_kernels:
        # Counted by search, which needs no atomics: the same result in every run.
        ends = torch.searchsorted(slots[order], torch.arange(size, device=slots.device), right=True)
        written = grouped().GroupedProduct.apply(sorted_phi, decoders.transpose(1, 2), ends)
    else:
        parts = sorted_phi.split(torch.bincount(slots, minlength=size).tolist())
        # unbind, not indexing: its backward writes each patch's gradient once; an index would write all K each time.
        each_of = zip(parts, decoders.unbind(0), strict=True)
        written = torch.cat([part @ each.t() for part, each in each_of if part.shape[0]])
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return written.index_select(0, back).reshape(tokens, k, width).sum(1)


def _check_patches(
    x: Tensor, p: Tensor, v: Tensor, a: Tensor, b: Tensor, u: Tensor, k: int, tau: float, path: str
) -> None:
    if x.ndim < 1 or not (p.ndim == v.ndim == a.ndim == b.ndim == 2) or u.ndim != 3:
        raise ValueError("patches: expected matrices prototypes, code and gates, and decoders [patches, width, rank]")
    if not x.shape[-1] == p.shape[1] == v.shape[1]:
        raise ValueError(f"x: found {x.shape[-1]} features; prototypes have {p.shape[1]}, the code {v.shape[1]}")
    sizes, ranks = {p.shape[0], a.shape[0], b.shape[0], u.shape[0]}, {v.shape[0], a.shape[1], b.shape[1], u.shape[2]}
    if len(sizes) > 1 or len(ranks) > 1 or not p.shape[0]:
        raise ValueError(f"patches: found sizes {sorted(sizes)} and ranks {sorted(ranks)}; one of each is needed")
    if k < 1 or not tau > 0:
        raise ValueError(f"found k={k}, tau={tau}; k >= 1 and tau > 0 are needed")
    if path not in get_args(PatchPath):
        raise ValueError(f"path: found {path!r}; known: {', '.join(get_args(PatchPath))}")
