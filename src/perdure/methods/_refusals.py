"""What several methods refuse: streams and objectives that do not have what a method asks for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import BadInput

if TYPE_CHECKING:
    from ..hosts import Host
    from ..streams import Experience
    from ._method import Method


def predicts_tokens(method: Method, host: Host) -> bool:
    """Whether the loss at a token asks for the next one; under the public `attach` whether the host could do that."""
    loop = getattr(method, "loop", None)
    if loop is not None:
        return loop.predicts_tokens
    find = getattr(host.model, "get_output_embeddings", None)
    return find is not None and find() is not None


def refuse_without_triton(setting: str, instead: str) -> None:
    """Raises BadInput for the value `fused` of a setting where triton is not installed."""
    if find_spec("triton") is None:
        raise BadInput(f"{setting}: fused needs triton, which is not installed; install it or set {instead}")


def refuse_joint(owner: Method) -> None:
    """Raises BadInput beside a method that learns everything at once."""
    whole = next((method.name for method in owner.loop.methods if "all_data" in method.needs), None)
    if whole is not None:
        raise BadInput(
            f"method.{owner.name}: {whole} learns all experiences at once, so none comes before that could be held; "
            f"remove {owner.name}"
        )


def refuse_captions(owner: Method, experience: Experience, why: str) -> None:
    """Raises BadInput for image rows with captions, which have no class."""
    row: Any = experience.train[0]
    if row.get("image") is not None and row.get("label") is None:
        raise BadInput(f"method.{owner.name}: the experience has rows with captions, and {why}")


def refuse_token_scores(method: Method, what: str, why: str) -> None:
    """Raises BadInput where the objective scores tokens, not classes. `what` the method does, `why` it cannot here."""
    loop = getattr(method, "loop", None)  # absent under the public `attach`
    if loop is not None and loop.predicts_tokens:
        raise BadInput(f"method.{method.name}: {what}, and the objective scores tokens, not classes: {why}; use er")
