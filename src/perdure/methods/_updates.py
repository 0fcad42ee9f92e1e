"""What a method adds to the host, in forms that other programs read: see `perdure.export`. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts import Site


class Update(NamedTuple):
    """ΔW = upᵀ down, added to the weight of one linear map of the host; factors and gates are folded in.

    Attributes:
        path: of the module. down: [r, d_in]. up: [r, d_out], d_out of the whole module.
    """

    path: str
    down: Tensor
    up: Tensor


class Stack(NamedTuple):
    """Routed items beside one linear map or feed-forward.

    Attributes:
        path: of the module whose input the items read. tensors: as docs/export.md says.
        out_slice: outputs [start, stop) of a fused map that the items write to; None for all.
        exit: path of the module to whose output they add, where it is another one.
    """

    path: str
    tensors: dict[str, Tensor]
    out_slice: tuple[int, int] | None = None
    exit: str = ""


def at_site(site: Site, keys: Tensor, values: Tensor) -> Update:
    """Σ_i b_i a_iᵀ at a site, for keys a_i [r, d_in] and values b_i [r, d_out of the site]."""
    from torch.nn.functional import pad

    from ..hosts.roles import features

    if site.out_slice is not None:
        start, stop = site.out_slice
        values = pad(values, (start, features(site.module)[1] - stop))
    return Update(site.path, keys.detach(), values.detach())
