"""Modules that stand inside a host."""

from .linear import LinearMemory
from .patches import PatchLayer
from .retrieval import PARTS, AttentionPooler, RetrievedPrompts, StaticPrompts
from .sparse_experts import SequenceGate, SparseExperts

__all__ = [
    "PARTS",
    "AttentionPooler",
    "LinearMemory",
    "PatchLayer",
    "RetrievedPrompts",
    "SequenceGate",
    "SparseExperts",
    "StaticPrompts",
]
