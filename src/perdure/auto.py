"""`method: auto`: the adapter, head and rates that did best on the validation rows of the ledger's streams.

`_auto.json` beside this file holds what may be chosen, docs/auto.md also what that gave on test rows. Both are made by

python -m perdure.auto docs/auto.md results/ledger.jsonl

Streams are of one kind where objective, modality and scenario agree. What is on offer was measured on every stream of
its kind and is ordered by the mean over these streams of `validation_average` (perplexities: geometric mean); the first
that the recipe's protocol grants is taken. Imports no torch.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ProtocolConfig, TrainingConfig
from .errors import BadInput, PerdureError
from .protocol import check_methods
from .registry import METHODS, OBJECTIVES

NAME = "auto"
EXTRACT = Path(__file__).with_name("_auto.json")
FIGURE = "validation_average"
LEAST_SEEDS = 3
"""Of a row that may decide; fewer are an illustration."""
IMAGE_FAMILIES = ("vit", "clip")
OF_ONE_MODEL = ("weights", "parameters", "pretrain")
SEED_METHODS = ("moram", "rwf", "seta", "apn")
HEAD = """# `method: auto`

Adapter, head and rates are chosen for you: what did best on the validation rows of the streams of your kind (objective,
modality, scenario) that the ledger holds, among what your protocol grants. Test figures decide nothing.
The first line of a run says what was taken and why; `perdure run my.yaml method=auto --print-config` shows every value.

```sh
perdure run my.yaml method=auto
perdure compare my.yaml --methods auto,lora,er
```

Made by `python -m perdure.auto docs/auto.md results/ledger.jsonl`. Rows whose runs scored no validation rows at the end
and rows of fewer than three seeds are not in it. Figures are means over the seeds of the ledger; over several streams,
arithmetic means of accuracies and geometric means of perplexities. Recipes on the same stream and model stand together
under the first one's name (their numbers of trials may differ; each recipe says its own). Of several streams the one
with the most arms comes first, and another joins while at least half of its arms stay, measured on all.
"""


@dataclass(frozen=True)
class Choice:
    """`settings` as of an arm of a recipe; `why` is one line for the user."""

    settings: dict[str, Any]
    why: str


def choose(data: Mapping[str, Any], offers: Sequence[Mapping[str, Any]] | None = None) -> Choice:
    """Chooses for a recipe.

    Args:
        data: the recipe's blocks, with what the user typed over them.
        offers: as `extract` gives them; those of the package when None.

    Raises:
        BadInput: nothing was measured on streams of this kind; names what to write instead.
        PerdureError: the protocol grants none of what was measured; names the first refusal.
    """
    if offers is None:
        offers = list(json.loads(EXTRACT.read_text(encoding="utf-8")))
    kind, scenario = _kind(data), _scenario(data)
    fitting = [offer for offer in offers if offer["kind"] == kind and not offer["withheld"]]
    if not fitting:
        known = ", ".join(sorted({offer["kind"] for offer in offers})) or "none"
        raise BadInput(
            f"method: auto rests on what was measured, and no stream of {kind} was; name a method "
            f"(`perdure methods` lists them), kinds that were measured: {known}"
        )
    own = [offer for offer in fitting if offer["scenario"] == scenario]
    refusals: list[PerdureError] = []
    for offer in own or fitting:
        settings = _fitted(offer["settings"], data)
        try:
            _check(settings, data)
        except PerdureError as error:
            refusals.append(error)
            continue
        return Choice(settings, _why(offer, scenario))
    raise type(refusals[0])(f"method: auto finds nothing that was measured and is granted here; {refusals[0]}")


def _kind(data: Mapping[str, Any]) -> str:
    ((name, config),) = OBJECTIVES.parse(data.get("objective") or "classification", "objective")
    if not OBJECTIVES.get(name).needs_head or OBJECTIVES.get(name).by_text:
        return name
    image = getattr(config, "tower", None) == "vision" or _sees(data.get("model"))
    return f"{name} of {'images' if image else 'text'}"


def _sees(model: Any) -> bool:
    """Whether a model takes images: by its family, or by what lies in its folder."""
    if isinstance(model, Mapping):
        scratch = model.get("scratch")
        return isinstance(scratch, Mapping) and scratch.get("family") in IMAGE_FAMILIES
    folder = Path(str(model)).expanduser()
    if (folder / "preprocessor_config.json").is_file():
        return True
    return not folder.is_dir() and any(family in str(model).lower() for family in IMAGE_FAMILIES)


def _scenario(data: Mapping[str, Any]) -> str:
    """The stream's scenario; where the task of a row is known at test its classes alone compete, which is another."""
    stream = data.get("stream")
    scenario = str((stream.get("scenario") if isinstance(stream, Mapping) else None) or "class_incremental")
    ((name, _),) = OBJECTIVES.parse(data.get("objective") or "classification", "objective")
    known = OBJECTIVES.get(name).needs_head and _protocol(data).task_id == "test"
    return scenario + (" (task known at test)" if known else "")


