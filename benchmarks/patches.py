"""APN's patches, forward and backward, against gather and einsum and a dense feed-forward; row-wise AdamW.

    python -m benchmarks.patches            # the paper's layer: K = 256, k = 4, r = 32, C = 384
    python -m benchmarks.patches --smoke    # seconds; the numbers mean nothing

`gathered` computes as the author's released layer: the chosen decoders gathered per token, then einsum. `dense` is the
feed-forward that the layer replaces: C -> 4 C -> C with GELU. Both train all their parameters, as the patches do. The
optimizer rows compare one step of `RowAdamW` in which a share of the patches was visited with torch's own AdamW
(foreach) on the same tensors. Bytes are those of tensors alive at the worst moment of forward and backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.layers import PatchLayer
from perdure.memory import choose_patch_path
from perdure.optim_rows import RowAdamW

from ._harness import bytes_of, compare, counted, options_of, roofline, row, write


class Gathered(PatchLayer):
    """The same layer, read as in shankch/nanoGPT-apn."""

    def forward(self, z: Tensor) -> Tensor:
        s = F.normalize(z, dim=-1) @ F.normalize(self.prototypes, dim=-1).t()
        top, index = torch.topk(s / self.tau, self.k, dim=-1)
        w = torch.softmax(top, dim=-1)
        u = (z @ self.code.t()).unsqueeze(1)
        phi = u * torch.sigmoid(self.gate_scale[index] * u + self.gate_bias[index])
        each = torch.einsum("tkdr,tkr->tkd", self.decoders[index], phi)
        return self.gamma * (w.unsqueeze(-1) * each).sum(1)


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    wanted = [x, *layer.parameters()]
    return lambda: (torch.autograd.grad(layer(x), wanted, grad), None)[1]


def check_equal(one: nn.Module, other: nn.Module, x: Tensor, grad: Tensor) -> float:
    found = []
    for layer in (one, other):
        y = layer(x)
        found.append([y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def layers(tokens: int, width: int, sizes: dict[str, int], pairs: int, seconds: float | None) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
    mine, gathered = PatchLayer(width, **sizes, depth=6), Gathered(width, **sizes, depth=6)  # type: ignore[arg-type]
    gathered.load_state_dict(mine.state_dict())
    difference = check_equal(mine, gathered, x, grad)
    if difference > 1e-3:
        raise SystemExit(f"the arms differ by {difference:.1e}; a ratio would mean nothing")
    path = choose_patch_path(sizes["patches"], sizes["k"])
    case: dict[str, Any] = {"width": width, **sizes, "tokens": tokens, "path": path, "relative_difference": difference}
    parameters = list(mine.parameters())
    moved = 2 * bytes_of(x, grad) + 2 * bytes_of(*parameters)
    case |= roofline(step(mine, x, grad), [x, grad, *parameters], moved, 5, seconds)
    rows = []
    for against, other in (("gathered", gathered), ("dense", feed_forward(width))):
        ratio = compare(step(mine, x, grad), step(other, x, grad), pairs=pairs, seconds=seconds)
        most = counted(step(other, x, grad), [x, grad, *other.parameters()]).peak_bytes
        rows.append(row({**case, "other_peak_bytes": most}, against, ratio))
        share, whole = case["peak_bytes"] / most, most / 2**20
        print(
            f"{tokens:6d} tokens, against {against:<9} {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), "
            f"{ratio.a_ms:.1f} ms against {ratio.b_ms:.1f} ms; peak {share:.3f} of {whole:.0f} MiB",
            flush=True,
        )
    return rows


def optimizers(width: int, sizes: dict[str, int], pairs: int, seconds: float | None) -> list[dict[str, Any]]:
    rows = []
    for share in (0.05, 0.25, 1.0):
        visited = max(1, round(share * sizes["patches"]))
        both = []
        for kind in (RowAdamW, torch.optim.AdamW):
            torch.manual_seed(0)
            decoders = nn.Parameter(torch.randn(sizes["patches"], width, sizes["rank"]))
            decoders.grad = torch.zeros_like(decoders)
            decoders.grad[torch.randperm(sizes["patches"])[:visited]] = 1.0
            group: dict[str, Any] = {"params": [decoders], "lr": 1e-4}
            optimizer = kind([group | ({"rows": True} if kind is RowAdamW else {})])
            both.append(optimizer.step)
        ratio = compare(*both, pairs=pairs, seconds=seconds)
        rows.append(row({"width": width, **sizes, "visited": visited}, "AdamW", ratio))
        print(f"optimizer, {visited} of {sizes['patches']} patches visited: {ratio.median:.3f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    options = options_of(parser, "patches", 20, argv, tokens=[32], pairs=3)
    width, sizes = 384, {"patches": 256, "k": 4, "rank": 32}
    if options.smoke:
        width, sizes = 16, {"patches": 16, "k": 2, "rank": 4}
    rows = [each for tokens in options.tokens for each in layers(tokens, width, sizes, options.pairs, options.seconds)]
    rows += optimizers(width, sizes, options.pairs, options.seconds)
    if options.output is None:
        return
    notes = [
        "Every arm computes gradients of the input and of all its parameters.",
        "ratio = time of the patches (or of RowAdamW) / time of the other arm, pair by pair; below 1, ours is faster.",
    ]
    write(options.output, "patches", {"dtype": "float32", "pairs": options.pairs}, rows, notes)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
