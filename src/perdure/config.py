"""The typed settings that Python, YAML, the command line and the tests share. Imports no torch."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from .errors import BadInput

_NUMBERS: dict[Any, Literal["int_type", "float_type", "bool_type"]] = {
    int: "int_type", float: "float_type", bool: "bool_type"
}  # fmt: skip


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read true as 1, 1 as true, 3.0 and "3" as 3; an int where a float is due is fine."""
        _refuse_coercion(value, cls.model_fields[str(info.field_name)].annotation)
        return value


def _refuse_coercion(value: Any, annotation: Any) -> None:
    kinds = _alternatives(annotation)
    numbers = [kind for kind in kinds if kind in _NUMBERS]
    if numbers and isinstance(value, (bool, str, int, float)) and type(value) not in kinds:
        # What else may stand here, text or a literal, takes the value or says itself what is wrong.
        only = all(kind in _NUMBERS or kind is type(None) or get_origin(kind) in (list, dict) for kind in kinds)
        if (only or isinstance(value, bool)) and not (type(value) is int and float in kinds):
            raise PydanticKnownError(_NUMBERS[numbers[0]])
    for kind in kinds:
        inner = get_args(kind)
        if get_origin(kind) is list and isinstance(value, (list, tuple)):
            for item in value:
                _refuse_coercion(item, inner[0])
        elif get_origin(kind) is dict and isinstance(value, dict):
            for item in value.values():
                _refuse_coercion(item, inner[1])


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, unions and constraints taken apart."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(inner[0])
    if origin in (Union, UnionType):
        return [kind for each in inner for kind in _alternatives(each)]
    return [annotation]


class MethodConfig(Strict):
    """Base of every method's settings."""


class HeadConfig(Strict):
    """Base of every head's settings."""


class ObjectiveConfig(Strict):
    """Base of every objective's settings."""


class ProtectConfig(Strict):
    """Confines new keys or down-projections to the null space of old layer inputs."""

    inputs: float = Field(0.8, gt=0, lt=1)
    """Share of the energy of old layer inputs (eigenvalues of their second moment) that is projected out."""


MOST_RATE = 1e30
"""Beyond it a step is no float32 number."""


class PretrainConfig(Strict):
    """The first experience trains the whole model; what the method trains otherwise waits for the second."""

    learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
    """Peak rate of that experience; `training.learning_rate` when absent."""
    epochs: int | None = Field(None, ge=1)
    """Passes over that experience; `training.epochs` when absent."""
    weight_decay: float = Field(0.0, ge=0)
    """Of that experience, on matrices alone."""


class EarlyStoppingConfig(Strict):
    """Training of an experience ends when its validation loss falls no more, and goes back to the lowest."""

    every: int = Field(10, ge=1)
    """Optimizer steps between two looks at the validation rows; the last step is one too."""
    patience: int = Field(3, ge=1)
    """Looks without a lower loss after which training of the experience ends."""


