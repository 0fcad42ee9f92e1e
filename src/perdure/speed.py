"""`perdure doctor --speed`: where, on this machine, one way to compute a memory overtakes the other.

Nothing is written down and nothing changes: results would hang on the machine. Whoever sees that the table of
`memory/dispatch.py` is wrong here sets `path` or `search` of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .timing import Ratio, compare

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, K = 1024, 8
ATOMS = ((16, 384), (32, 384), (64, 384), (256, 384))
KEYS = ((512, 768), (1024, 768), (2048, 768), (1024, 384), (2048, 384))
PATCHES = ((16, 384), (32, 384), (64, 384), (128, 384))
PATCHES_AT_ONCE, PATCH_RANK = 4, 8


@dataclass(frozen=True)
class Crossing:
    """One size, two ways: forward and backward of the second over the first.

    Attributes:
        what: setting that chooses. size, width: N (or K) and d. first, second: names of the ways.
        ratio: time of `second` over `first`; below 1 the second is faster. taken: the way that the table takes.
    """

    what: str
    size: int
    width: int
    first: str
    second: str
    ratio: Ratio
    taken: str

    @property
    def faster(self) -> str:
        """`second`, `first`, or `level` where the interval holds 1."""
        if self.ratio.low <= 1 <= self.ratio.high:
            return "level"
        return self.second if self.ratio.median < 1 else self.first


def crossings(pairs: int = 7) -> Iterator[Crossing]:
    """Measures every size of this module in turn, some seconds altogether, on the device that training would take."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sync = torch.cuda.synchronize if device.type == "cuda" else _nothing
    for make in (_atoms, _searches, _patches):
        for what, (size, width), first, second, taken, ways in make(device):
            ratio = compare(ways[1], ways[0], pairs=pairs, warmup=2, sync=sync)
            yield Crossing(what, size, width, first, second, ratio, taken)


def _nothing() -> None:
    pass


Case = tuple[str, tuple[int, int], str, str, str, tuple[Callable[[], Any], Callable[[], Any]]]


def _step(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], Any]:
    import torch

    output = forward().detach()
    # Written out: the gradient of a sum is one number for all places, which matrix products read in another way.
    upstream = torch.ones_like(output, memory_format=torch.contiguous_format)
    return lambda: torch.autograd.grad(forward(), wanted, upstream)


def _drawn(*shapes: tuple[int, ...], device: Any) -> list[Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) * shape[-1] ** -0.5 for shape in shapes]


def _atoms(device: Any) -> Iterator[Case]:
    from .memory import choose_path, read_atoms

    for size, width in ATOMS:
        x, keys, values, new_keys, new_values = _drawn(
            (TOKENS, width), (size - K, width), (size - K, width), (K, width), (K, width), device=device
        )
        wanted = [each.requires_grad_() for each in (x, new_keys, new_values)]

        def read(path: Any, bank: Any = (keys, values, new_keys, new_values), x: Any = x) -> Tensor:
            return read_atoms(x, *bank, k=K, tau=0.03, path=path)[0]

        ways = (_step(lambda read=read: read("dense"), wanted), _step(lambda read=read: read("gather"), wanted))
        yield "method.moram.path", (size, width), "dense", "gather", choose_path(size, K, device.type), ways


def _searches(device: Any) -> Iterator[Case]:
    from .memory import choose_search, index_keys, read_atoms

    for size, width in KEYS:
        x, keys, values, new_keys, new_values = _drawn(
            (TOKENS, width), (size, width), (size, width), (K, width), (K, width), device=device
        )
        wanted = [each.requires_grad_() for each in (x, new_keys, new_values)]
        index = index_keys(keys, x.dtype, coarse=True)

        def read(
            search: Any, bank: Any = (keys, values, new_keys, new_values), x: Any = x, index: Any = index
        ) -> Tensor:
            return read_atoms(x, *bank, k=K, tau=0.03, index=index, search=search)[0]

        ways = (_step(lambda read=read: read("exact"), wanted), _step(lambda read=read: read("coarse"), wanted))
        taken = choose_search(size, width, K, "coarse", device.type)[0]
        yield "method.moram.search", (size, width), "exact", "coarse", taken, ways


def _patches(device: Any) -> Iterator[Case]:
    from .memory import choose_patch_path, read_patches

    for size, width in PATCHES:
        x, prototypes, code, scale, bias, decoders = _drawn(
            (TOKENS, width), (size, width), (PATCH_RANK, width), (size, PATCH_RANK), (size, PATCH_RANK),
            (size, width, PATCH_RANK), device=device,
        )  # fmt: skip
        wanted = [each.requires_grad_() for each in (x, scale, bias, decoders)]

        def read(path: Any, layer: Any = (prototypes, code, scale, bias, decoders), x: Any = x) -> Tensor:
            return read_patches(x, *layer, k=PATCHES_AT_ONCE, tau=0.07, path=path)[0]

        ways = (_step(lambda read=read: read("dense"), wanted), _step(lambda read=read: read("grouped"), wanted))
        taken = choose_patch_path(size, PATCHES_AT_ONCE, device.type)
        yield "method.apn.path", (size, width), "dense", "grouped", taken, ways
