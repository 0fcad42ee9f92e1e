"""The learner whose steps the Hugging Face Trainer takes: hooks, services and state as ever, no loop of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..assembly import complete_methods
from ..bookkeeping import quiet
from ..bookmark import Bookmark
from ..config import TrainingConfig
from ..data import Batch, Rows
from ..errors import BadInput
from ..learner import Learner
from ..loading import evenly
from ..streams.experience import Experience
from ..streams.rows import feed_row
from .objective import objective_of
from .support import check_methods, check_shared, check_trainer

_HASHED_ROWS = 256
_HEAD = "host_head/"


class TrainerRows(Sequence):
    """Rows of the Trainer's data set as its collator takes them."""

    checked, labels = True, ()

    def __init__(self, dataset: Any):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise BadInput(
                f"Trainer: train_dataset: {type(dataset).__name__} has no length, and methods go over an experience's "
                "rows again when it ends; give a data set that is not streamed"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.dataset[number] for number in range(*at.indices(len(self)))]
        return self.dataset[int(at)]

    def hash(self) -> str:
        """sha256 over the number of rows and the text and whole numbers of up to 256 of them, evenly spaced.

        Other fields may be augmented anew each time, such as images.
        """
        plain = self.dataset.with_format(None) if hasattr(self.dataset, "with_format") else self.dataset
        digest = hashlib.sha256(str(len(self)).encode())
        with torch.random.fork_rng():
            for row in evenly(TrainerRows(plain), _HASHED_ROWS):
                fields = row if isinstance(row, Mapping) else dict(enumerate(row))
                feed_row(digest, {str(name): value for name, value in fields.items() if _is_plain(value)})
        return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    return isinstance(value, (str, int)) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def training_of(args: Any) -> TrainingConfig:
    """The Trainer's arguments as far as methods and passes read them."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return TrainingConfig(
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        epochs=max(1, math.ceil(args.num_train_epochs)),
        max_steps=args.max_steps if args.max_steps > 0 else None,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm or None,
        lr_scheduler=schedule if schedule in ("linear", "cosine") else "constant",  # type: ignore[arg-type]
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        bf16=args.bf16,
    )


class TrainerLoop(Learner):
    """Methods on the model of a Trainer.

    Args:
        trainer: a Trainer that has not trained yet.
        method: as a Learner's.
        head_learning_rate: of the model's own classification head; the Trainer's when absent.

    Raises:
        BadInput: the Trainer, its model or a method does not fit; the model is then as before.
    """

    def __init__(self, trainer: Any, method: Any, head_learning_rate: float | None = None):
        check_trainer(trainer)
        methods = complete_methods(method)
        check_methods(methods, trainer)
        self.trainer, self._head_rate = trainer, head_learning_rate
        model: Any = trainer.model
        objective = objective_of(model)
        super().__init__(
            model, trainer.processing_class, method=methods, objective=objective,
            training=training_of(trainer.args), seed=trainer.args.seed,
            protocol={"mask": "all"} if objective.own_head else None,
        )  # fmt: skip
        try:
            check_shared(model)
        except BadInput:
            self.detach()
            raise
        if objective.own_head:
            names = getattr(model.config, "id2label", None) or {}
            self.labels = {str(names.get(n, n)): n for n in range(model.config.num_labels)}

    def _make_accelerator(self) -> Any:
        return self.trainer.accelerator

    def follow(self, trainer: Any) -> None:
        """Goes on under another Trainer with the same model."""
        check_trainer(trainer)
        check_methods(self.methods, trainer)
        if trainer.model is not self.model:
            raise BadInput("Trainer: has another model than the one before; give it the same model object")
        self.trainer, self.training, self.accelerator = trainer, training_of(trainer.args), trainer.accelerator

    # ---- what trains
    def _host_head(self) -> list[tuple[str, nn.Parameter]]:
        """The model's own classification head: what stands beside its backbone."""
        if not self.objective.own_head:
            return []
        model: Any = self.model
        elsewhere = {id(p) for p in model.base_model.parameters()} if model.base_model is not model else set()
        elsewhere |= {id(p) for method in self.methods for _, p in method.touched()}
        return [(name, p) for name, p in self.host.named_parameters() if id(p) not in elsewhere]

    def _groups(self) -> list[dict[str, Any]]:
        groups = super()._groups()
        head = [(f"head/{name}", p) for name, p in self._host_head()]
        if head:
            rate = self._head_rate or self.training.learning_rate
            groups.append({"params": head, "lr": rate, "weight_decay": 0.0})
        return groups

    def parameters_changed(self) -> NoReturn:
        raise BadInput(
            "method: changes its parameters between two steps, which the Trainer's optimizer does not follow; train "
            "with perdure.Learner"
        )

    def rate(self, parameter: nn.Parameter) -> float | None:
        for group in self.trainer.optimizer.param_groups if self.trainer.optimizer is not None else ():
            if any(parameter is each for each in group["params"]):
                return float(group["lr"])
        return None

    # ---- rows
    def batches(
        self, rows: Rows, labels: dict[str, int] | None = None, *, by_length: bool = False, unlabelled: bool = False
    ) -> Iterator[Batch]:
        """Batches as the Trainer's collator makes them, in row order."""
        size, trainer = self.training.per_device_eval_batch_size, self.trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
        for start in range(0, len(rows), size):
            picked = [rows[number] for number in range(start, min(start + size, len(rows)))]
            yield self.batch_of(collate(picked), picked, range(start, start + len(picked))).to(self.device)

    def batch_of(self, inputs: Mapping[str, Any], rows: Rows = (), index: Sequence[int] | None = None) -> Batch:
        """What the collator gave as methods see it.

        Raises:
            BadInput: there are no labels.
        """
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            raise BadInput(
                f"Trainer: data_collator: gives {', '.join(inputs)} and no `labels`, so nothing can be learnt from it; "
                "give the data set `labels`, or a collator that makes them"
            )
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
        numbers = torch.full((len(labels),), -1) if index is None else torch.tensor(list(index))
        return Batch(tensors, labels, rows, numbers)

    # ---- an experience
    def learn(self, *_: Any, **__: Any) -> NoReturn:
        raise BadInput("learner: belongs to a Hugging Face Trainer, which takes its steps; call `trainer.train()`")

    def experience_of(self, dataset: Any, name: str) -> Experience:
        rows = TrainerRows(dataset)
        return Experience(self.position.experience, name, rows, hash=rows.hash())

    def begin(self, experience: Experience) -> None:
        """Tells the methods that an experience begins; one that fails before its first step is taken back."""
        self._bookmark = Bookmark(self, self._tells)
        try:
            self._begin(experience, experience)
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Before the first step of an experience all is made as if it had not been offered; later, nothing is done."""
        if self._bookmark is not None:
            self._bookmark.restore()
        self._bookmark = None

    def end(self) -> None:
        """Tells the methods that the experience has ended."""
        assert self.current is not None
        self.check_finite()
        self._bookmark = None
        self._end(self.current, self.current.train)
        self._leave()

    # ---- scores
    def score(self, rows: Rows) -> float | None:
        """Accuracy in [0, 1], or perplexity over tokens; None where there are no rows. Changes nothing."""
        if not len(rows):
            return None
        total = torch.zeros(2, dtype=torch.float64)
        with quiet(self.model), torch.no_grad():
            for batch in self.batches(rows):
                with self.autocast():
                    output = self.objective.forward(self.model, None, batch)
                parts = self.objective.score(batch, output)
                total += torch.stack([torch.as_tensor(part).double().cpu() for part in parts])
        return self.objective.finish(float(total[0]), int(total[1]))

    # ---- state
    def learnt_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().learnt_state()
        if self.objective.own_head:
            tensors |= {f"{_HEAD}{name}": p.detach() for name, p in self._host_head()}
            values["host_head"] = True
        return tensors, values

    def _load_learnt(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super()._load_learnt(tensors, values)
        with torch.no_grad():
            for name, parameter in self._host_head():
                parameter.copy_(tensors[f"{_HEAD}{name}"])
