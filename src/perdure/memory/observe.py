"""Reports of routing without side effects in the forward pass.

Layers call `report`; outside an `observing` context that does nothing. A context is closed before `backward`, so that a
forward pass recomputed by gradient checkpointing is not counted twice. Counts are committed by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import Routing


class Observation(NamedTuple):
    """What one layer reports of one forward pass.

    Attributes:
        site: name of the layer, e.g. "3.query".
        routing: detached; indices count the bank's items, old (frozen) ones first.
        frozen: number of old items among routing.size.
    """

    site: str
    routing: Routing
    frozen: int


class Written(NamedTuple):
    """How much an adapter adds to one module in one forward pass.

    Attributes:
        site: name of the layer.
        ratio: ‖adapter output‖ / ‖module's own output‖ per token [...], detached.
    """

    site: str
    ratio: Tensor


Observer = Callable[["Observation | Written"], None]
_observer: ContextVar[Observer | None] = ContextVar("perdure_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Sends every report inside the block to `observer`. The innermost of nested contexts gets the reports."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def is_observed() -> bool:
    """True inside an `observing` block: lets a layer skip work that only a report needs."""
    return _observer.get() is not None


def report(site: str, routing: Routing, frozen: int) -> None:
    """Hands a routing to the observer in charge, detached from the graph; nothing happens if there is none."""
    observer = _observer.get()
    if observer is not None:
        observer(Observation(site, routing.detach(), frozen))


def report_written(site: str, added: Tensor, base: Tensor) -> None:
    """Hands the size of what an adapter adds [..., D], relative to the base output [..., D], to the observer."""
    observer = _observer.get()
    if observer is not None:
        size = torch.linalg.vector_norm(added.detach().float(), dim=-1)
        observer(Written(site, size / torch.linalg.vector_norm(base.detach().float(), dim=-1).clamp_min(1e-12)))


_SUMS = ("tokens", "slots", "new_slots", "new_weight", "mass", "off", "on", "effective", "top", "open")


@dataclass
class _Site:
    sums: Tensor  # float64 [len(_SUMS)]
    usage: Tensor  # float64 [N]
    frozen: int = 0
    calls: int = 0
    unmasked: int = 0
    untaken: Tensor | None = None  # float64 [N], what of `usage` nobody took


def _longer(counts: Tensor, size: int) -> Tensor:
    """Counts of a bank that has grown to `size` items since."""
    return counts if counts.numel() == size else torch.cat([counts, counts.new_zeros(size - counts.numel())])


@dataclass
class RouterLog:
    """Adds up observations into statistics per site, on their device and without waiting for it.

    Item numbers must mean the same throughout: `keep()` when items are dropped, `reset()` after a merge.

    Attributes:
        mask: [B, T] bool, True where a token counts; None counts all. It applies to routings with leading shape
            [B, T] or [B * T]; other shapes (a pooled token, another tower) are counted whole and show up as
            `unmasked_calls`.
    """

    mask: Tensor | None = None
    _sites: dict[str, _Site] = field(default_factory=dict, repr=False)
    _written: dict[str, Tensor] = field(default_factory=dict, repr=False)  # float64 [2]: sum of ratios, tokens

    def __call__(self, observation: Observation | Written) -> None:
        self.add(observation)

    def reset(self) -> None:
        self._sites.clear()
        self._written.clear()

    def _fits(self, leading: torch.Size) -> bool:
        mask = self.mask
        return mask is None or leading == mask.shape or (len(leading) == 1 and leading[0] == mask.numel())

    def _token_weights(self, leading: torch.Size, device: torch.device) -> Tensor:
        ones = torch.ones(leading, dtype=torch.float64, device=device).reshape(-1)
        if self.mask is None or not self._fits(leading):
            return ones
        return ones * self.mask.to(device).reshape(-1).to(torch.float64)

    def _add_written(self, written: Written) -> None:
        tokens = self._token_weights(written.ratio.shape, written.ratio.device)
        sums = torch.stack([(written.ratio.reshape(-1).double() * tokens).sum(), tokens.sum()])
        before = self._written.get(written.site)
        self._written[written.site] = sums if before is None else before + sums

    @torch.no_grad()
    def add(self, observation: Observation | Written) -> None:
        """Counts one observation.

        Raises:
            ValueError: the site's bank has fewer items than before, so that item numbers no longer agree.
        """
        if isinstance(observation, Written):
            self._add_written(observation)
            return
        site, routing, frozen = observation
        device = routing.indices.device
        state = self._sites.get(site)
        if state is None:
            zeros = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
            usage = torch.zeros(routing.size, dtype=torch.float64, device=device)
            state = self._sites[site] = _Site(zeros, usage)
        if routing.size < state.usage.numel():
            raise ValueError(
                f"router log of {site!r}: found {routing.size} items after {state.usage.numel()}; "
                "call reset() after items were dropped or merged, and keep one log per view of a bank"
            )
        state.usage = _longer(state.usage, routing.size)
        state.calls += 1
        state.frozen = frozen
        leading = routing.indices.shape[:-1]
        state.unmasked += not self._fits(leading)
        tokens = self._token_weights(leading, device)
        k = routing.indices.shape[-1]
        indices = routing.indices.reshape(tokens.numel(), k)
        weights = routing.weights.reshape(tokens.numel(), k).to(torch.float64)
        is_open = (weights > 0).to(torch.float64)
        new = (indices >= frozen).to(torch.float64)
        mass = weights.sum(-1)
        squares = weights.square().sum(-1)
        on = (is_open.sum(-1) > 0).to(torch.float64)
        # (sum w)^2 / sum w^2 is 1 / sum w^2 while the weights sum to 1, and stays a count when delta closed some.
        effective = torch.where(squares > 0, mass.square() / squares.clamp_min(1e-300), squares)
        top = weights.amax(-1) if k else mass
        rows = torch.stack([
            torch.ones_like(mass), torch.full_like(mass, k), new.sum(-1), (new * weights).sum(-1), mass,
            1 - on, on, effective, top, is_open.sum(-1),
        ])  # fmt: skip
        state.sums += rows @ tokens
        counts = torch.zeros_like(state.usage)
        counts.index_add_(0, indices.reshape(-1), (is_open * tokens.unsqueeze(-1)).reshape(-1))
        state.usage += counts
        state.untaken = counts if state.untaken is None else _longer(state.untaken, routing.size) + counts

    def usage(self, site: str) -> Tensor:
        """How often each item was selected with a weight above 0: float64 [N]."""
        return self._sites[site].usage.clone()

    def take_usage(self, site: str) -> Tensor | None:
        """`usage` since the last call, to be committed to the bank after each step; None if nothing was counted.

        What nobody took is no part of `state_dict`, and `reset` forgets it.
        """
        state = self._sites.get(site)
        if state is None:
            return None
        counts, state.untaken = state.untaken, None
        return counts

    def keep(self, site: str, mask: Tensor) -> None:
        """Numbers the items anew, as a bank does that keeps those where mask [N] is True and drops the others."""
        state = self._sites.get(site)
        if state is None:
            return
        mask = mask.to(state.usage.device)
        state.usage = state.usage[mask[: state.usage.numel()]]
        if state.untaken is not None:
            state.untaken = state.untaken[mask[: state.untaken.numel()]]
        state.frozen = int(mask[: state.frozen].sum())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
        """What was added up so far: tensors, and JSON values by site."""
        tensors = {}
        for site, state in self._sites.items():
            tensors |= {f"{site}/sums": state.sums.clone(), f"{site}/usage": state.usage.clone()}
        tensors |= {f"{site}/written": sums.clone() for site, sums in self._written.items()}
        return tensors, {
            s: {"frozen": o.frozen, "calls": o.calls, "unmasked": o.unmasked} for s, o in self._sites.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, dict[str, int]]) -> None:
        """Goes on from what `state_dict` gave."""
        self._sites = {
            site: _Site(tensors[f"{site}/sums"].clone(), tensors[f"{site}/usage"].clone(), **counts)  # pyright: ignore[reportArgumentType]
            for site, counts in values.items()
        }
        end = "/written"
        self._written = {name[: -len(end)]: sums.clone() for name, sums in tensors.items() if name.endswith(end)}

    @property
    def sites(self) -> list[str]:
        return list(self._sites)

    def summary(self) -> dict[str, dict[str, float]]:
        """Statistics per site, means over the tokens counted (0 where no token was).

        Keys: `tokens`; `new_share`, share of selected slots won by new items; `new_weight_share`, their share of the
        weight; `off_rate`, share of tokens with no item open; `effective_atoms`, (sum w)^2 / sum w^2 over tokens
        with an open item; `top1_weight`; `open_atoms`, items with weight above 0; `mass`, sum of the weights;
        `used_share`, share of items used at least once; `items`, `new_items`; `calls`, `unmasked_calls`;
        `output_ratio`, mean of ‖adapter output‖ / ‖base output‖, where a layer reports it.
        """
        result = {}
        for name, state in self._sites.items():
            total: dict[str, float] = dict(zip(_SUMS, state.sums.tolist(), strict=True))
            tokens = total["tokens"]
            items = state.usage.numel()

            def mean(key: str, over: float, total: dict[str, float] = total) -> float:
                return total[key] / over if over else 0.0

            result[name] = {
                "tokens": tokens,
                "new_share": mean("new_slots", total["slots"]),
                "new_weight_share": mean("new_weight", total["mass"]),
                "off_rate": mean("off", tokens),
                "effective_atoms": mean("effective", total["on"]),
                "top1_weight": mean("top", tokens),
                "open_atoms": mean("open", tokens),
                "mass": mean("mass", tokens),
                "used_share": float((state.usage > 0).sum()) / items if items else 0.0,
                "items": float(items),
                "new_items": float(items - state.frozen),
                "calls": float(state.calls),
                "unmasked_calls": float(state.unmasked),
            }
        for name, sums in self._written.items():
            summed, tokens = sums.tolist()
            result.setdefault(name, {})["output_ratio"] = summed / tokens if tokens else 0.0
        return result