class TrainingConfig(Strict):
    """How the loop trains; names as in the Hugging Face Trainer where the meaning is the same."""

    learning_rate: float = Field(5e-4, gt=0, le=MOST_RATE)
    """Peak rate of the adapter or the model."""
    head_learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
    """Peak rate of a trained head; the learning rate when absent."""
    per_device_train_batch_size: int = Field(32, ge=1)
    per_device_eval_batch_size: int = Field(64, ge=1)
    epochs: int | list[int] = 1
    """Passes over each experience; a list gives each experience its own number."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps per experience at the most."""
    early_stopping: EarlyStoppingConfig | None = None
    """Needs validation rows in every experience (`stream.validation`)."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of whatever trains, where a method's parameter group asks for no other."""
    head_optimizer: Literal["adamw", "sgd"] | None = None
    """Of a trained head; `optimizer` when absent."""
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    bf16: bool = False
    """bfloat16 autocast in forward passes; weights and optimizer stay float32."""
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints inside an experience; boundaries are always saved."""
    save_total_limit: int = Field(2, ge=2)
    """Checkpoints kept for resuming. States at experience boundaries, which `perdure undo` needs, are kept apart."""
    keep_boundaries: int | None = Field(None, ge=0)
    """Boundary states kept for `perdure undo`; all when absent."""
    logging_steps: int = Field(10, ge=1)
    shard: Literal["none", "host", "banks", "both"] = "none"
    """What several processes split among them. host: the frozen weights of the host's blocks (FSDP2). banks: the frozen
    items of a method's banks. What trains stays whole in each of them."""
    num_threads: int | None = Field(None, ge=1)
    """Threads of one process; recorded, because float sums depend on it."""

    @field_validator("epochs", mode="after")
    @classmethod
    def _at_least_one_pass(cls, value: int | list[int]) -> int | list[int]:
        # Limits inside the union would be told under names of pydantic's own.
        if min(value if isinstance(value, list) else [value], default=0) < 1:
            raise ValueError("give one number, or one for each experience, each at least 1")
        return value

    @property
    def most_epochs(self) -> int:
        return max(self.epochs) if isinstance(self.epochs, list) else self.epochs

    def epochs_of(self, experience: int) -> int:
        """Passes over the experience of this index.

        Raises:
            BadInput: a list has no number for it.
        """
        if not isinstance(self.epochs, list):
            return self.epochs
        if experience >= len(self.epochs):
            raise BadInput(
                f"training.epochs: lists {len(self.epochs)} numbers, and there is an experience {experience + 1}; give "
                "one number for each experience, or one for all"
            )
        return self.epochs[experience]

    def check_length(self, experiences: int) -> None:
        """Raises BadInput where a list of passes is shorter or longer than the stream."""
        if isinstance(self.epochs, list) and len(self.epochs) != experiences:
            raise BadInput(
                f"training.epochs: lists {len(self.epochs)} numbers, and the stream has {experiences} experience"
                f"{'s' if experiences > 1 else ''}; give one number for each experience, or one for all"
            )


class ProbeConfig(Strict):
    """Scores between the boundaries, on the experiences met so far; the current one included."""

    every: int = Field(10, ge=1)
    """Optimizer steps of the run between two looks; the end of each experience is one too."""
    rows: int | None = Field(None, ge=1)
    """Test rows per experience that are looked at, drawn once and the same for every arm and seed; those of the
    boundaries when absent."""
    window: int | None = Field(None, ge=2)
    """Steps of the window of `windowed_forgetting` and `windowed_plasticity`; ten times `every` when absent."""


class ProtocolConfig(Strict):
    """What a method may see and store. What is not granted is withheld from the batch."""

    task_id: Literal["none", "train", "test"] = "none"
    """When the experience id of a row is known: never, in training only, or in training and at test."""
    boundaries: Literal["train", "none"] = "train"
    """Whether the method is told that a new experience begins."""
    rehearsal: int = Field(0, ge=0)
    """Samples of past experiences that may be stored at any time."""
    rehearsal_bytes: int | None = Field(None, ge=0)
    stored_bytes: int | None = Field(None, ge=0)
    """Bytes that may be kept beside the frozen base, rehearsal included, measured on the saved state after each
    experience; no limit when absent."""
    passes: int | None = Field(None, ge=1)
    """Training passes allowed over each experience; no limit when absent."""
    tuning: Literal["none", "validation"] = "validation"
    """Rows beside the training rows that may decide anything: none, or validation rows. Test rows never may."""
    mask: Literal["all", "seen", "current"] = "current"
    """Classes that compete in the training loss. Prediction is over the classes of `label_space`."""
    label_space: Literal["seen", "declared"] = "seen"
    """Classes among which a row is classified at test: those seen, or all declared, not learnt yet included (X-TAIL);
    the latter needs a head that knows classes by their names (class_text)."""
    evaluate: Literal["seen", "seen_and_next", "all"] = "seen"
    """Experiences whose test rows are scored after each experience; `all` declares every test set known."""
    max_test_rows: int | None = Field(None, ge=1)
    """Test rows per experience that are scored, drawn once and the same for every arm and seed; all when absent."""
    probe: ProbeConfig | None = None
    """Scores between the boundaries; none when absent."""
    max_forgetting: float | None = None
    """The run ends with exit code 66 when the report's forgetting is above this."""

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, data: Any) -> Any:
        # YAML reads a bare `none` as text but `null`/`~` as None: both mean the same here.
        if isinstance(data, dict):
            data = dict(data)
            for field in ("task_id", "boundaries"):
                if field in data and data[field] is None:
                    data[field] = "none"
        return data
