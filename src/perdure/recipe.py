"""A recipe: everything a run depends on, typed, from a YAML file, the command line or Python. Imports no torch.

A setting comes from, in rising order: the defaults, the recipe's file, the chosen arm, what the user typed.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, PrivateAttr, Tag, ValidationError, field_validator

from . import auto, yamltext
from .config import ProtocolConfig, Strict, TrainingConfig
from .errors import BadInput
from .models import ModelSource
from .presets import PRESETS
from .pretraining import Pretraining
from .protocol import check_drift, check_head, check_methods
from .recipe_layers import BLOCKS, DEFAULTS, apply_arm, head_name, holds, mark, set_value, split_override
from .registry import HEADS, METHODS, OBJECTIVES
from .streams import StreamConfig

RECIPES = Path(__file__).parent / "recipes"
LABELS = ("name", "description", "arm", "arms", "tuning", "pretraining", "output_dir")
"""Keys that do not change what a run computes."""
RECIPE_FILE, REPORT_FILE, PAGE_FILE = "recipe.yaml", "report.json", "report.html"
"""In the folder of a run; of a comparison the page too."""
MOST_BYTES = 200
"""Of a folder's name; file systems take 255, and temporary names are longer."""


class Arm(Strict):
    """What one arm of a comparison sets differently; stream, model, protocol and seed are the same for all arms."""

    method: Any = None
    head: Any = None
    objective: Any = None
    training: dict[str, Any] = Field(default_factory=dict)
    note: str | None = None
    """Shown beside the arm in a comparison."""

    @field_validator("training", mode="after")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        fields = TrainingConfig.model_fields
        for key in value:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return value


def _which(value: Any) -> str:
    return "(name)" if isinstance(value, str) else "(scratch)"


class Recipe(Strict):
    """All settings of a run. `load_recipe` and `make_recipe` give one that is checked and complete."""

    name: str = "run"
    description: str = ""
    model: Annotated[Annotated[str, Tag("(name)")] | Annotated[ModelSource, Tag("(scratch)")], Discriminator(_which)]
    """`minilm`, a hub id, a local folder, or `{scratch: {family: ...}}`."""
    stream: StreamConfig
    objective: Any = DEFAULTS["objective"]
    method: Any = DEFAULTS["method"]
    head: Any = None
    training: TrainingConfig = TrainingConfig.model_validate({})
    protocol: ProtocolConfig = ProtocolConfig.model_validate({})
    seed: int = Field(0, ge=0)
    output_dir: str | None = None
    """Folder of the run; `runs/<name>/<arm>/seed-<seed>` when absent."""
    arm: str | None = None
    """Label of the arm in tables."""
    arms: dict[str, Arm] = Field(default_factory=dict)
    tuning: dict[str, Any] = Field(default_factory=dict)
    """How the arms' rates were found: grid, trials, the data they were judged on; `equal: true` declares that every
    arm had the same grid and number of trials, which a comparison's page then says."""

    pretraining: Pretraining | None = None
    """What the backbone may have seen; what is known of the model when absent."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _base: dict[str, Any] = PrivateAttr(default_factory=dict)
    _origin: str = PrivateAttr(default="recipe")
    _overrides: tuple[str, ...] = PrivateAttr(default=())
    _choice: str | None = PrivateAttr(default=None)

    @field_validator("tuning", mode="after")
    @classmethod
    def _plain_claim(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("equal", False), bool):
            raise ValueError(
                f"tuning.equal: found {value['equal']!r}; write true if all arms had the same trials, else false"
            )
        return value

    @property
    def typed(self) -> list[tuple[list[str], Any]]:
        """What the user typed over the recipe: path of the setting and value."""
        return [split_override(text) for text in self._overrides]

    @property
    def choice(self) -> str | None:
        """What `method: auto` has taken and why; None without it."""
        return self._choice

    @property
    def label(self) -> str:
        """The arm's name, or the methods and the head joined by `+`."""
        return self.arm or short_name(self)

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.output_dir) if self.output_dir else run_folder(Path("runs") / safe(self.name), self)

    def with_arm(self, arm: str | None, *, typed: Sequence[str] = (), **changes: Any) -> Recipe:
        """The same recipe with another arm (what the user typed still wins) and other top-level values.

        What was typed for a plug-in, such as `method.er.budget=5`, holds for the arms that contain it.

        Args:
            arm: an arm of the recipe, a method's name, or either with `+head`; None for none.
            typed: overrides behind those that the user typed.
            changes: e.g. `seed=3`, `output_dir="runs/x"`.
        """
        if not self._base:
            base = self.model_dump(mode="json", exclude={"arm"}, exclude_unset=True)
            return _resolve(base, "recipe", typed, arm, changes)
        return _resolve(self._base, self._origin, [*self._overrides, *typed], arm, changes, several=arm is not None)


