"""The only training loop. It owns the step; methods return losses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .assembly import (
    as_labels,
    build_heads,
    check_combination,
    check_routing,
    check_touched,
    choose_head,
    choose_objective,
    complete_methods,
    settings_of,
)
from .attachment import Original, hold, holds, refuse_taken
from .bookkeeping import Counters, Past, Position, quiet
from .bookmark import Bookmark, HeadMark
from .config import PretrainConfig, ProtocolConfig, TrainingConfig
from .data import Batch, Output, Rows
from .drift import correct_statistics, keep_features
from .early_stopping import EarlyStopping, check_early_stopping
from .errors import BadInput
from .heads import Head
from .hosts import Host
from .loading import Plan, derived_seed, granted
from .methods import Method
from .protocol import check_granted
from .replay import ReplayBuffer
from .services import Services
from .sharding import check_sharding, refuse_split, split_host, splits_banks, splits_host
from .state import generator_state, model_hash, set_generator_state
from .stepping import Stepping
from .streams.experience import Experience
from .watch import OwnPasses, check_bytes, check_kept, check_sampler


class System(nn.Module):
    """Host and head as one module: what a wrapper for several processes sees. The user's model is never the wrapper."""

    def __init__(self, learner: Loop):
        super().__init__()
        self.host = learner.model
        if learner.head is not None:
            self.head = learner.head.module
        if learner.auxiliary_head is not None:
            self.auxiliary_head = learner.auxiliary_head.module
        self._learner = (learner,)  # in a tuple so that it is no submodule and no part of the state

    def forward(self, batch: Batch, training_head: bool = False) -> Output:
        learner = self._learner[0]
        head = learner.auxiliary_head if training_head and learner.auxiliary_head is not None else learner.head
        if training_head and head is not None:
            head = head.in_training()
        return learner.objective.forward(self.host, head, batch, learner.pooling)


