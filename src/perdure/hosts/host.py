"""Resolves a user's own model object into family, width, depth, sites and blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import BadInput
from . import blocks as _blocks
from . import feed_forward as _feed_forward
from . import prefix as _prefix
from . import sites as _sites
from .blocks import Block
from .feed_forward import FeedForward
from .roles import GROUPS, OTHER, PREFIX, ROLES, features, is_linear, roles_of
from .sites import Site

Pool = Literal["mean", "cls", "last"]
_FAMILIES = {
    "clip_vision_model": "clip",
    "clip_text_model": "clip",
    "gemma3_text": "gemma3",
    "dinov2_with_registers": "dinov2",
    "xlm-roberta": "roberta",
}
_PUT_IN = PREFIX.rstrip("_")  # PEFT names its adapters without the underscore
_CLIP_TEXT = "clip_text_model"
_MEAN = ("bert", "roberta", "distilbert", "mpnet", "albert", "electra", "deberta", "deberta-v2", "modernbert")
_CLS = ("vit", "deit", "dinov2", "beit")
_TOWERS = {"vision": ("vision", "visual", "image"), "text": ("text", "language")}


@dataclass(frozen=True)
class Tower:
    """One stack of blocks: its name ("" for the only one), dotted path, number of blocks and width D."""

    name: str
    path: str
    depth: int
    width: int


class Host:
    """A model as methods see it. Makes no copy and changes nothing by itself.

    Known by name of module: BERT, RoBERTa, DistilBERT, ViT, DeiT, DINOv2, CLIP (both towers), GPT-2, Llama, Qwen and
    Gemma, with any head on top. In any other model the longest list of blocks of one class is taken; roles are
    guessed from the last part of each linear map's path.

    Args:
        model: the user's own nn.Module, not a distributed wrapper around it.
        tower: "vision" or "text" where there are two and one of them alone is meant.

    Attributes:
        model: that object.
        tower: what width, depth, sites and blocks are of where they are asked for no tower; None for all.
        family: "bert", "vit", "clip", "gpt2", "llama" ...; the config's model type, or the class name without a config.
        towers: name -> Tower; empty if there are no blocks.

    Raises:
        BadInput: not an nn.Module, a distributed wrapper, an encoder-decoder model, or there is no such tower.
    """

    def __init__(self, model: nn.Module, tower: str | None = None):
        if not isinstance(model, nn.Module):
            raise BadInput(f"model: expected a torch.nn.Module, found {type(model).__name__}; load the model first")
        if type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise BadInput(f"model: is wrapped by {type(model).__name__}; attach to the model inside (`model.module`)")
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise BadInput(
                f"model: {type(model).__name__} is an encoder-decoder model, which is not supported; "
                "use its encoder, or a decoder-only or encoder-only model"
            )
        self.model = model
        kind = getattr(config, "model_type", "") or type(model).__name__.lower()
        self.kind: str = kind
        self.family: str = _FAMILIES.get(kind, kind)
        stacks = _stacks(model)
        self._blocks = [
            _block(child, f"{path}.{name}" if path else name, index, side, text=side == "text" or kind == _CLIP_TEXT)
            for side, path in stacks.items()
            for index, (name, child) in enumerate(model.get_submodule(path).named_children())
        ]
        self._sites = _find_sites(model, self._blocks)
        self.towers = {name: self._tower(name, path) for name, path in stacks.items()}
        self.tower: str | None = None
        self.tower = self._check_tower(tower)

    @classmethod
    def of(cls, model: Host | nn.Module) -> Host:
        """`model` itself if it is a Host already, else a Host for it."""
        return model if isinstance(model, Host) else cls(model)

    def __repr__(self) -> str:
        towers = ", ".join(f"{t.name or 'blocks'}: {t.depth} x {t.width}" for t in self.towers.values())
        return f"Host({self.family}, {towers or 'no blocks'})"

    # ---- what it is
    @property
    def width(self) -> int:
        """Width D of the hidden states; BadInput if towers differ (see `towers`)."""
        return self._one("width")

    @property
    def depth(self) -> int:
        """Number of blocks; BadInput if towers differ (see `towers`)."""
        return self._one("depth")

    def _one(self, field: str) -> int:
        among = self.towers.values() if self.tower is None else [self.towers[self.tower]]
        values = {getattr(tower, field) for tower in among}
        if len(values) == 1:
            return values.pop()
        found = ", ".join(f"{t.name}: {getattr(t, field)}" for t in self.towers.values()) or "no blocks"
        raise BadInput(f"model: {type(self.model).__name__} has no single {field} ({found}); name a tower")

    def pool_default(self, tower: str | None = None) -> Pool:
        """How one vector is made of [B, T, D]: "mean" over tokens (BERT-like), "cls" (first token), "last" real token.

        Raises:
            BadInput: there are two towers and none is named.
        """
        name = self._check_tower(tower)
        if name is None and len(self.towers) > 1:
            raise BadInput(f"tower: {type(self.model).__name__} has {' and '.join(self.towers)}; name one")
        name = name if name is not None else next(iter(self.towers), "")
        if self.family == "clip":
            return "cls" if name == "vision" or self.kind == "clip_vision_model" else "last"
        if self.family in _MEAN:
            return "mean"
        if self.family in _CLS:
            return "cls"
        if any(block.causal for block in self._blocks if block.tower == name):
            return "last"
        return "cls" if getattr(self.model, "main_input_name", "") == "pixel_values" else "mean"

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What full training would move: floating-point parameters, of its tower alone where one is meant.

        Not CLIP's `logit_scale`, a temperature that stands still in continual training (MoRAM, RAIL, ZSCL).
        """
        root = "" if self.tower is None else self.towers[self.tower].path.partition(".")[0]
        return [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.is_floating_point()
            and name != "logit_scale"
            and not any(part.startswith(_PUT_IN) for part in name.split("."))  # what other methods put in
            and name.startswith(f"{root}." if root else "")
        ]

    # ---- where things go
    def sites(
        self, roles: str | Sequence[str] = "all", layers: Iterable[int] | None = None, tower: str | None = None
    ) -> list[Site]:
        """Linear maps by role, ordered by tower, layer and role.

        Args:
            roles: a role ("query", "key", "value", "attention_output", "ffn_in", "ffn_gate", "ffn_out"), a group
                ("attention", "ffn", "all"), "other", or "re:" with a regular expression that is matched from the start
                of the module's path in the model ("re:.*q_proj$"); or a list of these. Groups skip what a family lacks.
            layers: indices of blocks, negative from the end; all when None.
            tower: "vision" or "text" where there are two; the Host's own when None, else both.

        Raises:
            BadInput: nothing fits; the message names what was found.
        """
        wanted = [roles] if isinstance(roles, str) else list(roles)
        name = self._check_tower(tower)
        numbers = None if layers is None else list(layers)
        chosen: dict[str, Site] = {}
        for role in wanted:
            matches = [site for site in self._sites if _fits(site, role)]
            if not matches:
                raise BadInput(self._nothing(role))
            chosen.update((site.name, site) for site in matches)
        picked = [
            site
            for site in self._sites
            if site.name in chosen
            and (name is None or site.tower == name)
            and (numbers is None or site.layer in self._layers(numbers, site.tower))
        ]
        if not picked:
            raise BadInput(f"layers: {numbers} with tower {tower!r} leave no site of {wanted}; {self._found()}")
        return picked

    def blocks(self, tower: str | None = None, layers: Iterable[int] | None = None) -> list[Block]:
        """The transformer blocks, first to last.

        Args:
            tower: as in `sites`. layers: indices of blocks, negative from the end; all when None.

        Raises:
            BadInput: the model has none, no such tower, or no such layer.
        """
        name = self._check_tower(tower)
        found = [block for block in self._blocks if name is None or block.tower == name]
        if not found:
            raise BadInput(f"model: {type(self.model).__name__} has no list of blocks of one class; {self._found()}")
        if layers is None:
            return found
        numbers = list(layers)
        return [block for block in found if block.layer in self._layers(numbers, block.tower)]

    def feed_forwards(self, layers: Iterable[int] | None = None, tower: str | None = None) -> list[FeedForward]:
        """The feed-forward of every block, first to last; `layers` and `tower` as in `sites`.

        Raises:
            BadInput: the model has no blocks, or a block's feed-forward is not one map in and one out.
        """
        numbers = None if layers is None else list(layers)
        return [
            _feed_forward.find(
                self, block.path, f"{block.name}.ffn", block.layer, block.tower,
                [site for site in self._sites if (site.tower, site.layer) == (block.tower, block.layer)],
            )
            for block in self.blocks(tower)
            if numbers is None or block.layer in self._layers(numbers, block.tower)
        ]  # fmt: skip

    def take_away(self, sites: Sequence[Site]) -> None:
        """Linear maps that are out of the model for now."""
        gone = {site.name for site in sites}
        self._sites = [site for site in self._sites if site.name not in gone]

    def give_back(self, sites: Sequence[Site]) -> None:
        """Linear maps that are in the model again."""
        self._sites = _ordered([*self._sites, *sites])

    # ---- what perdure put in
    def attached(self) -> list[tuple[str, str]]:
        """(path of the module, name of the submodule) of everything that was put in."""
        return [
            (path, name)
            for path, module in self.model.named_modules()
            if PREFIX not in path
            for name in module._modules
            if name.startswith(PREFIX)
        ]

    def strip(self, keep: Iterable[tuple[str, str]] = ()) -> None:
        """Removes every adapter except those in `keep` (as `attached` gives them)."""
        kept = set(keep)
        for path, name in reversed(self.attached()):
            if (path, name) in kept:
                continue
            module = self.model.get_submodule(path)
            room = next((room for room in (_blocks, _prefix) if name in room.names(module)), _sites)
            room.strip(module, name)

    # ---- inside
    def _tower(self, name: str, path: str) -> Tower:
        mine = [site for site in self._sites if site.tower == name and site.layer >= 0]
        entry = [site for site in mine if site.role in ("query", "ffn_in")] or mine
        return Tower(name, path, sum(block.tower == name for block in self._blocks), entry[0].in_features)

    def _check_tower(self, tower: str | None) -> str | None:
        if tower is None:
            return self.tower
        if tower in self.towers:
            return tower
        found = [name for name in self.towers if name] or "none that has a name; leave it out"
        raise BadInput(f"tower: {tower!r} is unknown; {type(self.model).__name__} has {found}")

    def _layers(self, layers: list[int], tower: str) -> set[int]:
        depth = self.towers[tower].depth if tower in self.towers else 0
        for layer in layers:
            if not -depth <= layer < depth:
                raise BadInput(f"layers: {layer} is out of range; the model has {depth} blocks, counted from 0")
        return {layer % depth for layer in layers} if depth else set()

    def _found(self) -> str:
        counts = Counter(site.role for site in self._sites)
        known = ", ".join(f"{role} ({count})" for role, count in counts.items() if role != OTHER)
        others = Counter(site.path.rsplit(".", 1)[-1] for site in self._sites if site.role == OTHER)
        rest = ", ".join(sorted(others)[:12])
        return f"found roles: {known or 'none'}; other linear maps: {rest or 'none'}"

    def _nothing(self, role: str) -> str:
        if not role.startswith("re:") and role not in (*GROUPS, *ROLES, OTHER):
            allowed = ", ".join((*GROUPS, *ROLES, OTHER))
            return f"roles: {role!r} is unknown; allowed: {allowed}, or 're:' and a regular expression; {self._found()}"
        return (
            f"roles: {role!r} fits nothing in {type(self.model).__name__} (family {self.family!r}); {self._found()}; "
            "a pattern like 're:.*q_proj$' picks modules by path"
        )


