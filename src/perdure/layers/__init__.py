"""Modules that stand inside a host."""

from .linear import LinearMemory
from .patches import PatchLayer
from .prompts import Carry, ComponentPrefix, ExpertKeys, ExpertPrefix, Keep, PromptPool, PromptQuery, StaticPrefix
from .retrieval import PARTS, RetrievedPrompts, StaticPrompts
from .sparse_experts import SequenceGate, SparseExperts

__all__ = [
    "PARTS",
    "Carry",
    "ComponentPrefix",
    "ExpertKeys",
    "ExpertPrefix",
    "Keep",
    "LinearMemory",
    "PatchLayer",
    "PromptPool",
    "PromptQuery",
    "RetrievedPrompts",
    "SequenceGate",
    "SparseExperts",
    "StaticPrefix",
    "StaticPrompts",
]
