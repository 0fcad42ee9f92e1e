"""The stream that needs no data file: learn the Python standard library. Imports no torch.

Texts are docstrings and short function sources of the running interpreter's own library, read with `ast`; nothing of it
is imported. The label is the package or large module a text comes from. One definition gives one text (its docstring,
else its source), so that no source carries a docstring of the other split; the class's own name and telling names of
its submodules are masked; texts that occur twice, in one class or in several, are removed before anything is drawn.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import BadInput
from .rows import CheckedRows
from .scenarios import Splits

MASK = "NAME"

# Large in every CPython from 3.11 to 3.14 and part of every build. The first with enough rows are taken.
PREFERRED = [
    "asyncio",
    "email",
    "xml",
    "unittest",
    "logging",
    "multiprocessing",
    "importlib",
    "decimal",
    "urllib",
    "http",
    "typing",
    "mailbox",
    "datetime",
    "collections",
    "ipaddress",
    "inspect",
    "tarfile",
    "pathlib",
    "argparse",
    "zipfile",
    "optparse",
    "configparser",
    "threading",
    "doctest",
    "ssl",
    "wsgiref",
    "pickle",
    "pydoc",
    "turtle",
    "xmlrpc",
    "concurrent",
    "pdb",
    "enum",
]
# Where the Python source of a module written in C, or moved in a later version, lies.
_ALIASES = {"decimal": ("_pydecimal",), "datetime": ("_pydatetime",)}
_NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}
_SHORTEST, _SHORTEST_SOURCE = 40, 60


@dataclass(frozen=True)
class StdlibOptions:
    """Sizes of the stream: classes, rows of each class and split, characters of a text at the most."""

    classes: int = 20
    train_rows: int = 40
    valid_rows: int = 10
    test_rows: int = 10
    max_chars: int = 600

    @property
    def rows(self) -> int:
        return self.train_rows + self.valid_rows + self.test_rows


def read_stdlib(options: StdlibOptions | None = None, seed: int = 0, root: str | Path | None = None) -> Splits:
    """Rows {"text", "label"} of the standard library; the same for the same Python, options and seed.

    Args:
        options: sizes.
        seed: decides which rows of a class are drawn and into which split; the classes do not depend on it.
        root: the library's folder; the running interpreter's own where absent.

    Raises:
        BadInput: too few classes have enough rows.
    """
    options = options or StdlibOptions()
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    usable = _usable(folder, options, preferred=True)
    if len(usable) < options.classes:
        usable = _usable(folder, options, preferred=False)
    chosen = list(usable)[: options.classes]
    if len(chosen) < options.classes:
        raise BadInput(
            f"source 'stdlib': only {len(chosen)} packages of {folder} have {options.rows} different texts, "
            f"{options.classes} are needed; ask for fewer rows or classes, or use a Python with its library's source"
        )
    splits: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": []}
    for name in chosen:
        drawn = sorted(usable[name], key=lambda text: _key(seed, name, text))
        ends = (options.train_rows, options.train_rows + options.valid_rows, options.rows)
        for split, start, end in zip(splits, (0, *ends), ends, strict=False):
            splits[split] += [{"text": text, "label": name} for text in drawn[start:end]]
    return Splits(
        "stdlib",
        **{split: CheckedRows(rows) for split, rows in splits.items()},
        classes=tuple(chosen),
        details={"python": platform.python_version(), "implementation": platform.python_implementation()},
    )


def _key(seed: int, name: str, text: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()


# ---- finding and reading
def _places(folder: Path) -> dict[str, list[Path]]:
    """Top-level name -> its Python files."""
    places: dict[str, list[Path]] = {}
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and (entry / "__init__.py").is_file() and entry.name not in _NOT_LIBRARY:
                inside = sorted(entry.rglob("*.py"), key=lambda path: path.relative_to(entry).as_posix())
                places[entry.name] = [p for p in inside if not _NOT_LIBRARY & set(p.relative_to(entry).parts)]
            elif entry.is_file() and entry.suffix == ".py" and not entry.stem.startswith("__"):
                places[entry.stem] = [entry]
    for name, others in _ALIASES.items():
        moved = [file for other in others for file in places.pop(other, [])]
        if moved:
            places[name] = places.get(name, []) + moved
    return places


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Syntax trees are a million small objects without cycles; the collector would walk all of torch's for them, which
    took longer than parsing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _texts(files: list[Path], max_chars: int) -> list[str]:
    found: list[str] = []
    for path in files:
        try:
            with tokenize.open(path) as file:
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a library's own escapes are not our matter
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # deliberately broken examples lie in some libraries
        lines = source.splitlines()
        module = ast.get_docstring(tree)
        if module and len(module) >= _SHORTEST:
            found.append(_shorten(module, max_chars))
        found += _definitions(tree, lines, max_chars)
    return found


def _definitions(parent: ast.Module | ast.ClassDef, lines: list[str], max_chars: int) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if doc and len(doc) >= _SHORTEST:
            yield _shorten(doc, max_chars)
        elif not isinstance(node, ast.ClassDef):
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if _SHORTEST_SOURCE <= len(source) <= max_chars:
                yield source
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, lines, max_chars)


def _shorten(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[:max_chars].rsplit(None, 1)[0]


# ---- masking and duplicates
def normalise(text: str) -> str:
    """What makes two texts the same: their letters, in order, without case."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _pattern(words: list[str]) -> re.Pattern[str]:
    """Finds names anywhere, also inside CamelCase; names of up to three letters only where no letter touches."""
    parts = []
    for word in sorted(words, key=lambda w: (-len(w), w)):
        quoted = re.escape(word)
        parts.append(f"(?i:{quoted})" if len(word) > 3 else f"(?<![A-Za-z])(?i:{quoted})(?![a-z])|{quoted.upper()}")
    return re.compile("|".join(parts))


def _words(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in set(re.findall(r"[a-z]+", text.lower())))


def _usable(folder: Path, options: StdlibOptions, preferred: bool) -> dict[str, tuple[str, ...]]:
    """Class -> its different, masked texts; classes with too few are left out. Preferred names come first."""
    found = _masked(folder, options.max_chars, preferred)
    return {name: texts for name, texts in found.items() if len(texts) >= options.rows}


@lru_cache(maxsize=4)
def _masked(folder: Path, max_chars: int, preferred: bool) -> dict[str, tuple[str, ...]]:
    # Cached, because parsing takes seconds and several streams of one process differ in seed and sizes only.
    places = _places(folder)
    names = [name for name in PREFERRED if name in places]
    names += [] if preferred else sorted(set(places) - set(names))
    with _uncollected():
        texts = {name: _texts(places[name], max_chars) for name in names}
    words = {name: _words(found) for name, found in texts.items()}
    total: Counter[str] = Counter()
    for counts in words.values():
        total.update(counts)
    masked: dict[str, dict[str, str]] = {}
    for name, found in texts.items():
        stems = {part.strip("_").lower() for path in places[name] for part in (path.stem, path.parent.name)}
        # A submodule's name tells the class if hardly any other class uses the word.
        telling = [
            s for s in stems if len(s) > 3 and s.isalpha() and s in words[name] and total[s] - words[name][s] <= 2
        ]
        pattern = _pattern([name, *(s for s in telling if s not in name)])
        masked[name] = {}
        for text in found:
            text = _shorten(pattern.sub(MASK, text), max_chars)
            masked[name].setdefault(normalise(text), text)
    owners = Counter(key for kept in masked.values() for key in kept)
    return {
        name: tuple(text for key, text in kept.items() if owners[key] == 1 and len(text) >= _SHORTEST)
        for name, kept in masked.items()
    }
