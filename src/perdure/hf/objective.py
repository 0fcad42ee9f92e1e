"""Objectives whose rows the Trainer's collator encodes, scored by the host's own output layer or head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..data import Batch, Output, Rows
from ..errors import BadInput
from ..objectives.causal_lm import CausalLM
from ..objectives.classification import Classification
from ..processors import position_limit

if TYPE_CHECKING:
    from ..heads import Head
    from ..objectives import Objective


class _Collated:
    """Rows are what the Trainer's data set holds; they are checked and encoded there."""

    def check(self, rows: Rows, processor: Any) -> None: ...

    def encode(self, rows: Rows, processor: Any, training: bool = False, seeds: Any = None) -> NoReturn:
        raise BadInput("rows: under the Hugging Face Trainer its own collator encodes them; give them to the Trainer")


class HostTokens(_Collated, CausalLM):
    """Causal language modelling on batches of the Trainer's collator."""

    def check_model(self, model: Any, processor: Any) -> None: ...


class HostClasses(_Collated, Classification):
    """Classification by the host's own head, which trains with the method; its classes are all there from the start."""

    needs_head = False
    own_head = True

    def check_model(self, model: Any, processor: Any) -> None: ...

    def forward(self, model: Any, head: Head | None, batch: Batch, pooling: str | None = None) -> Output:
        host = model(**batch.inputs)
        return Output(logits=host.logits, host=host)


def objective_of(model: Any) -> Objective:
    """The objective that belongs to a model's own head.

    Raises:
        BadInput: the model is neither a causal language model nor one that gives each row one class.
    """
    from transformers.models.auto import modeling_auto as auto

    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return HostTokens(CausalLM.Config(block_size=position_limit(model)))
    classes = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )  # fmt: skip
    if not any(kinds & set(mapping.values()) for mapping in classes):
        raise BadInput(
            f"model: {type(model).__name__} is neither a causal language model nor a sequence or image classifier; "
            "load it with AutoModelForCausalLM, AutoModelForSequenceClassification or AutoModelForImageClassification, "
            "or use perdure.Learner"
        )
    kind = getattr(model.config, "problem_type", None)
    if kind not in (None, "single_label_classification") or model.config.num_labels < 2:
        raise BadInput(
            f"model: {type(model).__name__} with {model.config.num_labels} label(s) and problem_type {kind!r} does not "
            "give each row one class; set num_labels to the number of classes"
        )
    return HostClasses(Classification.Config.model_validate({"pooling": "mean"}))
