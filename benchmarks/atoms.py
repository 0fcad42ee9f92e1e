"""MoRAM layer, forward and backward, against dense masking, PEFT LoRA and a trainable dense layer.

    python -m benchmarks.atoms            # the full setting: T = 4096, N = 64, 256, 1024, d = 384, 768
    python -m benchmarks.atoms --smoke    # seconds; the numbers mean nothing

Each arm is a complete layer: a frozen base linear d -> d plus its adapter, forward on [T, d] and backward to the input
and to the adapter's parameters. `moram` has N atoms of which the last 16 train (as many as LoRA's rank) and the others
are frozen. `masked` computes as the released MoRAM code does: one top-k mask over all N weights, full matrices times
masked vectors, gradients by autograd through the concatenated bank. `lora` is PEFT's own LoRA layer, r = 16. `dense` is
one trainable d x d linear beside the frozen base. Ratios are moram / other: below 1, moram is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.memory import AtomBank, choose_path, read_atoms

from ._harness import compare, row, write

K, TAU, NEW, RANK = 8, 0.03, 16, 16
TITLE = (
    f"{'d':>5} {'N':>5} {'path':>7}  {'against':<8} {'ratio':>6}  {'95 % interval':<16} {'moram ms':>9} {'other ms':>9}"
)


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


def moram(d: int, bank: AtomBank, path: str = "auto") -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    base = frozen_linear(d)

    def forward(x: Tensor) -> Tensor:
        return base(x) + read_atoms(x, *bank.view()[:4], k=K, tau=TAU, path=path)[0]  # type: ignore[arg-type]

    return forward, list(bank.parameters())


def masked(d: int, bank: AtomBank) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    base = frozen_linear(d)

    def forward(x: Tensor) -> Tensor:
        p = F.linear(x, torch.cat([bank.frozen_keys, bank.new_keys]))
        s = F.normalize(p, dim=-1)
        top, index = torch.topk(s, K, dim=-1)
        w = torch.softmax(torch.full_like(s, float("-inf")).scatter(-1, index, top) / TAU, dim=-1)
        return base(x) + F.linear(w * p, torch.cat([bank.frozen_values, bank.new_values]).t())

    return forward, list(bank.parameters())


def lora(d: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(frozen_linear(d))
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=["0"])
    model = inject_adapter_in_model(config, model)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def dense(d: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    base, added = frozen_linear(d), nn.Linear(d, d, bias=False)
    return lambda x: base(x) + added(x), list(added.parameters())


def step(arm: tuple[Callable[[Tensor], Tensor], list[Tensor]], x: Tensor, grad: Tensor) -> Callable[[], None]:
    forward, parameters = arm
    wanted = [x, *parameters]
    return lambda: (torch.autograd.grad(forward(x), wanted, grad), None)[1]


def check_equal(d: int, bank: AtomBank, x: Tensor, grad: Tensor) -> float:
    """Largest relative difference of output and gradients between the two ways of computing the same layer."""
    results = []
    for forward, parameters in (moram(d, bank), masked(d, bank)):
        y = forward(x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], grad)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def measure(sizes: list[int], widths: list[int], tokens: int, pairs: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(TITLE)
    for d in widths:
        torch.manual_seed(0)
        x = torch.randn(tokens, d).requires_grad_()
        grad = torch.randn(tokens, d)
        others = {"lora": step(lora(d), x, grad), "dense": step(dense(d), x, grad)}
        for size in sizes:
            bank = make_bank(d, size)
            difference = check_equal(d, bank, x, grad)
            if difference > 1e-3:
                raise SystemExit(f"d={d}, N={size}: the arms differ by {difference:.1e}; a ratio would mean nothing")
            mine = step(moram(d, bank), x, grad)
            path = choose_path(size, K)
            case = {"d": d, "atoms": size, "new": bank.new_size, "k": K, "tokens": tokens, "path": path}
            other_path = "dense" if path == "gather" else "gather"
            arms = {"masked": step(masked(d, bank), x, grad), **others}
            arms[f"path {other_path}"] = step(moram(d, bank, other_path), x, grad)
            for against, arm in arms.items():
                ratio = compare(mine, arm, pairs=pairs)
                rows.append(row({**case, "relative_difference_to_masked": difference}, against, ratio))
                interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
                numbers = f"{ratio.median:6.3f}  {interval:<16} {ratio.a_ms:9.2f} {ratio.b_ms:9.2f}"
                print(f"{d:5d} {size:5d} {path:>7}  {against:<12} {numbers}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atoms", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--atoms", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, help="threads of torch; its own default when absent")
    parser.add_argument("--output", default="results/speed/atoms.json")
    parser.add_argument("--smoke", action="store_true", help="a tiny setting that writes only where --output says")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.smoke:
        options.atoms, options.widths, options.tokens, options.pairs = [16, 64], [32], 64, 3
        if options.output == parser.get_default("output"):
            options.output = None
    rows = measure(options.atoms, options.widths, options.tokens, options.pairs)
    if options.output is None:
        return
    settings = {"tau": TAU, "lora_rank": RANK, "dtype": "float32", "pairs": options.pairs}
    notes = [
        "Every arm holds the frozen base linear and computes gradients of the input and of its own parameters.",
        "ratio = time of the moram layer / time of the other arm, pair by pair; below 1, moram is faster.",
    ]
    write(options.output, "atoms", settings, rows, notes)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
