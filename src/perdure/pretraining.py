"""What is known of the data that a backbone was pretrained on, and what of a stream it may hold. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .config import Strict
from .errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .models import ModelSource

FACTS_FILE = "facts.json"
"""In the folder of a model of one's own; its key `pretraining` holds the fields below."""


class Pretraining(Strict):
    """What a backbone may have seen before the first experience."""

    data: str = ""
    """The data in words; empty where it is not known."""
    seen: list[str] | None = None
    """Classes and names of experiences of the stream that it may have seen; null where that is not known."""


KNOWN = {
    "minilm": Pretraining(data="pairs of sentences of many public corpora (from memory of its model card)"),
}


def pretraining_of(spec: str | ModelSource) -> Pretraining:
    """What is known of a model: of one from scratch that it has seen nothing, of a local folder what its facts say.

    Raises:
        BadInput: the folder's facts are not to be read.
    """
    if not isinstance(spec, str):
        return Pretraining(data="nothing: random weights", seen=[])
    path = Path(spec).expanduser() / FACTS_FILE
    if spec in KNOWN or not path.is_file():
        return KNOWN.get(spec, Pretraining())
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        shared = facts.get("shared_classes")  # of folders from before the key `pretraining`
        return Pretraining(**facts.get("pretraining", {} if shared is None else {"seen": list(shared)}))
    except (OSError, ValueError, AttributeError, TypeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"model: {path} cannot be read ({first}); correct its key pretraining, or remove it") from None


def overlap(known: Pretraining, classes: Iterable[str], experiences: Iterable[str]) -> dict[str, Any]:
    """What of a stream the backbone may have seen, for the report.

    Returns:
        `data`, `seen` (of these classes and experiences; None: not known) and `said`, one sentence.
    """
    classes, experiences = list(dict.fromkeys(classes)), list(dict.fromkeys(experiences))
    what = f"{len(classes)} classes" if classes else f"{len(experiences)} experiences"
    data = known.data or "not known"
    if known.seen is None:
        said = f"pretrained on: {data}; what of this stream is in it is not known"
        return {"data": data, "seen": None, "said": said}
    seen = [name for name in known.seen if name in (classes or experiences)]
    listed = f" ({', '.join(seen[:12])}{', ...' if len(seen) > 12 else ''})" if seen else ""
    said = f"pretrained on: {data}; may have seen {len(seen)} of {what}{listed}"
    return {"data": data, "seen": seen, "said": said}
