"""One training step and one forward pass of a whole model with SETA-style experts against PEFT's LoRA of equal size.

    python -m benchmarks.experts             # MiniLM and a GPT-2 of the same shape, after 1, 4 and 8 tasks
    python -m benchmarks.experts --smoke     # seconds; the numbers mean nothing

Every past task left an expert with r (d_in + d_out) of each map's weights, which is what LoRA r = 8 has on the same
maps. The latest one trains, and beside it the gate, which LoRA has not. A step is forward, backward and AdamW
on what trains; the loss is the mean of the last hidden states' squares, the same for both, and the gate's regularisers
are left out. Ratios are SETA / LoRA.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from perdure.attachment import attach, attachment
from perdure.layers import SequenceGate, SparseExperts
from perdure.memory import Support

from ._harness import options_of
from .step import BATCH, LENGTH, LINEARS, RANK, against_lora, finish, lora, model_of


def seta(host: str, layers: int, tasks: int) -> nn.Module:
    """Supports of the tasks are drawn apart, so that each map holds tasks x r (d_in + d_out) values."""
    model = attach(model_of(host, layers), {"seta": {"gate_layer": 0}})
    generator = torch.Generator().manual_seed(1)
    held = attachment(model)
    assert held is not None
    for memory in held.methods[0].modules.values():
        if isinstance(memory, SequenceGate):
            memory.grow([-1] * tasks, torch.zeros(0))
            continue
        assert isinstance(memory, SparseExperts)
        bank, each = memory.bank, RANK * (memory.bank.in_features + memory.bank.out_features)
        places = torch.randperm(bank.in_features * bank.out_features, generator=generator)[: each * tasks]
        values = torch.randn(each * tasks, generator=generator) * 0.02
        experts = torch.arange(tasks, dtype=torch.int32).repeat_interleave(each)
        bank.set(Support(places.int(), experts, values, torch.ones(each * tasks)), [tasks - 1])
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=["minilm", "gpt2"], choices=list(LINEARS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 8])
    options = options_of(parser, "experts", 12, argv, hosts=["gpt2"], tasks=[2], pairs=2)
    length, layers = (8, 1) if options.smoke else (LENGTH, 6)
    rows = []
    for host in options.hosts:
        ids = torch.randint(1000, 2000, (BATCH, length), generator=torch.Generator().manual_seed(0))
        other = lora(host, layers)
        for tasks in options.tasks:
            rows += against_lora({"host": host, "tasks": tasks}, seta(host, layers, tasks), other, ids, options)
    note = "ratio = SETA / PEFT's LoRA, pair by pair, equal numbers of values that train, the gate of SETA aside."
    finish(options, "experts", length, rows, note)


if __name__ == "__main__":
    main()
