"""Finds methods, heads and objectives by name. Imports no torch.

A plug-in is a class in a module of `perdure.methods` (or `heads`, `objectives`), an entry point of the group
`perdure.methods` (`perdure.heads`, `perdure.objectives`), or any file given to `import_file`. There is no list to edit.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import json
import pkgutil
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import BadInput
from .presets import PRESETS

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T", bound=type)
INDEX_FILE = "_index.json"


@functools.cache
def _entry_points() -> EntryPoints:
    """Those of all installed packages; reading them takes longer than reading our own plug-ins."""
    return entry_points()  # pyright: ignore[reportReturnType]  # Python 3.11 gives what it calls a dict of them


class Registry:
    """Names of one kind of plug-in, discovered on first use.

    Args:
        kind: the package below `perdure` and the entry-point group, e.g. "methods".
        aliases: other names that users type.
    """

    def __init__(self, kind: str, aliases: dict[str, str] | None = None):
        self.kind = kind
        self.word = kind.rstrip("s")
        self.aliases = aliases or {}
        self._classes: dict[str, Any] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator: makes the class known under `name`."""

        def add(cls: T) -> T:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise BadInput(
                    f"{self.word} {name!r} is registered twice, by {known.__module__} and {cls.__module__}; rename one"
                )
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(f"perdure.{self.kind}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"perdure.{self.kind}.{module.name}")
        for point in _entry_points().select(group=f"perdure.{self.kind}"):
            point.load()

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> Any:
        """The class registered under `name` or an alias.

        Raises:
            BadInput: nothing has that name; the message suggests near names.
        """
        self._discover()
        name = self.aliases.get(name, name)
        if name not in self._classes:
            preset = PRESETS.get(name) if self.kind == "methods" else None
            if preset is not None:
                told = ", ".join(f"{key} {value}" for key, value in preset.settings.items())
                raise BadInput(
                    f"{self.word}: {name!r} is a preset, which stands alone and in recipes only; here give what it "
                    f"means: {told}"
                )
            near = difflib.get_close_matches(name, self._classes, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(self.names())}"
            raise BadInput(f"{self.word}: {name!r} is unknown; {hint}")
        return self._classes[name]

    def listing(self) -> list[dict[str, Any]]:
        """What `perdure methods` shows of each plug-in, by name, without importing our own modules.

        Those are read from `_index.json` beside them, which `python -m perdure.registry` writes; plug-ins of other
        packages and of `import_file` are loaded.
        """
        known: dict[str, dict[str, Any]] = {}
        if not self._discovered:
            text = Path(__file__).with_name(self.kind).joinpath(INDEX_FILE).read_text(encoding="utf-8")
            known = {entry["name"]: entry for entry in json.loads(text)}
            for point in _entry_points().select(group=f"perdure.{self.kind}"):
                point.load()
        return [entry for _, entry in sorted((known | {n: summary(c) for n, c in self._classes.items()}).items())]

    def parse(self, spec: Any, field: str) -> list[tuple[str, Any]]:
        """Reads `name`, `{name: settings}` or a list of these into pairs of class name and validated settings.

        Raises:
            BadInput: a name is unknown or a setting does not fit; the message names the field.
        """
        from pydantic import ValidationError

        pairs: list[tuple[str, Any]] = []
        for item in spec if isinstance(spec, (list, tuple)) else [spec]:
            if isinstance(item, str):
                item = {item: {}}
            if not isinstance(item, dict) or not item:
                raise BadInput(f"{field}: expected a name or {{name: settings}}, found {item!r}")
            for name, settings in item.items():
                cls = self.get(str(name))
                if isinstance(settings, cls.Config):
                    pairs.append((cls.name, settings))
                    continue
                if settings is not None and not isinstance(settings, dict):
                    raise BadInput(f"{field}.{name}: expected a mapping of settings, found {settings!r}")
                try:
                    pairs.append((cls.name, cls.Config(**(settings or {}))))
                except ValidationError as error:
                    raise BadInput(explain(error, f"{field}.{name}", cls.Config)) from None
        if not pairs:
            raise BadInput(f"{field}: is empty; name at least one {self.word}")
        return pairs


def explain(error: ValidationError, prefix: str, model: Any = None) -> str:
    """One line per wrong field: its dotted name, what was found, what is allowed."""
    lines = []
    for item in error.errors():
        where = ".".join([prefix, *(str(part) for part in item["loc"])]).strip(".")
        if item["type"] == "extra_forbidden":
            fields = list(getattr(model, "model_fields", {}))
            near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else (f"known: {', '.join(fields)}" if fields else "remove it")
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {item['msg'].lower()}, found {item.get('input')!r}")
    return "\n".join(lines)


def import_file(path: str | Path) -> None:
    """Runs a user's Python file so that the plug-ins in it register.

    Raises:
        BadInput: the file does not exist, is not Python, or imports what is not there; other errors keep their
            traceback.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise BadInput(f"--import: {path} is not a Python file")
    name = f"perdure_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        del sys.modules[name]
        raise BadInput(f"--import: {_line_of(error, spec.origin or str(path))}; correct it and try again") from error


def _line_of(error: SyntaxError | ImportError, path: str) -> str:
    """File, line and text of what went wrong, as the traceback would show them; `path` is what it calls the file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()!r}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}, line {lines[-1].lineno}: {error}: {lines[-1].line!r}" if lines else f"{path}: {error}"


def summary(cls: Any) -> dict[str, Any]:
    """Name, title and the declared facts of a plug-in class, as JSON-able values."""
    found: dict[str, Any] = {"name": cls.name, "title": cls.title}
    for fact in ("status", "needs", "removal", "closed_form"):
        if hasattr(cls, fact):
            value = getattr(cls, fact)
            found[fact] = sorted(value) if isinstance(value, frozenset) else value
    return found


def index_text(registry: Registry) -> str:
    """What `_index.json` must hold for the plug-ins of our own package."""
    names = [name for name in registry.names() if registry.get(name).__module__.startswith("perdure.")]
    return json.dumps([summary(registry.get(name)) for name in names], indent=1, ensure_ascii=False) + "\n"


METHODS = Registry("methods", aliases={"replay": "er"})
HEADS = Registry("heads")
OBJECTIVES = Registry("objectives")

if __name__ == "__main__":
    from perdure import registry as live  # not this module's second self: plug-ins register with that one

    for each in (live.METHODS, live.HEADS):
        Path(__file__).with_name(each.kind).joinpath(INDEX_FILE).write_text(index_text(each), encoding="utf-8")