# ---- finding and reading
def recipe_names() -> list[str]:
    """The package's recipes as `area/name`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given as a path, `area/name` or `name`.

    Raises:
        BadInput: there is none, or a short name fits several.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise BadInput(f"recipe: there is no file {name}; known names: {', '.join(recipe_names())}")
        return path
    known = recipe_names()
    found = [each for each in known if str(name) in (each, each.rsplit("/", 1)[-1])]
    if len(found) == 1:
        return RECIPES / f"{found[0]}.yaml"
    if found:
        raise BadInput(f"recipe: {name} fits {' and '.join(found)}; give the area too")
    stems = {each.rsplit("/", 1)[-1]: each for each in known}
    near: dict[str, str] = {}
    for each in difflib.get_close_matches(str(name), [*stems, *known], n=4):
        near.setdefault(stems.get(each, each), each)  # `clinc150` and `text/clinc150` are one
    hint = (
        f"did you mean {' or '.join([*near.values()][:2])}?"
        if near
        else f"known: {', '.join(known)}; or give a path to a .yaml file"
    )
    raise BadInput(f"recipe: {str(name)!r} is unknown; {hint}")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"recipe: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"recipe: {path} cannot be read: {error.strerror}") from None
    data = yamltext.load(text, f"recipe {path.name}")
    if not isinstance(data, dict):
        raise BadInput(f"recipe: {path} holds {type(data).__name__}, expected keys such as model, stream and method")
    for key in data:
        if not isinstance(key, str):
            raise BadInput(f"recipe {path.name}: the key {key!r} is no word; quote or correct it")
    return data


def load_recipe(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    arm: str | None = None,
    compared: bool = False,
    **changes: Any,
) -> Recipe:
    """Reads, completes and checks a recipe; loads no model and no data.

    Args:
        name: a path to a YAML file, or the name of a recipe of the package (`clinc150`, `text/clinc150`).
        overrides: `a.b=c`, values typed as YAML. `method=NAME` takes the arm NAME with its tuned values where the
            recipe has it; other overrides win over it.
        arm: an arm or method to take instead of the recipe's own method.
        compared: its arms will be compared, so `method.NAME.x=y` need not fit the recipe's own method.
        changes: top-level values that win over all, e.g. `seed=1`.

    Raises:
        BadInput: a key, type, name or combination is wrong; the message names the dotted field.
        ProtocolRefused: the method needs, or the training takes, more than the protocol grants.
    """
    path = find_recipe(name)
    base = _read(path)
    base.setdefault("name", path.stem)
    recipe = _resolve(base, f"recipe {base['name']}", overrides, arm, changes, several=compared)
    _check_arms(recipe)
    return recipe


def make_recipe(settings: dict[str, Any], overrides: Sequence[str] = (), **changes: Any) -> Recipe:
    """The same from a dict of settings."""
    recipe = _resolve(settings, "recipe", overrides, None, changes)
    _check_arms(recipe)
    return recipe


# ---- layers
def _resolve(
    base: dict[str, Any],
    origin: str,
    overrides: Sequence[str],
    arm: str | None,
    changes: dict[str, Any],
    several: bool = False,
) -> Recipe:
    typed = [split_override(text) for text in overrides]
    data: dict[str, Any] = copy.deepcopy(base)
    sources: dict[str, str] = {}
    mark(sources, data, origin)
    arms = data.get("arms") or {}
    if not isinstance(arms, dict):
        raise BadInput(f"arms: expected {{name: settings}}, found {arms!r}")
    if arm is None:
        chosen = [value for path, value in typed if path == ["method"] and isinstance(value, str)]
        if chosen:
            arm = chosen[-1]
    if arm is None and isinstance(data.get("method"), str) and data["method"] in PRESETS:
        arm = data["method"]
        if data.get("head") is not None:
            raise BadInput(f"head: the preset {arm} brings its own; remove head, or write the methods out")
    choice = None
    if arm is not None:
        if arm.partition("+")[0] == auto.NAME and auto.NAME not in arms:
            choice = _chosen(data, typed, arm)
            arms = {**arms, auto.NAME: choice.settings}
        typed = [(path, value) for path, value in typed if not (path == ["method"] and isinstance(value, str))]
        data["arm"] = apply_arm(data, sources, arms, arm)
        sources["arm"] = "command line"
        heads = [name for path, value in typed if path == ["head"] and (name := head_name(value))]
        if heads and not data["arm"].endswith(f"+{heads[-1]}"):
            data["arm"] += f"+{heads[-1]}"
    for path, value in sorted(typed, key=lambda item: len(item[0]) > 1):  # whole blocks before what lies in them
        if not several or holds(data, path):  # among several arms it is for those that have the plug-in
            set_value(data, sources, path, value)
    for key, value in changes.items():
        set_value(data, sources, [key], value)
    recipe = _validate(data)
    recipe = _complete(recipe, sources)
    recipe._sources.update(sources)
    recipe._base.update(base)
    recipe._origin, recipe._overrides = origin, tuple(overrides)
    recipe._choice = None if choice is None else choice.why
    return recipe


def _chosen(data: dict[str, Any], typed: list[tuple[list[str], Any]], arm: str) -> auto.Choice:
    """What `method: auto` means here, with what the user typed over everything but methods and head."""
    if arm != auto.NAME:
        raise BadInput(f"head: auto brings its own; write {auto.NAME} alone, or head=... beside method={auto.NAME}")
    data = copy.deepcopy(data)
    for path, value in typed:
        if path[0] not in ("method", "head"):
            set_value(data, {}, path, value)
    return auto.choose(data)


def source_of(recipe: Recipe, dotted: str) -> str:
    """Where a setting's value comes from: "default", "recipe NAME", "arm NAME" or "command line"."""
    exact = recipe._sources.get(dotted)
    if exact is not None:
        return exact
    parts = dotted.split(".")
    if parts[0] in BLOCKS:
        return "default"
    # A whole block given at once (stream={...}) marks its leaves, so only a set ancestor without leaves counts.
    for end in range(len(parts) - 1, 0, -1):
        ancestor = ".".join(parts[:end])
        if recipe._sources.get(ancestor) == "command line" and not any(
            key.startswith(f"{ancestor}.") for key in recipe._sources
        ):
            return "command line"
    return "default"


