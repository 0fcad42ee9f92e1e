"""What was learnt in forms that other programs read: merged weights, a PEFT adapter, stacked tensors of routed items.

Each folder carries `export.json`, which says what it is of and what it does not keep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import BadInput
from .gathering import processes
from .hosts.roles import PREFIX
from .memory.effects import low_rank_update
from .sharding import in_parts, splits_banks

if TYPE_CHECKING:
    from .learner import Learner
    from .methods import Method
    from .methods._updates import Update

FORMS = ("merged", "peft", "stacked")
DOCUMENT, STACKED = "export.json", "stacked.safetensors"
_GENERAL = "going on with learning, `forget` and `undo`: statistics, penalties and who wrote what stay behind"


def export(learner: Learner, folder: str | Path, to: str) -> dict[str, Any]:
    """Writes what a learner has learnt into `folder` and returns what export.json says.

    Args:
        folder: made where it does not exist; must be empty.
        to: "merged", a model folder as `save_pretrained` of transformers writes it; "peft", an adapter folder; or
            "stacked", the items of routed memories in one safetensors file (docs/export.md).

    Raises:
        BadInput: the method's effect has no such form, nothing was learnt, or an experience is not at its end.
        CannotWrite: the disk is full or the folder not writable.
    """
    from .state import files

    folder = Path(folder)
    if to not in FORMS:
        raise BadInput(f"export: there is no form {to!r}; choose {', '.join(FORMS)}")
    learner.refuse_detached()
    if learner.position.phase == "train" or not learner.history:
        state = "stands in the middle of an experience" if learner.history else "has learnt nothing yet"
        raise BadInput(f"export: the learner {state}; learn the experience to its end first")
    if to == "merged" and in_parts(learner.model):
        raise BadInput("export: the host is split over processes; save the learner and load it in one to export it")
    if splits_banks(learner.training) and processes() > 1:
        raise BadInput("export: banks are split over processes; save the learner and load it in one to export it")
    make = {"merged": _Merged, "peft": _Peft, "stacked": _Stacked}[to](learner)
    with files.writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"export: {folder} is there already and not empty; give another folder")
        files.make_folder(folder, exist_ok=True)
        facts = {
            "form": to,
            "method": [{"name": m.name, "settings": m.config.model_dump(mode="json")} for m in learner.methods],
            "base": learner._base_name(),
            "experiences": [past.name for past in learner.history],
            "loses": make.loses(),
            **make.write(folder),
        }
        text = json.dumps(facts, indent=1)
        files.atomic_write_text(folder / DOCUMENT, text + "\n")
    return json.loads(text)


class _Form:
    """One form of export: makes sure that it fits, says what it loses, writes."""

    form = ""

    def __init__(self, learner: Learner):
        self.learner = learner

    def loses(self) -> list[str]:
        head = self.learner.head
        lost = [_GENERAL]
        if head is not None:
            classes = len(self.learner.class_names)
            lost.insert(0, f"the head {head.name} with its {classes} classes: the model gives features, no classes")
        return lost

    def write(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    # ---- updates of weights
    def _updates(self) -> list[tuple[Method, list[Update]]]:
        """The updates of each method.

        Raises:
            BadInput: a method's effect is no update of weights.
        """
        found = []
        for method in self.learner.methods:
            updates = method.updates()
            if updates is None:
                other = "; --to stacked writes its items" if method.stacks() else "; `save_pretrained` keeps it"
                raise BadInput(
                    f"export: {method.name} cannot be written as {self.form}: what it adds depends on the input, so it "
                    f"is no update of weights{other}"
                )
            found.append((method, [update for update in updates if update.down.shape[0]]))
        return found


class _Merged(_Form):
    form = "merged"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.updates = self._updates()
        written = [name for method in learner.methods for name, _ in method.touched()]
        if not written and not any(updates for _, updates in self.updates):
            names = " and ".join(method.name for method in learner.methods)
            raise BadInput(f"export: {names} left the model as it was, so there is nothing to merge")

    def loses(self) -> list[str]:
        added = [method.name for method, updates in self.updates if updates and not method.merged]
        rounding = f"bits: W + ΔW of {' and '.join(added)} is rounded once to the weight's precision"
        return [*super().loses(), *([rounding] if added else [])]

    def write(self, folder: Path) -> dict[str, Any]:
        model: Any = self.learner.model
        state = plain_state(model)
        for method, updates in self.updates:
            for update in () if method.merged else updates:
                name = f"{update.path}.weight"
                delta = low_rank_update(update.down, update.up)
                if _transposed(model, update.path):
                    delta = delta.t()
                state[name] = (state[name].cpu().double() + delta).to(state[name].dtype)
        model.save_pretrained(folder, state_dict=state)
        if hasattr(self.learner.processor, "save_pretrained"):
            self.learner.processor.save_pretrained(folder)
        return {"model": type(model).__name__}


class _Peft(_Form):
    form = "peft"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        if learner.objective.own_head:
            raise BadInput("export: the model's own head trained too, which a PEFT adapter lacks; export it merged")
        updates = self._updates()
        written = [m.name for m in learner.methods if m.touched() and not m.merged]
        if written:
            raise BadInput(
                f"export: {' and '.join(written)} trained weights of the model itself, which no adapter holds; export "
                "it merged"
            )
        self.maps: dict[str, tuple[Tensor, Tensor]] = {}
        for update in (each for _, several in updates for each in several):
            down, up = self.maps.get(update.path, (update.down[:0], update.up[:0]))
            self.maps[update.path] = (torch.cat([down, update.down]), torch.cat([up, update.up]))
        if not self.maps:
            names = " and ".join(method.name for method in learner.methods)
            raise BadInput(f"export: {names} added nothing to the model, so there is no adapter to write")

    def loses(self) -> list[str]:
        return [*super().loses(), "dropout and growth: one adapter of rank r1 + r2 + ... in place of one an experience"]

    def write(self, folder: Path) -> dict[str, Any]:
        from peft import LoraConfig
        from safetensors.torch import save_file

        model = self.learner.model
        ranks = {path: down.shape[0] for path, (down, _) in self.maps.items()}
        most = max(ranks.values())
        other = {path: rank for path, rank in ranks.items() if rank != most}
        LoraConfig(
            r=most, lora_alpha=most, rank_pattern=other, alpha_pattern=other, target_modules=sorted(ranks),
            fan_in_fan_out=any(_transposed(model, path) for path in ranks), inference_mode=True,
            base_model_name_or_path=self.learner._base_name() or None,
            task_type="CAUSAL_LM" if self.learner.objective.predicts_tokens else None,
        ).save_pretrained(str(folder))  # fmt: skip
        tensors = {}
        for path, (down, up) in self.maps.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = down.cpu().contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = up.t().cpu().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return {"ranks": ranks}


class _Stacked(_Form):
    form = "stacked"

    def __init__(self, learner: Learner):
        super().__init__(learner)
        self.stacks = [(number, m.stacks()) for number, m in enumerate(learner.methods) if m.stacks()]
        without = [m.name for m in learner.methods if m.adapts and not m.stacks()]
        if without or not self.stacks:
            names = " and ".join(without or [m.name for m in learner.methods])
            raise BadInput(
                f"export: {names} keeps no routed items that could be stacked; use merged or peft where its effect is "
                "an update of weights, else `save_pretrained`"
            )
        written = [m.name for m in learner.methods if m.touched() and not m.stacks()]
        if written or any(not learner.methods[n].keeps_output for n, _ in self.stacks):
            raise BadInput(
                "export: the model's own weights were trained or replaced too, and the stacked file holds items alone; "
                "use `save_pretrained`"
            )

    def loses(self) -> list[str]:
        return [*super().loses(), "the routing itself: a reader must score, select and weigh as docs/export.md says"]

    def write(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        places = []
        for number, stacks in self.stacks:
            for name, stack in stacks.items():
                for key, tensor in stack.tensors.items():
                    tensors[f"{number}/{name}/{key}"] = tensor.cpu().contiguous().clone()
                places.append({
                    "method": number, "name": name, "path": stack.path, "out_slice": stack.out_slice,
                    "exit": stack.exit or stack.path,
                })  # fmt: skip
        save_file(tensors, folder / STACKED)
        return {"places": places}


def plain_state(model: Any) -> dict[str, Tensor]:
    """The model's tensors without what methods put in, under the names that its own class has."""
    ours = (PREFIX, PREFIX.rstrip("_"), "lora_")
    found = {}
    for name, tensor in model.state_dict().items():
        parts: Sequence[str] = name.split(".")
        if not any(part.startswith(ours) for part in parts):
            found[".".join(part for part in parts if part != "base_layer")] = tensor
    return found


def _transposed(model: Any, path: str) -> bool:
    from .hosts.roles import features

    return features(model.get_submodule(path))[2]
