"""MoE-Adapters: bottleneck experts beside every feed-forward, chosen for a sequence by its first token.

Yu, Zhuge, Zhang, Hu, Wang, Lu, He 2024, "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts
Adapters", CVPR (citation from memory). Formulas and defaults from the authors' released code (MoE-Adapters4CL), which
was read and not run; the paper was not at hand, so equations have no numbers. Per block of every tower, c the first
token of the sequence, one decision for all of its tokens:

    y    = FFN(z) + Σ_e g_e Ad_e(z)
    Ad_e = scale · U_e dropout(ReLU(D_e z + d_e)) + u_e       (the scale on u_e too)
    g    = softmax over the top_k largest of  c W_g + N(0, 1) (softplus(c W_n) + .01), 0 elsewhere; noise in training

W_g, W_n, U, u, d zero at the start. Two released configurations:

    class-incremental   one router, 2 experts, nothing freezes: the defaults here
    MTIL                {experts: 22, router: task, freeze: 2}: a router for each task; after a task the `freeze`
                        experts that most sequences chose in a block stand still there for good

At test MTIL's router is chosen by DDAS: an auto-encoder for each task on features of a pretrained AlexNet picks the
task, or none (then the plain model answers). That second network is no part of a host, and DDAS is not here:
`router: task` wants the protocol to give task ids at test (an upper bound to DDAS), and a task never learnt gets the
plain model.

| symbol | attribute |
|---|---|
| D_e, d_e; U_e, u_e | `experts[e].down`, `.up` of each layer |
| W_g, W_n | `routers[name].gate`, `.noise` (transposed); name "shared", or the task's id |

In a causal model the first token sees nothing but itself, so that the choice does not depend on the rest of the text;
the released text tower has the same property.

Stored: per block E (2 r D + r + D) numbers and 2 E D a router. Cost per token and block: 2 top_k r D, 2 E D a sequence.
Removal: rollback; experts have no single owner.

Deviations: experts and router read what the feed-forward reads, z = LN(x) in a pre-norm block; the release reads x
before the norm. An expert that no sequence of the experience chose does not freeze; one that is chosen again while it
stands still takes its place among the `freeze`, as released. The release computes a balance loss and does not add it;
there is none here. Label smoothing .2, AdamW without decay, 1000 steps of 64 rows and rates of 1e-4 to 5e-3 are its
training settings, not the method's. `activation: none` (linear experts) and `noise: false` are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig
from ..errors import BadInput
from ._method import Method, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ..data import Batch, Output
    from ..hosts import Handle, Host
    from ..layers.adapter_experts import AdapterExperts
    from ..streams import Experience


@register("moe_adapters")
class MoEAdapters(Method):
    """MoE-Adapters: bottleneck experts beside feed-forwards, chosen by the first token."""

    class Config(MethodConfig):
        experts: int = Field(2, ge=1)
        """Experts in every block. Released: 2 (class-incremental), 22 (MTIL, 11 tasks)."""
        top_k: int = Field(2, ge=1)
        """Experts that answer a sequence. Released: 2."""
        rank: int = Field(64, ge=1)
        """Bottleneck of an expert. Released: 64."""
        scale: float = Field(0.1, gt=0)
        """Factor on an expert's output. Released: .1."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """In the bottleneck. Released: .1."""
        activation: Literal["relu", "none"] = "relu"
        noise: bool = True
        """Noise on the router's scores in training. Released: on."""
        router: Literal["shared", "task"] = "shared"
        """One router, or one for each task; the latter needs task ids, at test too."""
        freeze: int = Field(0, ge=0)
        """Most chosen experts of a block that stand still after an experience. Released: 0, and 2 for MTIL."""
        layers: list[int] | None = None
        """Indices of the blocks, negative from the end; all when absent."""

        @model_validator(mode="after")
        def _enough(self) -> MoEAdapters.Config:
            for field in ("top_k", "freeze"):
                if getattr(self, field) > self.experts:
                    raise ValueError(
                        f"{field} {getattr(self, field)} is more than the {self.experts} experts; lower it"
                    )
            return self

    adapts = True
    citation = "Yu et al. 2024, MoE-Adapters4CL"

    def __init__(self, config: Any):
        super().__init__(config)
        self.values = {"tasks": [], "current": None, "frozen": {}}
        if config.freeze or config.router == "task":
            self.needs = self.needs | {"boundaries"}  # type: ignore[misc]
        if config.router == "task":
            self.needs = self.needs | {"task_id_at_test"}  # type: ignore[misc]
            self.predict = self._predict_by_task

    # ---- life in the host
    def attach(self, host: Host) -> None:
        from ..layers.adapter_experts import SHARED, AdapterExperts, Call, Watch

        config, loop = self.config, getattr(self, "loop", None)  # no loop under the public `attach`
        places = host.feed_forwards(config.layers)
        self._refuse(host, {place.tower for place in places})
        blocks = {(block.tower, block.layer): block for block in host.blocks()}
        self._call = Call()
        self._handles: list[Handle] = []
        for place in places:
            layer = AdapterExperts(
                place.in_features, place.out_features, experts=config.experts, rank=config.rank, top_k=config.top_k,
                scale=config.scale, dropout=config.dropout, relu=config.activation == "relu", noisy=config.noise,
                call=self._call, site=place.name, generator=None if loop is None else loop.generator,
            ).to(place.sites[0].device)  # fmt: skip
            if config.router == "shared":
                layer.add_router(SHARED)
            self.modules[place.name] = layer
            self._handles.append(blocks[place.tower, place.layer].add("moe_adapters", Watch(self._call)))
            self._handles.append(place.add("moe_adapters", layer))

    def _refuse(self, host: Host, towers: set[str]) -> None:
        """A router for each task where a row's task cannot be known."""
        if self.config.router == "shared":
            return
        loop = getattr(self, "loop", None)
        if loop is None:
            raise BadInput("method.moe_adapters.router: task needs a Learner, which knows the tasks; use shared")
        if len(towers) > 1:
            raise BadInput(
                f"method.moe_adapters.router: is task, but {type(host.model).__name__} has two towers, and texts of "
                "classes are encoded once for rows of all tasks; use shared, or name one tower "
                "(objective.classification.tower)"
            )
        if loop.replay.samples:
            raise BadInput(
                "method.moe_adapters.router: is task, but the task of rehearsed rows is not known; use shared, or "
                "leave the rehearsing method out"
            )

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    @property
    def layers(self) -> dict[str, AdapterExperts]:
        return self.modules  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        named: list[tuple[str, nn.Parameter]] = []
        for name, layer in self.layers.items():
            frozen = self.values["frozen"].get(name, [])
            for number, expert in enumerate(layer.experts):
                if number not in frozen:
                    named += [(f"{name}.{number}.{part}", p) for part, p in expert.named_parameters()]
            if layer.current in layer.routers:
                router = layer.routers[layer.current]
                named += [
                    (f"{name}.router.{layer.current}.{part}", p)
                    for part, p in router.named_parameters()
                    if part == "gate" or self.config.noise
                ]
        return [{"params": named, "weight_decay": 0.0}]

    # ---- the experience
    def before_experience(self, experience: Experience) -> None:
        if self.config.router == "task":
            if experience.task is None:
                raise BadInput(
                    "method.moe_adapters.router: task needs task ids, which this stream does not give; use shared"
                )
            task = str(experience.task)
            self.values = {
                **self.values, "tasks": list(dict.fromkeys([*self.values["tasks"], task])), "current": task,
            }  # fmt: skip
            self._lay_out()
        self.tensors = {}

    def _lay_out(self) -> None:
        """The routers of the tasks so far, the current one in charge."""
        for layer in self.layers.values():
            for task in self.values["tasks"]:
                layer.add_router(task)
            for name in [name for name in layer.routers if name not in self.values["tasks"]]:
                del layer.routers[name]  # an older state came back
            if self.values["current"] is not None:
                layer.current = self.values["current"]

    def before_step(self, batch: Batch) -> Batch:
        self._clear()  # passes of the user's own
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """No loss: books which experts the sequences of this micro-batch chose."""
        if self.config.freeze:
            import torch

            from ..gathering import gather_rows

            tallies = torch.stack([layer.tally.to(self.loop.device) for layer in self.layers.values()])
            for name, tally in zip(self.layers, gather_rows(tallies[None]).sum(0), strict=True):
                before = self.tensors.get(name)
                self.tensors[name] = tally if before is None else before.to(tally.device) + tally
        self._clear()
        return {}

    def _clear(self) -> None:
        for layer in self.layers.values():
            layer.tally = layer.tally.new_zeros(layer.tally.shape)

    def after_experience(self, experience: Experience) -> None:
        frozen = dict(self.values["frozen"])
        for name, counts in self.tensors.items():
            order = counts.argsort(descending=True, stable=True).tolist()
            most = [number for number in order[: self.config.freeze] if counts[number] > 0]
            frozen[name] = sorted({*frozen.get(name, []), *most})
        self.values = {**self.values, "frozen": frozen}
        self.tensors = {}

    # ---- use
    def _predict_by_task(self, batch: Batch, forward: Callable[[Batch], Output]) -> Output:
        if batch.task is None:
            raise BadInput(
                "method.moe_adapters.router: task needs the task of every row; score experiences of a stream with tasks"
            )
        with self._call.given([str(task) for task in batch.task.tolist()]):
            return forward(batch)

    def plasticity(self) -> dict[str, float]:
        """`frozen_experts`: share of all experts that stand still."""
        if not self.config.freeze:
            return {}
        still = sum(map(len, self.values["frozen"].values()))
        return {"frozen_experts": still / (len(self.layers) * self.config.experts)}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.values = dict(values["values"])
        if self.config.router == "task":
            self._lay_out()
        super().load_state_dict(tensors, values)
