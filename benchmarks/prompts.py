"""Prompt methods against the frozen host's own forward pass: time, and FLOPs counted.

    python -m benchmarks.prompts            # a ViT-B/16's shape (197 tokens), a small ViT (65 tokens), MiniLM (48)
    python -m benchmarks.prompts --smoke    # seconds; the numbers mean nothing

Inference without gradients. `rwf`: ten prompts retrieved from a block's own tokens in the first three blocks (the
first alone in the smoke setting); `static_prompts`: as many that are the same for every input; `l2p`: a pool of ten, of
which a pass of the frozen host chooses five of length five, so that every input is read twice. The ViTs' weights are
random: what is timed does not depend on them. Ratios are method / frozen host, pair by pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perdure import attach
from perdure.models import load_model

from ._harness import compare, counted, options_of, row, write

VITS = {
    "vit-b16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 224, "patch_size": 16},
    "vit-small": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3,
                  "image_size": 32, "patch_size": 4},
}  # fmt: skip
METHODS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "rwf": lambda blocks: {"rwf": {"length": 10, "layers": blocks}},
    "static_prompts": lambda blocks: {"static_prompts": {"length": 10, "layers": blocks}},
    "l2p": lambda _: {"l2p": {"size": 10, "length": 5, "top_n": 5}},
}
MOST_OF_RWF = 1.08
"""Of a ViT-B/16's forward pass: the bar."""


def host_of(name: str) -> nn.Module:
    if name == "minilm":
        return load_model("minilm", "classification")[0].eval()
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(ViTConfig(**VITS[name]), add_pooling_layer=False).eval()


def input_of(name: str, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "minilm":
        ids = torch.randint(1000, 2000, (batch, 48), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = VITS[name]["image_size"]
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    def one() -> None:
        with torch.no_grad():
            model(**inputs)

    return one


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=[*VITS, "minilm"], choices=[*VITS, "minilm"])
    parser.add_argument("--batch", type=int, default=4)
    options = options_of(parser, "prompts", 12, argv, hosts=["vit-small"], batch=1, pairs=2)
    blocks = [0] if options.smoke else [0, 1, 2]
    rows = []
    for host in options.hosts:
        inputs = input_of(host, options.batch)
        frozen = forward(host_of(host), inputs)
        own = counted(frozen).flops
        for name, method in METHODS.items():
            with_prompts = forward(attach(host_of(host), method(blocks)).eval(), inputs)
            ratio = compare(with_prompts, frozen, pairs=options.pairs, warmup=2, seconds=options.seconds)
            work = counted(with_prompts).flops / own
            rows.append({**row({"host": host, "method": name}, "frozen", ratio), "flops_ratio": round(work, 4)})
            print(
                f"{host:<10} {name:<15} {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the frozen host, "
                f"FLOPs {work:.3f}",
                flush=True,
            )
    if options.output is not None:
        settings = {"batch": options.batch, "blocks": blocks, "pairs": options.pairs, "bar_of_rwf": MOST_OF_RWF}
        write(options.output, "prompts", settings, rows, ["inference; method / frozen host, FLOPs counted"])


if __name__ == "__main__":
    main()