# ---- checks
def _validate(data: dict[str, Any]) -> Recipe:
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise BadInput(explain_nested(error, Recipe)) from None
    except TypeError as error:  # a key that is no identifier
        raise BadInput(f"recipe: {error}") from None


def _check_arms(recipe: Recipe) -> None:
    """Names and settings of every arm's plug-ins, whether or not the arm is going to run."""
    for name, arm in recipe.arms.items():
        for field, registry in BLOCKS.items():
            spec = getattr(arm, field)
            if spec in (None, "none"):
                continue
            try:
                registry.parse(spec, field)
            except BadInput as error:
                raise BadInput(f"arms.{name}.{error}") from None


def explain_nested(error: ValidationError, model: type[BaseModel]) -> str:
    """As `registry.explain`, with near names taken from the model that the wrong key stands in."""
    lines = []
    for item in error.errors():
        path = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("("))]
        owner: Any = model
        for part in path[:-1]:
            owner = _field_type(owner, part)
        where = ".".join(str(part) for part in path)
        if item["type"] == "extra_forbidden":
            fields = list(getattr(owner, "model_fields", {}))
            near = difflib.get_close_matches(str(path[-1]), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else (f"known: {', '.join(fields)}" if fields else "remove it")
            lines.append(f"{where}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: is missing; set it")
        elif item["type"] == "value_error":
            lines.append(_join(where, item["msg"].removeprefix("Value error, "), owner))
        else:
            message = item["msg"][:1].lower() + item["msg"][1:]
            lines.append(f"{where}: {message}, found {item.get('input')!r}")
    return "\n".join(dict.fromkeys(lines))


def _join(where: str, message: str, owner: Any) -> str:
    """A check of a whole block names its field itself: `stream` and `experiences: needs ...` make one dotted name."""
    own = _field_type(owner, where.rpartition(".")[2])
    name = message.partition(":")[0].split(", ")[0].split(".")[0]
    last = where.rpartition(".")[2]
    if message.startswith((f"{last}:", f"{last}.")):
        return f"{where.removesuffix(last)}{message}"
    return f"{where}.{message}" if name in getattr(own, "model_fields", {}) else f"{where}: {message}"


def _field_type(owner: Any, part: Any) -> Any:
    field = getattr(owner, "model_fields", {}).get(part)
    if field is None:
        return None
    todo = [field.annotation]
    while todo:
        kind = todo.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        todo += list(getattr(kind, "__args__", ()))
    return None


def _one(field: str, spec: Any) -> tuple[str, Any]:
    pairs = BLOCKS[field].parse(spec, field)
    if len(pairs) > 1:
        raise BadInput(f"{field}: takes one {field}, found {', '.join(name for name, _ in pairs)}; keep one")
    return pairs[0]


def _complete(recipe: Recipe, sources: dict[str, str]) -> Recipe:
    """Parses the plug-ins' settings, fills in their defaults, and checks what only fits together."""
    methods = METHODS.parse(recipe.method, "method")
    objective, objective_config = _one("objective", recipe.objective)
    head = recipe.head
    if OBJECTIVES.get(objective).needs_head:
        if head in (None, "none"):
            head = OBJECTIVES.get(objective).default_head
            sources.pop("head", None)
    elif head not in (None, "none"):
        raise BadInput(
            f"head: is {yamltext.inline(head)}, but the objective {objective} trains the model's own output layer; "
            "remove head, or set objective: classification"
        )
    else:
        head = None
    head_pair = None if head is None else _one("head", head)
    check_methods(methods, recipe.protocol, recipe.training)
    plugged = [METHODS.get(name) for name, _ in methods]
    if not any(method.adapts or method.frozen_features for method in plugged):  # the whole model trains
        plugged.append(METHODS.get("finetune"))
    check_head(plugged, OBJECTIVES.get(objective), head_pair and HEADS.get(head_pair[0]), recipe.protocol)
    if head_pair is not None:
        check_drift(plugged, *head_pair)
    updates: dict[str, Any] = {
        "method": [{name: config.model_dump(mode="json")} for name, config in methods],
        "objective": {objective: objective_config.model_dump(mode="json")},
        "head": None if head_pair is None else {head_pair[0]: head_pair[1].model_dump(mode="json")},
    }
    recipe = recipe.model_copy(update=updates)
    _check_stream(recipe)
    _check_names(recipe)
    folder = recipe.folder.expanduser()
    return recipe.model_copy(update={"output_dir": folder.as_posix()})


def _check_names(recipe: Recipe) -> None:
    for field, value in (("name", recipe.name), ("arm", recipe.label)):
        size = len(safe(value).encode())
        if size > MOST_BYTES:
            raise BadInput(f"{field}: a folder would have {size} bytes of name, {MOST_BYTES} are allowed; shorten it")


def _check_stream(recipe: Recipe) -> None:
    scenario = recipe.stream.scenario
    if scenario == "boundary_free" and recipe.protocol.boundaries == "train":
        raise BadInput("protocol.boundaries: is train, but stream.scenario boundary_free has none; set it to none")
    if scenario == "online" and recipe.training.most_epochs > 1:
        raise BadInput(
            f"training.epochs: is {recipe.training.epochs}, but stream.scenario online is a single pass; set it to 1"
        )


# ---- what a recipe says
def short_name(recipe: Recipe) -> str:
    """Methods, and the head where it is not the default, joined by `+`."""
    names = [name for name, _ in METHODS.parse(recipe.method, "method")]
    head = None if recipe.head in (None, "none") else _one("head", recipe.head)[0]
    usual = OBJECTIVES.get(_one("objective", recipe.objective)[0]).default_head
    return "+".join([*names, head] if head not in (None, usual) else names)


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what a run computes: all but names, folders and other arms."""
    return recipe.model_dump(mode="json", exclude=set(LABELS))


def recipe_hash(recipe: Recipe) -> str:
    """Hex sha256 of `identity`; equal for two recipes that compute the same."""
    text = json.dumps(identity(recipe), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def resolved_yaml(recipe: Recipe) -> str:
    """The name and everything that decides what a run computes, as YAML that `load_recipe` reads back to the same."""
    return yamltext.dump({"name": recipe.name, **identity(recipe)})


def annotated_yaml(recipe: Recipe) -> str:
    """The complete recipe without the other arms, each value with a comment that says where it comes from."""
    rows: list[tuple[str, str]] = []
    _emit(recipe, recipe.model_dump(mode="json", exclude={"arms"}), "", 0, rows)
    width = min(max(len(text) for text, _ in rows), 60)
    said = f"# {recipe.choice}\n" if recipe.choice else ""
    return said + "".join(f"{text:<{width}}  # {source}\n" if source else f"{text}\n" for text, source in rows)


def _emit(recipe: Recipe, value: dict[str, Any], prefix: str, depth: int, rows: list[tuple[str, str]]) -> None:
    pad = "  " * depth
    for key, below in value.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        name = yamltext.inline(key)
        if isinstance(below, dict) and below:
            rows.append((f"{pad}{name}:", source_of(recipe, dotted) if prefix in BLOCKS else ""))
            _emit(recipe, below, dotted, depth + 1, rows)
        elif dotted == "method":
            rows.append((f"{pad}{name}:", ""))
            for item in below:
                ((method, settings),) = item.items()
                start = len(rows)
                _emit(recipe, {method: settings}, dotted, depth + 2, rows)
                text, source = rows[start]
                rows[start] = (f"{pad}  - {text.lstrip()}", source)
        else:
            rows.append((f"{pad}{name}: {yamltext.inline(below)}", source_of(recipe, dotted)))


def run_folder(root: Path, recipe: Recipe) -> Path:
    """`<root>/<arm>/seed-<seed>`, where `run` and `compare` put and find a run."""
    return root / safe(recipe.label) / f"seed-{recipe.seed}"


def safe(name: str) -> str:
    """A name as one visible folder: no separator, and no leading dot, so that `..` leads nowhere."""
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in name).lstrip(".") or "run"
