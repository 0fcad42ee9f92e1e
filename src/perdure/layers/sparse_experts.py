"""Sparse experts beside linear maps, and the one gate that opens them (SETA-style, INFERRED)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..memory import Routing, SparseBank, is_observed, report, sparse_delta
from ..memory.routing import bernoulli_kl, gate_logits, pooled, routing_dtype

if TYPE_CHECKING:
    from ..hosts import Rest

GateMode = Literal["learned", "oracle", "open"]


class Decision(threading.local):
    """What the gate decided in the latest forward pass of this thread; no part of any state.

    Every thread has its own, so that concurrent requests do not meet. A deep copy of the host gets a new one, which
    its gate and its layers share.

    Attributes:
        gates: [B, T, E], or [B, 1, E] where one decision holds for all tokens.
        address: [B, D], pooled hidden state of each sequence, detached.
        tasks: task id of each row, where it was given from outside.
        order: expert -> its number in reports, where those at rest come first. resting: how many these are.
    """

    gates: Tensor | None = None
    address: Tensor | None = None
    tasks: Sequence[int] | None = None
    order: Sequence[int] = ()
    resting: int = 0

    @contextmanager
    def given(self, tasks: Sequence[int]) -> Iterator[None]:
        """Inside, rows belong to these tasks."""
        self.tasks = tasks
        try:
            yield
        finally:
            self.tasks = None

    def for_tokens(self, x: Tensor, site: str) -> Tensor:
        """Gates [N, E] for the tokens of x [..., d], N tokens in all.

        Raises:
            BadInput: the block of the gate did not run before, or x does not have the tokens that the gate saw.
        """
        gates = self.gates
        if gates is None:
            raise BadInput(f"site {site!r}: ran before the gate had decided; call the whole model, not a part of it")
        if gates.shape[1] == 1 and x.ndim == 3 and x.shape[0] == gates.shape[0]:
            gates = gates.expand(-1, x.shape[1], -1)
        if gates.shape[0] * gates.shape[1] != x.shape[:-1].numel():
            raise BadInput(
                f"site {site!r}: has tokens {list(x.shape[:-1])}, the gate decided for {list(gates.shape[:2])}; a "
                "method that inserts tokens cannot stand beside SETA-style experts here"
            )
        return gates.reshape(-1, gates.shape[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Decision:
        memo[id(self)] = new = Decision()
        return new

    def __reduce__(self) -> Any:
        return Decision, ()


class SequenceGate(nn.Module):
    """g_e = sigmoid(w_e . LN(h) / T + c_e), one decision for all layers: a function around an early block.

    h is the mean over real tokens of the hidden state that enters the block. Where the host is causal, a token takes
    those before it and itself, of the first `prompt_tokens` ones, so that nothing of the future leaks; from there on
    the decision stands. With a KV cache the decision at the end of the first call, the prompt, is kept for all later
    ones.

    Attributes:
        weight [E, D], bias [E]: parameters, replaced by other objects when E changes.
        old_weight [E, D], old_bias [E], usage [E]: the gate when the experience began, and how open it then was on
            past tasks (0 for the new unique expert).
        mean, variance [tasks, D]: Gaussian of each task's addresses. drawn [n, D]: draws from those of past tasks.
        members: task id -> experts that learnt it, for the oracle; set by the method.
        order, resting: see `Decision`; set by the method.
        task: the task of all rows for which none was given (the one being learnt).
    """

    old_weight: Tensor
    old_bias: Tensor
    usage: Tensor
    mean: Tensor
    variance: Tensor
    drawn: Tensor

    def __init__(self, width: int, *, mode: GateMode, temperature: float, prompt_tokens: int, open_at: float):
        super().__init__()
        self.width, self.mode, self.temperature = width, mode, temperature
        self.prompt_tokens, self.open_at = prompt_tokens, open_at
        self.weight, self.bias = nn.Parameter(torch.zeros(0, width)), nn.Parameter(torch.zeros(0))
        for name in ("old_weight", "mean", "variance", "drawn"):
            self.register_buffer(name, torch.zeros(0, width))
        for name in ("old_bias", "usage"):
            self.register_buffer(name, torch.zeros(0))
        self.decision = Decision()
        self.members: dict[int, list[int]] = {}
        self.task: int | None = None
        self.order: list[int] = []
        self.resting = 0

    def extra_repr(self) -> str:
        return f"width={self.width}, experts={self.bias.numel()}, mode={self.mode!r}"

    # ---- in the forward pass
    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor:
        """A block function: returns `hidden` as it is and leaves the decision for the layers."""
        self.decision.order, self.decision.resting = self.order, self.resting
        if rest.past:
            kept = (rest.notes or {}).get("gates")
            if kept is None or kept.shape[0] != hidden.shape[0]:
                raise BadInput(
                    "past_key_values: was filled without this gate or for another number of rows; start from an empty "
                    "cache, or pass use_cache=False"
                )
            self.decision.gates, self.decision.address = kept, None
            return hidden
        gates, address = self.decide(hidden, mask, rest.causal)
        self.decision.gates, self.decision.address = gates, address
        if rest.notes is not None:
            rest.notes["gates"] = gates[:, -1:].detach()
        return hidden

    def decide(self, hidden: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
        """Gates [B, T or 1, E] and the address [B, D] of each sequence, from hidden states [B, T, D]."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            hidden = hidden.detach().to(routing_dtype(hidden))
            address = pooled(hidden, mask, causal, self.prompt_tokens)
            if self.mode == "learned":
                gates = torch.sigmoid(self.logits(address))
            elif self.mode == "open":
                gates = address.new_ones(hidden.shape[0], 1, self.bias.numel())
            else:
                gates = self._of_tasks(address)
        return gates, address[:, -1]

    def _of_tasks(self, address: Tensor) -> Tensor:
        tasks = self.decision.tasks
        if not self.bias.numel():
            return address.new_zeros(address.shape[0], 1, 0)  # nothing was learnt yet
        if tasks is None:
            tasks = [self.task] * address.shape[0] if self.task is not None else None
        if tasks is None or len(tasks) != address.shape[0]:
            raise BadInput(
                f"gate: oracle has {'no task ids' if tasks is None else f'{len(tasks)} task ids'} for a batch of "
                f"{address.shape[0]} rows; evaluate through the Learner on a stream with task ids"
            )
        gates = address.new_zeros(len(tasks), 1, self.bias.numel())
        for row, task in enumerate(tasks):
            gates[row, 0, self.members.get(int(task), [])] = 1
        return gates

    def logits(self, address: Tensor, old: bool = False) -> Tensor:
        """[..., D] -> [..., E], by the gate as it is or, with `old`, as it was when the experience began."""
        weight, bias = (self.old_weight, self.old_bias) if old else (self.weight, self.bias)
        return gate_logits(address, weight, bias, self.temperature)

    def losses(self, address: Tensor) -> tuple[Tensor, Tensor]:
        """What the routing regulariser sums up, for the addresses [B, D] of a batch.

        Returns:
            mean over the batch, plus mean over the draws, of sum_e usage_e KL(old gate || gate), exactly 0 at the
            start; and the mean gates of the batch [E].
        """
        logits = self.logits(address)
        drift = [self._drift(address, logits)]
        if self.drawn.shape[0]:
            drawn = self.drawn.to(address.dtype)
            drift.append(self._drift(drawn, self.logits(drawn)))
        return torch.stack(drift).sum(), torch.sigmoid(logits).mean(0)

    def _drift(self, address: Tensor, logits: Tensor) -> Tensor:
        kl = bernoulli_kl(self.logits(address, old=True), logits)
        return (kl * self.usage.to(kl)).sum(-1).mean()

    # ---- growth
    @torch.no_grad()
    def grow(self, parents: Sequence[int], usage: Tensor) -> None:
        """One row per parent: a copy of the parent's row, or w = 0 and c = `open_at` for -1. The old gate is kept.

        Args:
            usage: of the experts so far; a new one takes its parent's, or 0.
        """
        weight, bias, usage = self.weight.detach(), self.bias.detach(), usage.to(self.bias.detach())
        for parent in parents:
            fresh = parent < 0
            weight = torch.cat([weight, weight.new_zeros(1, self.width) if fresh else weight[parent : parent + 1]])
            bias = torch.cat([bias, bias.new_full((1,), self.open_at) if fresh else bias[parent : parent + 1]])
            usage = torch.cat([usage, usage.new_zeros(1) if fresh else usage[parent : parent + 1]])
        self._set(weight.clone(), bias.clone())
        self.old_weight, self.old_bias, self.usage = weight.clone(), bias.clone(), usage.clone()

    @torch.no_grad()
    def remember(self, addresses: Tensor) -> None:
        """Keeps mean and variance of one task's addresses [n, D]; no address is kept."""
        addresses = addresses.to(self.mean)
        self.mean = torch.cat([self.mean, addresses.mean(0, keepdim=True)])
        self.variance = torch.cat([self.variance, addresses.var(0, unbiased=False, keepdim=True)])

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` addresses of each remembered task: [tasks, count, D]."""
        noise = torch.randn(self.mean.shape[0], count, self.width, generator=generator).to(self.mean)
        return self.mean[:, None] + noise * self.variance.sqrt()[:, None]

    @torch.no_grad()
    def openness(self, drawn: Tensor) -> Tensor:
        """Mean gates [tasks, E] of a learned gate on `draw`'s addresses."""
        return torch.sigmoid(self.logits(drawn)).mean(1)

    def _set(self, weight: Tensor, bias: Tensor) -> None:
        wanted = self.weight.requires_grad
        self.weight, self.bias = nn.Parameter(weight, wanted), nn.Parameter(bias, wanted)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            found = state_dict.get(prefix + name)
            if found is None or found.shape == tensor.shape:
                continue
            empty = tensor.detach().new_empty(found.shape)
            wanted = tensor.requires_grad
            setattr(self, name, nn.Parameter(empty, wanted) if isinstance(tensor, nn.Parameter) else empty)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SparseExperts(nn.Module):
    """dy = sum_e g_e (M_e * Delta_e) x, added to a linear map's output.

    Args:
        in_features, out_features: d_in, d_out of the map.
        site: its name. decision: the gate's, shared by all layers.
        path: "auto", "sparse" or "reference"; see `memory.sparse_delta`.
    """

    reports_routing = True

    def __init__(
        self, in_features: int, out_features: int, *, site: str, decision: Decision,
        path: Literal["auto", "reference", "sparse"] = "auto",
    ):  # fmt: skip
        super().__init__()
        self.bank = SparseBank(in_features, out_features)
        self.site, self.decision = site, decision
        self.path: Literal["auto", "reference", "sparse"] = path

    def extra_repr(self) -> str:
        return f"site={self.site!r}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in x's dtype (autocast's inside autocast); zeros for an empty bank."""
        bank, decision = self.bank, self.decision
        if not bank.size and not is_observed():
            return x.new_zeros(*x.shape[:-1], bank.out_features)
        gates = decision.for_tokens(x, self.site)
        if is_observed():
            numbers = torch.tensor(decision.order, dtype=torch.int64, device=gates.device).expand_as(gates)
            report(self.site, Routing(numbers, gates, gates, gates.shape[-1]), decision.resting)
        flat = x.reshape(-1, x.shape[-1])
        dy = sparse_delta(
            flat, gates, bank.frozen_values, bank.new_values, *bank.entries(), bank.out_features, self.path
        )  # fmt: skip
        return dy.reshape(*x.shape[:-1], bank.out_features)
