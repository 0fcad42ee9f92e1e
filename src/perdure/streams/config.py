"""The stream block of a recipe, and what makes a stream of it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..config import Strict
from ..errors import BadInput
from ..registry import explain
from . import scenarios
from .experience import Experience
from .rows import CheckedRows, relabel
from .scenarios import Selection, Splits
from .sources import TYPES, Reading, file_type, read_path
from .sources_named import DOMAIN_FIELDS, GROUPS, NAMED, data_folder, full_name, read_named
from .stdlib import StdlibOptions, read_stdlib
from .stream import Stream

Characters = Annotated[int, Field(ge=1)]
Field_ = Literal["text", "image", "label", "prompt", "answer"]
Scenario = Literal["class_incremental", "task_incremental", "domain_incremental", "online", "boundary_free"]


class NamedSource(Strict):
    """A named data set of the folder PERDURE_DATA, with settings."""

    name: str
    part: str | None = None
    """A further part used as training rows, e.g. `oos_train` of clinc150."""


class PathSource(Strict):
    """The user's own files."""

    path: str
    """Training rows: jsonl, csv, tsv, parquet, npz, txt (each also .gz) or a folder of images by class."""
    test: str | None = None
    valid: str | None = None
    type: Literal["jsonl", "csv", "tsv", "parquet", "npz", "txt", "images"] | None = None
    """Wins over the ending."""


class HubSource(Strict):
    """A data set that the library `datasets` loads."""

    hf: str
    config: str | None = None
    train: str = "train"
    test: str | None = "test"
    valid: str | None = None
    revision: str | None = None


class StdlibSettings(Strict):
    classes: int = Field(default=20, ge=2)
    train_rows: int = Field(default=40, ge=1)
    valid_rows: int = Field(default=10, ge=0)
    test_rows: int = Field(default=10, ge=0)
    max_chars: int = Field(default=600, ge=100)


class StdlibSource(Strict):
    """The running Python's standard library."""

    stdlib: StdlibSettings = StdlibSettings()


Source = NamedSource | PathSource | HubSource | StdlibSource
_KEYS: dict[str, type[Strict]] = {"name": NamedSource, "path": PathSource, "hf": HubSource, "stdlib": StdlibSource}


def _text(label: Any) -> Any:
    return str(label) if isinstance(label, int) and not isinstance(label, bool) else label


