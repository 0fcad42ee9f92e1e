"""Sequential LoRA: one adapter, trained on every experience in turn (SeqLoRA).

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models": y = W0 x + (alpha / r) B A x, A Kaiming-uniform,
B zero. The adapter is PEFT's own, injected into the user's model. The SeqLoRA rows of MoRAM's TRACE comparison use r 8,
alpha 32, dropout .1 on q and v.

| symbol | attribute |
|---|---|
| A [r, d_in] | `lora_A`, the down-projection |
| B [d_out, r] | `lora_B`, the up-projection |

With `grow`, every experience gets an A and a B of its own and the old ones stand still:
y = W0 x + Σ_t (alpha / r) B_t A_t x.
`protect` implies it and confines the rows of the new A to the null space of old layer inputs after every update: the
control for MoRAM with protected keys, projection without routing. With `first_only` the adapter learns the first
experience and then stands still, which with the ridge head is the shape of RanPAC's first-session adaptation. With
`pretrain` the first experience trains the host's own parameters instead, and the adapter waits for the second.

Stored: A and B of every adapted layer (with `protect` also second moments of layer inputs). Cost per token and layer:
r (d_in + d_out) multiply-adds. Removal: rollback; the adapter has no single owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..config import MethodConfig, PretrainConfig, ProtectConfig
from ..errors import BadInput
from ._host_parameters import HostParameters, pretraining_groups
from ._method import Method, register
from ._protection import InputProtection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import ProtocolConfig
    from ..hosts import Host
    from ..streams import Experience
    from ._updates import Update


@register("lora")
class LoRA(Method):
    """Sequential LoRA, one adapter for all experiences."""

    class Config(MethodConfig):
        rank: int = Field(8, ge=1)
        alpha: float = Field(16.0, gt=0)
        dropout: float = Field(0.0, ge=0, lt=1)
        targets: str | list[str] = "all"
        """Roles of the adapted linear maps, a group (attention, ffn, all) or `re:` and a pattern."""
        layers: list[int] | None = None
        first_only: bool = False
        """Train on the first experience only."""
        grow: bool = False
        """A new A and B for every experience, the old ones frozen."""
        protect: ProtectConfig | None = None
        """Confine new down-projections to the null space of old layer inputs; implies `grow`."""
        pretrain: PretrainConfig | None = None
        """Pretrain the whole model on the first experience; the adapter waits for the second."""

        @model_validator(mode="after")
        def _one_plan(self) -> LoRA.Config:
            if self.first_only and (self.grow or self.protect):
                other = "grow" if self.grow else "protect"
                raise ValueError(f"first_only trains one experience, {other} adds an adapter for each; keep one")
            if self.first_only and self.pretrain:
                raise ValueError("first_only trains the adapter on the experience that pretrain gives to the model")
            return self

    adapts = True
    status = "verified"

    def check_protocol(self, protocol: ProtocolConfig) -> None:
        asked = [name for name in ("first_only", "grow", "protect") if getattr(self.config, name)]
        if asked and protocol.boundaries == "none":
            raise BadInput(f"method.lora.{asked[0]}: needs boundaries (protocol.boundaries: train); remove it")

    def attach(self, host: Host) -> None:
        config = self.config
        self._host = host
        self._sites = host.sites(config.targets, layers=config.layers)
        self._refuse(host)
        self._pretrained = HostParameters(host.named_parameters() if config.pretrain else [])
        self._trained = {name: p.requires_grad for name, p in host.model.named_parameters()}  # PEFT freezes the host
        modules = {site.path: site.module for site in self._sites}
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []
        for path, module in modules.items():
            parent, _, leaf = path.rpartition(".")
            self._originals.append((host.model.get_submodule(parent), leaf, module))
        self._paths = list(modules)
        self._adapters: list[str] = []
        self._add_adapter()
        self._protection = InputProtection(self, config.protect) if config.protect else None

    def _refuse(self, host: Host) -> None:
        """A model or a choice of maps that PEFT would change beyond what was asked for."""
        other = next((path for path, module in host.model.named_modules() if hasattr(module, "base_layer")), None)
        if other is not None:  # PEFT would switch it off, wherever it is
            raise BadInput(
                f"model: carries a PEFT adapter already (at {other}), which method lora would switch off; "
                "merge it into the weights or remove it first"
            )
        chosen = {site.name for site in self._sites}
        for site in self._sites:
            if site.out_slice is None:
                continue
            left = [s.role for s in host.sites("attention") if s.path == site.path and s.name not in chosen]
            if left:
                raise BadInput(
                    f"method.lora.targets: {site.path} is query, key and value in one map, which PEFT adapts as a "
                    f"whole; choose {' and '.join(left)} too, or none of the three"
                )

    @property
    def renews(self) -> bool:  # type: ignore[override]
        return self.config.grow or self.config.protect is not None

    def _add_adapter(self) -> None:
        """Injects one more PEFT adapter; all are active, only the newest trains."""
        from peft import LoraConfig, inject_adapter_in_model

        config, model = self.config, self._host.model
        # PEFT's note on the model belongs to its own loading and saving, and warns at a second adapter.
        note = vars(model).pop("peft_config", None)
        self._adapters.append(f"perdure{len(self._adapters)}")
        try:
            inject_adapter_in_model(
                LoraConfig(
                    r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=self._paths,
                    fan_in_fan_out=any(site.transposed for site in self._sites),
                ),
                model,
                adapter_name=self._adapters[-1],
            )  # fmt: skip
        finally:
            vars(model).pop("peft_config", None)
            if note is not None:
                vars(model)["peft_config"] = note
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in self._paths}
        wrong = [path for path, layer in self._layers.items() if not hasattr(layer, "lora_A")]
        if wrong:
            self.detach(self._host)
            raise BadInput(f"method.lora.targets: PEFT did not adapt {', '.join(wrong)}; choose other roles")
        for layer in self._layers.values():
            layer.set_adapter(self._adapters)
        for _, parameter in self._named():
            parameter.requires_grad_(False)  # the loop switches on what trains

    def detach(self, host: Host) -> None:
        for parent, leaf, module in self._originals:
            setattr(parent, leaf, module)
        self._pretrained.restore()
        for name, parameter in host.model.named_parameters():
            parameter.requires_grad_(self._trained.get(name, parameter.requires_grad))

    def _named(self, adapters: list[str] | None = None) -> list[tuple[str, nn.Parameter]]:
        named = []
        for number, adapter in enumerate(self._adapters):
            if adapters is not None and adapter not in adapters:
                continue
            for path, layer in self._layers.items():
                named.append((f"{number}/{path}.A", layer.lora_A[adapter].weight))
                named.append((f"{number}/{path}.B", layer.lora_B[adapter].weight))
        return named

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.config.first_only and self.loop.experiences_learnt > 0:
            return []
        if self.pretrains:
            return pretraining_groups(self.config.pretrain, self._pretrained.named)
        return [{"params": self._named(self._adapters[-1:])}]

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._pretrained.named)

    def _downs(self) -> dict[str, nn.Parameter]:
        by_path = {site.path: site.name for site in self._sites}
        newest = self._adapters[-1]
        return {by_path[path]: layer.lora_A[newest].weight for path, layer in self._layers.items()}

    def before_experience(self, experience: Experience) -> None:
        if self.renews and self.loop.experiences_learnt > (self.config.pretrain is not None):
            for _, parameter in self._named():
                parameter.requires_grad_(False)
            self._add_adapter()
        if self._protection:
            self._protection.project(self._downs())

    def after_update(self, before: dict[str, Tensor]) -> None:
        if self._protection:
            self._protection.project(self._downs())

    def after_experience(self, experience: Experience) -> None:
        if self._protection and not experience.last:
            self._protection.observe(self._sites, experience.train)

    def updates(self) -> list[Update]:
        import torch

        from ._updates import Update

        found = []
        for path, layer in self._layers.items():
            downs = [layer.lora_A[name].weight for name in self._adapters]
            ups = [layer.lora_B[name].weight.t() * layer.scaling[name] for name in self._adapters]
            found.append(Update(path, torch.cat(downs).detach(), torch.cat(ups).detach()))
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        tensors |= self._pretrained.state_dict()
        return tensors | {name: p.detach() for name, p in self._named()}, values | {"adapters": len(self._adapters)}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        import torch

        super().load_state_dict(tensors, values)
        while len(self._adapters) < values["adapters"]:
            self._add_adapter()
        while len(self._adapters) > values["adapters"]:  # an older state: back to before an experience
            newest = self._adapters.pop()
            for layer in self._layers.values():
                layer.set_adapter(self._adapters)
                layer.delete_adapter(newest)
        self._pretrained.load_state_dict(tensors)
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(tensors[name])
        if self._protection:
            self._protection.reload()
