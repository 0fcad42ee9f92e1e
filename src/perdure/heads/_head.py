"""The base of every classification head. Imports no torch.

A head grows with the classes seen. Its tensors live in `self.module`, a plain container made by `build`, so that
wrappers, devices and the optimizer see them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ..config import HeadConfig
from ..registry import HEADS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

register = HEADS.register


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the whole key, so that neighbouring seeds or class ids give unrelated draws."""
    import torch

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


class Head(ABC):
    """Maps features [B, D] to class scores [B, C].

    Class attributes:
        closed_form: True if the head has statistics instead of gradients; an adapter that needs a gradient is then
            trained through an auxiliary cosine head, and `begin_fit`, `update`, `end_fit` fill the statistics in one
            counted pass at the experience's end.
        fits: True if there is such a pass although the head itself trains by gradient.
        needs_boundaries: True if it must be told where an experience ends.
        by_text: True if classes are known by their names: the objective encodes the names with the host, and the head
            scores features against them, classes that were never learnt included.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    Config: ClassVar[type[HeadConfig]] = HeadConfig
    closed_form: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = False
    by_text: ClassVar[bool] = False

    module: nn.Module

    def __init__(self, config: Any):
        self.config = config
        self.classes = 0
        self.values: dict[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not cls.__dict__.get("title") and cls.__doc__:
            cls.title = cls.__doc__.strip().splitlines()[0].rstrip(".")

    @abstractmethod
    def build(self, width: int, seed: int) -> nn.Module:
        """Creates `self.module` for features of `width`; `seed` alone decides every random draw of the head."""

    @abstractmethod
    def grow(self, classes: int) -> None:
        """Makes room for `classes` classes in all; old rows keep their values."""

    def parameters(self) -> list[tuple[str, Any]]:
        """What trains by gradient: (name, Parameter)."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, with the same keys as `Method.parameter_groups`."""
        return [{"params": self.parameters()}]

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Class scores [B, C] in float32, unmasked."""

    def in_training(self) -> Head:
        """The head as the training loss sees it; itself, but for heads of which a part stands still in training."""
        return self

    # ---- heads with a pass at the experience's end only
    def begin_fit(self, rows: int, seed: int) -> None:
        """A pass over one experience of `rows` rows begins."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Adds one batch (features [B, D], labels [B]) to the statistics."""

    def end_fit(self) -> None:
        """Solves for the weights."""

    # ---- state
    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return dict(self.module.state_dict()), {"classes": self.classes, "values": self.values}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores into a head on which `build` was called; sizes follow the state, be it larger or smaller."""
        _fit_shapes(self.module, tensors)
        self.module.load_state_dict(tensors)
        self.classes = int(values["classes"])
        self.values = dict(values["values"])


def _fit_shapes(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives each parameter and buffer of `module` the shape it has in `tensors`."""
    import torch

    for name, tensor in tensors.items():
        old = getattr(module, name, None)
        if old is None or old.shape == tensor.shape:
            continue
        new = torch.empty(tensor.shape, device=old.device, dtype=old.dtype)
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, name, new)
