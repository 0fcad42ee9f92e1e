"""Reading MoRAM atoms, forward and backward, against the ways that others compute it and against LoRA.

    python -m benchmarks.atoms            # the full setting: T = 4096, N = 64, 256, 1024, 4096, d = 384, 768
    python -m benchmarks.atoms --smoke    # seconds; the numbers mean nothing

`read`: the memory alone, of N atoms of which the last 16 train and the others are frozen, against `dense`, one
trainable d x d linear alone; `masked`, as the released MoRAM code computes (one top-k mask over all N weights, full
matrices times masked vectors, gradients by autograd through the concatenated bank); `gathered`, as the released APN
code reads its patches (the chosen values gathered per token, then einsum). `layer`: a frozen linear d -> d plus the
memory, against `lora`, PEFT's own layer, r = 16, on the same base. Backward is to the input and to what trains. The
memory searches its keys exactly or coarsely (column `search`; coarse rows say their recall of the true k). Ratios are
memory / other: below 1, the memory is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.memory import AtomBank, choose_path, choose_search, index_keys, read_atoms

from ._harness import bytes_of, compare, options_of, roofline, row, write

K, TAU, NEW, RANK = 8, 0.03, 16, 16
TITLE = f"{'d':>5} {'N':>5}  search {'arm':<6} {'against':<12} {'ratio':>6}  {'95 % interval':<16} {'ms':>8} other ms"
Arm = tuple[Callable[[Tensor], Tensor], list[Tensor]]


def make_bank(d: int, size: int) -> AtomBank:
    generator = torch.Generator().manual_seed(size)
    bank = AtomBank(d, d)
    if size > NEW:
        bank.grow(size - NEW, owner=0, generator=generator)
        bank.new_values.data.normal_(std=0.02, generator=generator)
    bank.grow(min(NEW, size), owner=1, generator=generator)
    bank.new_values.data.normal_(std=0.02, generator=generator)
    return bank


def frozen_linear(d: int) -> nn.Linear:
    torch.manual_seed(d)
    return nn.Linear(d, d).requires_grad_(False)


def settings_of(bank: AtomBank, wanted: str) -> dict[str, Any]:
    search, indexed = choose_search(bank.frozen_size, bank.in_features, K, wanted)  # type: ignore[arg-type]
    if not indexed:
        return {}
    return {"search": search, "index": index_keys(bank.frozen_keys, torch.float32, coarse=search == "coarse")}


def read(bank: AtomBank, search: str, path: str = "auto") -> Arm:
    settings = settings_of(bank, search)  # made once per growth, not per step

    def forward(x: Tensor) -> Tensor:
        return read_atoms(x, *bank.view()[:4], k=K, tau=TAU, path=path, **settings)[0]  # type: ignore[arg-type]

    return forward, list(bank.parameters())


def masked(bank: AtomBank) -> Arm:
    def forward(x: Tensor) -> Tensor:
        p = F.linear(x, torch.cat([bank.frozen_keys, bank.new_keys]))
        s = F.normalize(p, dim=-1)
        top, index = torch.topk(s, K, dim=-1)
        w = torch.softmax(torch.full_like(s, float("-inf")).scatter(-1, index, top) / TAU, dim=-1)
        return F.linear(w * p, torch.cat([bank.frozen_values, bank.new_values]).t())

    return forward, list(bank.parameters())


def gathered(bank: AtomBank) -> Arm:
    def forward(x: Tensor) -> Tensor:
        p = F.linear(x, torch.cat([bank.frozen_keys, bank.new_keys]))
        top, index = torch.topk(F.normalize(p, dim=-1), K, dim=-1)
        values = torch.cat([bank.frozen_values, bank.new_values])[index]
        return torch.einsum("tk,tkd->td", torch.softmax(top / TAU, dim=-1) * p.gather(-1, index), values)

    return forward, list(bank.parameters())


def on_base(d: int, arm: Arm) -> Arm:
    base, (forward, parameters) = frozen_linear(d), arm
    return lambda x: base(x) + forward(x), parameters


def lora(d: int) -> Arm:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(frozen_linear(d))
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["0"])
    model = inject_adapter_in_model(config, model)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def dense(d: int) -> Arm:
    layer = nn.Linear(d, d, bias=False)
    return layer, list(layer.parameters())


def step(arm: Arm, x: Tensor, grad: Tensor) -> Callable[[], None]:
    forward, parameters = arm
    wanted = [x, *parameters]
    return lambda: (torch.autograd.grad(forward(x), wanted, grad), None)[1]


def check_equal(bank: AtomBank, others: list[Arm], x: Tensor, grad: Tensor) -> float:
    """Largest relative difference of output and gradients between the ways of computing the same memory."""
    results = []
    for forward, parameters in (read(bank, "exact"), *others):
        y = forward(x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)])
    return max(float((a - b).norm() / b.norm()) for one in results[1:] for a, b in zip(results[0], one, strict=True))


def recall(bank: AtomBank, x: Tensor) -> float:
    """Share of the k best atoms of the exact search that the coarse one finds too."""
    exact, coarse = (
        read_atoms(x, *bank.view()[:4], k=K, tau=TAU, **settings_of(bank, search))[1].indices
        for search in ("exact", "coarse")
    )
    return float((exact.unsqueeze(2) == coarse.unsqueeze(1)).any(-1).float().mean())


def measure(
    sizes: list[int], widths: list[int], tokens: int, pairs: int, seconds: float | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(TITLE)
    for d in widths:
        torch.manual_seed(0)
        x = torch.randn(tokens, d).requires_grad_()
        grad = torch.randn(tokens, d)
        for size in sizes:
            bank = make_bank(d, size)
            rivals = {"masked": masked(bank), "gathered": gathered(bank)}
            difference = check_equal(bank, list(rivals.values()), x, grad)
            if difference > 1e-3:
                raise SystemExit(f"d={d}, N={size}: the arms differ by {difference:.1e}; a ratio would mean nothing")
            searches = ["exact"]
            if settings_of(bank, "coarse").get("search") == "coarse":
                searches.append("coarse")
            for search in searches:
                mine = read(bank, search)
                path = choose_path(size, K)
                case: dict[str, Any] = {"d": d, "atoms": size, "new": bank.new_size, "k": K, "tokens": tokens}
                case |= {"path": path, "search": search, "relative_difference": difference}
                if search == "coarse":
                    case["recall"] = recall(bank, x.detach())
                held = [x, grad, *bank.parameters(), *bank.buffers()]
                moved = 2 * bytes_of(x, grad) + bytes_of(*bank.buffers(), *bank.parameters(), *bank.parameters())
                case |= roofline(step(mine, x, grad), held, moved, 5, seconds)
                pairings = [("read", name, mine, arm) for name, arm in {"dense": dense(d), **rivals}.items()]
                pairings.append(("layer", "lora", on_base(d, mine), lora(d)))
                other = "dense" if path == "gather" else "gather"
                pairings.append(("read", f"path {other}", mine, read(bank, search, other)))
                for arm, against, a, b in pairings:
                    ratio = compare(step(a, x, grad), step(b, x, grad), pairs=pairs, seconds=seconds)
                    rows.append(row({**case, "arm": arm}, against, ratio))
                    numbers = f"{ratio.median:6.3f}  {f'{ratio.low:.3f} to {ratio.high:.3f}':<16}"
                    numbers += f" {ratio.a_ms:8.2f} {ratio.b_ms:9.2f}"
                    print(f"{d:5d} {size:5d} {search:>7} {arm:<6} {against:<12} {numbers}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atoms", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--atoms", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, default=4096)
    options = options_of(parser, "atoms", 40, argv, atoms=[64, 20000], widths=[32], tokens=64, pairs=3)
    rows = measure(options.atoms, options.widths, options.tokens, options.pairs, options.seconds)
    if options.output is None:
        return
    settings = {"tau": TAU, "lora_rank": RANK, "dtype": "float32", "pairs": options.pairs}
    notes = [
        "Every arm computes gradients of the input and of its own parameters; the index of frozen keys is made once.",
        "ratio = time of the memory / time of the other arm, pair by pair; below 1, the memory is faster.",
    ]
    write(options.output, "atoms", settings, rows, notes)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
