"""What the routed items do to the host: one function per effect, each with a dispatcher over its paths."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .kernels.atoms import Respond, dense_values, gather_values, joined
from .routing import Routing, effective_k, open_items, routing_dtype, weight

Path = Literal["auto", "reference", "dense", "gather"]

# Gathering touches k values per token at the speed of memory, a dense product all N at the speed of the processor.
# Whole layer on CPU, one thread, k = 2, 8, 16, d = 384, 768: equal within noise up to N = 3 k, gathering level or ahead
# beyond. Not measured on GPU.
GATHER_FROM = 4  # times k


def choose_path(size: int, k: int, device: torch.device | str = "cpu") -> Literal["dense", "gather"]:
    """The faster way to apply the values of N = size atoms, k of them selected."""
    return "gather" if size >= GATHER_FROM * k else "dense"


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
    Returns:
        dy [..., d_out] in x's dtype (autocast's inside autocast), and the Routing [..., k].
    Raises:
        ValueError: shapes do not fit together, or a setting is out of its range.
    """
    _check(x, frozen_keys, frozen_values, new_keys, new_values, k, tau, eps, min_k, path)
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
        path = "reference" if needs_frozen else choose_path(size, effective_k(k, size, min_k), x.device)
    elif needs_frozen and path != "reference":
        raise ValueError(f"path: found {path!r}, but frozen items ask for a gradient; use 'auto' or 'reference'")
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
            p, s, indices = Respond.apply(flat, old_k, new_k, k, eps, min_k, reserve)
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
