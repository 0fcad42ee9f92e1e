"""Classification of text or images with a growing head. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import ObjectiveConfig
from ..data import Batch, Output, Rows, wide
from ..errors import BadInput
from ..processors import (
    check_tokenizer,
    encode_image,
    encode_texts,
    image_processor_of,
    pad_id,
    position_limit,
    to_rgb,
    tokenizer_of,
)
from ._augment import AUGMENTATIONS, Augmentation
from ._objective import Objective, index_tensor, pad_right, register, require, right

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..heads import Head

REMEDY = "a classification row has `label` and either `text` or `image`"


@register("classification")
class Classification(Objective):
    """Classification of text or images.

    Pooled features [B, D] of the host go to the head; the loss is the cross-entropy over the allowed classes, the score
    the number of rows whose best allowed class is their own.
    """

    metric = "accuracy"
    higher_is_better = True
    needs_head = True

    class Config(ObjectiveConfig):
        pooling: Literal["auto", "mean", "cls", "last"] = "auto"
        """How token states become one vector: mean over real tokens, the first token, or the last real token."""
        max_length: int = Field(128, ge=1)
        """Tokens of a text at the most; the rest is cut off."""
        normalize: bool = False
        """Features to unit norm. Off: the cosine and ridge heads do it themselves, a linear head wants the length."""
        augment: Augmentation = "none"
        """Images in training, mirrored half of the time: flip_crop shifts by up to an eighth of each side, resized_crop
        cuts out a part of any size."""
        tower: Literal["vision", "text"] | None = None
        """Of a model with two towers (CLIP) the one that is adapted and whose features are classified."""

    config: Classification.Config

    # ---- rows
    def check(self, rows: Rows, processor: Any) -> None:
        for position, row in enumerate(rows):
            require(row, position, "label", str, REMEDY)
            if row.get("image") is None:
                require(row, position, "text", str, REMEDY)
            else:
                image_of(row, position)
        if rows:
            images = _are_images(rows)
            image_processor_of(processor) if images else tokenizer_of(processor)
            if self.config.tower == ("text" if images else "vision"):
                kind = "images" if images else "text"
                raise BadInput(
                    f"objective.classification.tower: is {self.config.tower}, but the rows are {kind}; name the other"
                )

    def check_model(self, model: Any, processor: Any) -> None:
        part = model
        if hasattr(model, "vision_model") and hasattr(model, "text_model"):
            if self.config.tower is None:
                raise BadInput(
                    f"objective.classification.tower: is not set, but {type(model).__name__} has two; name the "
                    "one that takes the rows, vision or text"
                )
            part = getattr(model, f"{self.config.tower}_model")
        if processor is None:  # said when there are rows
            return
        text = takes(part, "input_ids") and _has(tokenizer_of, processor)
        if not text and not (takes(part, "pixel_values") and _has(image_processor_of, processor)):
            raise BadInput(
                f"processor: {type(part).__name__} takes {getattr(part, 'main_input_name', 'other inputs')}, which "
                f"{type(processor).__name__} does not make; pass the model's own tokenizer or image processor"
            )
        if text:
            check_tokenizer(tokenizer_of(processor), part)
            limit = position_limit(part)
            if limit is not None and self.config.max_length > limit:
                raise BadInput(
                    f"objective.max_length: {self.config.max_length} is more than the model's {limit} positions; "
                    f"set it to {limit} or less"
                )

    def encode(
        self, rows: Rows, processor: Any, training: bool = False, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        if not rows:
            return []
        if not _are_images(rows):
            tokenizer = tokenizer_of(processor)
            texts = [require(row, i, "text", str, REMEDY) for i, row in enumerate(rows)]
            pad = pad_id(tokenizer)
            encoded = encode_texts(tokenizer, texts, self.config.max_length)
            for position, ids in enumerate(encoded):
                if not ids:
                    raise BadInput(
                        f"row {position}: field 'text' gives no token, found {texts[position]!r}; leave it out"
                    )
            return [{"input_ids": ids, "pad": pad} for ids in encoded]
        augment = AUGMENTATIONS.get(self.config.augment) if training else None
        if augment and (seeds is None or len(seeds) != len(rows)):
            raise ValueError(f"augmentation needs one seed for each of {len(rows)} rows")
        out = []
        for position, row in enumerate(rows):
            image = image_of(row, position)
            if augment and seeds is not None:
                image = augment(image, seeds[position])
            out.append({"pixel_values": encode_image(processor, image)})
        return out

    def collate(
        self,
        encoded: Sequence[Mapping[str, Any]],
        rows: Rows,
        labels: Mapping[str, int] | None = None,
        index: Sequence[int] | None = None,
    ) -> Batch:
        import numpy as np
        import torch

        if "pixel_values" in encoded[0]:
            inputs = {"pixel_values": torch.from_numpy(np.stack([e["pixel_values"] for e in encoded]))}
        else:
            ids = [e["input_ids"] for e in encoded]
            inputs = {
                "input_ids": pad_right(ids, encoded[0]["pad"]),
                "attention_mask": pad_right([[1] * len(i) for i in ids], 0),
            }
        return Batch(inputs, class_ids(rows, labels), rows, index_tensor(rows, index))

    # ---- the model
    def forward(self, model: Any, head: Head | None, batch: Batch, pooling: str | None = None) -> Output:
        """`pooling` replaces the configured one. Cached `batch.features` replace the host's. No head, no logits."""
        features, host = batch.features, None
        if features is None:
            features, host = self.features(model, batch, pooling)
        return Output(logits=None if head is None else head.logits(features), features=features, host=host)

    def features(self, model: Any, batch: Batch, pooling: str | None = None) -> tuple[Tensor, Any]:
        """Pooled features [B, D] float32 and the host's own output; what may be cached when the host is frozen."""
        backbone = backbone_of(model, batch.inputs)
        foreign = [name for name in batch.inputs if name in ("input_ids", "pixel_values") and not takes(backbone, name)]
        if foreign:
            raise BadInput(
                f"rows: give {foreign[0]}, but {type(backbone).__name__} takes {backbone.main_input_name}; give "
                "rows of the model's own kind, with `text` or with `image`"
            )
        host = backbone(**batch.inputs)
        pooling = pooling or self.config.pooling
        if pooling == "auto":
            pooling = pooling_of(backbone, batch.inputs)
        if getattr(host, "pooler_output", None) is not None:
            # No loss reaches it, and several processes would wait for the pooler's gradient.
            host["pooler_output"] = host.pooler_output.detach()
        features = pool(host.last_hidden_state, batch.inputs.get("attention_mask"), pooling)
        if self.config.normalize:
            features = features / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return features, host

    # ---- loss and score
    def loss(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        summed, counted = classification_terms(batch, output, allowed)
        return summed, counted.sum()

    def score(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, labels = _logits(batch, output)
        return right(batch, output, allowed).sum().double(), (labels != -100).sum()

    def finish(self, total: float, count: int) -> float:
        """Accuracy in [0, 1]."""
        return float(total) / int(count) if count else float("nan")


def classification_terms(batch: Batch, output: Output, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the allowed classes ([C] or [B, C]), and which rows [B] count."""
    from torch.nn.functional import cross_entropy

    logits, labels = _logits(batch, output)
    _check_own(labels, logits, allowed)
    counted = labels != -100
    if allowed is not None:
        # A row that counts nothing may have no class of its own group: leave its scores finite, else 0 · inf = NaN.
        logits = logits.masked_fill(~(allowed | ~counted[:, None]), float("-inf"))
    return cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), counted


def _logits(batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
    if output.logits is None or batch.labels is None:
        raise ValueError("classification: loss and score need logits and labels")
    return wide(output.logits), batch.labels


def _check_own(labels: Tensor, logits: Tensor, allowed: Tensor | None) -> None:
    """A label without a score or outside the mask is a fault of the loop; an infinite loss would hide which."""
    import torch

    classes = logits.shape[-1]
    real = labels != -100
    outside = real & ((labels < 0) | (labels >= classes))
    if allowed is not None:
        inside = torch.where(real & ~outside, labels, 0)
        own = allowed[inside] if allowed.dim() == 1 else allowed.gather(1, inside[:, None])[:, 0]
        outside = outside | (real & ~own)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise RuntimeError(
            f"internal error: row {row} of the batch has class id {int(labels[row])}, which is not among the "
            f"allowed ones of {classes} classes; the mask and the batch come from different experiences"
        )


def class_ids(rows: Rows, labels: Mapping[str, int] | None) -> Tensor | None:
    import torch

    if labels is None:
        return None
    ids = []
    for position, row in enumerate(rows):
        label = require(row, position, "label", str, REMEDY)
        if label not in labels:
            known = ", ".join(list(labels)[:10]) + (" ..." if len(labels) > 10 else "")
            raise BadInput(f"row {position}: label {label!r} is not among the {len(labels)} known classes ({known})")
        ids.append(labels[label])
    return torch.tensor(ids, dtype=torch.int64)


# ---- images
def _are_images(rows: Rows) -> bool:
    images = sum(row.get("image") is not None for row in rows)
    if 0 < images < len(rows):
        raise BadInput(f"rows: {images} of {len(rows)} have an image; a stream is either of text or of images")
    return images > 0


def image_of(row: Mapping[str, Any], position: int) -> np.ndarray:
    try:
        return to_rgb(row["image"])
    except BadInput as error:
        raise BadInput(f"row {position}: field 'image': {error}") from None


# ---- the host
def backbone_of(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The part of the model that gives hidden states: no task head; of CLIP the tower that the inputs need."""
    tower = "vision_model" if "pixel_values" in inputs else "text_model"
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        return getattr(model, tower)
    return getattr(model, "base_model", model)


def takes(module: Any, name: str) -> bool:
    """Whether a forward pass takes the input of this name; True where a model does not say what its main input is."""
    main = getattr(module, "main_input_name", None)
    return main in (None, name) or name in inspect.signature(module.forward).parameters


def _has(find: Callable[[Any], Any], processor: Any) -> bool:
    try:
        find(processor)
    except BadInput:
        return False
    return True


VISION_WITH_CLASS_TOKEN = ("vit", "deit", "dinov2", "beit", "clip_vision_model", "vit_msn")
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "electra", "albert", "deberta-v2")


def pooling_of(backbone: Any, inputs: Mapping[str, Any]) -> str:
    """The pooling that fits the family: `cls` for vision transformers with a class token, `mean` for other vision
    models and bidirectional text encoders (as sentence-transformers pools them), `last` for causal models and CLIP's
    text tower.
    """
    family = str(getattr(getattr(backbone, "config", None), "model_type", ""))
    if "pixel_values" in inputs:
        return "cls" if family in VISION_WITH_CLASS_TOKEN else "mean"
    return "mean" if family in ENCODERS else "last"


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Features [B, D] float32 of states [B, T, D] (or [B, D, H, W], always averaged) and mask [B, T] of real tokens."""
    import torch

    states = wide(states)
    if states.dim() == 4:
        return states.mean((2, 3))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    if pooling == "mean":
        weight = mask[:, :, None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    # First and last real token, whichever side is padded.
    positions = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "cls":
        at = torch.where(mask > 0, positions, mask.shape[1]).amin(1).clamp_max(mask.shape[1] - 1)
    elif pooling == "last":
        at = torch.where(mask > 0, positions, -1).amax(1).clamp_min(0)
    else:
        raise BadInput(f"objective.pooling: {pooling!r} is unknown; give auto, mean, cls or last")
    return states[torch.arange(len(states), device=states.device), at]
