"""What methods share that keep a vector of the model's own beside each rehearsed row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ._method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Rows
    from ..streams import Experience


def refuse_token_scores(method: Method, what: str, why: str) -> None:
    """Raises BadInput where the objective scores tokens, not classes. `what` the method does, `why` it cannot here."""
    loop = getattr(method, "loop", None)  # absent under the public `attach`
    if loop is not None and loop.predicts_tokens:
        raise BadInput(f"method.{method.name}: {what}, and the objective scores tokens, not classes: {why}; use er")


def refuse_captions(method: Method, experience: Experience) -> None:
    """Raises BadInput where rows have a caption in the place of a class: their scores change with the batch."""
    if len(experience.train) and experience.train[0].get("label") is None:
        raise BadInput(
            f"method.{method.name}: needs class scores of each row, and the rows of {experience.name!r} have captions; "
            "give rows with a `label`, or use er"
        )


def vectors_of(rows: Rows, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors kept under `name` beside rows, [n, longest] on the device of `like`, and which entries exist."""
    import torch

    from ..replay import unpack

    kept: list[Any] = [row[name] for row in rows]
    values, lengths = unpack(kept)
    known = torch.arange(values.shape[1])[None] < lengths[:, None]
    return values.to(like), known.to(like.device)
