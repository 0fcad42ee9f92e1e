"""perdure keeps a pretrained transformer learning from a stream of new data without forgetting.

Names are imported on first use, so that `import perdure` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Learner": ("learner", "Learner"),
    "attach": ("attachment", "attach"),
    "detach": ("attachment", "detach"),
    "Stream": ("streams", "Stream"),
    "Experience": ("streams", "Experience"),
    "Recipe": ("recipe", "Recipe"),
    "load_recipe": ("recipe", "load_recipe"),
    "PerdureCallback": ("hf.callback", "PerdureCallback"),
    "register_method": ("methods", "register"),
    "register_head": ("heads", "register"),
}

if TYPE_CHECKING:
    from .attachment import attach, detach
    from .heads import register as register_head
    from .hf.callback import PerdureCallback
    from .learner import Learner
    from .methods import register as register_method
    from .recipe import Recipe, load_recipe
    from .streams import Experience, Stream

__all__ = [
    "Experience",
    "Learner",
    "PerdureCallback",
    "Recipe",
    "Stream",
    "__version__",
    "attach",
    "detach",
    "load_recipe",
    "methods",
    "register_head",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module(".methods", __name__)
    if name not in _NAMES:
        raise AttributeError(f"module 'perdure' has no attribute {name!r}")
    module, attribute = _NAMES[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