def _to_source(value: Any, field: str = "source") -> Any:
    if isinstance(value, (str, Strict)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    kinds = [cls for key, cls in _KEYS.items() if key in value] if isinstance(value, Mapping) else []
    if len(kinds) != 1:
        raise ValueError(
            f"{field}: expected a name, a path, or a mapping with one of the keys {', '.join(_KEYS)}; found {value!r}"
        )
    try:
        return kinds[0](**value)
    except ValidationError as error:
        raise ValueError(explain(error, field, kinds[0])) from None


class StreamConfig(Strict):
    """What is learnt, and in which order."""

    source: str | Source | list[str | Source]
    """A named data set, a path, `stdlib`, a mapping with `name`, `path`, `hf` or `stdlib`, or a list of these."""
    fields: dict[Field_, str] = Field(default_factory=dict)
    """Canonical field -> name in the user's files, e.g. {text: utterance, label: intent}."""
    scenario: Scenario = "class_incremental"
    experiences: int | str | list[list[str]] | None = None
    """How classes are grouped: a number, `B0-Inc10`, `B50-Inc5`, or the labels of each experience."""
    class_order: int | Literal["given", "seed"] | list[str] = "given"
    """A seed (permutation by NumPy's RandomState, usually 1993), `given`, `seed` (the run's seed), or labels."""
    classes: list[str] | None = None
    """Declared labels; a row with another one is an error. The source's own where absent."""
    domain_field: str | None = None
    """The field whose values are the domains."""
    domain_order: list[str] | None = None
    rows_per_class: int | None = Field(default=None, ge=1)
    """Training rows of each class (in each domain) at the most."""
    test_rows_per_class: int | None = Field(default=None, ge=1)
    valid_rows_per_class: int | None = Field(default=None, ge=1)
    rows_per_experience: int | None = Field(default=None, ge=1)
    """Training rows of each domain at the most, for rows without labels."""
    test_rows_per_experience: int | None = Field(default=None, ge=1)
    validation: int | float | None = Field(default=None, gt=0)
    """Share (below 1) or rows of each class, taken from training rows; the source's own if absent."""
    test_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows that becomes the test rows of a source that has none."""
    experience_rows: int | None = Field(default=None, ge=1)
    """Rows of each portion of an online or boundary-free stream."""
    blend: float | None = Field(default=None, ge=0)
    """Boundary-free: how far neighbouring blocks flow into each other, in blocks; 0 is class-blocked."""
    label_prefix: bool = False
    """Puts the source's name before each label, so that equal labels of several sources are several classes."""
    text_unit: Literal["blocks", "lines", "paragraphs"] | None = None
    """Plain text: what one row is; blocks where absent."""
    block_chars: int | None = Field(default=None, ge=1)
    """Plain text: characters of a block; 1000 where absent."""
    max_chars: Characters | dict[Literal["train", "valid", "test"], Characters] | None = None
    """Plain text: characters that are used of each split."""
    seed: int | None = Field(default=None, ge=0)
    """Of all draws; the run's seed where absent."""

    @field_validator("source", mode="before")
    @classmethod
    def _read_source(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            if not value:
                raise ValueError("source: is an empty list; name at least one source")
            return [_to_source(item, f"source.{i}") for i, item in enumerate(value)]
        return _to_source(value)

    @field_validator("class_order", "experiences", "classes", "domain_order", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        """3 becomes "3", as in the rows; also in the lists of `experiences`."""
        if isinstance(value, (list, tuple)):
            return [cls._labels_are_text(item) if isinstance(item, (list, tuple)) else _text(item) for item in value]
        return value

    @field_validator("class_order", "experiences", "validation", mode="before")
    @classmethod
    def _no_truth(cls, value: Any) -> Any:
        if value is True or value is False:
            raise ValueError(f"expected a number, text or a list, found {value!r}")
        return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value

    @property
    def sources(self) -> list[str | Source]:
        """The sources in order, groups such as `textcl` and `trace500` spelt out."""
        listed = self.source if isinstance(self.source, list) else [self.source]
        return [item for one in listed for item in (GROUPS.get(one, [one]) if isinstance(one, str) else [one])]

    @property
    def by_domain(self) -> str | None:
        """The field that parts a single source into domains, or None."""
        if self.domain_field or len(self.sources) > 1:
            return self.domain_field
        only = self.sources[0]
        name = only.name if isinstance(only, NamedSource) else only if isinstance(only, str) else ""
        return DOMAIN_FIELDS.get(full_name(name) or "") if self.scenario == "domain_incremental" else None

    @model_validator(mode="after")
    def _fits(self) -> StreamConfig:
        problem = _impossible(self)
        if problem:
            raise ValueError(problem)
        return self


def _impossible(c: StreamConfig) -> str | None:
    """The first combination of settings that cannot be honoured, or None."""
    several, domains = len(c.sources) > 1, c.by_domain is not None or len(c.sources) > 1
    by_class = c.scenario in ("class_incremental", "task_incremental")
    small = c.scenario in ("online", "boundary_free")
    listed = isinstance(c.experiences, list)
    text = [c.text_unit, c.block_chars, c.max_chars] != [None] * 3
    empty = [name for name in ("experiences", "class_order", "classes", "domain_order") if getattr(c, name) == []]
    twice = c.classes is not None and len(set(c.classes)) < len(c.classes)
    seeded = isinstance(c.class_order, int) and not 0 <= c.class_order < 2**32
    rules: list[tuple[bool, str, str]] = [
        (empty != [], ", ".join(empty), "an empty list; name labels or remove the setting"),
        (twice, "classes", "a label occurs twice; name each once"),
        (seeded, "class_order", "as a seed it must be from 0 to 4294967295, which RandomState takes"),
        (several and c.domain_field is not None, "domain_field", "a list of sources is parted by source; remove it"),
        (several and by_class, "scenario", f"{c.scenario} takes one source; use domain_incremental for a list"),
        (by_class and c.domain_field is not None, "domain_field", f"{c.scenario} has none; use domain_incremental"),
        (not by_class and not small and not domains, "domain_field", "the scenario needs it or a list of sources"),
        (c.domain_order is not None and c.by_domain is None, "domain_order", "needs domain_field; a list is in order"),
        (domains and c.experiences is not None, "experiences", "the domains are the experiences; remove the setting"),
        (not domains and c.experiences is None, "experiences", "needs a number, 'B0-Inc10' or lists of labels"),
        (domains and c.class_order != "given", "class_order", "domains come in the order of domain_order"),
        (listed and c.class_order != "given", "class_order", "`experiences` lists the classes already; remove it"),
        (small and c.experience_rows is None, "experience_rows", f"{c.scenario} needs the number of rows of a portion"),
        (not small and c.experience_rows is not None, "experience_rows", "only online and boundary_free have portions"),
        (c.blend is not None and c.scenario != "boundary_free", "blend", "has a meaning in boundary_free only"),
        (isinstance(c.validation, float) and c.validation >= 1, "validation", "use a share below 1 or a whole number"),
        (None not in (c.valid_rows_per_class, c.validation), "valid_rows_per_class", "`validation` gives the number"),
        (c.label_prefix and not several, "label_prefix", "needs a list of sources"),
        (c.block_chars is not None and c.text_unit not in (None, "blocks"), "block_chars", "text_unit is not blocks"),
        (text and not any(map(_is_plain_text, c.sources)), "text_unit, block_chars, max_chars", "need plain text"),
        (c.fields != {} and not any(map(_has_own_fields, c.sources)), "fields", "named sources have their own"),
    ]
    for holds, name, message in rules:
        if holds:
            return f"{name}: {message} (found {_found(c, name)})"
    return _unfit_for_text(c)


def _found(c: StreamConfig, names: str) -> str:
    return ", ".join(repr(getattr(c, name)) for name in names.split(", "))


def _unfit_for_text(c: StreamConfig) -> str | None:
    plain = [s for s in c.sources if _is_plain_text(s)]
    labelled = {"rows_per_class": c.rows_per_class, "test_rows_per_class": c.test_rows_per_class, "classes": c.classes}
    given = [name for name, value in labelled.items() if value is not None]
    if plain and given:
        return f"{given[0]}: plain text has no labels; use max_chars or rows_per_experience"
    if plain and c.scenario in ("class_incremental", "task_incremental"):
        return f"scenario: plain text has no labels, which {c.scenario} needs; use domain_incremental"
    return None


def _is_plain_text(source: str | Source) -> bool:
    if isinstance(source, (NamedSource, str)):
        name = source if isinstance(source, str) else source.name
        full = full_name(name)
        if full is not None:
            return NAMED[full].kind == "lm"
        return isinstance(source, str) and _guess(source) == "txt"
    return isinstance(source, PathSource) and (source.type or _guess(source.path)) == "txt"


def _guess(path: str) -> str | None:
    try:
        return file_type(Path(path))
    except BadInput:
        return None


def _has_own_fields(source: str | Source) -> bool:
    if isinstance(source, str):
        return full_name(source) is None and source != "stdlib"
    return isinstance(source, (PathSource, HubSource))


# ---- building
def build_stream(config: StreamConfig | Mapping[str, Any], seed: int = 0) -> Stream:
    """Reads the sources and makes the stream that the settings describe.

    Args:
        config: the `stream` block of a recipe.
        seed: the run's seed; decides draws unless `config.seed` is given, and the class order where that is `seed`.

    Raises:
        BadInput: settings that do not fit together (before anything is read), or data that does not fit them.
    """
    if not isinstance(config, StreamConfig):
        try:
            config = StreamConfig(**config)
        except ValidationError as error:
            raise BadInput(explain(error, "stream", StreamConfig)) from None
    if seed < 0:
        raise BadInput(f"seed: {seed} is negative; use 0 or more")
    for source in config.sources:
        _check_source(source)
    draws = config.seed if config.seed is not None else seed
    parts = [_declare(_read(source, config, draws), config) for source in config.sources]
    names = [part.name for part in parts]
    if config.label_prefix and len(set(names)) < len(names):
        raise BadInput(f"label_prefix: two sources have one name ({', '.join(names)}); rename a file")
    how = Selection(
        **{name: getattr(config, name) for name in Selection.__dataclass_fields__ if name != "seed"}, seed=draws
    )
    made = _experiences(parts, config, how, seed)
    return Stream(
        made,
        name="+".join(names),
        scenario=config.scenario,
        classes=_all_classes(parts, config, made),
        details={"seed": draws, "class_order": config.class_order, **_details(parts)},
    )


def _check_source(source: str | Source) -> None:
    """Names and paths, before the first byte is read."""
    name = source.name if isinstance(source, NamedSource) else source if isinstance(source, str) else None
    if name is not None and full_name(name) is not None:
        data_folder()
    elif isinstance(source, NamedSource) or (name is not None and name != "stdlib" and not Path(name).exists()):
        import difflib

        known = list(dict.fromkeys([*NAMED, *(n.rsplit("/", 1)[-1] for n in NAMED), *GROUPS, "stdlib"]))
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: stdlib, {', '.join(NAMED)}"
        raise BadInput(f"source: {name!r} is neither a named source nor an existing file or folder; {hint}")
    elif isinstance(source, PathSource):
        for key in ("path", "test", "valid"):
            value = getattr(source, key)
            if value is not None and not Path(value).exists():
                raise BadInput(f"source.{key}: {value}: there is no such file or folder; correct the path")
        file_type(Path(source.path), source.type)


def _read(source: str | Source, config: StreamConfig, seed: int) -> Splits:
    needs_label = config.scenario in ("class_incremental", "task_incremental") or config.rows_per_class is not None
    required = [*(["label"] if needs_label else []), *([config.by_domain] if config.by_domain else [])]
    limits = config.max_chars if isinstance(config.max_chars, dict) else {}
    if isinstance(config.max_chars, int):
        limits = dict.fromkeys(("train", "valid", "test"), config.max_chars)
    how = Reading(
        {str(name): own for name, own in config.fields.items()} if _has_own_fields(source) else {},
        tuple(required),
        config.text_unit or "blocks",
        config.block_chars or 1000,
        {str(split): chars for split, chars in limits.items()},
    )
    if isinstance(source, StdlibSource) or source == "stdlib":
        settings = source.stdlib if isinstance(source, StdlibSource) else StdlibSettings()
        return read_stdlib(StdlibOptions(**settings.model_dump()), seed)
    if isinstance(source, HubSource):
        return read_hub_source(source, how)
    if isinstance(source, PathSource):
        return read_path(source.path, test=source.test, valid=source.valid, kind=source.type, how=how)
    name, part = (source.name, source.part) if isinstance(source, NamedSource) else (source, None)
    return read_named(name, how, part) if full_name(name) is not None else read_path(name, how=how)


def read_hub_source(source: HubSource, how: Reading) -> Splits:
    from .sources_hub import read_hub

    return read_hub(**source.model_dump(), how=how)


def _declare(data: Splits, config: StreamConfig) -> Splits:
    """Applies `label_prefix` and the declared classes."""
    if config.label_prefix:

        def prefixed(label: str) -> str:
            return f"{data.name}:{label}"

        splits = {
            split: CheckedRows(
                relabel(row, prefixed(row["label"])) if "label" in row else row for row in getattr(data, split)
            )
            for split in ("train", "valid", "test")
        }
        data = replace(data, **splits, classes=tuple(prefixed(label) for label in data.classes))
    if config.classes is not None:
        data = replace(data, classes=tuple(config.classes))
    return data


def _experiences(parts: Sequence[Splits], config: StreamConfig, how: Selection, seed: int) -> list[Experience]:
    by_field = config.by_domain
    if by_field is not None:
        parts = scenarios.by_field(parts[0], by_field, config.domain_order or "given")
    if by_field is not None or len(parts) > 1:
        blocks = scenarios.domain_incremental(parts, how)
    else:
        order = seed if config.class_order == "seed" else config.class_order
        tasks = config.scenario == "task_incremental"
        assert config.experiences is not None
        blocks = scenarios.class_incremental(parts[0], config.experiences, order, how, tasks=tasks)
    if config.scenario == "online":
        return scenarios.online(blocks, config.experience_rows or 1, how.seed)
    if config.scenario == "boundary_free":
        return scenarios.boundary_free(blocks, config.experience_rows or 1, config.blend or 0.0, how.seed)
    return blocks


def _all_classes(parts: Sequence[Splits], config: StreamConfig, made: Sequence[Experience]) -> list[str] | None:
    if config.classes is not None:
        return list(config.classes)
    used = list(dict.fromkeys(label for experience in made for label in experience.classes))
    return used or None


def _details(parts: Sequence[Splits]) -> dict[str, Any]:
    details: dict[str, Any] = {}
    for part in parts:
        for key, value in part.details.items():
            details[key] = {**details.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in details.items() if value not in (None, {})}


__all__ = ["TYPES", "HubSource", "NamedSource", "PathSource", "StdlibSource", "StreamConfig", "build_stream"]
