"""The frozen weights of a host split over processes, block by block (FSDP2), while what trains stays whole in each.

Every process keeps its part of each block; the whole block is there only while it computes. Adapters, banks and heads
are no part of that: their gradients are exchanged as without it, and a bank may grow between steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .errors import BadInput

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .hosts import Host
    from .methods import Method


def check_sharding(methods: Sequence[Method], training: TrainingConfig) -> None:
    """Raises BadInput where a method wants more of the host's weights than to compute with them."""
    if training.shard == "none":
        return
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise BadInput("training.shard: is host, which needs a later torch (fully_shard without ignored_params here)")
    for method in methods:
        why = "trains, overwrites or takes gradients of the host's own weights" if method.uses_host_weights else ""
        if getattr(method.config, "pretrain", None) is not None:
            why = "with pretrain trains the whole host in the first experience"
        if "old_model" in method.needs:
            why = "keeps a copy of the model as it was"
        if why:
            raise BadInput(
                f"training.shard: is host, but {method.name} {why}, which the processes then hold in parts; set it to "
                "none or choose a method that leaves the host as it is (lora, moram, apn, rwf)"
            )


def split_host(host: Host, methods: Sequence[Method], own: Iterable[nn.Parameter], processes: int) -> None:
    """Splits the blocks' parameters among those in `own`, the host's; all processes must call it.

    Embeddings and what stands behind the blocks stay whole in every process.

    Raises:
        BadInput: a method overwrites one of them, or the host has no blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kept = {id(parameter) for parameter in own}
    for method in methods:
        for name, parameter in method.touched():
            if id(parameter) in kept:
                raise BadInput(f"training.shard: is host, but {method.name} overwrites {name}; set it to none")
    mesh = init_device_mesh(next(host.model.parameters()).device.type, (processes,))
    for block in host.blocks():
        others = {parameter for parameter in block.module.parameters() if id(parameter) not in kept}
        # Each block is a root of its own, which would keep its weights whole after the first pass if not told.
        fully_shard(block.module, mesh=mesh, reshard_after_forward=True, ignored_params=others)


def in_parts(module: nn.Module) -> list[str]:
    """Names of the parameters of which this process holds a part."""
    return [name for name, parameter in module.named_parameters() if _is_split(parameter)]


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that this process holds, parts as parts."""
    return sum((p.to_local() if _is_split(p) else p).nbytes for p in module.parameters())  # type: ignore[operator]


def _is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
