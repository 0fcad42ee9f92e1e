"""Modules that stand inside a host."""

from .linear import LinearMemory
from .patches import PatchLayer
from .sparse_experts import SequenceGate, SparseExperts

__all__ = ["LinearMemory", "PatchLayer", "SequenceGate", "SparseExperts"]
