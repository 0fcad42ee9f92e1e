"""Modules that stand inside a host."""

from .linear import LinearMemory
from .sparse_experts import SequenceGate, SparseExperts

__all__ = ["LinearMemory", "SequenceGate", "SparseExperts"]
