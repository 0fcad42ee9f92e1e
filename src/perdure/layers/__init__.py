"""Modules that stand inside a host."""

from .linear import LinearMemory
from .retrieval import PARTS, RetrievedPrompts, StaticPrompts

__all__ = ["PARTS", "LinearMemory", "RetrievedPrompts", "StaticPrompts"]
