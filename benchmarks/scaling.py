"""What a bank of atoms costs and still says as experiences go from 10 to 10,000 (docs/scaling.md).

    perdure run clinc150-long method=moram
    python -m benchmarks.scaling runs/clinc150-long/moram/seed-0

Four parts, on some linear maps of the run's host and on inputs of its first experience:

`trained`: the run's own atoms, cut off after 1, 2, 5 ... experiences. `simulated`: atoms drawn so that keys and values
have, jointly, the mean and covariance of the trained ones, behind the first ten experiences' own atoms, up to 10,000
experiences; no stream of that length was learnt. `time`: a read without gradients over a linear map of the same width,
interleaved. And `consolidated`: what merging, pruning and folding the trained bank remove, and their loss on inputs
that they were not fitted to.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.memory import choose_search, fair_shares, fold, index_keys, merge_duplicates, read_atoms

from ._harness import compare, machine

OUTPUT = "results/scaling.json"
ROLES = ("query", "attention_output", "ffn_in", "ffn_out")
FIRST = 10  # experiences whose own atoms stand at the head of a simulated bank
TRAINED, SIMULATED = (1, 2, 5, 10, 20, 50), (10, 100, 1000, 10_000)
MEANT_FOR = 80  # atoms: ten experiences of eight; `silent_falling` is under `threshold_atoms` of this
ROWS = 12  # training rows of every experience that consolidation looks at


def expected_best(size: int) -> float:
    """Best score of N atoms that answer alike: sqrt(2 ln N / N), the largest of N normal responses over their norm."""
    return math.sqrt(2 * math.log(size) / size)


# ---- inputs
def inputs_of(learner: Any, sites: list[Any], rows: Any) -> dict[str, Tensor]:
    """Real inputs [tokens, d_in] of each site, row by row, so that none is padding."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs: found[name].append(inputs[0].detach().flatten(0, -2))

    handles = [site.module.register_forward_pre_hook(keep(site.name)) for site in sites]
    try:
        for row in rows:
            learner.features([row])
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


# ---- what a bank says
def answer(x: Tensor, keys: Tensor, values: Tensor, settings: dict[str, Any], delta: float) -> tuple[Tensor, Any]:
    none = keys[:0], values[:0]
    return read_atoms(
        x, keys, values, *none, k=settings["top_k"], tau=settings["temperature"], delta=delta, eps=settings["eps"]
    )


def said(
    x: Tensor, keys: Tensor, values: Tensor, own: Tensor, before: dict[str, Tensor], settings: Any
) -> dict[str, float]:
    """How a bank answers inputs x of an experience whose own atoms are marked in `own` [N]."""
    free, routing = answer(x, keys, values, settings, 0.0)
    delta = settings["threshold"]
    held, _ = answer(x, keys, values, settings, delta)
    falling = delta * min(1.0, (MEANT_FOR / len(keys)) ** 0.5)
    best = routing.scores.max(-1).values
    facts = {
        "atoms": len(keys),
        "expected_best": expected_best(len(keys)),
        "chance": float(own.float().mean()),
        "best_score": float(best.median()),
        "silent": float((best < delta).float().mean()),
        "silent_falling": float((best < falling).float().mean()),
        "own_share": float(own[routing.indices].float().mean()),
    }
    for name, now in (("free", free), ("held", held)):
        then = before.setdefault(name, now)
        facts[f"change_{name}"] = float((now - then).norm() / then.norm().clamp_min(1e-30))
        facts[f"size_{name}"] = float(now.norm() / then.norm().clamp_min(1e-30))
    return facts


