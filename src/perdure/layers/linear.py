"""A routed memory beside a linear map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput
from ..memory import AtomBank, AtomView, KeyIndex, choose_search, index_keys, is_observed, read_atoms, report
from ..memory.dispatch import Path, Search
from ..memory.routing import Routing


class LinearMemory(nn.Module):
    """dy = sum over the k best atoms of w_i (a_i . x) b_i, added to W x + b (MoRAM, eqs 3-8).

    In training all atoms compete and dropout falls on x before the key product. In evaluation the threshold delta
    is on, and atoms whose value is all zero (grown, never trained) take no part, not even in the norm. With an empty
    bank the layer returns zeros. Routing is reported under `site` in the bank's own numbering of atoms.

    Args:
        in_features, out_features: d_in, d_out of the linear map.
        site: name under which routing is reported, e.g. "3.query".
        k: atoms per token. tau: temperature of the softmax over their scores.
        delta: least score of an atom that answers in evaluation; 0 or None for no threshold.
        delta_atoms: number of atoms that delta is meant for: with N more of them it is delta * sqrt(delta_atoms / N)
            (ours), because the scores of N atoms that answer alike are of order 1 / sqrt(N). None: delta, as published.
        renormalise: makes the weights of the open atoms sum to 1 again.
        scale: factor on the values of new atoms while they train; folded into the values by `freeze` and `grow`.
        eps: smallest norm of the responses.
        dropout: probability, in training, of an input feature to be dropped.
        min_k: floor on k (2 in the released MoRAM code).
        reserve: places among the k that new atoms hold in training, so that they cannot starve (ours; at most k).
        path: "auto", "reference", "dense" or "gather"; see `memory.read_atoms`.
        search: "exact", "coarse" or "fused", the same; a small bank is searched exactly in any case.

    Raises:
        BadInput: a setting is out of its range.
    """

    reports_routing = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        site: str = "",
        k: int = 8,
        tau: float = 0.03,
        delta: float | None = 0.2,
        delta_atoms: int | None = None,
        renormalise: bool = False,
        scale: float = 1.0,
        eps: float = 1e-8,
        dropout: float = 0.0,
        min_k: int = 1,
        reserve: int = 0,
        path: Path = "auto",
        search: Search = "exact",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        limits = {"k": k >= 1, "min_k": min_k >= 1, "tau": tau > 0, "eps": eps > 0, "dropout": 0 <= dropout < 1}
        limits |= {"reserve": 0 <= reserve <= k, "delta_atoms": delta_atoms is None or delta_atoms >= 1}
        for name, right in limits.items():
            if not right:
                allowed = {"dropout": "at least 0 and below 1", "k": "at least 1", "min_k": "at least 1"}
                allowed["delta_atoms"] = "at least 1, or None"
                allowed["reserve"] = f"between 0 and k, which is {k}"
                raise BadInput(f"{name}: found {locals()[name]}; must be {allowed.get(name, 'above 0')}")
        self.bank = AtomBank(in_features, out_features, dtype=dtype, device=device)
        self.site, self.path = site, path
        self.search: Search = search
        self.k, self.tau, self.delta, self.renormalise = k, tau, delta, renormalise
        self.delta_atoms = delta_atoms
        self.scale, self.eps, self.dropout, self.min_k, self.reserve = scale, eps, dropout, min_k, reserve
        self._kept: tuple[Any, AtomView] | None = None
        self._indexed: tuple[Any, KeyIndex] | None = None

    def extra_repr(self) -> str:
        return f"site={self.site!r}, k={self.k}, tau={self.tau}, delta={self.delta}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in x's dtype (autocast's inside autocast)."""
        if not self.bank.in_parts:
            return self._answer(x)
        if not torch.is_grad_enabled():
            return self._answer_whole(x)
        # Computed again in the backward pass, so that autograd holds no atom until then.
        return checkpoint(self._answer_whole, x, use_reentrant=False)

    def _answer_whole(self, x: Tensor) -> Tensor:
        with self.bank.whole(changes=False):
            return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        if self.training:
            return self.read(self.bank.view(), F.dropout(x, self.dropout), delta=None, reserve=self.reserve)
        view = self._view()
        return self.read(view, x, delta=self.threshold(view.frozen_keys.shape[0] + view.new_keys.shape[0]))

    def threshold(self, size: int) -> float | None:
        """The delta that holds among `size` atoms."""
        if not self.delta or self.delta_atoms is None or size <= self.delta_atoms:
            return self.delta
        return self.delta * (self.delta_atoms / size) ** 0.5

    def read(self, view: AtomView, x: Tensor, delta: float | None, reserve: int = 0) -> Tensor:
        """The output that the atoms of `view` give for x [..., d_in], with this layer's settings."""
        settings: dict[str, Any] = {"k": self.k, "tau": self.tau, "delta": delta, "renormalise": self.renormalise}
        settings |= {"scale": self.scale, "eps": self.eps, "min_k": self.min_k, "reserve": reserve, "path": self.path}
        settings |= self._search(view)
        output, routing = read_atoms(x, *view[:4], **settings)
        if is_observed():
            if view.index is not None:
                # A view without atoms selects none: [..., 0] indices need no translation.
                indices = view.index[routing.indices] if view.index.numel() else routing.indices
                routing = Routing(indices, routing.weights, routing.scores, self.bank.size)
            report(self.site, routing, self.bank.frozen_size)
        return output

    def _view(self) -> AtomView:
        """The trained atoms. Without gradients they are looked for once per state of the bank: it waits for a GPU."""
        if torch.is_grad_enabled() or self.bank.in_parts:
            return self.bank.without_empty()
        tensors = self.bank.view()[:4]
        if any(t.is_inference() for t in tensors):
            return self.bank.without_empty()
        state = tuple((t, t._version, t.data_ptr()) for t in tensors)
        if self._kept is None or not _same(self._kept[0], state):
            self._kept = state, self.bank.without_empty()
        return self._kept[1]

    def _search(self, view: AtomView) -> dict[str, Any]:
        """How to find atoms among the frozen keys; their index is made once per state of these keys."""
        keys, stays = view.frozen_keys, self.bank.stays(view.frozen_keys)
        search, wanted = choose_search(keys.shape[0], self.bank.in_features, self.k, self.search, keys.device.type)
        wanted = wanted and self.path != "reference" and not keys.requires_grad
        if not wanted or stays is None or stays.is_inference():
            return {} if search == "coarse" else {"search": search}
        state = ((stays, stays._version, stays.data_ptr()),)
        if self._indexed is None or not _same(self._indexed[0], state):
            with torch.inference_mode(False):  # training reads it too
                self._indexed = state, index_keys(keys, self.bank.compute_dtype(), coarse=search == "coarse")
        return {"index": self._indexed[1], "search": search}

    def split(self, rank: int, processes: int) -> None:
        """See `AtomBank.split`."""
        self._kept = self._indexed = None  # they hold whole banks
        self.bank.split(rank, processes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_indexed": None}

    # ---- growth
    def grow(self, r: int, owner: int, generator: torch.Generator | None = None) -> None:
        """Freezes what is new and adds r atoms of write `owner`: keys U(-1/sqrt(d_in), 1/sqrt(d_in)), values zero.

        Raises:
            ValueError: r < 1 or owner < 0.
        """
        self.bank.grow(r, owner, generator, self.scale)

    def freeze(self) -> Tensor | None:
        """Makes the new atoms old, their values times `scale`, and drops those that were never trained.

        Nothing is trainable then. Returns bool [N], True for the atoms that stayed; None if all did.
        """
        return self.bank.freeze(self.scale)


def _same(old: Any, new: Any) -> bool:
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, new, strict=True))
