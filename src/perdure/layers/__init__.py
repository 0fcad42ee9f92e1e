"""Modules that stand inside a host."""

from .linear import LinearMemory
from .low_rank import LowRankBranches
from .patches import PatchLayer
from .retrieval import PARTS, RetrievedPrompts, StaticPrompts
from .sparse_experts import SequenceGate, SparseExperts

__all__ = [
    "PARTS",
    "LinearMemory",
    "LowRankBranches",
    "PatchLayer",
    "RetrievedPrompts",
    "SequenceGate",
    "SparseExperts",
    "StaticPrompts",
]
