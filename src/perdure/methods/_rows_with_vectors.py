"""What methods share that keep a vector of the model's own beside each rehearsed row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Rows


def vectors_of(rows: Rows, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors kept under `name` beside rows, [n, longest] on the device of `like`, and which entries exist."""
    import torch

    from ..replay import unpack

    kept: list[Any] = [row[name] for row in rows]
    values, lengths = unpack(kept)
    known = torch.arange(values.shape[1])[None] < lengths[:, None]
    return values.to(like), known.to(like.device)
