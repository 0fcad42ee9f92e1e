"""Prompts that a query of the frozen host chooses: pools, experts, components; and those that are the same for all.

Shapes: B rows, D width of the tower, W width of a block's keys and values, n tokens, M items of a pool.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..memory import cosine, select
from ..memory.routing import routing_dtype

if TYPE_CHECKING:
    from ..hosts import Insertion, Prefix, Rest


class Choice(threading.local):
    """What was decided for the rows of the latest forward pass of this thread; no part of any state.

    Every thread has its own; a deep copy of the host gets a new one, which its modules share.

    Attributes:
        away: the query pass is under way, in which no prompt may be there.
        query: [B, D]. seen: bool [B, T], tokens that see the prompts; None for all.
        chosen: [B, k] numbers of the chosen items. cosines: [B, k] their cosines, with gradients; None where none pull.
        tokens: [B, n, D], what is inserted into the next block.
    """

    away: bool = False
    query: Tensor | None = None
    seen: Tensor | None = None
    chosen: Tensor | None = None
    cosines: Tensor | None = None
    tokens: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        memo[id(self)] = new = Choice()
        return new

    def __reduce__(self) -> Any:
        return Choice, ()

    def rows(self, count: int) -> Tensor:
        """The queries of a block's rows.

        Raises:
            BadInput: the tower's query pass did not come before, or was for another number of rows.
        """
        if self.query is None or len(self.query) != count:
            found = "no query was taken" if self.query is None else f"queries were taken for {len(self.query)} rows"
            raise BadInput(f"prompts: {found}, a block has {count} rows; call the whole model, not a part of it")
        return self.query


class PromptQuery(nn.Module):
    """Takes the query of each row; what is chosen by it is the subclass's `choose`. See `hosts.QueryPass`."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.choice = Choice()

    @contextmanager
    def away(self) -> Iterator[None]:
        self.choice.away = True
        try:
            yield
        finally:
            self.choice.away = False

    def take(self, query: Tensor, seen: Tensor | None) -> None:
        choice = self.choice
        with torch.autocast(device_type=query.device.type, enabled=False):
            choice.query, choice.seen = query.to(routing_dtype(query)), seen
            choice.chosen = choice.cosines = choice.tokens = None
            self.choose(choice)

    def choose(self, choice: Choice) -> None:
        """Fills in what the blocks need."""


class Keep(nn.Module):
    """Block function in front of the first block: with a KV cache the choice of the first call stands."""

    def __init__(self, choice: Choice):
        super().__init__()
        self.choice = choice

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor:
        choice, notes = self.choice, rest.notes
        if choice.away or notes is None:
            return hidden
        if rest.past:
            if notes.get("query") is None or len(notes["query"]) != len(hidden):
                raise BadInput(
                    "past_key_values: was filled without these prompts or for another number of rows; start from an "
                    "empty cache, or pass use_cache=False"
                )
            choice.query, choice.chosen, choice.seen, choice.cosines = notes["query"], notes["chosen"], None, None
        else:
            notes["query"], notes["chosen"] = choice.rows(len(hidden)), choice.chosen
        return hidden


