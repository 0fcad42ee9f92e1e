"""One training step and one forward pass of a whole model with MoRAM against the same model with PEFT's LoRA.

    python -m benchmarks.step             # MiniLM and a GPT-2 of the same shape, after 10 and 100 experiences
    python -m benchmarks.step --smoke     # seconds; the numbers mean nothing

Both arms adapt the same linear maps, all of every block, with r = 8; a fused map of query, key and value is one for
LoRA and three banks for MoRAM. The banks hold 8 frozen atoms of each past experience, with values that are not zero,
and 8 new ones. A step is forward, backward and AdamW on what trains; the loss is the mean of the last hidden states'
squares, the same for both. Inference is a forward pass as after learning, when all atoms are frozen. Ratios are
MoRAM / LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from perdure.attachment import attach, attachment
from perdure.layers import LinearMemory
from perdure.memory import choose_search
from perdure.models import load_model

from ._harness import bytes_of, compare, counted, options_of, roofline, row, write

RANK, BATCH, LENGTH, WIDTH = 8, 16, 64, 384
LINEARS = {
    "minilm": r".*encoder\.layer\.\d+\..*(query|key|value|attention.output.dense|intermediate.dense|output.dense)",
    "gpt2": r".*h\.\d+\..*(c_attn|c_proj|c_fc)",
}
TRAINED = ("bank.new_keys", "bank.new_values", "perdure_seta.weight", "perdure_seta.bias")


def model_of(host: str, layers: int) -> nn.Module:
    if host == "minilm":
        return load_model("minilm", "classification")[0]
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=12, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))


def memories(model: nn.Module) -> list[LinearMemory]:
    held = attachment(model)
    assert held is not None
    return [each for each in held.methods[0].modules.values() if isinstance(each, LinearMemory)]


def moram(host: str, layers: int, experiences: int, search: str) -> nn.Module:
    model = attach(model_of(host, layers), {"moram": {"rank": RANK, "search": search}})
    generator = torch.Generator().manual_seed(1)
    for memory in memories(model):
        for owner, size in enumerate((RANK * experiences, RANK)):
            memory.grow(size, owner, generator)
            memory.bank.new_values.data.normal_(std=0.02, generator=generator)
    return model


def lora(host: str, layers: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=LINEARS[host])
    return inject_adapter_in_model(config, model_of(host, layers))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora_" in n or n.endswith(TRAINED)]


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    model.train()
    model.requires_grad_(False)
    parameters = [parameter.requires_grad_() for parameter in trained(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def one() -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one


def inference(model: nn.Module, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def one() -> None:
        model.eval()
        model(input_ids=ids)

    return one


def against_lora(case: dict[str, Any], mine: nn.Module, other: nn.Module, ids: torch.Tensor, options: Any) -> list[Any]:
    """Rows of a step and of a forward pass, with the work of both counted."""
    rows = []
    for what, make in (("step", step), ("inference", inference)):
        if what == "inference":
            for memory in memories(mine):
                memory.freeze()
        a, b = make(mine, ids), make(other, ids)
        ratio = compare(a, b, pairs=options.pairs, seconds=options.seconds)
        # The table of words is not read whole; a step reads every other weight twice.
        held = [*mine.parameters(), *mine.buffers()]
        read = bytes_of(
            *(p for name, p in mine.named_parameters() if "word_embeddings" not in name and "wte" not in name)
        )
        moments = [torch.empty(2 * p.numel()) for p in trained(mine)] if what == "step" else []
        found = roofline(a, [ids, *held, *moments], (1 + (what == "step")) * read, 3, options.seconds)
        found["flops_ratio"] = round(found["flops"] / counted(b).flops, 4)
        rows.append(row({**case, "what": what, **found}, "lora", ratio))
        print(
            f"{' '.join(f'{value!s:<6}' for value in case.values())} {what:<9} {ratio.median:.3f} ({ratio.low:.3f} to "
            f"{ratio.high:.3f}), {ratio.a_ms:.0f} ms against {ratio.b_ms:.0f} ms; FLOPs {found['flops_ratio']:.3f}",
            flush=True,
        )
    return rows


def finish(options: argparse.Namespace, name: str, length: int, rows: list[dict[str, Any]], note: str) -> None:
    """Writes the file, where one is wanted."""
    if options.output is None:
        return
    settings = {"rank": RANK, "batch": BATCH, "length": length, "dtype": "float32", "pairs": options.pairs}
    write(options.output, name, settings, rows, [note])
    print(f"written: {options.output}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=["minilm", "gpt2"], choices=list(LINEARS))
    parser.add_argument("--experiences", type=int, nargs="+", default=[10, 100])
    options = options_of(parser, "step", 20, argv, hosts=["gpt2"], experiences=[2, 80], pairs=2)
    length, layers = (8, 1) if options.smoke else (LENGTH, 6)
    rows = []
    for host in options.hosts:
        ids = torch.randint(1000, 2000, (BATCH, length), generator=torch.Generator().manual_seed(0))
        other = lora(host, layers)
        for experiences in options.experiences:
            wide = choose_search(RANK * experiences, WIDTH, RANK, "coarse")[0] == "coarse"
            for search in ("exact", "coarse")[: 1 + wide]:
                mine = moram(host, layers, experiences, search)
                case = {"host": host, "experiences": experiences, "atoms": RANK * (experiences + 1), "search": search}
                rows += against_lora(case, mine, other, ids, options)
    finish(options, "step", length, rows, "ratio = MoRAM / PEFT's LoRA, pair by pair; below 1, MoRAM is faster.")


if __name__ == "__main__":
    main()
