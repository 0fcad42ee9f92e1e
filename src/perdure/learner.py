"""The public face of the loop: learn, evaluate, predict, save, load."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arrivals import arrival, learn_spooled
from .assembly import as_labels
from .attachment import holds, release
from .bookkeeping import Counters, Past, Position, quiet
from .config import TrainingConfig
from .data import Batch, Output, Row, Rows, without_answers
from .early_stopping import EarlyStopping
from .errors import BadInput
from .evaluation.classes import count_classes
from .heads import Head
from .loading import derived_seed, drawn
from .loop import Loop
from .memory.observe import RouterLog
from .models import ASKED
from .objectives import right
from .passes import features_of
from .sharding import by_the_first, splits_banks
from .streams.experience import Experience
from .watch import check_scored_rows_gone, check_votes

log = logging.getLogger(__name__)


class Learner(Loop):
    __doc__ = Loop.__doc__

    # ---- evaluation and use
    def evaluate(
        self, experiences: Sequence[Experience], split: str = "test", *, per_class: dict[str, list[int]] | None = None
    ) -> dict[int, float | None]:
        """Scores the model on each experience; nothing of the learner changes, random states included. With
        `training.shard` all processes must call whatever runs the model, with the same rows.

        Args:
            experiences: e.g. `stream.seen`.
            split: "test" or "valid".
            per_class: class -> [rows classified right, rows]; the rows scored here are added, where they have classes.

        Returns:
            experience index -> accuracy in [0, 1] or perplexity; None where the split has no rows.

        Raises:
            BadInput: no list is given, two experiences have one index, or the learner was detached.
        """
        self.refuse_detached()
        if isinstance(experiences, Experience):
            raise BadInput(
                f"evaluate: expected a list of experiences, found one ({experiences.name!r}); give [experience]"
            )
        names: dict[int, str] = {}
        for experience in experiences:
            if experience.index in names:
                raise BadInput(
                    f"evaluate: {names[experience.index]!r} and {experience.name!r} both have the index "
                    f"{experience.index}, so one score would be lost; score them in two calls"
                )
            names[experience.index] = experience.name
        return {experience.index: self._evaluate_one(experience, split, per_class) for experience in experiences}

    def _evaluate_one(self, experience: Experience, split: str, per_class: dict[str, list[int]] | None) -> float | None:
        rows = getattr(experience, split)
        if self.protocol.max_test_rows is not None:
            rows = drawn(rows, self.protocol.max_test_rows)
        if not len(rows):
            return None
        together = self.head is not None and self.objective.unlabelled(rows)
        if self.head is not None and not self.head.classes and not together:
            return 0.0
        allowed = self._allowed_at_test(experience)
        total, voted = torch.zeros(2, dtype=torch.float64), False
        parts = []
        with quiet(self.model), torch.no_grad(), self.classes_encoded():
            for batch in self.scored_batches(experience, split, rows):
                with self.autocast():
                    asked = without_answers(batch)
                    output = self.forward(asked)
                    if not (voted or together or self.objective.writes) and len(batch) > 1:
                        check_votes(self, asked, output)
                        voted = True
                if self.objective.writes:
                    total += _summed(self.objective.grade(batch.rows, output.texts, experience.name))  # type: ignore[attr-defined]
                    continue
                if together:  # every row is scored against all others
                    parts.append((replace(batch, inputs={}), output))
                    continue
                total += self._score(batch, output, allowed)
                if per_class is not None and self.head is not None:
                    count_classes(per_class, batch.rows, right(batch, output, allowed).tolist())
            if together:
                total += self._score(*self.objective.gathered(parts), None)
        check_scored_rows_gone(self, experience, split, rows)
        return self.objective.finish(float(total[0]), int(total[1]))

    def _score(self, batch: Batch, output: Output, allowed: Tensor | None) -> Tensor:
        return _summed(self.objective.score(batch, output, allowed))

    def _allowed_at_test(self, experience: Experience) -> Tensor | None:
        if self.head is None:
            return None
        allowed = torch.zeros(self.head.classes, dtype=torch.bool, device=self.device)
        ids = {name: number for number, name in enumerate(self.class_names)}
        known = [ids[name] for name in experience.classes if name in ids]
        if self.protocol.task_id == "test" and known:
            allowed[known] = True
            return allowed
        allowed[: len(ids)] = True  # the mask "all" grows the head further: unseen classes never compete
        return allowed

    def forward(self, batch: Batch) -> Output:
        """One forward pass as it is used in evaluation, through the method that owns the prediction; what the model
        writes, where it is scored on that.
        """

        def plain(b: Batch) -> Output:
            if self.objective.writes:
                return self.objective.write(self.model, self.processor, b)  # type: ignore[attr-defined]
            return self.objective.forward(self.model, self.head, b, self.pooling)

        owner = next((method for method in self.methods if method.predict is not None), None)
        return plain(batch) if owner is None else owner.predict(batch, plain)  # type: ignore[misc]

    def predict(self, rows: Rows, classes: Sequence[str] | None = None) -> list[str]:
        """Class names of rows (no labels needed).

        Args:
            rows: what to classify.
            classes: the classes to choose among, where the task is known; all of the label space when absent.

        Raises:
            BadInput: nothing was learnt yet, a class is unknown, or the objective has no classes.
        """
        if self.head is None:
            raise BadInput(f"predict: objective {self.objective.name!r} has no classes; use the model's `generate`")
        if not self.class_names:
            raise BadInput("predict: nothing was learnt yet; call `learn` first")
        self.refuse_detached()
        names, found = self.class_names, []
        ids = {name: number for number, name in enumerate(names)}
        classes = None if classes is None else as_labels(classes) or []
        unknown = [name for name in classes or () if name not in ids]
        if unknown or (classes is not None and not len(classes)):
            raise BadInput(
                f"classes: {unknown or 'an empty list'} cannot be predicted; give some of {', '.join(names)}"
            )
        among = torch.tensor([ids[name] for name in (names if classes is None else classes)], device=self.device)
        with quiet(self.model), torch.no_grad(), self.classes_encoded():
            for batch in self.batches(rows, unlabelled=True):
                with self.autocast():
                    logits = self.forward(without_answers(batch)).logits
                assert logits is not None
                found += [names[number] for number in among[logits[:, among].argmax(-1)].tolist()]
        return found

    def features(self, rows: Rows) -> Tensor:
        """Pooled features [rows, D] in float32 on the CPU, in evaluation mode.

        Raises:
            BadInput: there are no rows, or the learner was detached.
        """
        self.refuse_detached()
        if not len(rows):
            raise BadInput("features: there are no rows; give at least one")
        with quiet(self.model), torch.no_grad():
            found: dict[int, Tensor] = {}
            for batch in self.batches(rows, unlabelled=True, by_length=True):
                features = features_of(self.objective.forward(self.model, None, batch, self.pooling))
                found |= zip(batch.index.tolist(), features, strict=True)  # type: ignore[union-attr]
        return torch.stack([found[number] for number in range(len(rows))])

    def observe(self, rows: Rows, log: RouterLog) -> None:
        """Adds to `log` how the memories answer rows (no labels needed), in evaluation mode; a text tower that encodes
        class names is asked for those of the current experience.
        """
        self.refuse_detached()
        with quiet(self.model), torch.no_grad():
            for batch in chain(self.batches(rows, unlabelled=True), self.text_batches()):
                with self.autocast(), self.observing(batch, log):
                    self.objective.forward(self.model, None, batch, self.pooling)

    def partial_fit(self, rows: Sequence[Row], *, spool: str | Path | None = None) -> Learner:
        """Learns rows that just arrived: one pass in batches. With `protocol.boundaries: none` the optimizer goes on
        from call to call and the method is not told that anything new begins; else each call is an experience. What
        an error leaves behind is said at `learn`.

        Args:
            rows: as those of an experience.
            spool: folder where the rows are kept, written before they are learnt. After a crash, load the last state
                you saved and go on: arrivals that the state does not hold are learnt first, in their order (with no
                new rows too).

        Raises:
            BadInput: no rows, a row that does not fit, a folder of another learner, or a method that learns after the
                last experience only.
        """
        late = [method.name for method in self.methods if "all_data" in method.needs]
        if late:
            raise BadInput(
                f"partial_fit: {', '.join(late)} learns nothing before the last experience, and arriving rows have "
                "none; give experiences to `learn`, the last one with last=True, or use another method"
            )
        try:
            train = list(rows)
        except TypeError:
            raise BadInput(f"partial_fit: expected a list of rows, found {type(rows).__name__}") from None
        if spool is None:
            self.learn(arrival(self.position.experience, train))
        else:
            learn_spooled(self, train, spool)
        return self

    def forget(self, write: int) -> Any:
        """Takes one write back at the level the method declares (`Method.removal`). What of it stays all the same is
        said under `left` in its record, `writes[write]`.

        Raises:
            BadInput: there is no such write, or the method cannot; `perdure undo` returns to an older state instead.
        """
        self.refuse_detached()
        if not 0 <= write < len(self.writes):
            raise BadInput(f"forget: write {write} does not exist; there are {len(self.writes)}")
        unable = [method.name for method in self.methods if method.removal == "rollback"]
        if unable:
            raise BadInput(f"forget: {', '.join(unable)} can only be rolled back; use `perdure undo` or an older state")
        if self.writes[write].get("forgotten"):
            raise BadInput(f"forget: write {write} ({self.writes[write]['name']}) was forgotten before")
        gone = [method.on_request("forget", {"write": write}) for method in self.methods]
        left = [f"{method.name}: {what}" for method in self.methods for what in method.left_by_forget()]
        left += [f"{self.head.name}: what the head learnt from it"] if self.head and not self.head.by_text else []
        self.writes[write] = {**self.writes[write], "forgotten": True, "left": left}
        self.services.router_log.reset()  # items were renumbered
        if self.optimization is not None:
            self._optimize_anew(keep=self.optimization)
        return gone

    def detach(self) -> nn.Module:
        """Takes everything out of the model again and returns it: the original, bit for bit, which parameters train and
        the mode of its modules included; blocks that `training.shard` split stay so. The learner is then of no further
        use, and a second call does nothing.
        """
        if holds(self.model, self._held):
            self._original.restore()
            release(self.model)
        return self.model

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a fresh process needs to go on bit for bit; the frozen base is not in it."""
        from .state import generator_state, rng_state

        self.check_finite()
        tensors, values = self.learnt_state()
        if self.optimization is not None:
            found, values["optimizer"] = self.optimization.state_dict()
            tensors |= _prefixed("optimizer", found)
        found, values["rng"] = rng_state()
        tensors |= _prefixed("rng", found)
        tensors["generator"] = generator_state(self.generator)
        if self.position.phase == "train" and self._asked is not None:
            tensors["sampler"] = self._asked
        if self._early is not None:
            found, values["early"] = self._early.state_dict()
            tensors |= _prefixed("early", found)
        found, values["replay"] = self.replay.state_dict()
        tensors |= _prefixed("replay", found)
        found, values["previous"] = self.services.previous_state()
        tensors |= _prefixed("previous", found)
        found, values["router"] = self.services.router_log.state_dict()
        tensors |= _prefixed("router", found)
        values |= {"position": asdict(self.position), "counters": asdict(self.counters)}
        return tensors, values

    def learnt_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was learnt: adapters, heads, classes; no optimizer, no random state."""
        self.refuse_detached()
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"methods": [], "names": [method.name for method in self.methods]}
        for number, method in enumerate(self.methods):
            found, described = method.state_dict()
            tensors |= _prefixed(f"method/{number}", found)
            values["methods"].append(described)
        for name, head in self._heads().items():
            found, values[name] = head.state_dict()
            tensors |= _prefixed(name, found)
        values |= {
            "labels": list(self.labels), "declared": self.declared, "writes": self.writes,
            "history": [asdict(past) for past in self.history],
        }  # fmt: skip
        return tensors, values

    def _heads(self) -> dict[str, Head]:
        heads = {"head": self.head, "auxiliary": self.auxiliary_head}
        return {name: head for name, head in heads.items() if head is not None}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state_dict` gave into a learner made with the same settings.

        Raises:
            BadInput: the state belongs to other methods or another head, or the learner was detached.
        """
        self.refuse_detached()
        from .state import set_generator_state, set_rng_state

        self.services.load_previous_state(_under("previous", tensors), values["previous"], self._load_learnt)
        self._load_learnt(tensors, values)
        self.position, self.counters = Position(**values["position"]), Counters(**values["counters"])
        self.replay.load_state_dict(_under("replay", tensors), values["replay"])
        self.services.router_log.load_state_dict(_under("router", tensors), values["router"])
        self.optimization = None
        if "optimizer" in values:
            self._optimize_anew()
            assert self.optimization is not None
            self.optimization.load_state_dict(_under("optimizer", tensors), values["optimizer"])
        self._early = None
        stopping = self.training.early_stopping
        if "early" in values and stopping is not None:
            self._early = EarlyStopping(stopping.every, stopping.patience)
            self._early.load_state_dict(_under("early", tensors), values["early"])
        set_generator_state(self.generator, tensors["generator"])
        self._asked = tensors.get("sampler")
        set_rng_state(_under("rng", tensors), values["rng"])

    def _load_learnt(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        mine = [method.name for method in self.methods]
        if values["names"] != mine:
            raise BadInput(f"method: the state was made with {values['names']}, this learner has {mine}; use the same")
        heads = self._heads()
        for name in ("head", "auxiliary"):
            if (name in values) != (name in heads):
                raise BadInput(f"{name}: the state and this learner do not both have one; use the same head setting")
        self.labels = {name: number for number, name in enumerate(values["labels"])}
        self.declared, self.writes = values["declared"], list(values["writes"])
        self.history = [Past(**past) for past in values["history"]]
        for number, (method, described) in enumerate(zip(self.methods, values["methods"], strict=True)):
            method.load_state_dict(_under(f"method/{number}", tensors), described)
        for name, head in heads.items():
            head.load_state_dict(_under(name, tensors), values[name])
        self.name_classes()
        self.system.to(self.device)
        self._features.clear()

    def stored_bytes(self) -> int:
        """Bytes that must be kept beside the frozen base to go on learning, measured on the state itself.

        Optimizer moments and random states are left out: they are gone at a boundary.
        """
        tensors, values = self.learnt_state()
        replayed, described = self.replay.state_dict()
        every = [*tensors.values(), *replayed.values()]
        return sum(t.numel() * t.element_size() for t in every) + len(
            json.dumps([values["methods"], described]).encode()
        )

    # ---- folders
    def save_pretrained(self, folder: str | Path, *, replay: bool = False) -> Path:
        """Writes adapters, heads and settings (no base weights) into `folder`; `from_pretrained` reads them back.

        Where `training.shard` splits banks, every process must call it, and the first one writes.

        Args:
            folder: made where it does not exist.
            replay: also write the rows kept for rehearsal, as they are. Without them a method that rehearses begins
                with an empty buffer.

        Raises:
            CannotWrite: the disk is full or the folder not writable; what was there before stays.
        """
        from .state.portable import write_portable

        tensors, values = self.learnt_state()
        values |= {
            "settings": self.settings(),
            "base": {"hash": self.base_hash(), "name": self._base_name()},
        }
        if replay:
            found, values["replay"] = self.replay.state_dict()
            tensors |= _prefixed("replay", found)
        elif len(self.replay):
            log.warning(
                "save_pretrained: the %d rows kept for rehearsal are not in %s; replay=True takes them along",
                len(self.replay), folder,
            )  # fmt: skip
        write = partial(write_portable, Path(folder), tensors, values)
        return by_the_first(self.accelerator, write, str(folder)) if splits_banks(self.training) else write()

    def export(self, folder: str | Path, to: str = "merged") -> dict[str, Any]:
        """Writes what was learnt for other programs: "merged", "peft" or "stacked"; see `export.export`."""
        from .export import export

        return export(self, folder, to)

    def settings(self) -> dict[str, Any]:
        """The arguments that make this learner again, JSON-able."""
        return {
            "method": [{method.name: method.config.model_dump(mode="json")} for method in self.methods],
            "head": None if self.head is None else {self.head.name: self.head.config.model_dump(mode="json")},
            "objective": {self.objective.name: self.objective.config.model_dump(mode="json")},
            "training": self.training.model_dump(mode="json"),
            "protocol": self.protocol.model_dump(mode="json"),
            "seed": self.seed,
            "classes": self.declared,
        }

    def describe(self) -> dict[str, Any]:
        """Settings and what is known about each part, for the report."""
        return self.settings() | {
            "details": [
                {"name": m.name, "title": m.title, "status": m.status, "removal": m.removal, "needs": sorted(m.needs)}
                for m in self.methods
            ],
            "metric": self.objective.metric,
            "higher_is_better": self.objective.higher_is_better,
        }

    def _base_name(self) -> str:
        """What `from_pretrained` can load the base by: as `load_model` was asked for it, else as transformers was."""
        asked = getattr(self.model, ASKED, None)
        return str(asked or getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None, processor: Any = None) -> Learner:
        """Reads a folder of `save_pretrained`. The base model is given, or loaded under the name it was saved with.

        Raises:
            BadInput: no such folder, or the base is another model (its hash differs). A given model is then as before.
            DamagedState: a file fails its checksum, or is not what `save_pretrained` writes.
        """
        from .state.portable import check_form, point_to, read_portable

        tensors, values = read_portable(Path(folder))
        check_form(values, set(inspect.signature(cls).parameters) - {"model", "processor"}, folder)
        objective = next(iter(values["settings"]["objective"]))
        if model is None:
            from .models import load_model

            if not values["base"]["name"]:
                raise BadInput(f"{folder}: does not say which model it belongs to; give `model` and `processor`")
            model, processor, _ = load_model(values["base"]["name"], objective)
        settings = point_to(values["settings"], folder)
        whole = {**settings, "training": {**settings["training"], "shard": "none"}}  # split only once all fits
        learner = cls(model, processor, **whole)
        try:
            learner._take_over(tensors, values, folder)
            learner.training = TrainingConfig(**settings["training"])
            learner.split()
        except BaseException:
            learner.detach()
            raise
        return learner

    def _take_over(self, tensors: dict[str, Tensor], values: dict[str, Any], folder: str | Path) -> None:
        base, found = values["base"], self.base_hash()  # before anything is put into the model
        if found != base["hash"]:
            raise BadInput(
                f"model: its weights (hash {found[:12]}) are not those that {folder} was learnt on "
                f"({base['hash'][:12]}, {base['name'] or 'unnamed'}); load that model"
            )
        try:
            self._load_learnt(tensors, values)
            if "replay" in values:
                self.replay.load_state_dict(_under("replay", tensors), values["replay"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(
                f"model: what {folder} holds does not fit {type(self.model).__name__} ({reason}); give the model it "
                f"was learnt on ({base['name'] or 'unnamed'})"
            ) from error
        self.position.experience = len(self.history)
        # What is learnt from here on must not draw again what the first experiences drew.
        self.generator.manual_seed(derived_seed(self.seed, "methods", len(self.writes)))


def _summed(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.as_tensor(x).double().cpu() for x in parts])


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
