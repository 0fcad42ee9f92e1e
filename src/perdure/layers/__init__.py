"""Modules that stand inside a host."""

from .linear import LinearMemory

__all__ = ["LinearMemory"]