def _fits(site: Site, role: str) -> bool:
    if role.startswith("re:"):
        try:
            return re.match(role[3:], site.path) is not None
        except re.error as error:
            raise BadInput(f"roles: {role!r} is not a regular expression: {error}") from None
    return site.role in GROUPS.get(role, (role,))


def _stacks(model: nn.Module) -> dict[str, str]:
    """Tower name -> path of its list of blocks. The longest list; two, where one is of images and one of text."""
    found: list[tuple[int, str]] = []
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(old) for old in taken):
            continue
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1 and any(True for _ in children[0].children())
        if alike and all(any(is_linear(part) for part in child.modules()) for child in children):
            found.append((len(children), path))
            taken.append(f"{path}." if path else "")
    found.sort(key=lambda pair: -pair[0])  # stable: the first of equals
    towers: dict[str, str] = {}
    for _, path in found:
        for tower, words in _TOWERS.items():
            if any(word in path for word in words):
                towers.setdefault(tower, path)
                break
    if len(towers) > 1:
        return dict(sorted(towers.items(), reverse=True))
    return {"": found[0][1]} if found else {}


def _block(module: nn.Module, path: str, layer: int, tower: str, text: bool) -> Block:
    # CLIP's attention modules serve both towers and do not say that text is causal.
    causal = _blocks.is_causal(module) or (text and type(module).__name__ == "CLIPEncoderLayer")
    return Block(f"{tower}.{layer}" if tower else str(layer), layer, tower, path, module, causal)


