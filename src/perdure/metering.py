"""Work and memory of one step, counted while it runs and not timed; no number is changed by it.

FLOPs are those of matrix products, convolutions and attention, two for a multiplication and an addition, by the
formulas of `torch.utils.flop_counter`; elementwise operations, normalisation and the optimizer's update are left out.
Bytes are those of the tensors alive at the worst moment; what an allocator or a kernel takes for itself is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from .bookkeeping import quiet
from .data import without_answers

if TYPE_CHECKING:
    from .data import Batch
    from .learner import Learner
    from .streams.experience import Experience


def _sparse_product(total: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """`total.addmm_(left, right)`: the entries that a sparse `left` holds, each with a row of `right`."""
    entries = left._nnz() if left.layout is torch.sparse_coo else left.numel()
    return 2 * entries * right.shape[1]


def _sampled_product(pattern: Tensor, left: Tensor, *_: Any, **__: Any) -> int:
    """`sampled_addmm`: an inner product for each entry of the pattern."""
    return 2 * pattern._nnz() * left.shape[1]


def _weighted_rows(table: Tensor, chosen: Tensor, *rest: Any, **_: Any) -> int:
    """`embedding_bag` with a weight for each chosen row of the table; without weights nothing is multiplied."""
    weights = rest[4] if len(rest) > 4 else None
    return 0 if weights is None else 2 * chosen.numel() * table.shape[1]


def _weights_of_rows(grad: Tensor, table: Tensor, chosen: Tensor, *_: Any, **__: Any) -> int:
    """The gradient of these weights: an inner product each."""
    return 2 * chosen.numel() * table.shape[1]


# Attention on the CPU, products with sparse matrices and sums of chosen rows, which torch's own table leaves out.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.addmm_: _sparse_product,
    torch.ops.aten.sparse_sampled_addmm: _sampled_product,
    torch.ops.aten._embedding_bag: _weighted_rows,
    torch.ops.aten._embedding_bag_forward_only: _weighted_rows,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _weights_of_rows,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Meter(TorchDispatchMode):
    """Counts what runs inside it, the backward pass included.

    Args:
        held: tensors that are alive before it begins and count in `peak_bytes`: parameters, buffers, optimizer states.

    Attributes:
        flops: floating point operations, see the module.
        now, peak_bytes: bytes of the tensors alive now and at the worst moment, each storage once.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.flops, self.peak_bytes = 0, 0
        self.now, self._known = 0, set[int]()
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:  # without gradients an operation may come whole that is made of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:  # a sparse gradient has no storage of its own
            return
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.peak_bytes = max(self.peak_bytes, self.now)
        weakref.finalize(storage, self._gone, name, size).atexit = False

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def tokens_of(batches: Iterable[Batch]) -> int | None:
    """Tokens without padding; None for images and for cached features, where no token is read."""
    total = 0
    for batch in batches:
        if "pixel_values" in batch.inputs or "input_ids" not in batch.inputs:
            return None
        mask = batch.inputs.get("attention_mask")
        total += batch.inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return total


def _per(flops: int, batches: list[Batch], kind: str) -> dict[str, float]:
    """FLOPs by token and by row of the batches as they came, so that rehearsed rows are a cost of the new ones."""
    rows, tokens = sum(len(batch) for batch in batches), tokens_of(batches)
    found = {f"{kind}_flops_per_row": flops / rows} if rows else {}
    return found | ({f"{kind}_flops_per_token": flops / tokens} if tokens else {})


@contextmanager
def training_step(learner: Any, batches: list[Batch]) -> Iterator[None]:
    """Counts the optimizer step inside, with all that methods do in it, into `learner.metered`.

    Nothing is counted in several processes, whose exchange of gradients the mode does not see.
    """
    if learner.accelerator.num_processes > 1:
        yield
        return
    with Meter(_held(learner)) as meter:
        meter.peak_bytes = meter.now
        yield
    learner.metered = {**_per(meter.flops, batches, "train"), "step_peak_bytes": meter.peak_bytes}


def _held(learner: Any) -> Iterator[Tensor]:
    yield from learner.system.parameters()
    yield from learner.system.buffers()
    yield from learner.learnt_state()[0].values()  # what methods keep, such as the parameters of before
    yield from learner.optimization.state_dict()[0].values()


def inference(learner: Learner, experience: Experience) -> dict[str, float]:
    """FLOPs of one evaluation batch, from rows to scores, by row and by token; nothing of the learner changes.

    The first test rows of the experience are read, without cached features and with the texts of classes encoded
    before. Where the score is on what the model writes, writing counts and there is no figure by token.
    """
    rows = list((experience.test or experience.train)[: learner.training.per_device_eval_batch_size])
    task = experience.task if learner.protocol.task_id == "test" else None
    with quiet(learner.model), torch.no_grad(), learner.classes_encoded(), learner.autocast():
        for batch in learner.batches(rows, unlabelled=True):
            with Meter() as meter:
                learner.forward(without_answers(learner.with_task(batch, task)))
            found = _per(meter.flops, [batch], "inference")
            if learner.objective.writes:
                found.pop("inference_flops_per_token", None)
            return found
    return {}