def _fitted(settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with as large a buffer as the protocol grants; the note is of the stream it was measured on."""
    settings = {key: copy.deepcopy(value) for key, value in settings.items() if key != "note"}
    granted = _protocol(data).rehearsal
    for item in settings["method"] if isinstance(settings["method"], list) else [settings["method"]]:
        for config in item.values() if isinstance(item, Mapping) else ():
            if config and config.get("budget") and granted:
                config["budget"] = granted
    return settings


def _protocol(data: Mapping[str, Any]) -> ProtocolConfig:
    return ProtocolConfig.model_validate(data.get("protocol") or {})


def _check(settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    training = TrainingConfig.model_validate({**(data.get("training") or {}), **(settings.get("training") or {})})
    check_methods(METHODS.parse(settings["method"], "method"), _protocol(data), training)


def _why(offer: Mapping[str, Any], scenario: str) -> str:
    figures = ", ".join(f"{stream} {_shown(value)}" for stream, value in offer["validation"].items())
    other = "" if offer["scenario"] == scenario else f"; measured on {offer['scenario']} streams, none was {scenario}"
    return f"auto: {offer['arm']}, best on validation rows of what is granted ({figures}){other}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %" if value <= 1 else f"{value:.2f}"


# ---- from the ledger
def extract(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `choose` may offer, best first within each kind and scenario.

    Rows without `run` or validation figures, those of fewer than `LEAST_SEEDS` seeds, and arms that have all data at
    once or task ids at test, are left out. An arm is its name and its head. Recipes with the same model and stream are
    one stream, called as the first of them. Settings are those of the row's own recipe, over several streams those of
    the one with the most arms.
    """
    from .evaluation.ledger import latest
    from .recipe import load_recipe

    groups: dict[tuple[str, str], dict[str, dict[tuple[str, str | None], Mapping[str, Any]]]] = {}
    names: dict[Any, str] = {}
    for row in latest(rows):
        figure = row["metrics"].get(FIGURE)
        if not figure or figure["mean"] is None or not row.get("run") or len(row["seeds"]) < LEAST_SEEDS:
            continue
        recipe = load_recipe(row["run"][0], row["run"][1:])
        if row["method"] not in recipe.arms or _is_bound(recipe.arms[row["method"]].method):
            continue
        key = (_kind(recipe._base), _scenario(recipe._base))
        same = json.dumps([row["model"], recipe._base["stream"]], sort_keys=True)
        stream = names.setdefault((key, same), row["recipe"])
        settings = recipe.arms[row["method"]].model_dump(mode="json", exclude_defaults=True)
        arms = groups.setdefault(key, {}).setdefault(stream, {})
        arms[row["method"], row["head"]] = {"metrics": row["metrics"], "settings": settings}
    offers = []
    for (kind, scenario), measured in sorted(groups.items()):
        streams, everywhere = _together(measured)
        sign = -1 if OBJECTIVES.get(kind.split()[0]).higher_is_better else 1
        group = []
        for arm, head in everywhere:
            settings = next(iter(streams.values()))[arm, head]["settings"]
            rows_of = {stream: arms[arm, head]["metrics"] for stream, arms in streams.items()}
            group.append(
                {
                    "kind": kind, "scenario": scenario, "arm": arm, "settings": settings,
                    "stores_rows": _stores(settings["method"]), "withheld": _withheld(settings["method"]),
                    "validation": {stream: metrics[FIGURE]["mean"] for stream, metrics in rows_of.items()},
                    "test": {stream: _tested_mean(metrics) for stream, metrics in rows_of.items()},
                }
            )  # fmt: skip
        offers += sorted(group, key=lambda offer: (sign * mean(offer["validation"].values()), offer["arm"]))
    return offers


def _together(streams: Mapping[str, dict[Any, Any]]) -> tuple[dict[str, dict[Any, Any]], set[Any]]:
    """Streams that are judged together, and the arms measured on all of them.

    The one with the most arms comes first; another joins while at least half of its arms stay, measured on all.
    """
    chosen: dict[str, dict[Any, Any]] = {}
    everywhere: set[Any] = set()
    most = max(len(arms) for arms in streams.values())
    for stream, arms in sorted(streams.items(), key=lambda pair: -len(pair[1])):
        both = everywhere & set(arms) if chosen else set(arms)
        if 2 * len(both) >= most:
            chosen[stream], everywhere = arms, both
    return chosen, everywhere


def _tested_mean(metrics: Mapping[str, Any]) -> float:
    """As `validation_average`: of perplexities the geometric mean over experiences."""
    return metrics[next(name for name in ("geometric_average", "average_accuracy") if name in metrics)]["mean"]


def mean(values: Iterable[float]) -> float:
    """Over streams: of perplexities the geometric mean, else the arithmetic one."""
    values = list(values)
    if max(values) > 1:
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def _needs(method: Any) -> set[str]:
    return {need for name, config in METHODS.parse(method, "method") for need in METHODS.get(name)(config).needs}


def _is_bound(method: Any) -> bool:
    return bool({"all_data", "task_id_at_test"} & _needs(method))


def _withheld(method: Any) -> str:
    """Why an arm is measured and not offered; empty where it is offered."""
    for name, config in METHODS.parse(method, "method"):
        if METHODS.get(name).status == "control":
            return "a control"
        fields = type(config).model_fields
        if any(getattr(config, field) != fields[field].default for field in OF_ONE_MODEL if field in fields):
            return "made for the measured model"  # names weights, parameters or a pretraining that only this one has
    return ""


def _stores(method: Any) -> bool:
    return "rehearsal" in _needs(method)


def page(offers: Sequence[Mapping[str, Any]]) -> str:
    """docs/auto.md: what is chosen where, and what that gave on test rows beside the four seed systems."""
    lines = [HEAD]
    for kind, scenario in dict.fromkeys((offer["kind"], offer["scenario"]) for offer in offers):
        group = [offer for offer in offers if (offer["kind"], offer["scenario"]) == (kind, scenario)]
        streams = list(group[0]["validation"])
        lines += [f"## {kind}, {scenario.replace('_', ' ')}", ""]
        lines += ["| arm | " + " | ".join(f"{s}: validation | test" for s in streams) + " | stores rows |"]
        lines += ["|---" * (2 * len(streams) + 2) + "|"]
        for offer in group:
            cells = [f"{_shown(offer['validation'][s])} | {_shown(offer['test'][s])}" for s in streams]
            name = offer["arm"] + (f" ({offer['withheld']}, not offered)" if offer["withheld"] else "")
            lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if offer['stores_rows'] else 'no'} |")
        lines += ["", *_verdict(group), ""]
    return "\n".join([*lines, *_overall(offers)])


