"""Matrices of other tools: how they are read, what is refused, and the pages that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perdure.cli import main
from perdure.comparison import rebuild
from perdure.errors import BadInput
from perdure.evaluation.matrix_files import read_matrix_file
from perdure.matrix_report import report_matrices
from perdure.report import build

N = None
TRIANGLE = [[0.8, N, N], [0.6, 0.9, N], [0.5, 0.7, 1.0]]


def written(folder: Path, text: str, name: str = "ewc.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0.8,,\n0.6,0.9,\n0.5,0.7,1\n", N),
        ("0.8\n0.6,0.9\n0.5,0.7,1\n", N),  # the lower triangle alone
        ("80;;\n60;90;\n50;70;100\n", N),
        ("80%\t\t\n60%\t90%\t\n50%\t70%\t100%\n", N),
        ("after,a,b,c\na,0.8,,\nb,0.6,0.9,\nc,0.5,0.7,1.0\n", ["a", "b", "c"]),
        ("a,b,c\n80,,\n60,90,\n50,70,100\n", ["a", "b", "c"]),
        (",0,1,2\n0,80,,\n1,60,90,\n2,50,70,100\n", N),  # as pandas writes it
        ("task,a,b,c\n1,80,,\n2,60,90,\n3,50,70,100\n", ["a", "b", "c"]),
        ("\ufeff0.8,0,0\r\n0.6,0.9,0\r\n0.5,0.7,1\r\n", N),  # an array that was filled with zeros
    ],
)
def test_csv(text, names, tmp_path):
    found = read_matrix_file(written(tmp_path, text))
    assert found.rows == TRIANGLE and found.experiences == names
    assert (found.name, found.seed, found.metric) == ("ewc", None, "accuracy")


def test_json_says_what_it_is(tmp_path):
    said = {"matrix": [[80], [60, 90], [50, 70, 100]], "name": "EWC", "seed": 3, "experiences": ["a", "b", "c"],
            "baseline": [N, 10, 0], "scale": "percent"}  # fmt: skip
    found = read_matrix_file(written(tmp_path, json.dumps(said), "x.json"))
    assert found.rows == TRIANGLE and (found.name, found.seed) == ("EWC", 3) and found.baseline == [N, 0.1, 0.0]
    assert found.notes == []
    plain = read_matrix_file(written(tmp_path, json.dumps(TRIANGLE), "ewc_seed2.json"))
    assert plain.rows == TRIANGLE and (plain.name, plain.seed) == ("ewc", 2)
    assert plain.notes == ["Read as fraction, by the size of the scores."]


def test_perplexities_have_no_scale(tmp_path):
    found = read_matrix_file(written(tmp_path, "10,\n8,20\n"), metric="perplexity")
    assert found.rows == [[10.0, N], [8.0, 20.0]]
    with pytest.raises(BadInput, match="perplexity is 1 or more"):
        read_matrix_file(written(tmp_path, "0.5,\n8,20\n"), metric="perplexity")
    with pytest.raises(BadInput, match="a perplexity has none"):
        read_matrix_file(written(tmp_path, "10,\n8,20\n"), metric="perplexity", scale="percent")


def test_the_scale_is_told_where_it_cannot_be_seen(tmp_path):
    for text in ("1,\n0,1\n", "1.5,\n1.2,0.9\n", "50,\n0.4,0.9\n"):
        with pytest.raises(BadInput, match="--scale fraction or --scale percent"):
            read_matrix_file(written(tmp_path, text))
    assert read_matrix_file(tmp_path / "ewc.csv", scale="percent").rows[1] == pytest.approx([0.004, 0.009])
    with pytest.raises(BadInput, match=r"row 1, column 1: found 50; a fraction lies in \[0, 1\]"):
        read_matrix_file(tmp_path / "ewc.csv", scale="fraction")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.8,,\n0.6,0.9\n0.5,0.7,1\n", "row 2 has 2 cells, row 1 has 3"),
        ("0.8,0.1\n0.6,0.9\n0.5,0.7\n", "3 rows and 2 columns"),
        ("0.8,nan\n0.6,0.9\n", "row 1, column 2: found nan; leave the cell empty"),
        ("0.8,\n0.6,inf\n", "row 2, column 2: found inf"),
        ("0.8,\n0.6,x\n", "row 2, column 2: expected a number or nothing, found 'x'"),
        ("80,\n60,101\n", r"row 2, column 2: found 101; a percent lies in \[0, 100\]"),
        ("0.8,\n-0.6,0.7\n", "row 2, column 1: found -0.6"),
        (",\n,\n", "no cell holds a score"),
        ("\n\n", "is empty"),
        ("a,b\n", "has names and no row"),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(text, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        read_matrix_file(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a list of rows"),
        ("[1, 2]", "expected a list of rows"),
        ("[[0.5, NaN], [0.5, 0.5]]", "row 1, column 2: found nan"),
        ('[["0.5"]]', "row 1, column 1: expected a number or null"),
        ('{"matrix": [[0.5]], "acc": 1}', "key 'acc' is unknown"),
        ('{"name": "x"}', "key 'matrix' is missing"),
        ('{"schema": 1, "matrix": [[0.5]]}', "is a report of perdure"),
        ('{"matrix": [[0.5]], "seed": "0"}', "seed: expected a whole number"),
        ('{"matrix": [[0.5]], "experiences": ["a", "b"]}', "2 names for 1 columns"),
        ('{"matrix": [[0.5]], "scale": "points"}', "scale: found 'points'"),
        ('{"matrix": [[0.5]], "metric": "f1"}', "metric: found 'f1'"),
        ('{"matrix": [[0.5]], "baseline": [2], "scale": "fraction"}', "baseline, column 1: found 2"),
    ],
)
def test_what_is_wrong_with_a_json_is_named(text, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        read_matrix_file(written(tmp_path, text, "x.json"))


def test_a_file_that_says_another_scale_than_the_user(tmp_path):
    path = written(tmp_path, '{"matrix": [[0.5]], "scale": "percent"}', "x.json")
    with pytest.raises(BadInput, match="the file says percent, you say fraction"):
        read_matrix_file(path, scale="fraction")
    with pytest.raises(BadInput, match="cannot be read"):
        read_matrix_file(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe0")
    with pytest.raises(BadInput, match="no UTF-8"):
        read_matrix_file(tmp_path / "b.csv")


# ---- pages
def test_one_matrix_gives_every_figure_that_follows_from_it(tmp_path, capsys):
    path = written(tmp_path, "0.8,,\n0.6,0.9,\n0.5,0.7,1\n")
    main_ends_well(["report", "--matrix", str(path), "--output-dir", str(tmp_path / "out")])
    report = build.read_report(tmp_path / "out" / "report.json")
    expected = {"average_accuracy": 2.2 / 3, "forgetting": 0.25, "backward_transfer": -0.25, "learning_accuracy": 0.9}
    assert {name: report["metrics"][name] for name in expected} == pytest.approx(expected)
    assert report["metrics"]["transfer"] is None and report["protocol"] == {}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "73.3" in page and "perdure did not run it" in page and "What the method was allowed" not in page
    said = capsys.readouterr().out
    assert "Backward transfer" in said and "−25.0 points" in said and "Training time" not in said
    assert said.strip().endswith("report.html")


def main_ends_well(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def three_seeds(folder: Path) -> list[str]:
    files = []
    for seed in range(3):
        files.append(str(written(folder, f"0.8,\n0.{5 + seed},0.9\n", f"ewc-seed-{seed}.csv")))
        files.append(f"er={written(folder, f'0.8,{chr(10)}0.{7 + seed},0.9{chr(10)}', f'other{seed}.csv')}")
    return files


def test_several_matrices_are_compared_over_seeds(tmp_path, capsys):
    files = three_seeds(tmp_path)
    options = [word for file in files for word in ("--matrix", file)]
    main_ends_well(["report", *options, "--reference", "er", "--output-dir", str(tmp_path / "out")])
    comparison = build.read_comparison(tmp_path / "out" / "comparison.json")
    ewc, er = comparison["rows"]
    assert (ewc["arm"], ewc["seeds"], er["seeds"], comparison["reference"]) == ("ewc", [0, 1, 2], [0, 1, 2], "er")
    assert comparison["illustration"] is False
    # Each seed ends 0.1 below er: (0.7 + s + 0.9) / 2 against (0.5 + s + 0.9) / 2.
    assert ewc["difference"]["average_accuracy"]["mean"] == pytest.approx(-0.1)
    assert (ewc["difference"]["average_accuracy"]["wins"], ewc["difference"]["average_accuracy"]["losses"]) == (0, 3)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "protocol not known" in page and "under one protocol" not in page
    assert "paired by seed" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("report.json"))) == 6
    again = page, (tmp_path / "out" / "comparison.csv").read_text()
    pages = rebuild([tmp_path / "out"], reference="ewc")  # as any comparison, here with another reference
    assert build.read_comparison(pages[-1].parent / "comparison.json")["rows"][0]["difference"] is None
    report_matrices(files, tmp_path / "out", reference="er")
    assert again == ((tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "comparison.csv").read_text())


def test_names_of_experiences_in_one_file_hold_for_all(tmp_path):
    one = written(tmp_path, "a,b\n0.8,\n0.6,0.9\n", "one.csv")
    other = written(tmp_path, "0.8,\n0.6,0.9\n", "other.csv")
    report_matrices([str(one), str(other)], tmp_path / "out")
    report = build.read_report(tmp_path / "out" / "other" / "seed-0" / "report.json")
    assert report["details"]["stream"]["experiences"] == ["a", "b"]


def test_matrices_that_do_not_fit_leave_nothing_behind(tmp_path):
    one, two = written(tmp_path, "0.8,\n0.6,0.9\n", "a.csv"), written(tmp_path, "0.8\n", "b.csv")
    out = tmp_path / "out"
    cases = [
        ([str(one), str(two)], {}, "details.stream.length"),
        ([str(one), f"x={one}"], {"reference": "y"}, "reference: 'y' is not an arm"),
        ([str(one)], {"reference": "a"}, "needs several matrices"),
        ([f"a b={one}", f"a/b={one}"], {}, "give two methods one folder"),
        (["="], {}, "write FILE or NAME=FILE"),
        ([], {}, "at least one file"),
    ]
    for files, options, words in cases:
        with pytest.raises(BadInput, match=words):
            report_matrices(files, out, **options)
        assert not out.exists()
    seed = written(tmp_path, '{"matrix": [[0.5]], "seed": 1, "name": "x"}', "c.json")
    with pytest.raises(BadInput, match="both seed 1 of 'x'"):
        report_matrices([str(seed), str(seed)], out)


def test_other_pages_are_not_written_over(tmp_path):
    path = written(tmp_path, "0.8,\n0.6,0.9\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    with pytest.raises(BadInput, match="another page"):
        report_matrices([str(path)], out)
    (out / "report.html").unlink()
    report_matrices([str(path)], out)
    report_matrices([str(path)], out)
    with pytest.raises(BadInput, match="another page"):
        report_matrices([str(path), f"x={path}"], out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["some", "--matrix", "x.csv"], "do not go together"),
        (["some", "--scale", "percent"], "are for files given with --matrix"),
        ([], "name at least one run folder"),
    ],
)
def test_options_that_do_not_go_together(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    assert end.value.code == 64 and words in capsys.readouterr().err
