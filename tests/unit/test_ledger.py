"""The ledger's rows, its file and the page made from it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from perdure import results
from perdure.errors import BadInput
from perdure.evaluation import ledger
from perdure.evaluation.compare import build_comparison
from tests.unit.report_samples import arms

ROOT = Path(__file__).resolve().parents[2]
FIGURE = {"mean": 0.8432, "low": 0.82, "high": 0.8664}
ROW = {
    "recipe": "clinc150",
    "method": "moram",
    "head": "ridge",
    "model": "minilm",
    "stream": "clinc150 10x15",
    "seeds": [0, 1, 2],
    "metrics": {"average_accuracy": FIGURE, "forgetting": {"mean": 0.03, "low": None, "high": None}},
    "cost": {"seconds": {"mean": 181.0, "low": 170.0, "high": 192.0}},
    "hardware": "2 CPU cores",
    "commit": "0123abc",
    "published": None,
    "status": "no published figure",
    "note": "30 training rows a class",
}


def row(**changes):
    return {**copy.deepcopy(ROW), **changes}


def test_append_and_read(tmp_path):
    path = tmp_path / "results" / "ledger.jsonl"
    assert ledger.read(path) == []
    ledger.append(path, row())
    ledger.append(path, row(method="er", note="ünï | pipe"))
    assert ledger.read(path) == [row(), row(method="er", note="ünï | pipe")]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row())
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"recipe": "cl')
    ledger.append(path, row(method="er"))
    with pytest.raises(BadInput, match=r"ledger\.jsonl: line 2: is not valid JSON"):
        ledger.read(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2])["method"] == "er"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": [True, 2]}, "seeds"),
        ({"recipe": ""}, "recipe"),
        ({"head": 3}, "head"),
        ({"note": None}, "note"),
        ({"metrics": {}}, "metrics"),
        ({"metrics": {"forgetting": 0.1}}, r"metrics\.forgetting"),
        ({"metrics": {"forgetting": {"mean": float("nan"), "low": None, "high": None}}}, r"metrics\.forgetting\.mean"),
        ({"status": "fine"}, "status: found 'fine'"),
        ({"status": "reproduced"}, "published is null"),
        ({"published": {"figure": 80.9, "source": "page"}}, "published names one"),
        ({"published": {"figure": 80.9}, "status": "differs"}, "published: expected"),
        ({"seeds": [0, 1]}, "fewer than 3 seeds are an 'illustration'"),
        ({"extra": 1}, "'extra' is unknown"),
    ],
)
def test_bad_rows_are_refused_and_not_written(tmp_path, changes, words):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(BadInput, match=words):
        ledger.append(path, row(**changes))
    assert not path.exists()


def test_missing_field_is_named():
    short = row()
    del short["commit"]
    with pytest.raises(BadInput, match="'commit' is missing"):
        ledger.validate_row(short)


def test_good_statuses():
    ledger.validate_row(row(seeds=[0], status="illustration"))
    for status in ("reproduced", "differs"):
        ledger.validate_row(row(published={"figure": 80.9, "source": "paper, table 2"}, status=status))


def test_rows_from_a_comparison():
    comparison = build_comparison(arms((0, 1, 2)), recipe="demo", notes={"joint": "upper bound"})
    rows = ledger.rows_from_comparison(comparison, note="reduced rows")
    assert [r["method"] for r in rows] == [r["arm"] for r in comparison["rows"]]
    assert {r["status"] for r in rows} == {"no published figure"}
    assert rows[-1]["note"] == "reduced rows; upper bound"
    published = {"joint": {"figure": 92.0, "source": "a paper"}}
    with pytest.raises(BadInput, match="say whether it 'reproduced'"):
        ledger.rows_from_comparison(comparison, published=published)
    told = ledger.rows_from_comparison(comparison, published=published, status={"joint": "differs"})
    assert told[-1]["status"] == "differs" and told[-1]["published"]["figure"] == 92.0


def test_commit_and_hardware_are_those_of_the_arms_own_runs():
    """Finished runs are reused: what is checked out when the ledger is written made none of them."""
    runs = arms((0, 1, 2))
    for n, report in enumerate(r for reports in runs.values() for r in reports):
        report["environment"] = {"commit": "old" if n < 4 else "new", "cpu": "EPYC", "threads": 1, "device": "cpu"}
    runs["joint"][0]["environment"] = {}
    rows = ledger.rows_from_comparison(build_comparison(runs, recipe="demo"))
    assert [r["commit"] for r in rows[:3]] == ["old", "old; new", "new"]
    assert {r["hardware"] for r in rows[:-1]} == {"EPYC, 1 thread a run"}
    assert rows[-1]["commit"] == "not recorded; new"
    assert rows[-1]["hardware"] == "processor not recorded; EPYC, 1 thread a run"


def test_two_seeds_enter_the_ledger_as_an_illustration():
    rows = ledger.rows_from_comparison(build_comparison(arms((0, 1)), recipe="demo"))
    assert {r["status"] for r in rows} == {"illustration"}


def test_a_comparison_that_does_not_say_what_made_it_is_refused():
    comparison = build_comparison(arms((0,)), recipe="demo")
    del comparison["rows"][0]["made_by"]
    with pytest.raises(BadInput, match="made_by: .* rebuild the comparison"):
        ledger.rows_from_comparison(comparison)


def test_the_ledger_of_the_project_is_valid_and_its_page_is_made_from_it():
    rows = ledger.read(ROOT / "results" / "ledger.jsonl")
    assert rows
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == ledger.markdown(rows), "run `make docs`"
    kept = json.loads(results.EXTRACT.read_text(encoding="utf-8"))
    assert kept == results.extract(rows) and kept, "run `make docs`"
    lines = results.lines_of("moram")
    assert any(line.startswith("stdlib, moram: average ") for line in lines) and results.lines_of("ridge")
    assert not any("lora" in line for line in lines) and results.lines_of("no_such_method") == []


def test_page(tmp_path, capsys):
    path, page = tmp_path / "ledger.jsonl", tmp_path / "docs" / "results.md"
    ledger.append(path, row(note="old"))
    ledger.append(path, row(method="a|b<c", published={"figure": 0.9, "source": "a|b"}, status="reproduced"))
    ledger.append(path, row(note="new"))
    assert ledger.main([str(page), str(path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "84.3 ± 2.3" in text and "| 3.0 |" in text and "| 181 ± 11 |" in text
    assert "- moram: new" in text and "old" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 4
    assert {line.replace("\\|", "").count("|") for line in tables} == {12}
    assert "a\\|b&lt;c" in text
    assert ledger.main([str(page)]) == 64
    assert ledger.main([str(page), str(tmp_path / "none.jsonl")]) == 64
    assert "does not exist" in capsys.readouterr().err


def test_page_of_perplexities_and_of_nothing():
    perplexity = {"average_accuracy": {"mean": 31.254, "low": None, "high": None}}
    text = ledger.markdown([row(metrics=perplexity, seeds=[0], status="illustration")])
    assert "| 31.25 |" in text
    assert "No result has been recorded" in ledger.markdown([])


# ---- what younger rows hold
def test_figures_by_seed_and_the_command_are_kept(tmp_path):
    comparison = build_comparison(arms(), recipe="r")
    made = ledger.rows_from_comparison(comparison, run=["r", "seed=1"])
    ledger.append(tmp_path / "l.jsonl", made[0])
    (kept,) = ledger.read(tmp_path / "l.jsonl")
    assert kept["run"] == ["r", "seed=1"] and list(kept["values"]) == list(kept["metrics"])
    mean = kept["metrics"]["average_accuracy"]["mean"]
    assert sum(kept["values"]["average_accuracy"]) / len(kept["seeds"]) == pytest.approx(mean)
    for wrong, words in (
        ({"values": {"average_accuracy": [1.0]}}, r"values\.average_accuracy: expected a number or null for each seed"),
        ({"values": {"speed": [1.0, 2.0, 3.0]}}, r"values\.speed"),
        ({"values": [1.0]}, "values: expected figures by name"),
        ({"run": []}, "run: expected a recipe"),
        ({"run": "clinc150"}, "run: expected a recipe"),
    ):
        with pytest.raises(BadInput, match=words):
            ledger.validate_row(row(**wrong))


def test_the_page_says_where_the_task_of_a_row_is_known(tmp_path):
    comparison = build_comparison(arms(), recipe="clinc150")
    rows = ledger.rows_from_comparison(comparison)
    assert all(found["protocol"] == comparison["protocol"] for found in rows)
    assert ledger.TASK_KNOWN not in ledger.markdown([row(), *rows])
    assert ledger.TASK_KNOWN in ledger.markdown([row(protocol={"task_id": "test"})])
    assert ledger.TASK_KNOWN not in ledger.markdown([row(protocol={"task_id": "test"}, head=None)])  # no class competes
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, row(protocol={"task_id": "test"}))
    assert ledger.read(path)[0]["protocol"] == {"task_id": "test"}
    with pytest.raises(BadInput, match="protocol: expected the block"):
        ledger.append(path, row(protocol="test"))
