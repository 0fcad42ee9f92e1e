"""What is frozen split over processes, while what trains stays whole in each and a bank may grow between steps.

The host block by block (FSDP2): every process keeps its part of each block, the whole block is there only while it
computes. A bank's frozen items by rows (`memory.parts`), the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .errors import BadInput, CannotWrite

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainingConfig
    from .hosts import Block, Host
    from .methods import Method


def check_sharding(methods: Sequence[Method], training: TrainingConfig) -> None:
    """Raises BadInput where a method wants more of what is split than to compute with it, or has no bank to split."""
    is_set = f"training.shard: is {training.shard}, but"
    if splits_banks(training) and not any(method.splits_banks for method in methods):
        names = ", ".join(method.name for method in methods)
        raise BadInput(f"{is_set} {names} keeps no bank of frozen items that grows; set it to none, or choose moram")
    for method in methods if training.shard != "none" else ():
        why = "keeps a copy of the model as it was" if "old_model" in method.needs else ""
        if splits_host(training) and method.uses_host_weights:
            why = "trains, overwrites or takes gradients of the host's own weights"
        if splits_host(training) and getattr(method.config, "pretrain", None) is not None:
            why = "with pretrain trains the whole host in the first experience"
        if why:
            raise BadInput(
                f"{is_set} {method.name} {why}, which the processes then hold in parts; set it to none or choose a "
                "method that leaves all of it as it is (such as moram)"
            )


def splits_host(training: TrainingConfig) -> bool:
    return training.shard in ("host", "both")


def splits_banks(training: TrainingConfig) -> bool:
    return training.shard in ("banks", "both")


def refuse_split(model: nn.Module) -> None:
    """Raises BadInput where a model's weights are split already, by a learner before or by others."""
    if in_parts(model):
        raise BadInput("model: its weights are split over processes; load the model again")


def split_host(host: Host, frozen: Container[str], processes: int) -> None:
    """Splits the parameters of all blocks that `frozen` names; all processes must call it.

    Embeddings and what stands behind the blocks stay whole in every process. Nothing is split where it raises.

    Raises:
        BadInput: a method trains or overwrites a weight of a block, blocks share modules, or torch is too old.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise BadInput(
            f"training.shard: splits the host, but torch {torch.__version__} cannot leave parameters out; renew it"
        )
    blocks = [block for tower in host.towers for block in host.blocks(tower)]
    _refuse_shared(blocks)
    others = [_not_split(block, frozen) for block in blocks]
    mesh = init_device_mesh(next(host.model.parameters()).device.type, (processes,))
    for block, ignored in zip(blocks, others, strict=True):
        # Each block is a root of its own, which would keep its weights whole after the first pass if not told.
        fully_shard(block.module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def _not_split(block: Block, frozen: Container[str]) -> set[nn.Parameter]:
    """What methods brought into a block."""
    found = set()
    for name, parameter in block.module.named_parameters():
        if f"{block.path}.{name}" in frozen:
            continue
        if "perdure" not in name:  # as what we put in is called, by PEFT too
            raise BadInput(
                f"training.shard: splits the host, but a method trains or overwrites {block.path}.{name}; set none"
            )
        found.add(parameter)
    return found


def _refuse_shared(blocks: Sequence[Block]) -> None:
    owners: dict[int, str] = {}
    for block in blocks:
        for name, module in block.module.named_modules():
            if "perdure" in name or next(module.parameters(recurse=False), None) is None:  # ours may serve all blocks
                continue
            other = owners.setdefault(id(module), block.name)
            if other != block.name:  # the first one's weights are gathered for the first one alone
                raise BadInput(
                    f"training.shard: splits the host, but blocks {other} and {block.name} share modules; set none"
                )


def by_the_first(accelerator: Accelerator, write: Callable[[], Path], where: str) -> Path:
    """What `write` returns, called in the first process; the others wait for it and learn whether it failed.

    Raises:
        CannotWrite: in the others, where it failed; the first one raises the error itself.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Path | None] = [None]
    try:
        if accelerator.is_main_process:
            found[0] = write()
    finally:
        broadcast_object_list(found)
    if found[0] is None:
        raise CannotWrite(f"{where}: the first process could not write it; its own error says why")
    return found[0]


def in_parts(module: nn.Module) -> list[str]:
    """Names of the parameters of which this process holds a part."""
    return [name for name, parameter in module.named_parameters() if is_split(parameter)]


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