def _uniform(*shape: int, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def fresh(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Initial prompts, U[0, 0.01): flax's `uniform()`, as the code of L2P and DualPrompt has it."""
    return _uniform(*shape, low=0.0, high=0.01, generator=generator)


class PromptPool(PromptQuery):
    """L2P: M keys and prompts; the N prompts whose keys have the largest cosines to the query are inserted.

    Args:
        vote: all rows of a batch take the N prompts that were chosen most often among them (lowest number first).
    """

    def __init__(
        self, width: int, size: int, length: int, top_n: int, *, vote: bool = False,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__(width)
        self.top_n, self.vote = top_n, vote
        self.keys = nn.Parameter(_uniform(size, width, low=-1.0, high=1.0, generator=generator))
        self.prompts = nn.Parameter(fresh(size, length, width, generator=generator))

    def extra_repr(self) -> str:
        return f"size={len(self.keys)}, length={self.prompts.shape[1]}, top_n={self.top_n}, vote={self.vote}"

    def choose(self, choice: Choice) -> None:
        assert choice.query is not None
        keys = self.keys.to(choice.query.dtype)
        cosines = cosine(choice.query, keys)
        chosen = select(cosines, self.top_n)
        if self.vote:
            votes = torch.zeros(len(keys), dtype=cosines.dtype, device=keys.device)
            votes.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=votes.dtype))
            chosen = select(votes, self.top_n).expand(len(cosines), -1)
        choice.chosen, choice.cosines = chosen, cosines.gather(1, chosen)
        # The keys take part in the forward pass with weight 0: of several processes only what does is synchronised.
        choice.tokens = self.prompts[chosen].flatten(1, 2) + (0.0 * self.keys.sum()).to(self.prompts.dtype)


class Carry(nn.Module):
    """Block function: inserts the tokens of the choice in front and passes on what the block makes of them."""

    def __init__(self, choice: Choice):
        super().__init__()
        self.choice = choice

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, rest: Rest) -> Tensor | Insertion:
        from ..hosts import Insertion

        choice = self.choice
        if choice.away or rest.past:
            return hidden
        choice.rows(len(hidden))
        assert choice.tokens is not None
        tokens = choice.tokens.to(hidden.dtype)
        return Insertion(torch.cat((tokens, hidden), 1), tokens.shape[1], seen=choice.seen, leaving=self._pass_on)

    def _pass_on(self, tokens: Tensor) -> None:
        self.choice.tokens = tokens


class StaticPrefix(nn.Module):
    """Trained keys and values [2, n, W], the same for every input. `choice` tells where they are away, if anywhere."""

    def __init__(self, start: Tensor, choice: Choice | None = None):
        super().__init__()
        self.P = nn.Parameter(start)
        self.choice = choice

    def forward(self, rows: int, tokens: int) -> Prefix | None:
        if self.choice is not None and self.choice.away:
            return None
        return _prefix(self.P[None], None)


def _prefix(both: Tensor, seen: Tensor | None) -> Prefix:
    """[B or 1, 2, n, W] -> keys and values."""
    from ..hosts import Prefix

    return Prefix(both[:, 0], both[:, 1], seen)


class Growing(nn.Module):
    """Tensors that grow along their first dimension: what older experiences learnt are buffers, the newest trains.

    `old_<name>` [t, ...] and `new_<name>` [k, ...]; the parameter is another object after each change of size.
    """

    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        self.shapes = shapes
        for name, shape in shapes.items():
            self.register_buffer(f"old_{name}", torch.zeros(0, *shape))
            self.register_parameter(f"new_{name}", nn.Parameter(torch.zeros(0, *shape)))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What trains now, by name."""
        named = [(f"new_{name}", self.get_parameter(f"new_{name}")) for name in self.shapes]
        return [(name, parameter) for name, parameter in named if parameter.numel()]

    @property
    def old_size(self) -> int:
        return len(self.get_buffer(f"old_{next(iter(self.shapes))}"))

    @property
    def size(self) -> int:
        return self.old_size + len(self.get_parameter(f"new_{next(iter(self.shapes))}"))

    def whole(self, name: str) -> Tensor:
        """Old and new in one tensor; gradients reach the new."""
        return torch.cat([self.get_buffer(f"old_{name}"), self.get_parameter(f"new_{name}")])

    @torch.no_grad()
    def freeze(self) -> None:
        """What trained joins what is old."""
        for name in self.shapes:
            setattr(self, f"old_{name}", self.whole(name).clone())
            self._set(name, self.get_parameter(f"new_{name}").detach()[:0].clone())

    @torch.no_grad()
    def grow(self, **start: Tensor) -> None:
        """What is old stays, these train."""
        for name, tensor in start.items():
            self._set(name, tensor.to(self.get_buffer(f"old_{name}")))

    def _set(self, name: str, tensor: Tensor) -> None:
        setattr(self, f"new_{name}", nn.Parameter(tensor, self.get_parameter(f"new_{name}").requires_grad))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.shapes:
            for part in (f"old_{name}", f"new_{name}"):
                found, tensor = state_dict.get(prefix + part), getattr(self, part)
                if found is None or found.shape == tensor.shape:
                    continue
                empty = tensor.detach().new_empty(found.shape)
                if part.startswith("old_"):
                    setattr(self, part, empty)
                else:
                    self._set(name, empty)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ExpertKeys(PromptQuery):
    """DualPrompt: a key for each expert. In training every row takes the newest, else the one of the nearest key."""

    def __init__(self, width: int):
        super().__init__(width)
        self.pool = Growing(keys=(width,))

    def choose(self, choice: Choice) -> None:
        assert choice.query is not None
        pool = self.pool
        if not pool.size:
            return
        cosines = cosine(choice.query, pool.whole("keys").to(choice.query.dtype))
        if self.training and pool.size > pool.old_size:
            choice.chosen = torch.full((len(cosines), 1), pool.size - 1, device=cosines.device)
            choice.cosines = cosines[:, -1:]
        else:
            choice.chosen = select(cosines, 1)

    def add(self, generator: torch.Generator | None) -> None:
        self.pool.grow(keys=_uniform(1, self.width, low=-1.0, high=1.0, generator=generator))


class ExpertPrefix(Growing):
    """DualPrompt: one prefix [2, n, W] for each expert, the chosen one in front of a block's keys and values."""

    def __init__(self, length: int, width: int, choice: Choice):
        super().__init__(P=(2, length, width))
        self.choice = choice

    def forward(self, rows: int, tokens: int) -> Prefix | None:
        choice = self.choice
        if choice.away or not self.size:
            return None
        choice.rows(rows)
        assert choice.chosen is not None
        both = self.whole("P")[choice.chosen[:, 0]]
        if choice.cosines is not None:  # see `PromptPool.choose`
            both = both + (0.0 * choice.cosines.sum()).to(both.dtype)
        return _prefix(both, choice.seen)


