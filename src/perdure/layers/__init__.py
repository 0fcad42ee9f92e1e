"""Modules that stand inside a host."""

from .directions import Directions, Magnitudes
from .linear import LinearMemory
from .low_rank import LowRankBranches
from .patches import PatchLayer
from .prompts import Carry, ComponentPrefix, ExpertKeys, ExpertPrefix, Keep, PromptPool, PromptQuery, StaticPrefix
from .retrieval import PARTS, AttentionPooler, RetrievedPrompts, StaticPrompts
from .sparse_experts import SequenceGate, SparseExperts

__all__ = [
    "PARTS",
    "AttentionPooler",
    "Directions",
    "Carry",
    "ComponentPrefix",
    "ExpertKeys",
    "ExpertPrefix",
    "Keep",
    "LinearMemory",
    "LowRankBranches",
    "Magnitudes",
    "PatchLayer",
    "PromptPool",
    "PromptQuery",
    "RetrievedPrompts",
    "SequenceGate",
    "SparseExperts",
    "StaticPrefix",
    "StaticPrompts",
]
