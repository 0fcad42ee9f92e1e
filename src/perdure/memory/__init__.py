"""Mathematics of routed memories on tensors. Imports torch alone."""

from .bank import SHARED, AtomBank, AtomView
from .contrast import contrast_directions, paired
from .dispatch import choose_patch_path, choose_path, choose_search
from .effects import read_atoms, read_patches, sparse_delta
from .folding import Fold, fold
from .kernels.search import KeyIndex, index_keys
from .merging import MergeReport, fair_shares, merge_duplicates
from .observe import Observation, RouterLog, Written, is_observed, observing, report, report_written
from .protect import InputMoments, free_directions, leading_basis, overlap, project
from .retrieval import free_energy, least_free_energy, retrieve
from .routing import Routing, cosine, dot, effective_k, open_items, select, self_activation, weight
from .sparse import Shares, SparseBank, Support, share_out
from .subspace import Subspace, designed_rows, update_subspace
from .task_tree import (
    TaskNode,
    direction_gap,
    drawn_as_released,
    least_bound,
    relative_pull,
    released_alignment,
    tree_of_changes,
    tree_of_directions,
)

__all__ = [
    "SHARED",
    "AtomBank",
    "AtomView",
    "Fold",
    "InputMoments",
    "KeyIndex",
    "MergeReport",
    "Observation",
    "RouterLog",
    "Written",
    "Routing",
    "Shares",
    "SparseBank",
    "Subspace",
    "Support",
    "TaskNode",
    "choose_patch_path",
    "choose_path",
    "choose_search",
    "contrast_directions",
    "cosine",
    "designed_rows",
    "direction_gap",
    "dot",
    "drawn_as_released",
    "effective_k",
    "fair_shares",
    "fold",
    "free_directions",
    "free_energy",
    "index_keys",
    "is_observed",
    "leading_basis",
    "least_bound",
    "least_free_energy",
    "merge_duplicates",
    "observing",
    "open_items",
    "overlap",
    "paired",
    "project",
    "read_atoms",
    "read_patches",
    "relative_pull",
    "released_alignment",
    "report",
    "report_written",
    "retrieve",
    "select",
    "self_activation",
    "share_out",
    "sparse_delta",
    "tree_of_changes",
    "tree_of_directions",
    "update_subspace",
    "weight",
]  # fmt: skip
