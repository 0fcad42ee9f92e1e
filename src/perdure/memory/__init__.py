"""Mathematics of routed memories on tensors. Imports torch alone."""

from .bank import SHARED, AtomBank, AtomView
from .contrast import contrast_directions, paired
from .effects import choose_patch_path, choose_path, read_atoms, read_patches, sparse_delta
from .merging import MergeReport, merge_duplicates
from .observe import Observation, RouterLog, Written, is_observed, observing, report, report_written
from .protect import InputMoments, free_directions, leading_basis, overlap, project
from .retrieval import free_energy, least_free_energy, retrieve
from .routing import Routing, cosine, dot, effective_k, open_items, select, self_activation, weight
from .sparse import Shares, SparseBank, Support, share_out
from .subspace import Subspace, designed_rows, update_subspace

__all__ = [
    "SHARED",
    "AtomBank",
    "AtomView",
    "InputMoments",
    "MergeReport",
    "Observation",
    "RouterLog",
    "Written",
    "Routing",
    "Shares",
    "SparseBank",
    "Subspace",
    "Support",
    "choose_patch_path",
    "choose_path",
    "contrast_directions",
    "cosine",
    "designed_rows",
    "dot",
    "effective_k",
    "free_directions",
    "free_energy",
    "is_observed",
    "leading_basis",
    "least_free_energy",
    "merge_duplicates",
    "observing",
    "open_items",
    "overlap",
    "paired",
    "project",
    "read_atoms",
    "read_patches",
    "report",
    "report_written",
    "retrieve",
    "select",
    "self_activation",
    "share_out",
    "sparse_delta",
    "update_subspace",
    "weight",
]  # fmt: skip
