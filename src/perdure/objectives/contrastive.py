"""Image-text contrastive learning with CLIP: images with class names, or with captions. Imports no torch.

From MoRAM's released X-TAIL code (ICML 2026; CoDyRA's has the same loss): with image embeddings f [B, D] and class-text
embeddings T [C, D], both of unit norm, and the host's frozen temperature s = exp(logit_scale),

    L = CE(s f Tᵀ with the columns of classes of earlier experiences at −inf, y)  +  CE(s T fᵀ, M)

M[c, j] = 1 if y_j = c: soft targets that are not normalised (a class with n rows of the batch weighs n), the softmax
runs over the images of the batch, and the mean over **all** C classes learnt, so the second term's weight shrinks as
classes come. Texts of earlier classes are encoded once per experience without a gradient, in evaluation mode, those of
the current classes in every step.

Rows with a caption instead of a class are learnt by the same two terms, each caption a class of its own:
CE(s f gᵀ, I) + CE(s g fᵀ, I), g [B, D] the captions' embeddings. That is twice CLIP's symmetric loss (Radford et al.
2021); it is ours, the X-TAIL code has no captions.

| symbol | where |
|---|---|
| f, g | `Output.features`, `Output.other_features` |
| s f Tᵀ | `Output.logits` of rows with classes |
| T of earlier classes | `heads.class_text`, buffer `still` |
| mask of earlier classes | `protocol.mask: current`; rehearsed rows compete among all classes seen |

Deviations: which classes the first term masks is the protocol's choice; the release concatenates empty atoms of the
next task before it encodes the earlier classes, which MoRAM here leaves out of evaluation. Several processes contrast
their rows with those of the others. With gradient accumulation the softmax over images sees the rows of one
micro-batch, so the second term then depends on their number, as for every in-batch contrast; the first one does not.
Cost: a step encodes the images of the batch and the texts of all current classes; an evaluation encodes every class
text once. Padding of class texts counts in router statistics, which know no mask for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

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
    tokenizer_of,
)
from ._augment import AUGMENTATIONS, Augmentation
from ._objective import Objective, index_tensor, pad_right, register, require, right
from .classification import class_ids, classification_terms, image_of, pool

if TYPE_CHECKING:
    from torch import Tensor

    from ..heads import Head
    from ..hosts import Host

REMEDY = "an image-text row has `image` and either `label` or `text`"
TEXTS_AT_ONCE = 128
"""Class texts encoded together where no gradient is needed."""


@register("image_text")
class ImageText(Objective):
    """Image-text contrast (CLIP): images with class names or with captions.

    With classes the score is the number of rows whose best class text is their own. With captions it is retrieval: rows
    of a split whose best caption, among all of that split, is their own.
    """

    metric = "accuracy"
    higher_is_better = True
    needs_head = True
    default_head = "class_text"
    by_text = True

    class Config(ObjectiveConfig):
        template: str = "a photo of a {}."
        """Text of a class; {} is its name, with spaces for underscores."""
        templates: dict[str, str] = Field(default_factory=dict)
        """Domain -> template, for labels such as `aircraft:707-320` (`stream.label_prefix`): what stands before the
        colon chooses the template and is left out of the text, where it is a key here."""
        max_length: int = Field(77, ge=2)
        """Tokens of a text at the most, its end token included; the rest is cut off. CLIP has 77 positions."""
        augment: Augmentation = "none"
        """Images in training: mirrored half of the time, shifted by up to an eighth of each side."""

        @field_validator("template", "templates", mode="after")
        @classmethod
        def _one_place(cls, value: Any) -> Any:
            for template in value.values() if isinstance(value, dict) else [value]:
                if template.count("{}") != 1:
                    raise ValueError(f"{template!r} needs {{}} once, where the class name goes")
            return value

    config: ImageText.Config

    # ---- class names
    def class_text(self, label: str) -> str:
        """The text of a class: its name in its domain's template."""
        domain, colon, name = label.partition(":")
        if not colon or domain not in self.config.templates:
            domain, name = "", label
        return self.config.templates.get(domain, self.config.template).replace("{}", name.replace("_", " "))

    def class_tokens(self, names: Sequence[str], processor: Any) -> list[list[int]]:
        """Token ids of the texts of classes.

        Raises:
            BadInput: two classes have the same text, so that no image could be told to be of one of them.
        """
        if not names:
            return []
        found: dict[tuple[int, ...], str] = {}
        tokens = self._tokens([self.class_text(name) for name in names], processor)
        for name, ids in zip(names, tokens, strict=True):
            other = found.setdefault(tuple(ids), name)
            if other != name:
                raise BadInput(
                    f"label: {other!r} and {name!r} are one text, {self.class_text(name)!r} (at most "
                    f"{self.config.max_length} tokens); rename one, or set objective.image_text.templates or max_length"
                )
        return tokens

    def _tokens(self, texts: Sequence[str], processor: Any) -> list[list[int]]:
        tokenizer = tokenizer_of(processor)
        end, limit = tokenizer.eos_token_id, self.config.max_length
        encoded = encode_texts(tokenizer, texts, limit)
        # CLIP's embedding of a text is the state of its end token, which not every tokenizer writes.
        return [ids if ids and ids[-1] == end else [*ids[: limit - 1], end] for ids in encoded]

    def pad(self, processor: Any) -> int:
        return pad_id(tokenizer_of(processor))

    # ---- rows
    def unlabelled(self, rows: Rows) -> bool:
        """True for rows with captions.

        Raises:
            BadInput: some rows have a class and some a caption.
        """
        classes = sum(row.get("label") is not None for row in rows)
        if 0 < classes < len(rows) and any(row.get("label") is None and row.get("text") is not None for row in rows):
            raise BadInput(
                f"rows: {classes} of {len(rows)} have a label; rows have either classes or captions, so split them"
            )
        return not classes and any(row.get("text") is not None for row in rows)

    def check(self, rows: Rows, processor: Any) -> None:
        captions = self.unlabelled(rows)
        for position, row in enumerate(rows):
            require(row, position, "text" if captions else "label", str, REMEDY)
            if "image" not in row:
                require(row, position, "image", object, REMEDY)
            image_of(row, position)
        image_processor_of(processor)
        tokenizer_of(processor)

    def check_model(self, model: Any, processor: Any) -> None:
        parts = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
        missing = [part for part in parts if not hasattr(model, part)]
        if missing:
            raise BadInput(
                f"model: objective 'image_text' needs a CLIP model with two towers, but {type(model).__name__} has no "
                f"{missing[0]}; use a CLIPModel, or objective classification"
            )
        tokenizer = tokenizer_of(processor)
        image_processor_of(processor)
        check_tokenizer(tokenizer, model.text_model)
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise BadInput("processor: the tokenizer has no end token, whose state is CLIP's text; use the model's own")
        limit = position_limit(model.text_model)
        if limit is not None and self.config.max_length > limit:
            raise BadInput(
                f"objective.image_text.max_length: {self.config.max_length} is more than the text tower's {limit} "
                f"positions; set it to {limit} or less"
            )

    def encode(
        self, rows: Rows, processor: Any, training: bool = False, seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        if not rows:
            return []
        augment = AUGMENTATIONS.get(self.config.augment) if training else None
        if augment and (seeds is None or len(seeds) != len(rows)):
            raise ValueError(f"augmentation needs one seed for each of {len(rows)} rows")
        out = []
        for position, row in enumerate(rows):
            image = image_of(row, position)
            if augment and seeds is not None:
                image = augment(image, seeds[position])
            out.append({"pixel_values": encode_image(processor, image)})
        if self.unlabelled(rows):
            texts = [require(row, i, "text", str, REMEDY) for i, row in enumerate(rows)]
            pad = self.pad(processor)
            for item, ids in zip(out, self._tokens(texts, processor), strict=True):
                item |= {"input_ids": ids, "pad": pad}
        return out

    def collate(
        self,
        encoded: Sequence[Mapping[str, Any]],
        rows: Rows,
        labels: Mapping[str, int] | None = None,
        index: Sequence[int] | None = None,
    ) -> Batch:
        """Rows with captions get the label 0, which says no more than that they count."""
        import numpy as np
        import torch

        inputs = {"pixel_values": torch.from_numpy(np.stack([e["pixel_values"] for e in encoded]))}
        if "input_ids" in encoded[0]:
            ids = [e["input_ids"] for e in encoded]
            inputs["input_ids"] = pad_right(ids, encoded[0]["pad"])
            inputs["attention_mask"] = pad_right([[1] * len(i) for i in ids], 0)
            found: Any = torch.zeros(len(ids), dtype=torch.int64)
        else:
            found = class_ids(rows, labels)
        return Batch(inputs, found, rows, index_tensor(rows, index))

    # ---- the model
    def width(self, host: Host) -> int:
        return int(host.model.config.projection_dim)  # type: ignore[union-attr]

    def forward(self, model: Any, head: Head | None, batch: Batch, pooling: str | None = None) -> Output:
        """Embeddings of unit norm, and class scores s f Tᵀ [B, C] where there is a head and no caption.

        Inputs of one kind run one tower. Under the training view of the head C counts the classes learnt, else those of
        the label space.
        """
        features, others = batch.features, None
        if features is None and "pixel_values" in batch.inputs:
            features = self.image_features(model, batch.inputs["pixel_values"])
        if "input_ids" in batch.inputs:
            others = self.text_features(model, batch.inputs["input_ids"], batch.inputs["attention_mask"])
        logits, scale = None, model.logit_scale.detach().exp()
        if head is not None and head.classes and features is not None and others is None:
            texts = getattr(head, "ready", None)
            if texts is None or getattr(head, "learning", False):
                texts = self.class_features(model, head)
            cosines = head.logits(features, texts)  # type: ignore[call-arg]
            logits = scale.to(cosines.dtype) * cosines
        return Output(logits=logits, features=features, other_features=others, host={"scale": scale})

    def image_features(self, model: Any, pixels: Tensor) -> Tensor:
        """Embeddings [B, D] of unit norm of images [B, 3, H, W]."""
        return _unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))

    def text_features(self, model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, D] of unit norm of token ids [B, T] that end with the end token; mask [B, T]."""
        states = model.text_model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return _unit(model.text_projection(pool(states, mask, "last").to(states.dtype)))

    def class_features(self, model: Any, head: Any) -> Tensor:
        """Embeddings [C, D] of unit norm of the class texts: all as the host gives them now, or, under the training
        view, those of the classes learnt, of which only the current ones carry a gradient."""
        import torch

        if not head.learning:
            numbers = range(head.classes)
            return torch.cat([
                self.text_features(model, *head.texts(numbers[start : start + TEXTS_AT_ONCE]))
                for start in range(0, head.classes, TEXTS_AT_ONCE)
            ])  # fmt: skip
        texts = head.module.get_buffer("still")
        if not head.current:
            return texts
        encoded = self.text_features(model, *head.texts(head.current))
        return texts.to(encoded.dtype).index_copy(0, torch.tensor(head.current, device=texts.device), encoded)

    def hold_class_texts(self, model: Any, head: Any, learnt: int, current: Sequence[int]) -> None:
        """Encodes the texts of the learnt classes that are not current, for the whole experience."""
        import torch

        old = [number for number in range(learnt) if number not in set(current)]
        dtype = model.logit_scale.dtype
        still = torch.zeros(learnt, head.width, dtype=torch.promote_types(dtype, torch.float32))
        for start in range(0, len(old), TEXTS_AT_ONCE):
            chosen = old[start : start + TEXTS_AT_ONCE]
            still[chosen] = self.text_features(model, *head.texts(chosen)).to(still)
        head.hold(still, current)

    # ---- loss and score
    def loss(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B · L, B) for the B rows that count, so that the loop's division gives L."""
        if output.logits is not None:
            to_text, counted = classification_terms(batch, output, allowed)
            return to_text + counted.sum() * _to_images(wide(output.logits), batch.labels), counted.sum()
        scores, counted = _pairs(batch, output)
        import torch

        own = torch.arange(len(scores), device=scores.device)
        return counted * (_cross_entropy(scores, own) + _cross_entropy(scores.T, own)), counted

    def loss_among(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of the rows of all processes together, divided by their number."""
        from ..gathering import gather_rows, processes

        if allowed is not None and allowed.dim() == 1 and output.logits is not None:
            allowed = allowed.expand(output.logits.shape)
        assert batch.labels is not None
        logits, features, others = (
            None if tensor is None else gather_rows(tensor)
            for tensor in (output.logits, output.features, output.other_features)
        )
        labels = gather_rows(batch.labels, fill=-100)
        every = None if allowed is None else gather_rows(allowed.to(labels), fill=1) > 0
        summed, count = self.loss(Batch({}, labels), Output(logits, features, others, output.host), every)
        return summed / processes(), count

    def score(self, batch: Batch, output: Output, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if output.logits is not None:
            if batch.labels is None:
                raise ValueError("image_text: the score needs labels")
            return right(batch, output, allowed).sum().double(), (batch.labels != -100).sum()
        scores, counted = _pairs(batch, output)
        texts = [row["text"] for row in batch.rows]
        best = scores.argmax(-1).tolist()
        # Two images may have one caption: either is right.
        hits = sum(texts[chosen] == text for chosen, text in zip(best, texts, strict=True))
        return scores.new_tensor(hits).double(), counted

    def gathered(self, parts: Sequence[tuple[Batch, Output]]) -> tuple[Batch, Output]:
        import torch

        rows = [row for batch, _ in parts for row in batch.rows]
        images, texts = (
            torch.cat([getattr(output, name) for _, output in parts]) for name in ("features", "other_features")
        )
        labels = torch.zeros(len(rows), dtype=torch.int64, device=images.device)
        return Batch({}, labels, rows), Output(features=images, other_features=texts, host=parts[0][1].host)

    def finish(self, total: float, count: int) -> float:
        """Accuracy in [0, 1]."""
        return float(total) / int(count) if count else float("nan")


def _unit(features: Tensor) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(wide(features), dim=-1)


def _cross_entropy(scores: Tensor, own: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(scores, own)


def _to_images(logits: Tensor, labels: Tensor | None) -> Tensor:
    """CE(s T fᵀ, M), mean over classes: scores [B, C], labels [B] with -100 for images that do not count."""
    import torch

    assert labels is not None
    counted = labels != -100
    if not counted.any():
        return logits.sum() * 0.0
    scores = logits[counted].T
    targets = (torch.arange(len(scores), device=logits.device)[:, None] == labels[counted]).to(scores.dtype)
    return -(targets * scores.log_softmax(-1)).sum(-1).mean()


def _pairs(batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
    """Scores s f gᵀ [N, N] of the pairs that count, and their number."""
    import torch

    if output.features is None or output.other_features is None or batch.labels is None:
        raise ValueError("image_text: loss and score of rows with captions need both embeddings and labels")
    counted = batch.labels != -100
    images, texts = output.features[counted], output.other_features[counted]
    with torch.autocast(images.device.type, enabled=False):
        return output.host["scale"].to(images.dtype) * (images @ texts.T), counted.sum()
