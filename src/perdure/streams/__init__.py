"""Streams: experiences in order, made from a user's files, named data sets or a generator. Imports no torch."""

from .config import HubSource, NamedSource, PathSource, StdlibSource, StreamConfig, build_stream
from .experience import Experience
from .guarded import FirstExperiences
from .scenarios import Selection, Splits
from .spool import Spool, SpooledStream
from .stream import Stream

__all__ = [
    "Experience",
    "FirstExperiences",
    "HubSource",
    "NamedSource",
    "PathSource",
    "Selection",
    "Splits",
    "Spool",
    "SpooledStream",
    "StdlibSource",
    "Stream",
    "StreamConfig",
    "build_stream",
]
