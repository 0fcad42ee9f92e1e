"""Modules that stand inside a host."""

from .linear import LinearMemory
from .patches import PatchLayer

__all__ = ["LinearMemory", "PatchLayer"]