class Loop(Stepping):
    """Keeps a pretrained transformer learning, one experience after another.

    Args:
        model: the user's own transformers model; small modules are put into it, it stays the same object.
        processor: its tokenizer or an image processor.
        method: a name, `{name: settings}`, or a list of these, e.g.
            `[{"moram": {"rank": 8}}, {"er": {"budget": 200}}]`.
        head: "cosine" (default for classification), "linear", "ridge", "ncm", "slda", "slca", "class_text"
            (default for image_text), or `{name: settings}`.
        objective: "classification", "causal_lm" or "image_text", or `{name: settings}`.
        training, protocol: `TrainingConfig`, `ProtocolConfig`, or dicts of their fields.
        seed: seed of every random draw.
        classes: all class names, where they are declared in advance (needed for the mask "all" and the label space
            "declared").

    Raises:
        BadInput: a name, setting or combination that cannot be honoured.
        ProtocolRefused: a method needs more than the protocol grants.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        method: Any = "moram",
        head: Any = None,
        objective: Any = "classification",
        training: Any = None,
        protocol: Any = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ):
        # Everything that can be refused is refused before the model is touched.
        self.training = settings_of(training, TrainingConfig, "training")
        self.protocol = settings_of(protocol, ProtocolConfig, "protocol")
        self.objective = choose_objective(objective)
        self.methods = complete_methods(method)
        self.head = choose_head(head, self.objective)
        self.declared = as_labels(classes)
        check_granted(self.methods, self.protocol, self.training)
        check_early_stopping(self.methods, self.training, self.protocol)
        check_sharding(self.methods, self.training)
        check_combination(self.methods, self.objective, self.head, self.protocol, self.declared)
        self.host = Host(model, getattr(self.objective.config, "tower", None))
        refuse_taken(model)
        refuse_split(model)
        self.objective.check_model(model, processor)
        self.model, self.processor, self.seed = model, processor, seed
        automatic = getattr(self.objective.config, "pooling", None) == "auto"
        self.pooling = self.host.pool_default() if automatic else None
        self.labels: dict[str, int] = {}
        self.history: list[Past] = []
        self.writes: list[dict[str, Any]] = []
        self.position, self.counters = Position(), Counters()
        self._seed_everything()
        width = self.objective.width(self.host) if self.head is not None else 0
        self.auxiliary_head = build_heads(self.head, self.methods, width, seed)
        self.name_classes()
        self.accelerator = self._make_accelerator()
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "methods"))
        everything = any("all_data" in method.needs for method in self.methods)
        samples = sys.maxsize if everything else max(method.requires_rehearsal() for method in self.methods)
        limit = None if everything else self.protocol.rehearsal_bytes
        self.replay = ReplayBuffer(samples, limit, generator=self.generator)
        self.services, self.own_passes = Services(self), OwnPasses(self)
        self.optimization = None
        self._features, self._marked = {}, {}
        self.current = None
        self._original = Original(self.host)
        try:
            self._enter_model()
        except BaseException:
            self._original.restore(half_done=True)
            raise

    _base_hash: str | None = None
    """Taken before the host is split."""

    # ---- construction
    def _make_accelerator(self) -> Any:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Buffers are the same in every process by construction; a host may have parameters that no output needs (a
        # pooler).
        return Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)]
        )

    def _enter_model(self) -> None:
        self.model.to(self.device)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for item in self.methods:
            item.loop = self.services
            self._original.attach(item)
        check_touched(self.methods)
        check_routing(self.methods)
        self.system = System(self).to(self.device).eval()
        self._held = hold(self.model, self.methods)
        check_bytes(self, "before anything is learnt")
        self.split()

    def split(self) -> None:
        """Splits what `training.shard` says over the processes; after that nothing may be refused."""
        if self.training.shard == "none" or self._world == 1:
            return
        self._base_hash = self.base_hash()  # of the whole; it cannot change any more
        if splits_host(self.training):
            split_host(self.host, self.frozen_base(), self._world)
        for method in self.methods if splits_banks(self.training) else ():
            method.split_banks(self.accelerator.process_index, self._world)

    def frozen_base(self) -> dict[str, Tensor]:
        """The host's own tensors that no method trains or put in, by name; merged weights as they were at attach."""
        trained = {id(p) for _, p in self.named_trainable()} | {id(p) for m in self.methods for _, p in m.touched()}
        originals = {id(p): tensor for m in self.methods for p, tensor in m.originals()}
        found: dict[str, Tensor] = self.model.state_dict(keep_vars=True)
        return {
            name: originals.get(id(tensor), tensor) for name, tensor in found.items()
            if (id(tensor) not in trained or id(tensor) in originals) and "perdure" not in name
        }  # fmt: skip

    def base_hash(self) -> str:
        """Hash of the frozen base, by which a saved state knows its model."""
        return self._base_hash or model_hash(self.frozen_base())

    def refuse_detached(self) -> None:
        """Raises BadInput after `detach`: the model is no longer what was learnt."""
        if not holds(self.model, self._held):
            raise BadInput(
                "learner: it was detached from its model; make a new Learner, or load one with `from_pretrained`"
            )

    def _seed_everything(self) -> None:
        import random

        import numpy

        torch.manual_seed(derived_seed(self.seed, "torch"))
        random.seed(derived_seed(self.seed, "python"))
        numpy.random.seed(derived_seed(self.seed, "numpy") % 2**32)
        if self.training.num_threads:
            torch.set_num_threads(self.training.num_threads)

    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.named_trainable())

    @property
    def epoch(self) -> int:
        """Pass over the current experience, from 0."""
        return self.position.step // self._steps_per_epoch

    @property
    def seen(self) -> list[str]:
        """Names of the classes learnt so far, by class id."""
        return list(self.labels)

    # ---- classes
    def _refuse_undeclared(self, names: Iterable[str]) -> None:
        for name in names:
            if self.declared is not None and name not in self.declared:
                raise BadInput(
                    f"label: {name!r} is outside the declared set of {len(self.declared)} classes "
                    f"({', '.join(self.declared[:5])} ...); declare it or correct the row"
                )

    def _see(self, names: Iterable[str]) -> bool:
        """Gives new classes an id and a row in each head; True if a head grew."""
        for name in names:
            self.labels.setdefault(name, len(self.labels))
        wanted = len(self.labels)
        if self.protocol.mask == "all" and self.declared is not None:
            wanted = len(self.declared)
        self.name_classes()
        grew = False
        for head in (self.head, self.auxiliary_head):
            if head is not None and head.classes < wanted:
                head.grow(wanted)
                head.module.to(self.device)
                grew = True
        return grew

    @property
    def class_names(self) -> list[str]:
        if self.protocol.label_space == "seen" or self.declared is None:
            return list(self.labels)
        return list(dict.fromkeys([*self.labels, *self.declared]))

    def name_classes(self) -> None:
        """Tells a head that knows classes by their names which there are."""
        if self.head is not None and self.head.by_text:
            names = self.class_names
            objective: Any = self.objective
            self.head.name_classes(  # type: ignore[attr-defined]
                objective.class_tokens(names, self.processor), objective.pad(self.processor)
            )

    def _hold_class_texts(self) -> None:
        """Texts of the classes of earlier experiences stand still in training: they are encoded once, now.

        Without boundaries no experience is earlier, and joint training learns all classes at once: none stands still.
        """
        if self.head is None or not self.head.by_text:
            return
        everything = any("all_data" in method.needs for method in self.methods)
        known = self.protocol.boundaries == "train" and not everything
        current = [self.labels[name] for name in (self.history[-1].classes if known else self.labels)]
        with quiet(self.model), torch.no_grad(), self.autocast():
            self.objective.hold_class_texts(self.model, self.head, len(self.labels), current)  # type: ignore[attr-defined]

    # ---- learning
    def learn(self, experience: Experience, *, on_step: Callable[[Any, dict[str, float]], None] | None = None) -> Loop:
        """Learns one experience; continues in its middle when a state from there was loaded.

        Args:
            experience: what to learn; its train rows are read as often as `training.epochs` says.
            on_step: called after every optimizer step with the losses of this step (on logged steps, else empty).

        Raises:
            BadInput: the experience is empty, a row does not fit, or another one was left in its middle.
            NonFiniteLoss: the loss is NaN or infinite; the optimizer has not stepped on it.

        After an error before the first step all is as if the experience had not been offered. After a later one the
        learner stands in its middle: it takes the same experience again, an older state, or `abandon`.
        """
        self.refuse_detached()
        self._clock = time.perf_counter()
        if not len(experience.train):
            raise BadInput(f"experience {experience.name!r}: has no training rows; give at least one")
        if self.position.phase == "train":
            self._refuse_another(experience)
        else:
            self._bookmark = Bookmark(self, self._tells)
        try:
            self._learn(experience, on_step)
        except BaseException:
            if self._bookmark is not None:
                self._bookmark.restore()
            raise
        finally:
            self._bookmark = None
        return self

    def _learn(self, experience: Experience, on_step: Callable[[Any, dict[str, float]], None] | None) -> None:
        grew, resumed = False, self.position.phase == "train"
        seen, name = self._withheld(experience), experience.name
        if resumed:
            self.current = seen
        else:
            grew = self._begin(experience, seen)
        experience = seen
        rows = self._training_rows(experience, resumed)
        if len(rows):
            plan = self._plan(rows)
            self._steps_per_epoch, self.steps_planned = plan.steps_per_epoch, plan.steps
            if (self.optimization is None or grew) and self.named_trainable():
                self._optimize_anew(keep=self.optimization)
            if not resumed:
                keep_features(self, rows)
            self._train(rows, plan, on_step)
            self._end(experience, rows)
        self._forget_features(experience)
        self.tick()
        check_kept(self, experience.train, name)
        self._leave()

    def _leave(self) -> None:
        self.position, self._early = Position(self.position.experience + 1, 0, "boundary"), None
        if self.protocol.boundaries == "train":
            self.optimization = None

    def abandon(self) -> None:
        """Gives up the experience in whose middle an error has left the learner, so that it can learn others.

        What its steps have changed stays, and so does its write. Before its first step an experience that fails leaves
        nothing to give up, and nothing is done.
        """
        self.refuse_detached()
        if self.position.phase == "train":
            self._leave()

    def _refuse_another(self, experience: Experience) -> None:
        past = self.history[-1]
        if past.hash and experience.hash != past.hash:
            raise BadInput(
                f"experience {experience.name!r}: the learner stands at step {self.position.step} of {past.name!r}, "
                "whose rows are others; give that experience again, load an older state, or call `abandon` to leave "
                "the rest of it"
            )

    @property
    def _tells(self) -> bool:
        """Whether methods are told that the next experience begins; the first one they always see."""
        return self.protocol.boundaries == "train" or not self.history

    def _withheld(self, experience: Experience) -> Experience:
        """What the loop goes on with: test rows, an ungranted task id, the name that may say it and fields that no
        method may see are then within no plug-in's reach, whatever it looks into.
        """
        known = self.protocol.task_id != "none"
        return replace(
            experience, train=granted(experience.train, experience.classes), test=(),
            valid=granted(experience.valid), task=experience.task if known else None,
            name=experience.name if known else f"experience {self.position.experience}",
        )  # fmt: skip

    def _begin(self, experience: Experience, seen: Experience) -> bool:
        labels = self._label_names(experience)
        self.objective.check(experience.train, self.processor)
        self._refuse_undeclared(labels)
        told = self._tells
        if told and self.history and any("old_model" in method.needs for method in self.methods):
            self.services.remember_model()  # before the heads grow
        self.current, self._asked = seen, None
        grew = self._see(labels)
        self.history.append(Past(experience.index, experience.name, labels, experience.hash))
        self.writes.append(
            {"id": len(self.writes), "kind": "experience", "name": experience.name, "hash": experience.hash}
        )
        self._early = EarlyStopping.of(self.training, experience) if self._pretraining is None else None
        if told:
            self.services.router_log.reset()  # what it counts is this experience
            with self.own_passes.watched():
                for method in self.methods:
                    method.before_experience(_for_methods(seen))
            self.system.to(self.device)
        self._hold_class_texts()
        self.position = Position(self.position.experience, 0, "train")
        return grew

    def _label_names(self, experience: Experience) -> list[str]:
        if self.head is None or self.objective.unlabelled(experience.train):
            return []
        names = dict.fromkeys(experience.classes)
        for number, row in enumerate(experience.train):
            if row.get("label") is None:
                raise BadInput(
                    f"experience {experience.name!r}, row {number}: has no field 'label'; map it with stream.fields"
                )
            if str(row["label"]) not in names:
                raise BadInput(
                    f"experience {experience.name!r}, row {number}: label {row['label']!r} is not among its classes "
                    f"({', '.join(list(names)[:10])}); declare it or correct the row"
                )
        return list(names)

    def _training_rows(self, experience: Experience, resumed: bool) -> Rows:
        """What the methods choose to train on; asked again after a resume, they draw what they drew before."""
        rows: Rows = experience.train
        choosing = [method for method in self.methods if type(method).sampler is not Method.sampler]
        if not choosing or self.protocol.boundaries == "none":  # to be asked would tell that something new begins
            return rows
        now = generator_state(self.generator)
        if resumed and self._asked is not None:
            set_generator_state(self.generator, self._asked)
        else:
            self._asked = now
        for method in choosing:
            chosen = method.sampler(_for_methods(experience))
            if chosen is not None:
                rows = chosen
        check_sampler(self, experience.train, rows, self._epochs)
        if resumed:
            set_generator_state(self.generator, now)
        return rows

    @property
    def _pretraining(self) -> PretrainConfig | None:
        """How the host as a whole trains in this experience; None where a method adapts it."""
        return next((method.config.pretrain for method in self.methods if method.pretrains), None)

    @property
    def _epochs(self) -> int:
        own = None if self._pretraining is None else self._pretraining.epochs
        return self.training.epochs_of(self.position.experience) if own is None else own

    def _plan(self, rows: Rows) -> Plan:
        t = self.training
        return Plan(
            len(rows), t.per_device_train_batch_size, t.gradient_accumulation_steps, self.accelerator.num_processes,
            self.accelerator.process_index, self._epochs, t.max_steps,
            derived_seed(self.seed, "experience", self.position.experience),
        )  # fmt: skip

    def _end(self, experience: Experience, rows: Rows) -> None:
        self.model.eval()
        if self.protocol.boundaries == "train" or experience.last:
            with self.own_passes.watched():
                for method in self.methods:
                    method.after_experience(_for_methods(experience))
        if self.head is not None and (self.head.closed_form or self.head.fits):
            self._fit_head(experience, rows)

    def _fit_head(self, experience: Experience, rows: Rows) -> None:
        """The pass of a head with statistics; counted as extra where the adapter has already had its own passes."""
        assert self.head is not None
        mark = HeadMark(self.head)
        try:
            self._fit(self.head, experience, rows)
        except BaseException:  # half a pass must not stay in the sums: the whole pass comes again
            mark.restore()
            raise

    def _fit(self, head: Head, experience: Experience, rows: Rows) -> None:
        correct_statistics(self, rows)
        head.begin_fit(len(rows), derived_seed(self.seed, "fit", self.position.experience) % 2**31)
        if self.caches_features:
            features = self._cached_features(experience, "train", rows)
            ids = torch.tensor([self.labels[str(row["label"])] for row in rows])
            head.update(features.to(self.device), ids.to(self.device))
        else:
            if self.optimization is not None:
                self.counters.extra_passes += 1
                self.counters.extra_rows += len(rows)
            for batch in self.batches(rows):
                with torch.no_grad(), self.autocast():
                    output = self.objective.forward(self.model, None, batch, self.pooling)
                assert output.features is not None and batch.labels is not None
                head.update(output.features.float(), batch.labels)
        head.end_fit()


def _for_methods(seen: Experience) -> Experience:
    """Validation rows judge a method, which learns from the others alone."""
    return replace(seen, valid=())
