"""SETA-style: sparse experts by gradient sensitivity, split on share, one gate for all layers. All formulas INFERRED.

In the spirit of SETA (arXiv 2601.17616, "Split-on-Share ..."; 2606.07500, "Sparse Subspace-to-Expert Sharing ...").
Only the abstracts and second-hand digests were at hand: that a sparse subspace per task comes from gradient
sensitivity and is split into shared and unique experts, that one gate grows with them, and that elastic anchoring and
a routing-aware regulariser protect. Every formula, default and schedule below is our own design; no result of SETA's
can be claimed for it.

    S_t[j] = mean over batches of (dL_t/dW_j)²            or |W_j dL_t/dW_j| (snip), before any update of task t
    M_t    = the `density` share of weights with the largest S_t, spread over the maps by their share of sum S_t
    split  for each expert e, O = M_t ∩ M_e; if |O| ≥ τ min(|M_t|, |M_e|): O becomes shared by T_e ∪ {t} with its
           values, e keeps the rest; M_t \\ ∪ M_e becomes a new unique expert with Δ = 0
    y      = W0 x + b + Σ_e g_e (M_e ⊙ Δ_e) x
    g_e    = sigmoid(w_e · LN(h) / T + c_e), h = mean hidden state of the prompt before block `gate_layer`;
             new rows w = 0, c = 2, a part that was split off inherits its parent's row
    loss   + λ_w Σ_{e shared} α_e Σ_j Ω_j (Δ_j − Δ*_j)²,  α_e = (|T_e| / t) (1 + usage_e)
           + λ_r E_h Σ_{e old} KL(g_e^{t−1}(h) ‖ g_e(h)) usage_e, h of the batch and of each past task's Gaussian
           + λ_b Σ_{e unique, past} mean g_e(h)

| symbol | attribute |
|---|---|
| M_e, Δ_e | `bank` of each layer: positions, expert numbers, values |
| T_e | `values["experts"]` |
| g, h | `SequenceGate`: `weight`, `bias`; `decision.address` |
| Ω, Δ*, α_e Ω_j | `bank` importance (divided by its mean), `anchor`, `pull` |
| τ, T, λ_w, λ_r, λ_b | `overlap`, `temperature`, `anchor`, `routing`, `close` |

At task t the experts with t in T_e train, and the gate; all others are buffers. Shared experts are never merged:
their parts have different gate rows. Blocks below the gate's are not adapted, so that h never changes. Ω_j sums S_s
over the past tasks s from the first whose mask had j on: S is not stored outside the supports. The number of experts
can double with every task; parts of fewer than `smallest` entries are not split off. `split: false` gives independent
experts, the control: every task gets all of M_t for itself.

A causal host must not look ahead, and plain text has no marked prompt: token i takes the mean over tokens up to i, of
the first `prompt_tokens`; from there on the decision stands. In generation with a cache it is kept from the prompt.

Stored: 16 bytes an entry (position, expert, value, importance), |∪ M_t| entries in all; the gate, E (D + 1) numbers
twice; two vectors of D a task and `draws` a past one. Cost per token and map: one multiply-add an entry, d_in an expert
for the gates; before each experience a forward and backward pass over `probe_rows` rows. Removal: rollback; shared
experts have no single owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method, register
from ._sensitivity import Sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ..data import Batch, Output
    from ..hosts import Handle, Host
    from ..layers import SequenceGate, SparseExperts
    from ..memory import Shares, SparseBank, Support
    from ..streams import Experience
    from ._updates import Stack


OPEN_AT = 2.0
"""c of a new gate row: sigmoid(2) = .88."""


@register("seta")
class SETA(Method):
    """SETA-style: sparse shared and unique experts, one growing gate (formulas INFERRED)."""

    class Config(MethodConfig):
        density: float = Field(0.01, gt=0, le=1)
        """Share ρ of the adapted weights that one task's mask takes. INFERRED from "0.98 to 1.25 % trainable"."""
        score: Literal["fisher", "snip", "random"] = "fisher"
        """Sensitivity: mean squared gradient, mean |weight times gradient|, or the control: masks drawn at random."""
        allocation: Literal["adaptive", "uniform"] = "adaptive"
        """Each map's share of the mask: by its share of the sensitivity, within ρ/4 and 4ρ, or ρ everywhere."""
        probe_rows: int = Field(1024, ge=1)
        """Training rows whose gradients are taken before an experience, at most, evenly spaced."""
        per_sample: bool = False
        """One gradient a row instead of one a batch: the exact diagonal, at one backward pass a row."""
        split: bool = True
        """Share what overlaps; false gives every task a unique expert of its whole mask."""
        overlap: float = Field(0.05, ge=0, le=1)
        """τ: overlaps below this share of the smaller support stay with the old expert, at rest."""
        smallest: int = Field(16, ge=1)
        """So do overlaps of fewer entries than this over all maps, unless they are the whole of an expert."""
        gate: Literal["learned", "oracle", "open"] = "learned"
        """`oracle` opens the experts of a row's task (an upper bound; the protocol must grant task ids at test),
        `open` all of them."""
        gate_layer: int = Field(2, ge=0)
        """The gate reads what enters this block; only this block and later ones are adapted."""
        prompt_tokens: int = Field(32, ge=1)
        """Causal hosts: tokens from which the decision is made."""
        temperature: float = Field(1.0, gt=0)
        gate_learning_rate: float = Field(1e-3, gt=0)
        anchor: float = Field(1.0, ge=0)
        """λ_w, the pull of shared experts to their values at the last boundary; 0 for none."""
        routing: float = Field(1.0, ge=0)
        """λ_r, against drift of the gate; 0 for none."""
        close: float = Field(0.0, ge=0)
        """λ_b, keeps unique experts of past tasks closed on new data."""
        draws: int = Field(64, ge=1)
        """Addresses drawn from each past task's Gaussian for the routing loss and for usage."""
        targets: str | list[str] = "all"
        """Roles of the adapted linear maps, a group (attention, ffn, all) or `re:` and a pattern."""
        layers: list[int] | None = None
        """Adapted blocks; all from the gate's on when absent."""

    needs = frozenset({"boundaries", "gradients"})
    adapts = True
    uses_host_weights = True
    status = "unverified"

    def __init__(self, config: Any):
        super().__init__(config)
        self.values = {"experts": [], "tasks": [], "masks": [], "overlaps": [], "anchored": False}
        if config.gate == "oracle":
            self.needs = self.needs | {"task_id_at_test"}  # type: ignore[misc]
            self.predict = self._predict_by_task

    # ---- life in the host
    def attach(self, host: Host) -> None:
        from ..layers import SequenceGate, SparseExperts

        config, blocks = self.config, host.blocks()
        if len({block.tower for block in blocks}) > 1:
            raise BadInput(
                "method.seta: one gate serves one stack of blocks, and the model has two towers; name one "
                "(objective.classification.tower)"
            )
        if config.gate_layer >= len(blocks):
            raise BadInput(
                f"method.seta.gate_layer: is {config.gate_layer}, but the model has {len(blocks)} blocks, counted from "
                f"0, and only those from the gate's on are adapted; set it to {len(blocks) - 1} or less"
            )
        wanted = range(config.gate_layer, len(blocks)) if config.layers is None else config.layers
        sites = host.sites(config.targets, layers=wanted)
        early = sorted({site.layer for site in sites if site.layer < config.gate_layer})
        if early:
            raise BadInput(
                f"method.seta.layers: blocks {early} come before the gate's (gate_layer {config.gate_layer}) and must "
                "stand still; leave them out or lower gate_layer"
            )
        self._host, self._sites = host, sites
        self._sensitivity = Sensitivity(self, sites, config.score)
        gate = SequenceGate(
            host.width, mode=config.gate, temperature=config.temperature, prompt_tokens=config.prompt_tokens,
            open_at=OPEN_AT,
        )  # fmt: skip
        self._handles: list[Handle] = [blocks[config.gate_layer].add("seta", gate)]
        self.modules["gate"] = gate
        for site in sites:
            layer = SparseExperts(site.in_features, site.out_features, site=site.name, decision=gate.decision)
            self._handles.append(site.add("seta", layer))
            self.modules[site.name] = layer

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    @property
    def _gate(self) -> SequenceGate:
        return self.modules["gate"]  # type: ignore[return-value]

    @property
    def layers(self) -> dict[str, SparseExperts]:
        return {name: module for name, module in self.modules.items() if name != "gate"}  # type: ignore[misc]

    @property
    def banks(self) -> dict[str, SparseBank]:
        return {name: layer.bank for name, layer in self.layers.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self._sensitivity.group:
            return [self._sensitivity.group]
        values = [(f"{name}.values", bank.new_values) for name, bank in self.banks.items() if bank.new_values.numel()]
        gate: list[tuple[str, nn.Parameter]] = []
        if self.config.gate == "learned" and self.values["experts"]:
            gate = [("gate.weight", self._gate.weight), ("gate.bias", self._gate.bias)]
        return [
            {"params": values, "weight_decay": 0.0},
            {"params": gate, "weight_decay": 0.0, "lr": self.config.gate_learning_rate},
        ]

    # ---- a new task
    def before_experience(self, experience: Experience) -> None:
        import torch

        from ..memory import share_out

        config, gate = self.config, self._gate
        if config.gate == "oracle" and experience.task is None:
            raise BadInput("method.seta.gate: oracle needs task ids, which this stream does not give; use learned")
        task = len(self.values["tasks"])
        self.values = {**self.values, "tasks": [*self.values["tasks"], experience.task]}
        self._tell_gate()
        drawn = gate.draw(config.draws, self.loop.generator)
        usage = self._usage(task, drawn)
        addresses: list[Tensor] = []
        scores = self._sensitivity.measure(
            experience.train, most=config.probe_rows, per_sample=config.per_sample,
            after=lambda: addresses.append(gate.decision.address),  # type: ignore[arg-type]
        )  # fmt: skip
        spread = 4.0 if config.allocation == "adaptive" else 1.0
        masks = self._sensitivity.masks(scores, config.density, spread, self.loop.generator)
        supports = {name: bank.support() for name, bank in self.banks.items()}
        shares = share_out(
            self.values["experts"], supports, masks, task, config.overlap, config.smallest, config.split
        )  # fmt: skip
        gate.drawn = drawn.flatten(0, 1)
        gate.remember(torch.cat(addresses))
        gate.grow(shares.parents, usage)
        self._lay_out(task, supports, shares, scores)
        self.values = {
            **self.values, "experts": shares.experts, "overlaps": [*self.values["overlaps"], shares.overlap],
            "masks": [*self.values["masks"], sum(mask.numel() for mask in masks.values())],
        }  # fmt: skip
        self._tell_gate()

    def _usage(self, task: int, drawn: Tensor) -> Tensor:
        """How open each expert was on past tasks, [E]."""
        import torch

        experts = self.values["experts"]
        if self.config.gate == "learned" and task:
            return self._gate.openness(drawn).mean(0)
        return torch.tensor([1.0 if self.config.gate == "open" else len(e) / max(task, 1) for e in experts])

    def _tell_gate(self) -> None:
        """Which experts a task id opens, and which task is being learnt; the oracle's knowledge."""
        gate, tasks = self._gate, self.values["tasks"]
        gate.members = {
            task: [number for number, e in enumerate(self.values["experts"]) if any(tasks[each] == task for each in e)]
            for task in {each for each in tasks if each is not None}
        }
        gate.task = tasks[-1] if tasks else None
        trains = [len(tasks) - 1 in e for e in self.values["experts"]]
        at_rest_first = sorted(range(len(trains)), key=trains.__getitem__)
        gate.order, gate.resting = sorted(range(len(trains)), key=at_rest_first.__getitem__), trains.count(False)

    def _lay_out(self, task: int, supports: dict[str, Support], shares: Shares, scores: dict[str, Tensor]) -> None:
        """Gives the banks their entries. The experts of this task train, shared ones pulled to where they are now."""
        import torch

        from ..memory import Support

        experts, usage = shares.experts, self._gate.usage
        training = [number for number, e in enumerate(experts) if task in e]
        alpha = torch.tensor([len(e) / (task + 1) if len(e) > 1 and task in e else 0.0 for e in experts])
        alpha = alpha.to(usage) * (1 + usage)
        anchored = torch.cat([s.importance[alpha[shares.moved[name]] > 0] for name, s in supports.items()])
        scale = float(anchored.mean()) if anchored.numel() else 0.0
        for name, bank in self.banks.items():
            support, owner, fresh, score = (
                supports[name],
                shares.moved[name],
                shares.fresh[name],
                scores[name].flatten(),
            )
            omega = support.importance / scale if scale > 0 else torch.ones_like(support.importance)
            grown = Support(
                torch.cat([support.index, fresh.to(support.index)]),
                torch.cat([owner, torch.full_like(fresh, len(experts) - 1)]).to(support.expert),
                torch.cat([support.values, support.values.new_zeros(fresh.shape)]),
                torch.cat([support.importance + score[support.index.long()], score[fresh]]),
            )
            bank.set(grown, training, torch.cat([alpha[owner] * omega, omega.new_zeros(fresh.shape)]))
        self.values = {**self.values, "anchored": anchored.numel() > 0}

    def after_experience(self, experience: Experience) -> None:
        for bank in self.banks.values():
            bank.freeze()

    # ---- the step
    def before_step(self, batch: Batch) -> Batch:
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second is the older one
        asked = next((name for name in names if hasattr(type(self._host.model), name)), "")
        if asked and getattr(self._host.model, asked):
            raise BadInput(
                "model: gradient checkpointing computes blocks again without the gate's decision, which method seta "
                "cannot honour; switch it off (gradient_checkpointing_disable)"
            )
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        config, found = self.config, {}
        if config.gate == "oracle" and batch.rehearsed is not None:  # a later method of the list has put them in
            raise BadInput("method.seta.gate: oracle does not know the tasks of rehearsed rows; use learned")
        if config.anchor and self.values["anchored"]:
            found["anchor"] = config.anchor * sum(bank.pulled() for bank in self.banks.values())
        if config.gate == "learned" and len(self.values["tasks"]) > 1 and (config.routing or config.close):
            address = self._gate.decision.address
            assert address is not None
            drift, opened = self._gate.losses(address)
            if config.routing:
                found["routing"] = config.routing * drift
            now = len(self.values["tasks"]) - 1
            past = [number for number, e in enumerate(self.values["experts"]) if len(e) == 1 and e[0] < now]
            if config.close and past:
                found["close"] = config.close * opened[past].sum()
        return found

    # ---- use
    def _predict_by_task(self, batch: Batch, forward: Callable[[Batch], Output]) -> Output:
        if batch.task is None:
            raise BadInput(
                "method.seta.gate: oracle needs the task of every row; score experiences of a stream with tasks"
            )
        with self._gate.decision.given(batch.task.tolist()):
            return forward(batch)

    def plasticity(self) -> dict[str, float]:
        """Shares of all adapted weights, and how often the gate agrees with the tasks (on draws of the Gaussians)."""
        import torch

        experts, gate, masks = self.values["experts"], self._gate, self.values["masks"]
        if not experts:
            return {}
        weights = sum(bank.in_features * bank.out_features for bank in self.banks.values())
        supports = [bank.support() for bank in self.banks.values()]
        shared = torch.tensor([len(e) > 1 for e in experts])
        entries = sum(s.index.numel() for s in supports)
        found = {
            "experts": float(len(experts)), "support_share": entries / weights, "mask_share": sum(masks) / weights,
            "shared_share": sum(int(shared[s.expert.long().cpu()].sum()) for s in supports) / entries,
            "mask_overlap": self.values["overlaps"][-1],
        }  # fmt: skip
        if self.config.gate == "learned":
            opened = gate.openness(gate.draw(256, torch.Generator().manual_seed(0))).cpu() > 0.5
            own = torch.tensor([[task in e for e in experts] for task in range(len(opened))])
            found["gate_agreement"] = float((opened == own).float().mean())
        return found

    def stacks(self) -> dict[str, Stack]:
        """The gate's `weight` [E, D] and `bias` [E]; of each map `row`, `column`, `expert`, `values` of all entries."""
        from ._updates import Stack

        block = self._host.blocks()[self.config.gate_layer]
        gate = {"weight": self._gate.weight.detach(), "bias": self._gate.bias.detach()}
        found = {"gate": Stack(block.path, gate)}
        for site in self._sites:
            support = self.banks[site.name].support()
            places = {"row": support.index // site.in_features, "column": support.index % site.in_features}
            tensors = {**places, "expert": support.expert, "values": support.values}
            found[site.name] = Stack(site.path, tensors, site.out_slice)
        return found

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self._tell_gate()
