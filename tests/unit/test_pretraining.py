"""What is known of the data behind a backbone, where it comes from, and how a report says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import BadInput
from perdure.models import ModelSource
from perdure.pretraining import Pretraining, overlap, pretraining_of
from perdure.recipe import make_recipe, recipe_hash
from tests.e2e import tiny


def folder(path: Path, facts: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "facts.json").write_text(facts if isinstance(facts, str) else json.dumps(facts), encoding="utf-8")
    return str(path)


def test_where_it_is_known_from(tmp_path: Path) -> None:
    assert pretraining_of(ModelSource(**tiny.MODEL)).seen == []
    assert pretraining_of("minilm").seen is None and "sentences" in pretraining_of("minilm").data
    assert pretraining_of("owner/somewhere-on-the-hub") == Pretraining()
    said = {"data": "Tiny ImageNet", "seen": ["bear", "bus"]}
    assert pretraining_of(folder(tmp_path / "a", {"epochs": 3, "pretraining": said})) == Pretraining(**said)
    older = {"images": 10000, "shared_classes": {"bear": "brown bear", "bus": "school bus"}}
    assert pretraining_of(folder(tmp_path / "b", older)).seen == ["bear", "bus"]
    assert pretraining_of(folder(tmp_path / "c", {"epochs": 3})) == Pretraining()
    for facts in ("{", "[]", {"pretraining": {"dat": "x"}}, {"pretraining": {"seen": "bear"}}):
        with pytest.raises(BadInput, match=r"model: .*facts\.json cannot be read .* key pretraining"):
            pretraining_of(folder(tmp_path / "d", facts))


def test_what_of_the_stream_it_holds() -> None:
    known = Pretraining(data="pictures", seen=["bus", "bear", "ship"])
    found = overlap(known, ["bear", "cat", "bear", "bus"], ["first", "second"])
    assert found["seen"] == ["bus", "bear"]
    assert found["said"] == "pretrained on: pictures; may have seen 2 of 3 classes (bus, bear)"
    text = overlap(Pretraining(data="one book", seen=["book"]), [], ["book", "other"])
    assert text["said"] == "pretrained on: one book; may have seen 1 of 2 experiences (book)"
    nothing = overlap(pretraining_of(ModelSource(**tiny.MODEL)), ["a"], ["first"])
    assert nothing["said"] == "pretrained on: nothing: random weights; may have seen 0 of 1 classes"
    unknown = overlap(Pretraining(), ["a"], ["first"])
    assert unknown["seen"] is None and unknown["said"].endswith("what of this stream is in it is not known")


def test_a_recipe_may_say_it_and_stays_the_same_run(tmp_path: Path) -> None:
    from perdure.progress import Progress
    from perdure.run import Run
    from perdure.run_report import _cost, _overlap

    settings = tiny.settings(tmp_path, "lora", output_dir=str(tmp_path / "run"))
    plain = make_recipe(settings)
    said = make_recipe({**settings, "pretraining": {"data": "trees", "seen": ["kind1"]}})
    assert recipe_hash(plain) == recipe_hash(said)
    for recipe, words in ((plain, "nothing: random weights"), (said, r"trees; may have seen 1 of 6 classes \(kind1\)")):
        run = Run(recipe, Progress(enabled=False))
        assert re.search(words, _overlap(run)["said"])
        assert _cost(run)["rehearsal_bytes"] == 0
        run.learner.detach()
    with pytest.raises(BadInput, match=r"pretraining\.sen: unknown key; did you mean 'seen'"):
        make_recipe({**settings, "pretraining": {"sen": []}})
