"""Tuning sees training and validation rows of the first experiences; whoever reaches for more is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from perdure.errors import ProtocolRefused
from perdure.streams import Experience, Stream
from perdure.streams.guarded import FirstExperiences


def rows(*words: str) -> list[dict[str, str]]:
    return [{"text": word, "label": word[0]} for word in words]


def stream(test: str = "ax") -> Stream:
    def one(i: int) -> Experience:
        return Experience(i, f"e{i}", rows("ab", "bb"), rows(test, "bx"), rows("ac", "bc"))

    return Stream([one(i) for i in range(4)], classes=["a", "b"])


USES = {
    "len": len, "iter": list, "item": lambda rows: rows[0], "slice": lambda rows: rows[:1], "bool": bool,
    "in": lambda rows: 1 in rows, "reversed": lambda rows: list(reversed(rows)), "equal": lambda rows: rows == [],
    "labels": lambda rows: rows.labels, "index": lambda rows: rows.index(1), "count": lambda rows: rows.count(1),
    "copy": lambda rows: list(copy.deepcopy(rows)),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_test_rows_are_withheld_whatever_is_done_with_them(use):
    seen = FirstExperiences(stream(), (0, 1))
    with pytest.raises(ProtocolRefused, match=r"test rows of experience 1 \('e1'\): tuning may not see them"):
        USES[use](seen.experience(1).test)


@pytest.mark.parametrize("index", [0, 3, 4, -1])
def test_other_experiences_are_refused(index):
    with pytest.raises(
        ProtocolRefused, match=f"experience {index} of stream 'stream': tuning may not see it, but 1, 2"
    ):
        FirstExperiences(stream(), (1, 2)).experience(index)


def test_what_may_be_seen_is_as_it_was():
    whole, seen = stream(), FirstExperiences(stream(), (1, 2))
    for experience in seen:
        before = whole.experience(experience.index)
        assert (experience.train, experience.valid) == (before.train, before.valid)
        assert (experience.name, experience.classes, experience.task) == (before.name, before.classes, before.task)
    assert [experience.last for experience in seen] == [False, True] and seen.classes == ("a", "b")


def test_an_experience_can_be_copied_and_stays_withheld():
    copied = replace(FirstExperiences(stream(), (0,)).experience(0), task=3)
    with pytest.raises(ProtocolRefused):
        len(copied.test)


def test_the_hash_is_of_what_may_be_seen_alone():
    def seen(test: str, positions: tuple[int, ...]) -> FirstExperiences:
        return FirstExperiences(stream(test), positions)

    assert seen("ax", (0, 1)).hash == seen("ay", (0, 1)).hash != seen("ax", (0,)).hash
