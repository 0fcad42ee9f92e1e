from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from perdure import doctor, speed
from perdure.memory import choose_patch_path, choose_path, choose_search
from perdure.timing import Ratio, compare


def printed(found: list[speed.Crossing], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(speed, "crossings", lambda: iter(found))
    into = io.StringIO()
    doctor.print_speed(Console(file=into, width=200))
    return into.getvalue()


def crossing(median: float, low: float, high: float, taken: str) -> speed.Crossing:
    return speed.Crossing("method.moram.path", 64, 384, "dense", "gather", Ratio(median, low, high, 1, 1, 7), taken)


def test_every_case_is_measured_and_names_what_the_table_takes(monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", 8)
    monkeypatch.setattr(speed, "ATOMS", ((16, 12), (256, 12)))
    monkeypatch.setattr(speed, "KEYS", ((64, 12),))
    monkeypatch.setattr(speed, "PATCHES", ((8, 12), (64, 12)))
    found = list(speed.crossings(pairs=2))
    assert [(each.what, each.size, each.taken) for each in found] == [
        ("method.moram.path", 16, choose_path(16, speed.K)),
        ("method.moram.path", 256, choose_path(256, speed.K)),
        ("method.moram.search", 64, choose_search(64, 12, speed.K, "coarse")[0]),
        ("method.apn.path", 8, choose_patch_path(8, speed.PATCHES_AT_ONCE)),
        ("method.apn.path", 64, choose_patch_path(64, speed.PATCHES_AT_ONCE)),
    ]
    assert all(each.ratio.pairs == 2 and each.ratio.median > 0 for each in found)


def test_what_is_compared_is_the_second_way_over_the_first(monkeypatch):
    seen: list[Any] = []

    def ratio(a: Any, b: Any, **_: Any) -> Ratio:
        seen.append((a, b))
        return Ratio(1, 1, 1, 1, 1, 1)

    monkeypatch.setattr(speed, "compare", ratio)
    monkeypatch.setattr(speed, "ATOMS", ())
    monkeypatch.setattr(speed, "PATCHES", ())
    monkeypatch.setattr(speed, "KEYS", ((64, 12),))
    asked: list[str] = []
    from perdure import memory

    real = memory.read_atoms
    monkeypatch.setattr(
        memory, "read_atoms", lambda *a, search, **rest: (asked.append(search), real(*a, search=search, **rest))[1]
    )
    (found,) = speed.crossings()
    assert (found.first, found.second) == ("exact", "coarse")
    asked.clear()
    for way in seen[0]:
        way()
    assert asked == ["coarse", "exact"]


def test_a_table_that_is_wrong_here_is_named(monkeypatch):
    right, level = crossing(0.5, 0.4, 0.6, "gather"), crossing(1.2, 0.9, 1.4, "gather")
    text = printed([right, level], monkeypatch)
    assert "faster" not in text and "set by hand" not in text and "0.40 to 0.60" in text
    text = printed([right, crossing(1.5, 1.3, 1.7, "gather")], monkeypatch)
    assert text.count("(here dense is faster)") == 1 and "set by hand where it matters: method.moram.path" in text


def test_ratios_are_paired():
    order: list[str] = []
    ratio = compare(lambda: order.append("a"), lambda: order.append("b"), pairs=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" and ratio.pairs == 3 and ratio.low <= ratio.median <= ratio.high