def _find_sites(model: nn.Module, blocks: list[Block]) -> list[Site]:
    owners = {block.path: block for block in blocks}
    sharing: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing.setdefault(id(weight), []).append(path)
    drafts: list[dict[str, Any]] = []
    wrapped: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(old) for old in wrapped) or PREFIX in path
        if inside or not is_linear(module):
            continue
        wrapped.append(f"{path}." if path else "")
        owner = next((owners[head] for head in _heads(path) if head in owners), None)
        relative = path[len(owner.path) + 1 :] if owner else path
        d_in, d_out, transposed = features(module)
        shared = sharing.get(id(module._parameters.get("weight")), [])
        for role, out_slice in roles_of(relative, d_in, d_out) if owner else [(OTHER, None)]:
            draft = {"role": role, "path": path, "module": module, "in_features": d_in, "transposed": transposed}
            draft |= {"layer": owner.layer if owner else -1, "tower": owner.tower if owner else ""}
            draft |= {"out_slice": out_slice, "out_features": out_slice[1] - out_slice[0] if out_slice else d_out}
            drafts.append(draft | {"tied": tuple(p for p in shared if p != path), "relative": relative})
    return _named(drafts)


def _heads(path: str) -> list[str]:
    """Every beginning of a dotted path, longest first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _named(drafts: list[dict[str, Any]]) -> list[Site]:
    """Sites with unique names, ordered by tower, layer and role; what is outside the blocks comes last."""
    count = Counter((d["tower"], d["layer"], d["role"]) for d in drafts)
    sites = []
    for draft in drafts:
        relative = draft.pop("relative")
        plain = draft["role"] != OTHER and count[draft["tower"], draft["layer"], draft["role"]] == 1
        name = draft["role"] if plain else relative
        name = name if draft["layer"] < 0 else f"{draft['layer']}.{name}"
        sites.append(Site(name=f"{draft['tower']}.{name}" if draft["tower"] else name, **draft))
    return _ordered(sites)


def _ordered(sites: list[Site]) -> list[Site]:
    rank = {role: number for number, role in enumerate((*ROLES, OTHER))}
    return sorted(sites, key=lambda s: (s.layer < 0, s.tower != "vision", s.tower, s.layer, rank[s.role]))
