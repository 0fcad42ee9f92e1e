"""What the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .nursery import Nursery


@pytest.fixture(scope="package")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()
