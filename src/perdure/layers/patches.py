"""Routed low-rank patches, in place of a feed-forward or beside it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from ..memory import is_observed, read_patches, report
from ..memory.dispatch import PatchPath

INIT_STD = 0.02


class PatchLayer(nn.Module):
    """y = Dropout(γ Σ_{i in top-k} w_i U_i (u ⊙ σ(a_i ⊙ u + b_i))) with u = Vᵀ z.

    The layer of Attractor Patch Networks as the author released it; w is the softmax of the k best cos(z, p_i) / τ.
    Routing is reported under `site`; the forward pass writes nothing.

    Args:
        width: C, features of z. out_width: features of y, C where absent.
        patches: K. k: patches per token. rank: r. tau: temperature. gamma: factor on the output.
        dropout: on the output, in training.
        depth: blocks of the host, for the size of new decoders; None for zero decoders, which say nothing at first.
        site: name under which routing is reported, e.g. "3.ffn".
        path: see `memory.read_patches`.

    Attributes:
        prototypes: p [K, C]. code: Vᵀ [r, C]. gate_scale, gate_bias: a, b [K, r]. decoders: U [K, out_width, r].

    Raises:
        BadInput: a setting is out of its range.
    """

    reports_routing = True

    def __init__(
        self,
        width: int,
        out_width: int | None = None,
        *,
        patches: int = 256,
        k: int = 4,
        rank: int = 32,
        tau: float = 0.07,
        gamma: float = 1.0,
        dropout: float = 0.0,
        depth: int | None = None,
        site: str = "",
        path: PatchPath = "auto",
    ):
        super().__init__()
        for name, value in {"patches": patches, "k": k, "rank": rank, "tau": tau}.items():
            if not value > 0:
                raise BadInput(f"{name}: found {value}; must be above 0")
        if k > patches:
            raise BadInput(f"k: found {k}, more than the {patches} patches; lower it or raise patches")
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout: found {dropout}; must be at least 0 and below 1")
        self.k, self.tau, self.gamma, self.dropout, self.site = k, tau, gamma, dropout, site
        self.path: PatchPath = path
        self.prototypes = nn.Parameter(torch.empty(patches, width).normal_(std=INIT_STD))
        self.code = nn.Parameter(torch.empty(rank, width).normal_(std=INIT_STD))
        self.gate_scale = nn.Parameter(torch.empty(patches, rank).normal_(std=INIT_STD))
        self.gate_bias = nn.Parameter(torch.zeros(patches, rank))
        self.decoders = nn.Parameter(torch.zeros(patches, out_width or width, rank))
        if depth is not None:
            with torch.no_grad():
                self.decoders.normal_(std=INIT_STD / math.sqrt(2 * depth))

    def extra_repr(self) -> str:
        size, width, rank = self.decoders.shape
        return f"site={self.site!r}, patches={size}, width={width}, rank={rank}, k={self.k}, tau={self.tau}"

    def forward(self, z: Tensor) -> Tensor:
        """[..., C] -> [..., out_width], in z's dtype (autocast's inside autocast)."""
        tensors = self.prototypes, self.code, self.gate_scale, self.gate_bias, self.decoders
        output, routing = read_patches(z, *tensors, k=self.k, tau=self.tau, gamma=self.gamma, path=self.path)
        if is_observed():
            report(self.site, routing, 0)
        return F.dropout(output, self.dropout, self.training)
