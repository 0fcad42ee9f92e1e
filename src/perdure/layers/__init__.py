"""Modules that stand inside a host."""

from .directions import Directions, Magnitudes
from .linear import LinearMemory
from .low_rank import LowRankBranches
from .patches import PatchLayer
from .retrieval import PARTS, AttentionPooler, RetrievedPrompts, StaticPrompts
from .sparse_experts import SequenceGate, SparseExperts

__all__ = [
    "PARTS",
    "AttentionPooler",
    "Directions",
    "LinearMemory",
    "LowRankBranches",
    "Magnitudes",
    "PatchLayer",
    "RetrievedPrompts",
    "SequenceGate",
    "SparseExperts",
    "StaticPrompts",
]