class ComponentPrefix(Growing):
    """CODA-Prompt: p = sum_m cos(q * A_m, K_m) P_m, one half in front of the keys, the other of the values."""

    def __init__(self, query_width: int, length: int, width: int, choice: Choice):
        super().__init__(K=(query_width,), A=(query_width,), P=(2, length, width))
        self.choice = choice

    def forward(self, rows: int, tokens: int) -> Prefix | None:
        choice = self.choice
        if choice.away or not self.size:
            return None
        query = choice.rows(rows)
        with torch.autocast(device_type=query.device.type, enabled=False):
            weights = self.weights(query)
            both = torch.einsum("bm,mkld->bkld", weights, self.whole("P").to(weights.dtype))
        return _prefix(both, choice.seen)

    def weights(self, query: Tensor) -> Tensor:
        """cos(q * A_m, K_m) [B, M] of queries [B, D]."""
        seen = query[:, None] * self.whole("A").to(query.dtype)
        return torch.cosine_similarity(seen, self.whole("K").to(query.dtype), dim=-1, eps=1e-8)

    def overlap(self) -> Tensor:
        """sum over K, A and P (flattened) of the squared Frobenius norm of B Bᵀ - I."""
        total = torch.zeros((), device=self.get_buffer("old_K").device)
        for name in self.shapes:
            rows = self.whole(name).flatten(1)
            total = total + (rows @ rows.t() - torch.eye(len(rows), device=rows.device)).square().sum()
        return total

    def add(self, count: int, generator: torch.Generator | None) -> None:
        """`count` components, each of unit length and orthogonal to those before where there is room."""
        start = {}
        for name, shape in self.shapes.items():
            made = orthogonal_rows(self.get_buffer(f"old_{name}").flatten(1).cpu(), count, generator)
            start[name] = made.unflatten(1, shape) if len(shape) > 1 else made
        self.grow(**start)


@torch.no_grad()
def orthogonal_rows(old: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` random rows of unit length, Gram-Schmidt against each other and against `old` [t, d].

    Where old and new are more than d, what lacks room is random, of unit length.
    """
    width = old.shape[1]
    rows = list(old.double())
    for _ in range(count):
        drawn = torch.randn(width, generator=generator, dtype=torch.float64)
        if len(rows) < width:
            # `old` rows have trained and are no longer orthogonal: a least-squares basis, not one row after the other.
            basis = torch.linalg.qr(torch.stack(rows, 1)).Q if rows else drawn.new_zeros(width, 0)
            for _ in range(2):
                drawn = drawn - basis @ (basis.t() @ drawn)
        rows.append(drawn / drawn.norm())
    return torch.stack(rows[len(old) :]).float() if count else old[:0]
