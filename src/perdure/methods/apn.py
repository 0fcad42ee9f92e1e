"""APN: attractor patch networks, routed low-rank patches in place of a feed-forward or beside it.

Shashank 2026, "Attractor Patch Networks", arXiv 2602.06993v1. Layer, start and released protocol were read in the
author's code (shankch/nanoGPT-apn), which was not run; of the paper the abstract alone was at hand, so equations have
no numbers here. Per block, with the token z that its feed-forward reads (h ← h + APN(z) in a pre-norm block):

    s_i = cos(z, p_i) / τ                           i = 1..K
    S   = the k largest;  w = softmax over S alone
    u   = Vᵀ z                                      one code for all patches, not normalised
    φ_i = u ⊙ σ(a_i ⊙ u + b_i)
    y   = Dropout(γ Σ_{i∈S} w_i U_i φ_i)

Start: p, V, a ~ N(0, 0.02²), b = 0, U ~ N(0, (0.02 / √(2 · blocks))²). The released loss is cross-entropy alone.

| symbol | attribute |
|---|---|
| p [K, C], Vᵀ [r, C] | `prototypes`, `code` |
| a, b [K, r]; U [K, C, r] | `gate_scale`, `gate_bias`; `decoders` |
| K, k, r, τ, γ | `patches`, `top_k`, `rank`, `temperature`, `gamma` |

`place: replace` is the published use: the feed-forward is gone, for models from scratch (`pretrain` makes one ready in
the first experience). `place: beside` adds y to a pretrained model's own feed-forward; U is zero at first. Ours.

Locality: if patch j is not in S(z), changing U_j, a_j, b_j changes y(z) by exactly 0. It is a statement about one layer
and equal inputs: through attention a token feels what earlier tokens' patches write. It needs V and p frozen
(`train: patches`), and an optimizer that leaves unvisited patches alone: with `row_wise` each patch is an AdamW of its
own that neither decays nor moves in a step in which no token of any micro-batch or process had a gradient for it.

Stored: per block K C (1 + r) + 2 K r + r C numbers (K for U's width), and the host's own parameters where they train.
Cost per token and block: K C for the scores, r C for the code, k C r for the patches. Removal: rollback; patches are
shared by experiences.

Deviations: the released adaptation trains V, and p unless told not to; here both are switches and off. Released AdamW
is an ordinary one (`row_wise: false`). Sums run in float32 under bf16. `pretrain` and `place: beside` are ours. A
third-party text speaks of a usage balance loss; the released code has none, nor has this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..config import MethodConfig, PretrainConfig
from ..errors import BadInput
from ._host_parameters import HostParameters, pretraining_groups
from ._method import Method, register
from ._refusals import refuse_without_triton

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..hosts import Handle, Host, Replacement
    from ..layers import PatchLayer
    from ..streams import Experience
    from ._updates import Stack

_PATCH = ("gate_scale", "gate_bias", "decoders")


@register("apn")
class APN(Method):
    """APN: routed low-rank patches, in place of a feed-forward or beside it."""

    class Config(MethodConfig):
        patches: int = Field(256, ge=1)
        """Patches K per block. Released: 256."""
        top_k: int = Field(4, ge=1)
        """Patches that answer a token. Released: 4."""
        rank: int = Field(32, ge=1)
        """Size r of the code that all patches share. Released: 32."""
        temperature: float = Field(0.07, gt=0)
        """Temperature τ of the softmax over the kept cosines. Released: .07."""
        gamma: float = 1.0
        """Factor γ on the output. Released: 1."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """On the output. Released: .2 in pretraining and after."""
        place: Literal["beside", "replace"] = "beside"
        """Add to the feed-forward (zero at first) or stand in its place (published, for models from scratch)."""
        train: Literal["patches", "patches+prototypes", "all"] = "patches"
        """What trains: U, a, b; also the prototypes; or all of layer and host."""
        train_code: bool = False
        """Train V too, as the released adaptation does. V is shared by all tokens, so locality is gone."""
        pretrain: PretrainConfig | None = None
        """Train all of the host, and of layers in its place, on the first experience; `train` holds from the second."""
        weights: str | None = None
        """A folder of `save_pretrained`: its layers, and its host where it trained that, are the start."""
        row_wise: bool = True
        """A patch that no token visited in a step does not move. False: AdamW as released."""
        layers: list[int] | None = None
        path: Literal["auto", "reference", "dense", "grouped", "fused"] = "auto"
        """How patches are computed; auto: by a measured table (ours; `perdure doctor --speed`)."""

        @model_validator(mode="after")
        def _enough(self) -> APN.Config:
            if self.top_k > self.patches:
                raise ValueError(f"top_k {self.top_k} is more than the {self.patches} patches; lower it")
            if self.weights is not None and self.pretrain is not None:
                raise ValueError("weights and pretrain both make the layers ready; give one of them")
            return self

    adapts = True
    status = "unverified"

    def __init__(self, config: Any):
        super().__init__(config)
        self.keeps_output = config.place == "beside"  # type: ignore[misc]
        self.uses_host_weights = config.train == "all"  # type: ignore[misc]

    def attach(self, host: Host) -> None:
        from ..layers import PatchLayer

        config = self.config
        if config.path == "fused":
            refuse_without_triton("method.apn.path", "auto")
        self._places = places = host.feed_forwards(config.layers)
        for place in places:
            self.modules[place.name] = PatchLayer(
                place.in_features, place.out_features, patches=config.patches, k=config.top_k, rank=config.rank,
                tau=config.temperature, gamma=config.gamma, dropout=config.dropout, site=place.name, path=config.path,
                depth=len(host.blocks(place.tower)) if config.place == "replace" else None,
            ).to(place.sites[0].device)  # fmt: skip
        self._handles: list[Handle | Replacement] = [
            place.replace(self.modules[place.name])
            if config.place == "replace"
            else place.add("apn", self.modules[place.name])
            for place in places
        ]
        mine = {id(p) for _, p in self._named("")}
        start = self._start(config.weights, host)
        trains = config.train == "all" or config.pretrain is not None or any(key.startswith("host/") for key in start)
        self._host = HostParameters([pair for pair in host.named_parameters() if id(pair[1]) not in mine] * trains)
        if start:
            try:
                self._begin_with(start)
            except BadInput:
                self.detach(host)
                raise

    def _start(self, folder: str | None, host: Host) -> dict[str, Tensor]:
        """Tensors of this method in a folder of `save_pretrained`; empty without one."""
        from pathlib import Path

        from ..state.portable import read_portable

        if folder is None:
            return {}
        tensors, values = read_portable(Path(folder))
        if self.name not in values["names"]:
            raise BadInput(f"method.apn.weights: {folder} holds {values['names']} and no apn; name a folder of one")
        prefix = f"method/{values['names'].index(self.name)}/"
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return {key: tensor for key, tensor in found.items() if key.startswith(("modules/", "host/"))}

    def _begin_with(self, start: dict[str, Tensor]) -> None:
        """Overwrites the layers, and the host where the folder has its weights."""
        own = {key: tensor for key, tensor in Method.state_dict(self)[0].items() if key.startswith("modules/")}
        host = self._host.state_dict() if any(key.startswith("host/") for key in start) else {}
        shapes, found = ({key: tuple(t.shape) for key, t in each.items()} for each in (own | host, start))
        if shapes != found:
            key = min(key for key in {*shapes, *found} if shapes.get(key) != found.get(key))
            raise BadInput(
                f"method.apn.weights: {self.config.weights} does not fit: {key} is {found.get(key, 'not there')}, this "
                f"model has {shapes.get(key, 'no such tensor')}; use the model and the settings it was saved with"
            )
        Method.load_state_dict(self, start, {"values": {}})
        if host:
            self._host.load_state_dict(start)

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._host.restore()
        self.modules = {}

    @property
    def memories(self) -> dict[str, PatchLayer]:
        return self.modules  # type: ignore[return-value]

    def _named(self, *tensors: str) -> list[tuple[str, nn.Parameter]]:
        """Parameters of every layer by name; "" for all."""
        return [
            (f"{site}.{name}", parameter)
            for site, layer in self.memories.items()
            for name, parameter in layer.named_parameters()
            if name in tensors or "" in tensors
        ]

    # ---- what trains
    def parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        if self.pretrains and config.place == "beside":
            return pretraining_groups(config.pretrain, self._host.named)
        everything = self.pretrains or config.train == "all"
        by_row = _PATCH if config.train == "patches" and not everything else ("prototypes", *_PATCH)
        patches = {"params": self._named(*by_row), "rows": config.row_wise}
        shared = self._named("code") if config.train_code or everything else []
        if not self.pretrains:
            return [patches, {"params": shared + (self._host.named if everything else [])}]
        groups = pretraining_groups(config.pretrain, shared + self._host.named)
        return [{**groups[0], **patches}, *groups]

    def touched(self) -> list[tuple[str, nn.Parameter]]:
        return self._host.named + self._named("")

    # ---- which patches a domain uses
    def after_experience(self, experience: Experience) -> None:
        """Keeps how often each patch was selected in this experience, counted on logged steps of this process."""
        import torch

        log = self.loop.router_log
        for site, layer in self.memories.items():
            used = log.usage(site) if site in log.sites else torch.zeros(layer.prototypes.shape[0])
            row = used.float()[None]
            before = self.tensors.get(f"usage/{site}")
            self.tensors[f"usage/{site}"] = row if before is None else torch.cat([before.to(row), row])

    def plasticity(self) -> dict[str, float]:
        """Means over the blocks.

        `visited_patches`: share of the patches that the last experience selected at all. `routing_overlap`: Σ_i
        min(f_i, g_i) of the patches' shares f in the last experience and g in an earlier one, mean over the earlier
        ones; 0 where they use none in common, 1 where they use the same equally.
        """
        tables = [table.double().cpu() for name, table in self.tensors.items() if name.startswith("usage/")]
        if not tables:
            return {}
        found = {"visited_patches": sum(float((t[-1] > 0).double().mean()) for t in tables) / len(tables)}
        shares = [t / t.sum(1, keepdim=True).clamp_min(1) for t in tables]
        overlaps = [float(t[:-1].minimum(t[-1]).sum(1).mean()) for t in shares if len(t) > 1]
        return found | ({"routing_overlap": sum(overlaps) / len(overlaps)} if overlaps else {})

    def stacks(self) -> dict[str, Stack]:
        """`prototypes` p, `code` Vᵀ, `gate_scale` a, `gate_bias` b and `decoders` U of each block's patches."""
        from ._updates import Stack

        found = {}
        for place in self._places:
            tensors = {key: tensor.detach() for key, tensor in self.memories[place.name].named_parameters()}
            found[place.name] = Stack(place.entry, tensors, exit=place.exit)
        return found

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        return tensors | self._host.state_dict(), values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self._host.load_state_dict(tensors)
