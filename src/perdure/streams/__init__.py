"""Streams: experiences in order, made from a user's files, named data sets or a generator. Imports no torch."""

from .config import HubSource, NamedSource, PathSource, StdlibSource, StreamConfig, build_stream
from .experience import Experience
from .scenarios import Selection, Splits
from .spool import Spool, SpooledStream
from .stream import Stream
from .tuning import for_tuning

__all__ = [
    "Experience",
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
    "for_tuning",
]