def more_like(keys: Tensor, values: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Atoms [number, d_in], [number, d_out] with the joint mean and covariance of those given."""
    mixing = torch.randn(number, keys.shape[0], generator=generator) / math.sqrt(keys.shape[0] - 1)
    means = keys.mean(0), values.mean(0)
    return tuple(mean + mixing @ (part - mean) for part, mean in zip((keys, values), means, strict=True))  # type: ignore[return-value]


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]}


def trained(
    banks: dict[str, Any], x: dict[str, Tensor], settings: Any, counts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    before: dict[str, dict[str, Tensor]] = {name: {} for name in banks}
    for count in counts:
        rows = []
        for name, (keys, values, owners) in banks.items():
            seen = owners < count
            rows.append(said(x[name], keys[seen], values[seen], owners[seen] == 0, before[name], settings))
        yield {"experiences": count, **mean_of(rows)}


def simulated(
    banks: dict[str, Any], x: dict[str, Tensor], settings: Any, counts: tuple[int, ...], each: int
) -> Iterator[dict[str, Any]]:
    before: dict[str, dict[str, Tensor]] = {name: {} for name in banks}
    for count in counts:
        rows = []
        for name, (keys, values, owners) in banks.items():
            first = owners < FIRST
            generator = torch.Generator().manual_seed(0)  # a longer bank begins like a shorter one
            parts = [(keys[first], values[first])]
            for start in range(int(first.sum()), count * each, 8192):
                parts.append(more_like(keys, values, min(8192, count * each - start), generator))
            all_keys, all_values = (torch.cat([part[side] for part in parts]) for side in (0, 1))
            own = torch.cat([owners[first] == 0, torch.zeros(len(all_keys) - int(first.sum()), dtype=torch.bool)])
            rows.append(said(x[name], all_keys, all_values, own, before[name], settings))
        yield {"experiences": count, **mean_of(rows)}


# ---- what it costs
def timed(d: int, counts: tuple[int, ...], each: int, k: int, tokens: int, pairs: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d, generator=generator)
    weight = torch.randn(d, d, generator=generator)
    for count in counts:
        size = count * each
        keys, values = torch.randn(2, size, d, generator=generator) * d**-0.5
        for wanted in ("exact", "coarse"):
            search, indexed = choose_search(size, d, k, wanted)  # type: ignore[arg-type]
            if search != wanted:
                continue
            settings = (
                {"search": search, "index": index_keys(keys, x.dtype, coarse=search == "coarse")} if indexed else {}
            )
            with torch.inference_mode(), torch.no_grad():
                found = compare(
                    lambda keys=keys, values=values, settings=settings: read_atoms(
                        x, keys, values, keys[:0], values[:0], k=k, tau=0.03, **settings
                    ),
                    lambda: F.linear(x, weight),
                    pairs=pairs,
                )
            yield {
                "experiences": count, "atoms": size, "width": d, "search": search, "tokens": tokens,
                "over_linear": round(found.median, 3), "low": round(found.low, 3), "high": round(found.high, 3),
                "multiplications_over_linear": round((size * d + 2 * k * d) / d**2, 2) if search == "exact" else None,
                "bytes_of_float32": 2 * size * d * 4,
            }  # fmt: skip


# ---- consolidation
def consolidated(
    banks: dict[str, Any], usage: dict[str, Tensor], fit: dict[str, Tensor], test: dict[str, Tensor], settings: Any
) -> Iterator[dict[str, Any]]:
    """Of the whole trained bank, without and with the threshold."""
    for delta in (0.0, settings["threshold"]):
        for how, value in (
            ("merge", 0.99),
            ("merge", 0.9),
            ("merge", 0.7),
            ("prune", 1),
            ("prune", 20),
            ("limit", 80),
            ("fold", 0.01),
        ):
            rows = []
            for name, (keys, values, owners) in banks.items():
                y, routing = answer(test[name], keys, values, settings, delta)
                size = float(y.norm().clamp_min(1e-30))
                if how == "merge":
                    new_keys, new_values, groups, _ = merge_duplicates(
                        keys, values, torch.zeros(len(keys)), owners, value
                    )
                    left, now = len(groups), answer(test[name], new_keys, new_values, settings, delta)[0]
                elif how == "prune":
                    _, of_fit = answer(fit[name], keys, values, settings, delta)
                    counts = torch.zeros(len(keys)).index_put_(
                        (of_fit.indices.flatten(),), (of_fit.weights.flatten() > 0).float(), accumulate=True
                    )
                    kept = counts >= value
                    left = int(kept.sum())
                    now = answer(test[name], keys[kept], values[kept], settings, delta)[0]
                elif how == "limit":
                    kept = fair_shares(usage[name], owners, value)
                    left = int(kept.sum())
                    now = answer(test[name], keys[kept], values[kept], settings, delta)[0]
                else:
                    found = fold(fit[name], answer(fit[name], keys, values, settings, delta)[0], value)
                    left, now = 0, (test[name].double() @ found.delta.t()).to(y)
                rows.append({"atoms_left": left / len(keys), "loss": float((now - y).norm()) / size})
            yield {"how": how, "value": value, "threshold": delta, **mean_of(rows)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished MoRAM run")
    parser.add_argument("--most", type=int, default=SIMULATED[-1], help="experiences that are simulated at most")
    parser.add_argument("--tokens", type=int, default=512, help="of a timed read")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--output", default=OUTPUT)
    options = parser.parse_args(argv)
    from perdure.recipe import RECIPE_FILE, load_recipe
    from perdure.run import learner_of
    from perdure.streams import build_stream

    torch.manual_seed(0)
    learner = learner_of(options.run)
    recipe = load_recipe(Path(options.run) / RECIPE_FILE)
    stream = list(build_stream(recipe.stream, recipe.seed))
    (method,) = [each for each in learner.methods if each.name == "moram"]
    settings = method.config.model_dump()
    layers = sorted({site.layer for site in method._sites})
    wanted = {layers[0], layers[len(layers) // 2], layers[-1]}
    sites = [site for site in method._sites if site.layer in wanted and site.role in ROLES]
    banks, usage = {}, {}
    for site in sites:
        bank = method.memories[site.name].bank
        banks[site.name] = (bank.keys().detach(), bank.values().detach(), bank.owners)
        usage[site.name] = bank.usage
    each = settings["rank"]
    counts = tuple(count for count in TRAINED if count <= len(stream))
    later = tuple(count for count in SIMULATED if count <= options.most)
    first = inputs_of(learner, sites, stream[0].train)
    fit, test = ({}, {})
    for experience in stream:
        some = [experience.train[number] for number in range(min(ROWS, len(experience.train)))]
        for kept, rows in ((fit, some), (test, experience.test)):
            for name, x in inputs_of(learner, sites, rows).items():
                kept.setdefault(name, []).append(x)
    fit, test = ({name: torch.cat(parts) for name, parts in kept.items()} for kept in (fit, test))
    found: dict[str, Any] = {
        "schema": 1, "name": "scaling", "machine": machine(), "run": recipe.name,
        "settings": {name: settings[name] for name in ("rank", "top_k", "temperature", "threshold", "search")},
        "sites": list(banks), "tokens_of_the_first_experience": len(next(iter(first.values()))),
        "tokens_for_consolidation": {"fit": len(next(iter(fit.values()))), "test": len(next(iter(test.values())))},
    }  # fmt: skip
    width = next(iter(banks.values()))[0].shape[1]
    parts = {
        "trained": trained(banks, first, settings, counts),
        "simulated": simulated(banks, first, settings, later, each),
        "consolidated": consolidated(banks, usage, fit, test, settings),
        "time": timed(width, later, each, settings["top_k"], options.tokens, options.pairs),
    }
    for name, rows in parts.items():
        found[name] = []
        for row in rows:
            print(name, json.dumps(row), flush=True)
            found[name].append(row)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
