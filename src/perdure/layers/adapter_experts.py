"""Bottleneck adapters beside a feed-forward, a few of which a router chooses for each sequence (MoE-Adapters)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import wide
from ..errors import BadInput
from ..memory.observe import is_observed, report
from ..memory.routing import Routing

if TYPE_CHECKING:
    from ..hosts import Rest

SHARED = "shared"
"""Name of the router where all tasks have one."""


class Call(threading.local):
    """What the layers of a host need of the forward pass under way in this thread; no part of any state.

    Attributes:
        first: [B], index of each sequence's first real token in this block's call; None for 0.
        past: tokens that the KV cache of this block held before. notes: where a decision lives as long as the cache.
        tasks: name of the router of each row, where it was given from outside.
    """

    first: Tensor | None = None
    past: int = 0
    notes: dict[str, Any] | None = None
    tasks: Sequence[str] | None = None

    @contextmanager
    def given(self, tasks: Sequence[str]) -> Iterator[None]:
        """Inside, rows belong to these tasks."""
        self.tasks = tasks
        try:
            yield
        finally:
            self.tasks = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        memo[id(self)] = new = Call()
        return new

    def __reduce__(self) -> Any:
        return Call, ()


class Watch(nn.Module):
    """Function around a block that changes nothing: it notes where each sequence begins, and the cache."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor:
        self.call.first = None if mask is None else mask.int().argmax(1)
        self.call.past, self.call.notes = rest.past, rest.notes
        return hidden


class Router(nn.Module):
    """Noisy top-k gate (Shazeer et al. 2017): logits = c W_g + N(0, 1) (softplus(c W_n) + .01), the noise in training.

    Attributes:
        gate, noise: W_gᵀ, W_nᵀ [E, D], zero at first.
    """

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(experts, width))
        self.noise = nn.Parameter(torch.zeros(experts, width))

    def forward(self, c: Tensor, noisy: bool) -> Tensor:
        """[B, D] -> [B, E]."""
        with torch.autocast(c.device.type, enabled=False):
            c = wide(c)
            logits = c @ self.gate.to(c.dtype).T
            if not noisy:
                return logits
            return logits + torch.randn_like(logits) * (F.softplus(c @ self.noise.to(c.dtype).T) + 1e-2)


class Adapter(nn.Module):
    """Ad(z) = scale · up(dropout(act(down z))); up is zero at first, down U(−1/√d, 1/√d), biases zero."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, scale: float, dropout: float, relu: bool,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.down, self.up = nn.Linear(in_features, rank), nn.Linear(rank, out_features)
        self.scale, self.dropout, self.relu = scale, dropout, relu
        bound = 1 / math.sqrt(in_features)
        with torch.no_grad():
            self.down.weight.uniform_(-bound, bound, generator=generator)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, z: Tensor) -> Tensor:
        hidden = _linear(self.down, z)
        hidden = hidden.relu() if self.relu else hidden
        return self.scale * _linear(self.up, F.dropout(hidden, self.dropout, self.training))


def _linear(layer: nn.Linear, z: Tensor) -> Tensor:
    """In the precision of z, whatever that of the parameters."""
    return F.linear(z, layer.weight.to(z.dtype), layer.bias.to(z.dtype))


class AdapterExperts(nn.Module):
    """y = Σ_e g_e Ad_e(z), g one decision for the whole sequence, made from its first real token.

    With a KV cache the decision of the first call, the prompt, is kept for all later ones.

    Args:
        in_features, out_features: of the feed-forward. call: shared by all layers of a host. site: name in reports.

    Attributes:
        experts: E adapters. routers: name -> Router.
        current: name of the router where no task is given.
        tally: [E] int64, sequences that chose each expert in training since it was set to zero; no state.
    """

    reports_routing = True

    def __init__(
        self, in_features: int, out_features: int, *, experts: int, rank: int, top_k: int, scale: float, dropout: float,
        relu: bool, noisy: bool, call: Call, site: str, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.top_k, self.noisy = in_features, top_k, noisy
        self.out_features, self.call, self.site = out_features, call, site
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "relu": relu, "generator": generator}
        self.experts = nn.ModuleList(Adapter(in_features, out_features, rank, **options) for _ in range(experts))
        self.routers = nn.ModuleDict()
        self.current = SHARED
        self.tally = torch.zeros(experts, dtype=torch.int64)

    def add_router(self, name: str) -> None:
        """A router for one more task, as the first one began; nothing happens where it is there."""
        if name not in self.routers:
            self.routers[name] = Router(self.in_features, len(self.experts)).to(self.experts[0].down.weight.device)  # type: ignore[union-attr]

    def forward(self, z: Tensor) -> Tensor:
        """[B, T, d_in] -> [B, T, d_out]."""
        if z.ndim != 3:
            raise BadInput(f"site {self.site!r}: has tokens {list(z.shape[:-1])}, expected sequences [B, T]")
        gates = self._gates(z)
        y = z.new_zeros(*z.shape[:2], self.out_features)
        for number, expert in enumerate(self.experts):
            rows = (gates[:, number] > 0).nonzero()[:, 0]
            if len(rows):
                added = gates[rows, number, None, None] * expert(z[rows])
                y = y.index_add(0, rows, added.to(y.dtype))
        return y

    def _gates(self, z: Tensor) -> Tensor:
        """g [B, E], zero but for the k that answer; all zero for a task that was never learnt."""
        call = self.call
        if call.past and call.notes is not None:
            kept = call.notes.get(self.site)
            if kept is None:
                raise BadInput(f"past_key_values: {self.site!r} did not see the prompt; start from an empty cache")
            return kept
        first = call.first
        if first is not None and len(first) != len(z):
            raise BadInput(f"site {self.site!r}: ran outside its block; call the whole model, not a part of it")
        c = z[:, 0] if first is None else z[torch.arange(len(z), device=z.device), first]
        gates = self._routed(c)
        if call.notes is not None:
            call.notes[self.site] = gates.detach()
        if self.training and torch.is_grad_enabled():
            self.tally = self.tally.to(gates.device) + (gates > 0).sum(0)
        return gates

    def _routed(self, c: Tensor) -> Tensor:
        noisy, tasks = self.noisy and self.training, self.call.tasks
        if tasks is None:
            return self._chosen(self.routers[self.current](c, noisy))
        gates = wide(c).new_zeros(len(c), len(self.experts))
        for name in dict.fromkeys(tasks):
            if name in self.routers:
                rows = torch.tensor([n for n, task in enumerate(tasks) if task == name], device=c.device)
                gates = gates.index_copy(0, rows, self._chosen(self.routers[name](c[rows], noisy)))
        return gates

    def _chosen(self, logits: Tensor) -> Tensor:
        best, indices = logits.topk(self.top_k, dim=1)
        weights = best.softmax(1)
        if is_observed():
            report(self.site, Routing(indices, weights, best, len(self.experts)), 0)
        return torch.zeros_like(logits).scatter(1, indices, weights)
