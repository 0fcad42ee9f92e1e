"""The schema number of a state and the steps that bring an older state up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from perdure.errors import DamagedState

SCHEMA = 1
"""Rises by one with every change after which an older perdure could not read a state; add the step to MIGRATIONS
and a fixture of the schema left behind to the tests. The first keys of the document and the checksum at its end keep
their form under every schema, so that an older perdure can tell a newer state from a damaged one."""

Content = tuple[dict[str, Any], dict[str, Tensor]]
MIGRATIONS: dict[int, Callable[[dict[str, Any], dict[str, Tensor]], Content]] = {}
"""Schema number -> function from (values, tensors) of that schema to those of the next."""


def migrate(values: dict[str, Any], tensors: dict[str, Tensor], schema: int = SCHEMA) -> Content:
    """Brings values and tensors of a state written under `schema` to the present schema, step by step.

    Raises:
        DamagedState: `schema` is newer than this perdure knows, or no step leads on from it.
    """
    check_schema(schema)
    for number in range(schema, SCHEMA):
        if number not in MIGRATIONS:
            raise DamagedState(
                f"the state has schema {number}; this perdure reads schema {SCHEMA} and knows no way there"
            )
        values, tensors = MIGRATIONS[number](values, tensors)
    return values, tensors


def check_schema(schema: Any) -> None:
    """Refuses a schema number that is newer than ours or no number at all."""
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise DamagedState(f"the state's schema is {schema!r}, not a number from 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise DamagedState(
            f"the state has schema {schema}, but this perdure knows schemas up to {SCHEMA}: it was written by a newer "
            "perdure. Upgrade perdure, or resume with the version that wrote it; the files are untouched."
        )
