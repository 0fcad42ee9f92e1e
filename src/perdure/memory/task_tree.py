"""Which past task resembles the present one: a K-D tree of tasks over layers, searched by lower confidence bounds.

TreeLoRA, Qian et al. 2025 (arXiv 2506.10355). A task has one vector in every layer; the tree splits the tasks by the
first layer's vectors at its root, by the second layer's below, and so on. Where a formula comes from, and what is
inferred, stands in `methods/tree_lora.py`. Tasks are numbered from 0 in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskNode:
    """A group of tasks.

    Attributes:
        tasks: their numbers, rising.
        spread: δ, the largest distance between two of them; 0 for a single one.
        middle: median closeness to the group's mean, at which it was split; None for a single task.
        children: those at least as close as the median, and the others; empty for a single task.
    """

    tasks: tuple[int, ...]
    spread: float = 0.0
    middle: float | None = None
    children: tuple[TaskNode, ...] = ()


def directions(rows: Tensor) -> Tensor:
    """Rows [..., D] divided by their L1 norm; a row of zeros stays."""
    return rows / rows.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def direction_gap(a: Tensor, b: Tensor) -> Tensor:
    """½ ‖a/‖a‖₁ − b/‖b‖₁‖₁ over the last dimension: a metric of directions in [0, 1]."""
    return (directions(a) - directions(b)).abs().sum(-1) / 2


def tree_of_directions(layers: Sequence[Tensor]) -> TaskNode:
    """Splits by the L1 distance to the mean direction of a group; δ is the diameter of the group in the mean gap.

    Args:
        layers: one [N, D] for each layer, a row for each task; any scale.
    """
    unit = [directions(rows) for rows in layers]
    gaps = torch.stack([torch.cdist(rows, rows, p=1) / 2 for rows in unit]).mean(0)
    return _split(unit, range(len(gaps)), 0, lambda rows: -(rows - rows.mean(0)).abs().sum(1), gaps)


def tree_of_changes(layers: Sequence[Tensor]) -> TaskNode:
    """As the released code: splits by the inner product with the mean of a group, of what each task changed.

    Args:
        layers: one [N, D] for each layer; each row is taken minus the row before it.
    """
    changed = [torch.cat([rows[:1], rows[1:] - rows[:-1]]) for rows in layers]
    return _split(changed, range(len(changed[0])), 0, lambda rows: rows @ rows.mean(0), None)


def _split(
    layers: list[Tensor], tasks: Sequence[int], depth: int, closeness: Callable[[Tensor], Tensor], gaps: Tensor | None
) -> TaskNode:
    """Halves by the order of the tasks where the median does not part them. Below the last layer the first follows."""
    if len(tasks) == 1:
        return TaskNode(tuple(tasks))
    index = list(tasks)
    close = closeness(layers[depth % len(layers)][index])
    # `median` is the lower one of two: of an even number more than half would be near, as in the released code.
    middle = close.median() if gaps is None else -(-close).median()
    near = [task for task, inside in zip(tasks, (close >= middle).tolist(), strict=True) if inside]
    far = [task for task in tasks if task not in near]
    if not far:
        near, far = index[: len(index) // 2], index[len(index) // 2 :]
    spread = 0.0 if gaps is None else float(gaps[index][:, index].max())
    children = tuple(_split(layers, part, depth + 1, closeness, gaps) for part in (near, far))
    return TaskNode(tuple(tasks), spread, float(middle), children)


def least_bound(root: TaskNode, choices: Sequence[float], gaps: Sequence[float], exploration: float = 2.0) -> int:
    """The task at the end of the walk from the root into the child with the lower bound each time.

    leaf k   LCB = μ_k − c √(log t / n_k), −∞ where n_k = 0
    node j   LCB = max(μ_j − c √(log t / n_j) − δ_j, least LCB of its children)

    n_j counts the choices of all tasks in j, μ_j is the mean gap over them; t is the number of this choice, from 1.

    Args:
        choices: n_k, how often each task was chosen. gaps: μ_k, the mean gap seen then; anything where n_k = 0.
        exploration: c.
    """
    log_t = math.log(sum(choices) + 1)

    def bound(tasks: Sequence[int], spread: float) -> float:
        number = sum(choices[task] for task in tasks)
        if not number:
            return -math.inf
        mean = sum(choices[task] * gaps[task] for task in tasks) / number
        return mean - exploration * math.sqrt(log_t / number) - spread

    def walk(node: TaskNode) -> tuple[float, int]:
        own = bound(node.tasks, node.spread)
        if not node.children:
            return own, node.tasks[0]
        least, task = min((walk(child) for child in node.children), key=lambda found: found[0])
        return max(own, least), task

    return walk(root)[1]


def drawn_as_released(
    root: TaskNode, choices: Tensor, gaps: Tensor, step: int, steps: int, generator: torch.Generator
) -> list[int]:
    """One past task for each layer, drawn as the released code draws it, its signs included.

    v_kl = μ_kl + √(log(2 S (s + 1)(s + 2))) / √(2 n_kl + 1e-5)              then v ← v + min v
    one task j ~ softmax over k of Σ_l v_kl; the rows of its child of the root are multiplied by min(middle, 1.5)
    task of layer l ~ softmax over k of v_kl / (max v − min v + 1e-5)

    So a larger distance is more likely to be chosen, although the bound was meant to be subtracted from it.

    Args:
        choices, gaps: n and μ, [N, L]; μ is 0 where n is. step: s, from 0. steps: S.
    """
    width = math.sqrt(math.log(2 * steps * (step + 1) * (step + 2)))
    values = gaps + width / torch.sqrt(2 * choices + 1e-5)
    values = values + values.min()
    if root.children:
        first = int(torch.multinomial(values.sum(1).softmax(0), 1, generator=generator))
        child = next(child for child in root.children if first in child.tasks)
        values[list(child.tasks)] *= 1.0 if child.middle is None else min(child.middle, 1.5)
    shares = (values / (values.max() - values.min() + 1e-5)).softmax(0)
    return torch.multinomial(shares.t(), 1, generator=generator)[:, 0].tolist()


def relative_pull(layers: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ‖A − T‖₁ / ‖T‖₁: a scalar, 0 at the targets. Its gradient is sign(A − T) / (L ‖T‖₁)."""
    parts = [
        (now - then).abs().sum() / then.abs().sum().clamp(min=torch.finfo(then.dtype).tiny)
        for now, then in zip(layers, targets, strict=True)
    ]
    return torch.stack(parts).mean()


def released_alignment(layers: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """P / (P₀ + 1e-5) with P = −Σ_layers ⟨A, T⟩ and P₀ its value without a gradient, as released.

    Its value is 1 whatever A is; its gradient is that of log |P|. The release subtracts it from the loss, so that a
    step makes ⟨A, T⟩ grow where it is positive.
    """
    product = -torch.stack([(now * then).sum() for now, then in zip(layers, targets, strict=True)]).sum()
    return product / (product.detach() + 1e-5)
