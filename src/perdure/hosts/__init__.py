"""Hosts: a user's own model, seen as linear maps with roles and as blocks."""

from .blocks import Adding, Block, BlockAdapter, BlockFunction, Inserting, Insertion, Rest
from .feed_forward import FeedForward, Replacement
from .host import Host
from .prefix import Prefix, PrefixAdapter
from .query import QueryPass
from .roles import GROUPS, ROLES
from .sites import Handle, Site

__all__ = [
    "GROUPS",
    "ROLES",
    "Adding",
    "Block",
    "BlockAdapter",
    "BlockFunction",
    "FeedForward",
    "Handle",
    "Host",
    "Inserting",
    "Insertion",
    "Prefix",
    "PrefixAdapter",
    "QueryPass",
    "Replacement",
    "Rest",
    "Site",
]
