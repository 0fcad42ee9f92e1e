"""Heads: any adapter with any head."""

from ._head import Head, register

__all__ = ["Head", "register"]
