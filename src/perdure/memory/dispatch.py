"""Which of the ways to compute the same thing is taken: one small table that was measured, and nothing else decides.

All ways give the same values and gradients up to rounding, and rounding differs. So the table belongs to the code and
not to the machine: a run repeated elsewhere takes the same way (but for `quick_codes`). `perdure doctor --speed`
measures where the ways cross on a machine; whoever finds another place sets `path` or `search` of the method.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

Path = Literal["auto", "reference", "dense", "gather"]
Search = Literal["exact", "coarse", "fused"]
PatchPath = Literal["auto", "reference", "dense", "grouped", "fused"]

CANDIDATES = 2  # times k
"""Of a coarse search. Recall of the true top 8 with 16 candidates: 1.000 on random keys, see benchmarks.atoms."""


class Crossovers(NamedTuple):
    """Sizes from which the second way is the faster one.

    Attributes:
        gather: N / k from which the chosen values are gathered; below, one dense product over all N.
        group: K / k from which tokens are sorted by patch; below, one dense product over all patches.
        coarse: n d from which a coarse search of n frozen keys pays, if it is allowed, and `coarse_shape`, n / d: fewer
            keys than features cost less themselves than their Gram matrix.
        gram: n / d from which the gradient of the joint norm goes through a Gram matrix that is at hand, and
            `make_gram` where it must be made first. Two sides of d are level in multiply-adds.
    """

    gather: float
    group: float
    coarse: int
    coarse_shape: float
    gram: float
    make_gram: float


# One thread, forward and backward, median ratios of interleaved pairs beside other work.
# gather: d = 384 and 768. Gathering over dense, 1024 tokens: k = 8: 0.5 to 1.0 at N = 16, 0.5 to 0.8 at 88, 0.4 to 0.7
# at 256; k = 2 and 16: 0.6 to 0.9 at N = 4 k. 128 tokens: 1.0 to 1.1 at N = 16, 0.8 to 1.0 at 88, 0.7 to 0.9 at 256.
# group: 1024 tokens, k = 4. C = 128, r = 8: dense over grouped 1.0 at K = 32, 1.8 at 64; C = 384: 0.8, 1.0, 2.0 at 128.
# coarse: a step of MiniLM (d = 384, n = 800) took 1.1 times as long with it, reads at d = 768 took 0.6 times; without
# AVX-512 VNNI the product of 808 codes took 28 times as long as that of the keys themselves.
TABLE: dict[str, Crossovers] = {"cpu": Crossovers(2.0, 16.0, 1 << 19, 1.25, 1.0, 1.5)}
"""By type of device; one that is not here has not been measured and takes the processor's row."""


def crossovers(device: str = "cpu") -> Crossovers:
    """The row of a type of device, such as "cuda"."""
    return TABLE.get(device, TABLE["cpu"])


def choose_path(size: int, k: int, device: str = "cpu") -> Literal["dense", "gather"]:
    """The faster way to apply the values of N = size atoms, k of them selected."""
    return "gather" if size >= crossovers(device).gather * k else "dense"


def choose_patch_path(size: int, k: int, device: str = "cpu") -> Literal["dense", "grouped"]:
    """The faster way to apply K = size patches, k of them selected."""
    return "grouped" if size >= crossovers(device).group * k else "dense"


@functools.cache
def quick_codes(device: str = "cpu") -> bool:
    """False on processors where scores from 8-bit codes are not known to be quicker than exact ones.

    They are on x86 with AVX-512 VNNI; without it the search took some thirty times as long. It is the one choice that
    depends on the machine. Accelerators take bfloat16 and have not been measured.
    """
    if device != "cpu":
        return True
    import torch

    known = getattr(torch.cpu, "_is_vnni_supported", None)
    return known is not None and bool(known())


def choose_search(old: int, width: int, k: int, search: Search, device: str = "cpu") -> tuple[Search, bool]:
    """How n = old frozen keys of `width` features are searched, and whether an index of them pays."""
    row = crossovers(device)
    large = old * width >= row.coarse and old >= row.coarse_shape * width and old >= 4 * CANDIDATES * k
    if search == "coarse" and not (large and quick_codes(device)):
        search = "exact"
    return search, search == "coarse" or old >= row.gram * width