def _overall(offers: Sequence[Mapping[str, Any]]) -> list[str]:
    """`auto` without stored rows against each arm of the seed papers' methods, over all streams that have both."""
    pairs: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for kind, scenario in dict.fromkeys((offer["kind"], offer["scenario"]) for offer in offers):
        group = [offer for offer in offers if (offer["kind"], offer["scenario"]) == (kind, scenario)]
        group = [offer for offer in group if not offer["stores_rows"]]
        taken = next((offer for offer in group if not offer["withheld"]), None)
        share = OBJECTIVES.get(kind.split()[0]).higher_is_better
        for offer in group:
            if taken is not None and _methods(offer) & set(SEED_METHODS):
                both = [(taken["test"][stream], offer["test"][stream]) for stream in offer["test"]]
                pairs.setdefault((offer["arm"], share), []).extend(both)
    if not pairs:
        return []
    lines = ["## Against the seed papers' methods, over all streams", ""]
    lines += ["Test figures, no stored rows, means over the streams that both were measured on.", ""]
    lines += ["| arm | streams | auto | the arm |", "|---|---|---|---|"]
    for (arm, _), both in pairs.items():
        mine, its = (_shown(mean(one[place] for one in both)) for place in (0, 1))
        lines.append(f"| {arm} | {len(both)} | {mine} | {its} |")
    return [*lines, ""]


def _verdict(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Test figures of the choice without stored rows against arms of the seed papers' methods."""
    offered = [offer for offer in group if not offer["withheld"]]
    free = [offer for offer in group if not offer["stores_rows"]]
    told = []
    for word, offers in (
        ("without stored rows", [offer for offer in offered if not offer["stores_rows"]]),
        ("with stored rows granted", offered),
    ):
        if offers:
            told.append(f"- {word}: `auto` takes **{offers[0]['arm']}**, test {_tested(offers[0])}")
    seeds = [offer for offer in free if _methods(offer) & set(SEED_METHODS)]
    shown = [f"{offer['arm']} {_tested(offer)}" for offer in seeds]
    return [*told, f"- methods of the seed papers, test: {', '.join(shown) or 'not measured here'}"]


def _tested(offer: Mapping[str, Any]) -> str:
    return _shown(mean(offer["test"].values()))


def _methods(offer: Mapping[str, Any]) -> set[str]:
    return {name for name, _ in METHODS.parse(offer["settings"]["method"], "method")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and `_auto.json` from a ledger; returns the exit code."""
    from .evaluation.ledger import read

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 2:
        print("usage: python -m perdure.auto PAGE.md LEDGER.jsonl", file=sys.stderr)
        return BadInput.exit_code
    offers = extract(read(arguments[1]))
    EXTRACT.write_text("".join(["[\n", ",\n".join(json.dumps(offer) for offer in offers), "\n]\n"]), encoding="utf-8")
    Path(arguments[0]).write_text(page(offers), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
