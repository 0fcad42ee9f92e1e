"""Class-text head: a class is what the host's text encoder makes of its name. Imports no torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..config import HeadConfig
from ..data import Batch, wide
from ._head import Head, register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("class_text")
class ClassTextHead(Head):
    """Class names through the host's own text encoder (CLIP), zero-shot for classes not learnt yet.

    scores = f̂ T̂ᵀ, f̂ [B, D] image embeddings and T̂ [C, D] the embeddings of the class texts, both of unit norm
    (Radford et al. 2021, CLIP; MoRAM, ICML 2026, released X-TAIL code). The texts are encoded by the adapted text
    encoder as it is now; the objective does that (`image_text`) and multiplies by the host's temperature. Nothing of
    the head trains.

    In training the texts of the classes of earlier experiences stand still: `still` [C, D] holds their embeddings,
    encoded once at the start of the experience without a gradient; those of the current classes are encoded anew in
    every step.

    State: `still`, needed to go on in the middle of an experience, and the ids of the current classes. Not state:
    `tokens` (from the names) and `ready` (a cache of one evaluation).
    """

    by_text = True

    class Config(HeadConfig):
        pass

    config: ClassTextHead.Config
    learning = False
    """True for the view of the training loss, see `in_training`."""
    ready: Tensor | None = None
    """Embeddings [C, D] of unit norm of all classes, while many passes share them."""

    def build(self, width: int, seed: int) -> nn.Module:
        import torch

        self.width, self.classes = width, 0
        self.tokens: list[list[int]] = []
        self.pad = 0
        self.values = {"current": []}
        self.module = torch.nn.Module()
        self.module.register_buffer("still", torch.zeros(0, width))
        return self.module

    def grow(self, classes: int) -> None:
        self.classes = max(self.classes, classes)

    def name_classes(self, tokens: Sequence[Sequence[int]], pad: int) -> None:
        """Token ids of the text of each class, by class id; all classes of the label space."""
        self.tokens, self.pad, self.ready = [list(ids) for ids in tokens], pad, None
        self.classes = len(self.tokens)

    def hold(self, still: Tensor, current: Sequence[int]) -> None:
        """An experience begins: `still` [C, D] are embeddings of the classes learnt (rows of current ones unused)."""
        self.module.still = still.detach().to(self.module.get_buffer("still").device)
        self.values = {"current": list(current)}

    @property
    def current(self) -> list[int]:
        """Ids of the classes of the current experience."""
        return self.values["current"]

    def in_training(self) -> ClassTextHead:
        view = copy.copy(self)
        view.learning = True
        return view

    def texts(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [len(ids), T] of the texts of classes, padded on the right."""
        import torch

        rows = [self.tokens[number] for number in ids]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        device = self.module.get_buffer("still").device
        return tokens.to(device), mask.to(device)

    def current_texts(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` texts of the current classes."""
        for start in range(0, len(self.current), size):
            tokens, mask = self.texts(self.current[start : start + size])
            yield Batch({"input_ids": tokens, "attention_mask": mask})

    def logits(self, features: Tensor, texts: Tensor | None = None) -> Tensor:
        """Cosines [B, C] of features [B, D] and class embeddings [C, D] (`ready` where none are given)."""
        import torch
        from torch.nn.functional import normalize

        texts = self.ready if texts is None else texts
        if texts is None:
            raise ValueError("class_text: the class texts are not encoded; the objective image_text does that")
        with torch.autocast(features.device.type, enabled=False):
            features = wide(features)
            return normalize(features, dim=-1) @ normalize(wide(texts).to(features.dtype), dim=-1).T
