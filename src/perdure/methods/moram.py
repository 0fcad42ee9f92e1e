"""MoRAM: mixture of rank-1 associative memory, self-activated.

"MoRAM", ICML 2026, OpenReview P247k4ELcn, arXiv 2506.21035 (v1 under the name MoRA). Formulas from the authors' project
page (equations 3-8) and released code; the paper's full text was not at hand. Per adapted linear map and token x, with
the bank of all atoms so far, keys A [N, d_in] and values B [N, d_out]:

    p  = A x                                        raw responses of all atoms, old and new
    s  = p / max(‖p‖₂, eps)                         signed, joint norm over the atoms
    w  = softmax(s / τ) over the k largest signed s; 0 elsewhere
    w_i ← w_i · 1[s_i ≥ δ]                          in evaluation only, not renormalised
    y  = W0 x + b + Σ_i w_i p_i B_i                 the raw p_i, not s_i, multiplies the value

r new atoms per experience: keys U(−1/√d_in, 1/√d_in), values zero; old atoms are frozen buffers.

| symbol | attribute |
|---|---|
| A, B | `bank.keys()`, `bank.values()` |
| r, k, τ, δ | `rank`, `top_k`, `temperature`, `threshold` |
| eps | `eps` |

Stored: N · (d_in + d_out) numbers a layer, growing by r atoms an experience; with `protect` and with `keys: contrast`
also second moments of layer inputs, d_in² numbers for each kind of input. Cost per token and layer: N · d_in for the
scores and k · d_out for the values. Removal: structural (`forget` drops the atoms of one write; later atoms were learnt
in their presence). Beside that, never saved and made anew from the keys: AᵀA of the old keys [d_in, d_in] once they
are as many as d_in, and with `search: coarse` one byte for each of their numbers; 2 k · d_in scores a token then, and
N · d_in products of bytes.

Deviations from the released code, all of them defects there: the value scale is folded into the values at
freezing (the release halves them); atoms that were never trained take no part in evaluation (the release lets empty
atoms of the next task take slots) and do not freeze; parameters and optimizer state are new for each experience.
`min_k` is 1 here, the release forces k ≥ 2 (`min_k: 2` gives that). On a stream without boundaries atoms are added
every `grow_every` steps: ours. Atoms that two writes trained there belong to neither. Ours as well are
`threshold_atoms` (δ falls with N), `max_atoms` (a bank that stops growing), `protect`, and `keys: contrast`: from the
second experience on new keys start as ±v, v the directions in which this experience's inputs have the most energy for
that of all earlier ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import MethodConfig, ProtectConfig
from ..errors import BadInput
from ._contrast import InputContrast
from ._method import Method, register
from ._protection import InputProtection
from ._refusals import refuse_without_triton

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import ProtocolConfig
    from ..data import Batch
    from ..hosts import Handle, Host
    from ..layers import LinearMemory
    from ..memory import AtomBank
    from ..streams import Experience
    from ._updates import Stack


@register("moram")
class MoRAM(Method):
    """MoRAM: rank-1 key-value atoms that score themselves, r more per experience."""

    class Config(MethodConfig):
        rank: int = Field(8, ge=1)
        """Atoms added per layer and experience. Published: 16 (X-TAIL), 8 (TRACE)."""
        top_k: int = Field(8, ge=1)
        """Atoms that answer a token. Published: equal to the rank."""
        temperature: float = Field(0.03, gt=0)
        """Softmax temperature τ. Published: .01 (X-TAIL), .03 (TRACE)."""
        threshold: float = Field(0.2, ge=0, lt=1)
        """Score δ below which an atom is silent in evaluation. Published: .2."""
        threshold_atoms: int | None = Field(None, ge=1)
        """Atoms that the threshold is meant for: among N more of them it is δ · √(threshold_atoms / N) (ours)."""
        renormalise: bool = False
        """Let the weights of the atoms above the threshold sum to one. The released code does not."""
        scale: float = Field(1.0, gt=0)
        """Factor on training values, folded into them when they freeze. Published: 1 (X-TAIL), 2 (TRACE)."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """On the input of the key product. Published: 0 (X-TAIL), .1 (TRACE)."""
        min_k: int = Field(1, ge=1)
        reserve: int = Field(0, ge=0)
        """Places among the k that new atoms hold in training, at most `top_k`. Ours, against starved atoms."""
        eps: float = Field(1e-8, gt=0)
        targets: str | list[str] = "all"
        """Roles of the adapted linear maps, a group (attention, ffn, all) or `re:` and a pattern."""
        layers: list[int] | None = None
        grow_every: int | None = Field(None, ge=1)
        """Optimizer steps between growths; for streams without boundaries."""
        max_atoms: int | None = Field(None, ge=1)
        """Old atoms a map keeps: of every write an equal share, its most used (ours). None: all, as published."""
        protect: ProtectConfig | None = None
        """Confine new keys to the null space of old layer inputs."""
        keys: Literal["drawn", "contrast"] = "drawn"
        """Where new keys start: drawn at random, as published, or along what older experiences have not had (ours)."""
        search: Literal["exact", "coarse", "fused"] = "exact"
        """Of a large bank (from 960 atoms of width 768): score all, or only 2 k that 8-bit codes find (ours; exact on
        processors without AVX-512 VNNI). fused:
        all in one Triton kernel, for GPUs; not measured."""
        path: Literal["auto", "reference", "dense", "gather"] = "auto"
        """How the chosen values are summed; auto: by a measured table (ours; `perdure doctor --speed`)."""
        key_rows: int = Field(128, ge=1)
        """Training rows from which contrast keys are made, evenly spaced."""

    adapts = True
    renews = True
    removal = "structural"
    splits_banks = True
    status = "unverified"

    def __init__(self, config: Any):
        super().__init__(config)
        if config.grow_every is not None:  # without boundaries too an atom must be known by who trained it
            self.needs = self.needs | {"write_ids"}  # type: ignore[misc]

    def check_protocol(self, protocol: ProtocolConfig) -> None:
        if protocol.boundaries == "train":
            return
        if self.config.grow_every is None:
            raise BadInput(
                "method.moram.grow_every: the stream has no boundaries, so say after how many steps new atoms are added"
            )
        if self.config.protect is not None:
            raise BadInput("method.moram.protect: needs boundaries to know which inputs are old; remove it")
        if self.config.keys == "contrast":
            raise BadInput("method.moram.keys: contrast needs boundaries to know which inputs are old; set it to drawn")

    def attach(self, host: Host) -> None:
        from ..layers import LinearMemory

        config = self.config
        if config.search == "fused":
            refuse_without_triton("method.moram.search", "exact")
        self._sites = host.sites(config.targets, layers=config.layers)
        self._handles: list[Handle] = []
        for site in self._sites:
            memory = LinearMemory(
                site.in_features, site.out_features, site=site.name, k=config.top_k, tau=config.temperature,
                delta=config.threshold, delta_atoms=config.threshold_atoms, renormalise=config.renormalise,
                scale=config.scale, eps=config.eps, dropout=config.dropout, min_k=config.min_k, reserve=config.reserve,
                search=config.search, path=config.path,
            )  # fmt: skip
            self._handles.append(site.add("moram", memory))
            self.modules[site.name] = memory
        self._protection = InputProtection(self, config.protect) if config.protect else None
        self._contrast = InputContrast(self, config.key_rows) if config.keys == "contrast" else None

    def detach(self, host: Host) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self.modules = {}

    def split_banks(self, rank: int, processes: int) -> None:
        for memory in self.memories.values():
            memory.split(rank, processes)

    @property
    def memories(self) -> dict[str, LinearMemory]:
        return self.modules  # type: ignore[return-value]

    def _new_keys(self) -> dict[str, nn.Parameter]:
        return {name: memory.bank.new_keys for name, memory in self.memories.items()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = []
        for name, memory in self.memories.items():
            if memory.bank.new_size:
                named += [(f"{name}.keys", memory.bank.new_keys), (f"{name}.values", memory.bank.new_values)]
        return [{"params": named, "weight_decay": 0.0}]

    # ---- growth
    def _freeze(self) -> None:
        for name, memory in self.memories.items():
            before = memory.bank.frozen_size
            for kept in (memory.freeze(), self._limit(memory.bank, before)):
                if kept is not None:
                    self.loop.router_log.keep(name, kept)

    def _limit(self, bank: AtomBank, before: int) -> Tensor | None:
        from ..gathering import summed

        most = self.config.max_atoms
        if most is None or bank.frozen_size <= most:
            return None
        return bank.limit(most, bank.frozen_size - before, summed(bank.usage))

    def _grow(self, owner: int) -> None:
        self._freeze()
        for memory in self.memories.values():
            memory.grow(self.config.rank, owner, self.loop.generator)
        self.values["writers"] = []  # writes that have trained the new atoms
        if self._protection:
            self._protection.project(self._new_keys())

    def before_experience(self, experience: Experience) -> None:
        self._grow(self.loop.write_id)
        if self._contrast:
            for name, keys in self._contrast.keys(self._sites, experience.train, self.config.rank).items():
                self.memories[name].bank.new_keys.data[: len(keys)].copy_(keys)
            if self._protection:
                self._protection.project(self._new_keys())

    def before_step(self, batch: Batch) -> Batch:
        # Without boundaries nobody says that learning begins again, on a state whose atoms are all frozen.
        if not self.loop.knows_boundaries and not any(memory.bank.new_size for memory in self.memories.values()):
            self._grow(self.loop.write_id)
            self.loop.parameters_changed()
        return batch

    def after_update(self, before: dict[str, Tensor]) -> None:
        if not self.loop.knows_boundaries:
            self._claim(self.loop.write_id)
        # After the optimizer's step, so that momentum and weight decay cannot leave the null space.
        if self._protection:
            self._protection.project(self._new_keys())

    def _claim(self, write: int) -> None:
        """New atoms belong to the write that trains them, and to no single one as soon as a second one does."""
        from ..memory import SHARED

        writers = self.values.get("writers", [])
        if writers[-1:] == [write]:
            return
        self.values["writers"] = writers = [*writers, write]
        if len(writers) > 1:
            shared = self.values.get("shared", [])
            self.values["shared"] = shared + [each for each in writers[-2:] if each not in shared[-1:]]
        for memory in self.memories.values():
            memory.bank.own_new(write if len(writers) == 1 else SHARED)

    def after_step(self) -> None:
        for name, memory in self.memories.items():
            counts = self.loop.router_log.take_usage(name)  # of a logged step
            if counts is not None:
                memory.bank.add_usage(counts)
        every = self.config.grow_every
        if every is not None and (self.loop.step + 1) % every == 0:
            self._grow(self.loop.write_id)
            self.loop.parameters_changed()

    def after_experience(self, experience: Experience) -> None:
        if self.loop.knows_boundaries:  # else new atoms go on learning until the next growth
            self._freeze()
        if self._protection and not experience.last:
            self._protection.observe(self._sites, experience.train)

    # ---- use
    def on_request(self, kind: str, payload: Any) -> Any:
        """`forget` with {"write": id}: drops the atoms of that write from every layer; returns how many went."""
        if kind != "forget":
            return super().on_request(kind, payload)
        write = int(payload["write"])
        if write in self.values.get("shared", []):
            raise BadInput(
                f"forget: write {write} trained atoms that other writes trained too, since the stream has no "
                "boundaries; they have no single owner, so it cannot be taken back alone; use `perdure undo` or an "
                "older state"
            )
        gone = sum(memory.bank.drop(write) for memory in self.memories.values())
        if not self.loop.knows_boundaries and not any(memory.bank.new_size for memory in self.memories.values()):
            self._grow(self.loop.write_id + 1)  # no boundary will come that would do it
        return gone

    def left_by_forget(self) -> list[str]:
        # Exact removal would take moments of every experience apart: d² numbers a layer for each, not once.
        asked = [name for name, on in (("protect", self._protection), ("keys: contrast", self._contrast)) if on]
        kept = f"second moments of layer inputs, its rows among those of all others ({' and '.join(asked)})"
        return [kept] if asked else []

    def stacks(self) -> dict[str, Stack]:
        """`keys` a_i [N, d_in], `values` b_i [N, d_out] and `owners` [N] of the atoms that answer."""
        import torch

        from ._updates import Stack

        found = {}
        for site in self._sites:
            memory = self.memories[site.name]
            bank, view = memory.bank, memory.bank.without_empty()
            values = torch.cat([view.frozen_values, view.new_values.detach() * memory.scale])
            tensors = {
                "keys": torch.cat([view.frozen_keys, view.new_keys.detach()]), "values": values,
                "owners": bank.owners if view.index is None else bank.owners[view.index],
            }  # fmt: skip
            found[site.name] = Stack(site.path, tensors, site.out_slice)
        return found

    def plasticity(self) -> dict[str, float]:
        if not self._protection:
            return {}
        shares = list(self._protection.directions().values())
        return {"protected_directions": sum(shares) / len(shares)} if shares else {}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        if self._protection:
            self._protection.reload()
