"""Learns every method in however many processes there are and writes what came out. Run by `torchrun` and without.

    python -m tests.conformance.two_processes RESULTS

float64, no dropout, a global batch of 4 and a last batch of 3 rows, which two processes share as 2 and 1.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import weakref
from typing import Any

import torch
from safetensors.torch import save_file

from perdure.assembly import complete_methods
from perdure.config import TrainingConfig
from perdure.errors import BadInput, CannotWrite
from perdure.learner import Learner
from perdure.sharding import check_sharding, in_parts, is_split
from perdure.streams.experience import Experience

from . import cases

GLOBAL_BATCH, ROWS = 4, 7
HEADS: dict[str, Any] = {
    "ridge": {"ridge": {"features": 16}}, "ncm": {"ncm": {"recentre": {}}}, "slda": {"slda": {"recentre": {}}},
    "slca": {"slca": {"samples": 8}},
}  # fmt: skip
SPECS = cases.all_specs()
CASES: dict[str, tuple[str, Any]] = {
    f"{name}/bert": ("bert", SPECS[name]) for name in SPECS if cases.runs(name, "bert")
}
CASES |= {f"{name}/gpt2": ("gpt2", SPECS[name]) for name in ("finetune", "moram", "moram+er", "apn", "ewc", "lwf")}
CASES |= {f"{name}/{host}": (host, SPECS[name]) for host in ("vit", "llama") for name in ("finetune", "moram")}
CASES |= {f"{name} adamw/bert": ("bert", SPECS[name]) for name in ("finetune", "moram-protected")}
CASES |= {f"{name}/clip": ("clip", SPECS[name]) for name in ("finetune", "moram", "moram+er")}
CASES["finetune pooler/bert"] = ("bert", SPECS["finetune"])  # as AutoModel builds it: no loss reaches the pooler
CASES["captions/clip"] = ("clip", SPECS["moram"])


def splits(spec: Any) -> bool:
    try:
        check_sharding(complete_methods(spec), TrainingConfig(shard="host"))
    except BadInput:
        return False
    return True


SHARDED = [  # the host split over the processes, what trains whole
    f"{name} sharded/{host}" for host in cases.HOSTS for name in SPECS
    if cases.runs(name, host) and splits(SPECS[name])
    and (host == "bert" or name in ("moram", "lora"))
]  # fmt: skip
CASES |= {name: (name.rpartition("/")[2], SPECS[name.partition(" ")[0]]) for name in SHARDED}
BANKS = {  # old atoms in parts; with the host
    "moram": "banks", "moram-contrast": "banks", "moram-limited": "banks", "moram-protected": "both",
}  # fmt: skip
CASES |= {  # 3 experiences leave 9 atoms a map, which two processes cannot share alike
    f"{name} {shard}/bert": ("bert", {"moram": {**SPECS[name]["moram"], "rank": 3}}) for name, shard in BANKS.items()
}
CASES["moram-limited banks/bert"][1]["moram"]["max_atoms"] = 5  # nor these
CASES |= {f"moram+{head}/bert": ("bert", SPECS["moram"]) for head in ("ridge", "ncm", "slda", "slca")}


def held_bytes(module: torch.nn.Module) -> int:
    """Of parameters, parts as parts."""
    return sum((p.to_local() if is_split(p) else p).nbytes for p in module.parameters())  # type: ignore[operator]


def check_split(learner: Learner) -> None:
    """Of what the blocks hold frozen, each of two processes keeps half, up to rows that do not divide."""
    blocks = [block.module for block in learner.host.blocks()]
    parts = [block.get_parameter(name) for block in blocks for name in in_parts(block)]
    split, whole = sum(p.nbytes for p in parts), sum(p.nbytes for block in blocks for p in block.parameters())
    kept = sum(map(held_bytes, blocks))
    assert split > 0 and whole - 0.55 * split < kept < whole - 0.45 * split, (split, whole, kept)


def refused(words: str, function: Any, *given: Any, **named: Any) -> None:
    try:
        function(*given, **named)
    except BadInput as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def check_a_split_host() -> None:
    """Nothing of the whole lives on; what is refused leaves a model as it was; a split one is not taken again."""
    named: dict[str, Any] = {"training": {"shard": "host"}, "objective": {"classification": {"max_length": 32}}}
    named |= {"protocol": {"rehearsal": 12, "mask": "seen"}, "method": SPECS["moram"]}
    for method in ("moram", "lora", "linear_probe"):
        model, processor = cases.build_host("bert")
        trains = {name: bool(number % 2) for number, (name, _) in enumerate(model.named_parameters())}
        for name, on in trains.items():
            model.get_parameter(name).requires_grad_(on)
        whole = [weakref.ref(p) for layer in model.encoder.layer for p in layer.parameters()]
        learner = Learner(model, processor, **{**named, "method": SPECS[method]})
        check_split(learner)
        gc.collect()
        assert whole and not any(reference() is not None for reference in whole), method
        refused("load the model again", Learner, learner.detach(), processor, **named)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    model, processor = cases.build_host("bert")
    model.encoder.layer[1].output = model.encoder.layer[0].output
    refused("share modules", Learner, model, processor, **named)
    assert not in_parts(model)
    with tempfile.TemporaryDirectory() as folder:
        cases.build_learner("bert", SPECS["moram"], shard="host").save_pretrained(folder)
        model, processor = cases.build_host("bert")
        model.encoder.layer[0].output.dense.weight.data.add_(1)
        refused("its weights", Learner.from_pretrained, folder, model, processor)
        assert not in_parts(model)


def check_split_banks(
    learner: Learner, host: str, made: list[Experience], logits: torch.Tensor, processes: int
) -> torch.Tensor:
    """Each process holds its part, a saved folder has all, one write can be taken back; returns what is then said."""
    banks = [memory.bank for memory in learner.methods[0].modules.values()]
    for bank in banks:
        held, rows = len(bank.frozen_keys), bank.frozen_size
        assert rows > 2 and len(bank.frozen_values) == held and abs(held - rows / processes) < 1, (held, rows)
    assert any(bank.frozen_size % 2 for bank in banks)
    if processes > 1:
        refused("split over processes", learner.export, "unused", "stacked")
        try:
            learner.save_pretrained("/proc/none")
        except CannotWrite as error:
            alone = "the first process could not write it" in str(error)
            assert alone != learner.accelerator.is_main_process, error
        else:
            raise AssertionError("a process does not know that nothing was saved")
    with tempfile.TemporaryDirectory() as own:
        folders: list[Any] = [own]
        if processes > 1:
            torch.distributed.broadcast_object_list(folders)  # one folder for both, as a user would give
        learner.save_pretrained(folders[0])
        again = Learner.from_pretrained(folders[0], *cases.build_host(host, torch.float64))
        said = cases.outputs(again, made)  # both have read the folder where one has its answers
    assert again.methods[0].modules.keys() == learner.methods[0].modules.keys()
    for memory, bank in zip(again.methods[0].modules.values(), banks, strict=True):
        assert torch.equal(memory.bank.frozen_keys, bank.frozen_keys), "a part that is not this process's"
    assert torch.equal(said, logits)
    again.forget(0)
    return torch.cat([logits, cases.outputs(again, made)])


def learn(name: str, processes: int) -> dict[str, Any]:
    host, spec = CASES[name]
    made = cases.experiences(host, 3 if any(f" {word}/" in name for word in BANKS.values()) else 2, rows=ROWS)
    if name.startswith("captions"):  # the test rows keep their classes, to be scored
        captions = [{"image": row["image"], "text": f"{n} {row['label']}"} for n, row in enumerate(made[0].train)]
        made[0] = made[0].with_rows(train=captions, test=())
    head = HEADS.get(name.partition("/")[0].rpartition("+")[2])
    sharded = " sharded" in name or " both" in name
    shard = next((word for word in ("banks", "both") if f" {word}/" in name), "host" if sharded else "none")
    optimizer = {"optimizer": "adamw"} if "adamw" in name else {"optimizer": "sgd", "learning_rate": 0.02}
    learner = cases.build_learner(
        host, cases.without_dropout(spec), dtype=torch.float64, head=head, pooler="pooler" in name, epochs=1,
        **optimizer, shard=shard, logging_steps=1,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
    )  # fmt: skip
    assert learner.accelerator.num_processes == processes, learner.accelerator.num_processes
    if sharded and processes > 1:
        check_split(learner)
    losses: list[float] = []
    for experience in made:
        learner.learn(experience, on_step=lambda _, seen: losses.extend(seen[name] for name in sorted(seen)))
    logits = cases.outputs(learner, made)
    if name.startswith("moram sharded"):  # the hash of the base is that of the whole
        with tempfile.TemporaryDirectory() as folder:
            learner.save_pretrained(folder)
            again = Learner.from_pretrained(folder, *cases.build_host(host, torch.float64))
        assert torch.equal(cases.outputs(again, made), logits) and bool(in_parts(again.model)) == (processes > 1)
    if shard in ("banks", "both"):
        logits = check_split_banks(learner, host, made, logits, processes)
    if name == "lora sharded/bert" and processes > 1:
        refused("split over processes", learner.export, "unused", "merged")
    return {"losses": losses, "logits": logits.tolist(), "samples": [learner.counters.samples]}


def main() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        check_a_split_host()
    found = {name: learn(name, processes) for name in CASES}
    save_file(
        {
            f"{name}/{what}": torch.tensor(values, dtype=torch.float64)
            for name in found
            for what, values in found[name].items()
        },
        f"{sys.argv[1]}.{os.environ.get('RANK', '0')}",
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
