"""report.json, the page of plots and the terminal tables, from synthetic runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from perdure.errors import BadInput, CannotWrite
from perdure.evaluation.compare import build_comparison
from perdure.report import build, plots, svg, terminal, words
from perdure.report.html import render_comparison, render_run
from tests.unit.report_samples import arms, sample

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert('x')</script> & \"ünï\" 日本語 🙂\x00\u202e"


class Page(HTMLParser):
    """Reads a page: balanced elements, every attribute, the text of each element kind."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def check(page: str, identifier: str) -> tuple[Page, dict]:
    """The page stands alone, its drawings are well-formed, its data is valid JSON."""
    found = Page(page)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "href", "xlink:href") or value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page and "url(" not in page
    kinds = [value for tag, name, value in found.attributes if tag == "script" and name == "type"]
    assert kinds == ["application/json"]
    assert ("script", "id", identifier) in found.attributes
    assert "nan" not in " ".join(v.lower() for t, n, v in found.attributes if n in ("d", "x", "y", "width", "height"))
    for drawing in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    (script,) = found.texts["script"]
    return found, json.loads(script)


def visible(page: Page) -> str:
    return " ".join(t for tag, texts in page.texts.items() if tag not in ("script", "style") for t in texts)


# ---- report.json
def test_report_keys_and_metrics():
    report = sample(baseline=[0.01] * 5)
    assert report["schema"] == 1 and report["metrics"]["forward_transfer"] is None
    for key in ("average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer"):
        assert isinstance(report["metrics"][key], float)
    assert build.validate_report(json.loads(json.dumps(report))) == report


@pytest.mark.parametrize(
    ("change", "words_found"),
    [
        ({"schema": 2}, "schema: found 2"),
        ({"seed": "0"}, "seed: expected int"),
        ({"seed": True}, "seed: expected int"),
        ({"higher_is_better": 1}, "higher_is_better: expected bool"),
        ({"protocol": []}, "protocol: expected mapping"),
        ({"metric": "f1"}, "metric: found 'f1'"),
        ({"status": "failed"}, "status: found 'failed'"),
        ({"matrix": [[0.5, "x"]]}, "matrix: row 0, column 1"),
        ({"metrics": {}}, r"metrics\.average_accuracy: is missing"),
        ({"cost": {"seconds": 1.0}}, r"cost\.trainable_parameters: is missing"),
        ({"router": {"0.query": {"off_rate": "x"}}}, r"router\.0\.query\.off_rate"),
        ({"plasticity": {"drift": float("nan")}}, r"plasticity\.drift: found nan"),
        ({"curves": {"loss": [[1, 2]]}}, r"curves\.loss: point 0"),
        ({"curves": {"loss": [[1, 0, 0.5], [2, 0, None]]}}, r"curves\.loss: point 1"),
        ({"curves": {"loss": [[1, 0, "x"]]}}, r"curves\.loss: point 0"),
        ({"curves": {"loss": None}}, r"curves\.loss: expected a list"),
        ({"curves": {"loss": "falling"}}, r"curves\.loss: expected a list"),
        ({"details": {"method": "moram"}}, r"details: method: expected sequence or null"),
        ({"details": {"method": ["moram"]}}, r"details\.method\.0: expected an object"),
        ({"details": {"method": [{"name": "moram", "title": "MoRAM"}]}}, r"details\.method\.0: status: is missing"),
        ({"details": {"head": 5}}, r"details: head: expected mapping or null"),
        ({"details": {"stream": "clinc150"}}, r"details: stream: expected mapping or null"),
        ({"details": {"stream": {"classes": [["a"], 3]}}}, r"details\.stream\.classes\.1: expected a list"),
        ({"details": {"stream": {"classes": [["a"], ["b", 3]]}}}, r"details\.stream\.classes\.1: expected a list"),
        ({"details": {"arm": ["lora"]}}, r"details: arm: expected str or null"),
        ({"details": {"router_history": [None]}}, r"details\.router_history\.0: expected an object"),
    ],
)
def test_malformed_report_is_named(change, words_found):
    with pytest.raises(BadInput, match=words_found):
        build.validate_report({**sample(), **change})


def test_missing_field_is_named():
    report = sample()
    del report["environment"]
    with pytest.raises(BadInput, match="environment: is missing"):
        build.validate_report(report)


def test_files_round_trip_and_errors(tmp_path):
    report = sample(name=EVIL)
    path = tmp_path / "deep" / "report.json"
    build.write_json(path, report)
    assert build.read_report(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match="not valid JSON"):
        build.read_report(path)
    with pytest.raises(BadInput, match="cannot be read"):
        build.read_report(tmp_path / "none.json")
    with pytest.raises(CannotWrite):
        build.write_json(path / "below-a-file.json", report)


# ---- the page of a run
def test_run_page(tmp_path):
    report = sample()
    page = render_run(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    found, data = check(page, "perdure-report")
    assert data == report
    text = visible(found)
    for said in (
        "illustration (one seed: 0)",
        "Forgetting of each experience",
        "Training loss",
        "Router over experiences",
        "effective",
        "Protocol",
    ):
        assert said.lower() in text.lower(), said
    for figure in ("average_accuracy", "forgetting", "learning_accuracy"):
        assert words.score(report["metrics"][figure]) in text
    assert render_run(report) == page


def test_run_page_says_what_is_in_the_matrix():
    page = render_run(sample(matrix=[[0.912, None], [0.434, 0.873]], curves={}, router={}, plasticity={}))
    text = visible(check(page, "perdure-report")[0])
    for shown in ("91.2", "43.4", "87.3", "65.3", "47.8"):
        assert shown in text, shown
    assert "Training loss" not in text and "What the memory did" not in text


def test_empty_and_first_rows_render():
    for matrix in ([], [[0.5]], [[None]], [[0.5, 0.1, None]]):
        report = sample(matrix=matrix, status="running", curves={"loss": [[1, 0, 0.5]]}, notes=[])
        text = visible(check(render_run(report), "perdure-report")[0])
        assert "still running" in text


def test_perplexity_page():
    rows = [[30.5, None], [44.25, 21.0]]
    report = sample(matrix=rows, metric="perplexity", higher_is_better=False, head=None, objective="language_modelling")
    assert report["metrics"]["forgetting"] == pytest.approx(13.75)
    text = visible(check(render_run(report), "perdure-report")[0])
    assert "Average perplexity" in text and "13.75" in text and "points" not in text


def test_hostile_names_stay_text():
    report = sample(name=EVIL, stream=EVIL, notes=[EVIL], environment={EVIL: EVIL})
    report["details"]["stream"]["experiences"][0] = EVIL
    report["details"]["stream"]["classes"][0] = [EVIL]
    report["router"] = {EVIL: {"off_rate": 0.5}}
    page = render_run(report)
    found, data = check(page, "perdure-report")
    assert data["name"] == EVIL
    assert "<script>alert" not in page and "\x00" not in page
    assert "<script>alert('x')</script>" in visible(found) and "日本語" in visible(found)


def test_long_labels_are_cut_on_the_page_and_whole_in_its_data():
    report = sample()
    report["details"]["stream"]["classes"][0] = ["x" * 5000]
    report["details"]["stream"]["class_order"] = ["y" * 5000]
    report["details"]["stream"]["experiences"][0] = "z" * 5000
    found, data = check(render_run(report), "perdure-report")
    assert data == report
    text = visible(found)
    assert not any(letter * 401 in text for letter in "xyz") and "x" * 100 in text


def test_large_runs_stay_readable():
    report = sample(count=100, keep=0.99)
    report["details"]["stream"]["classes"] = [[f"intent {j}.{n}" for n in range(8)] for j in range(100)]
    page = render_run(report)
    found, _ = check(page, "perdure-report")
    cells = plots.matrix_plot(report)["svg"]
    assert cells.count("<rect") <= plots.MOST_CELLS**2
    assert "mean of 2 × 2 experiences" in visible(found)
    assert "and 8 more" in visible(found)
    assert len(page) < 1_500_000
    ten = plots.matrix_plot(sample(count=15))["svg"]
    assert ten.count("<text") > 120


# ---- the page of a comparison
def _compared(seeds=(0,), count=5, **arguments):
    runs = arms(seeds, count)
    return build_comparison(runs, recipe="demo", reference="lora", **arguments), [r for rs in runs.values() for r in rs]


def test_comparison_page_of_one_seed(tmp_path):
    tuning = {"grid": {"learning_rate": [1e-4, 5e-4]}, "trials": 2, "on": "validation rows of the first experience"}
    comparison, reports = _compared(tuning=tuning, notes={"joint": "sees all the data at once"})
    page = render_comparison(comparison, reports, tmp_path / "report.html")
    found, data = check(page, "perdure-comparison")
    assert data == comparison
    text = visible(found)
    for said in ("illustration (one seed)", "upper bound", "reference", "validation rows of the first", "one seed"):
        assert said in text, said
    assert "sees all the data at once" in text and "Difference to lora" in text
    assert "±" not in text and 'fill-opacity="0.13"' not in page
    assert render_comparison(comparison, reports) == page


def test_comparison_page_of_three_seeds_has_bands_and_intervals():
    comparison, reports = _compared((0, 1, 2), 10)
    page = render_comparison(comparison, reports)
    text = visible(check(page, "perdure-comparison")[0])
    assert "illustration" not in text and "3 seeds, 95 % intervals" in text
    assert page.count('fill-opacity="0.13"') == 7
    row = next(r for r in comparison["rows"] if r["arm"] == "moram")
    assert words.interval("average_accuracy", row["metrics"]["average_accuracy"]) in text
    assert "declares no tuning" in text


def test_two_seeds_are_called_an_illustration_everywhere():
    comparison, reports = _compared((0, 1))
    text = visible(check(render_comparison(comparison, reports), "perdure-comparison")[0])
    assert "illustration (2 seeds)" in text and "Fewer than 3 seeds" in text and "single run" not in text
    shown = _printed(terminal.print_comparison, comparison, width=200)
    assert "illustration (2 seeds)" in shown and "fewer than 3 seeds are an illustration" in shown


@pytest.mark.parametrize(("equal", "claimed"), [(True, True), (False, False), (None, False)])
def test_equal_tuning_is_claimed_only_where_it_is_declared(equal, claimed):
    tuning = {"trials": 6} if equal is None else {"trials": 6, "equal": equal}
    comparison, reports = _compared(tuning=tuning)
    text = visible(check(render_comparison(comparison, reports), "perdure-comparison")[0])
    assert ("same grid and number of trials" in text) is claimed
    assert ("may not have had the same chance" in text) is not claimed


def test_warnings_about_what_made_the_runs_are_shown():
    runs = arms((0,))
    runs["lora"][0]["environment"]["commit"] = "<b>old"
    comparison = build_comparison(runs, recipe="demo")
    page = render_comparison(comparison, [r for reports in runs.values() for r in reports])
    said = "the runs differ in commit: not recorded (6 runs), <b>old (1 run)"
    assert said in visible(check(page, "perdure-comparison")[0]) and "<b>old" not in page.split("<script")[0]
    assert f"warning: {said}" in _printed(terminal.print_comparison, comparison, width=300)


def test_joint_measured_once_renders():
    runs = {k: v for k, v in arms((0, 1)).items() if k in ("lora", "moram")}
    last = [[None] * 5 for _ in range(4)] + [[0.9, 0.8, 0.9, 0.7, 0.8]]
    runs["joint"] = [sample("joint", seed, matrix=last) for seed in (0, 1)]
    comparison = build_comparison(runs, recipe="demo")
    page = render_comparison(comparison, [r for rs in runs.values() for r in rs])
    assert "82.0" in visible(check(page, "perdure-comparison")[0])


def test_a_page_over_orders_names_places_and_says_so():
    def page_of(order: str | int, *names: str) -> str:
        runs = {"lora": [sample("lora", seed, 3) for seed in (0, 1, 2)]}
        for report, first in zip(runs["lora"], names, strict=True):
            report["details"]["stream"] |= {"class_order": order, "experiences": [first, "b", "c"]}
        comparison = build_comparison(runs, recipe="demo")
        return visible(check(render_comparison(comparison, runs["lora"]), "perdure-comparison")[0])

    same, other = page_of(1993, "zoo", "zoo", "zoo"), page_of("seed", "zoo", "ape", "elk")
    assert "not over orders" in same and "1 zoo" in same
    assert "an order of classes of its own" in other and "1 zoo" not in other and "after 1" in other


def test_the_page_shows_classes_bytes_and_work():
    table = [
        {"name": f"<b>{n}", "rows": 4, "scores": [0.9, 0.5 - n / 100], "forgetting": 0.4 + n / 100} for n in range(12)
    ]
    report = sample(count=2, per_class=table, curves={"loss": [], "stored_bytes": [1_000_000, 3_500_000]})
    report["cost"] |= {"inference_flops_per_token": 1.25e9, "step_peak_bytes": 5_000_000, "probe_share": 0.125}
    text = visible(check(render_run(report), "perdure-report")[0])
    assert "Classes that lost most" in text and "<b>11" in text and "<b>2" in text and "<b>1 " not in text
    assert "All 12 classes" in text and "MB stored" in text and "1.25 G" in text and "12.5 %" in text
    assert "Classes that lost most" not in render_run(sample())
    with pytest.raises(BadInput, match=r"per_class\.0: rows: is missing"):
        build.validate_report({**sample(), "per_class": [{"name": "a"}]})
    with pytest.raises(BadInput, match=r"per_class\.0\.scores: column 1"):
        build.validate_report({**sample(), "per_class": [{**table[0], "scores": [0.5, "x"]}]})
    with pytest.raises(BadInput, match="per_class: expected a list"):
        build.validate_report({**sample(), "per_class": "all"})


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ((0.2, 0.9), 0, 1),
        ((0.75, 0.9), 0.7, 1),
        ((0.05, 0.1), 0, 0.2),
        ((0.02, 0.49), 0, 0.6),
        ((), 0, 1),
        ((1.0,), 0.9, 1),
    ],
)
def test_an_axis_of_shares_ends_where_they_lie(values, low, high):
    axis = plots.score_axis(values, "accuracy", "average")
    assert (round(axis.low, 6), round(axis.high, 6)) == (low, high)


@pytest.mark.parametrize(
    ("learnt", "of", "rows", "columns"),
    [
        (3, 3, [1, 2, 3], [1, 2, 3]),
        (2, 10, [1, 2], list(range(1, 11))),
        (50, 50, [1, 6, 11, 17, 22, 28, 33, 39, 44, 50], [1, 6, 11, 17, 22, 28, 33, 39, 44, 50]),
        (4, 50, [1, 2, 3, 4], [1, 2, 3, 4, 5]),
    ],
)
def test_the_terminal_shows_ten_of_many_experiences(learnt, of, rows, columns):
    report = sample(count=of)
    report["matrix"] = report["matrix"][:learnt]
    table = terminal.run_table(report)
    assert [str(column.header) for column in table.columns[1:-1]] == [str(number) for number in columns]
    assert table.row_count == len(rows)
    names = list(table.columns[0].cells)
    assert [str(name).split()[0] for name in names] == [str(number) for number in rows]
    assert ("of 50 experiences" in str(table.caption)) == (of == 50)


def test_the_terminal_shows_differences_to_the_reference():
    comparison, _ = _compared((0, 1, 2))
    row = next(row for row in comparison["rows"] if row["arm"] == "moram")
    text = " ".join(_printed(terminal.print_comparison, comparison, width=200).split())
    shown, wins = words.difference("average_accuracy", row["difference"]["average_accuracy"])
    assert "Difference to lora, paired by seed, in points" in text and f"moram {shown} {wins}" in text
    assert words.difference("forgetting", None) == (words.DASH, words.DASH)
    alone, _ = _compared((0,))
    assert "[" not in words.difference("average_accuracy", alone["rows"][0]["difference"]["average_accuracy"])[0]


def test_reports_must_be_those_of_the_runs():
    comparison, reports = _compared((0, 1))
    with pytest.raises(BadInput, match="13 for 14 runs"):
        render_comparison(comparison, reports[1:])
    with pytest.raises(BadInput, match="has seeds"):
        render_comparison(comparison, reports[::-1])
    with pytest.raises(BadInput, match="rows: is empty"):
        build.validate_comparison({**comparison, "rows": []})
    with pytest.raises(BadInput, match=r"rows\.0\.runs: found 99; expected positions in runs"):
        build.validate_comparison({**comparison, "rows": [{**comparison["rows"][0], "runs": [99]}]})
    with pytest.raises(BadInput, match=r"runs\.0: expected the folder of a run, found 5"):
        build.validate_comparison({**comparison, "runs": [5, *comparison["runs"][1:]]})
    with pytest.raises(BadInput, match=r"tuning: expected mapping or null, found 'by hand'"):
        build.validate_comparison({**comparison, "tuning": "by hand"})


# ---- words and drawings
def test_best_cells_leave_upper_bounds_aside():
    comparison, _ = _compared()
    best = words.best_cells(comparison)
    named = {(comparison["rows"][i]["arm"], name) for i, name in best}
    assert ("moram, protected keys + ridge", "average_accuracy") in named
    assert not any(arm == "joint" for arm, _ in named)
    assert ("frozen + ridge", "trainable_parameters") in named
    assert {name for _, name in named} == {name for _, name in words.columns(comparison)}
    assert "anytime_accuracy" not in {name for _, name in named}  # no arm was probed


def test_number_formats():
    assert words.score(0.8375) == "83.8" and words.score(-0.031) == "−3.1" and words.score(-0.0001) == "0.0"
    assert (
        words.score(None) == "–"
        and words.score(1234.5, "perplexity") == "1,234"
        and words.score(9.876, "perplexity") == "9.88"
    )
    assert words.count(22_713_216) == "22.7 M" and words.count(768) == "768" and words.count(0) == "0"
    assert words.size(9_500_000) == "9.5 MB" and words.size(12) == "12 B"
    assert words.seconds(61) == "61 s" and words.seconds(180) == "3 min" and words.seconds(7200) == "2 h"
    assert words.signed("average_accuracy", 0.1) == "+10.0" and words.signed("average_accuracy", 0.0001) == "0.0"


def test_lists_are_told_shortly():
    assert (
        words.text([450, 450, 450]) == "450 (3 times)" and words.text([1, 2]) == "1, 2" and words.text(None) == "none"
    )
    assert words.text(list(range(99))).endswith("23 … (99 in all)")
    assert words.figure("samples", 12_300) == "12.3 k" and words.figure("evaluation_seconds", 12.0) == "12 s"


def test_units_of_work_and_shares():
    assert words.figure("train_flops_per_token", 2.5e9) == "2.5 G" and words.figure("train_flops_per_row", 12.0) == "12"
    assert words.figure("probe_share", 0.0456) == "4.56 %" and words.unit("recovered_share") == ""
    assert words.figure("recovery_steps", 12.4) == "12" and words.unit("recovery_steps") == ""
    assert words.unit("class_forgetting") == "points" and words.figure("growth_bytes", 1_600_000) == "1.6 MB"


def test_ticks():
    assert svg.nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.nice_ticks(3, 3)[0] < 3 < svg.nice_ticks(3, 3)[-1]
    assert svg.integer_ticks(1, 5) == [1, 2, 3, 4, 5]
    assert svg.integer_ticks(1, 100)[0] == 1 and svg.integer_ticks(1, 100)[-1] == 100
    for low, high in ((7.0, 300.0), (40_000, 138_000_000), (5.0, 5.0), (1.0, 10.0), (0.02, 3e7)):
        axis = svg.Axis(low, high, "", str, log=True)
        assert axis.low <= low < axis.high and high <= axis.high and 2 <= len(axis.ticks) <= 9
        assert 0 <= axis.place(low) <= axis.place(high) <= 1


def test_ramp_gets_darker():
    def light(share: float) -> int:
        return sum(int(svg.colour(share)[k : k + 2], 16) for k in (1, 3, 5))

    tones = [light(n / 20) for n in range(21)]
    assert tones == sorted(tones, reverse=True) and svg.colour(-1) == svg.colour(0) and svg.colour(2) == svg.colour(1)


# ---- terminal
def _printed(show, thing, width=100, ansi=False) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=ansi, color_system="standard" if ansi else None)
    show(thing, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_run():
    report = sample(name="[bold]run[/]")
    text = _printed(terminal.print_run, report)
    assert "[bold]run[/]" in text and words.score(report["matrix"][4][0]) in text and "Forgetting" in text
    assert "note: Rates come" in text
    wide = _printed(terminal.print_run, sample(count=100, keep=0.99), width=80)
    assert " 100 " in wide and max(len(line) for line in wide.splitlines()) <= 80


def test_names_are_no_emoji_codes(capsys):
    terminal.print_run(sample(name=":bomb:"))
    terminal.print_comparison(_compared(notes={"joint": "a :bomb:"})[0])
    assert capsys.readouterr().out.count(":bomb:") == 2


def test_terminal_comparison_marks_the_best():
    comparison, _ = _compared((0, 1, 2))
    text = _printed(terminal.print_comparison, comparison, width=80)
    row = comparison["rows"][4]
    assert words.interval("average_accuracy", row["metrics"]["average_accuracy"]) in text
    assert "min" in text and "upper" in text and "illustration" not in text
    for row in comparison["rows"]:  # one column more, in a terminal as narrow as before
        row["metrics"]["anytime_accuracy"] = {"mean": 0.5, "low": 0.4, "high": 0.6}
    narrow = _printed(terminal.print_comparison, comparison, width=80)
    assert all(row["arm"][:6] in narrow for row in comparison["rows"]) and "…" not in narrow
    ansi = _printed(terminal.print_comparison, comparison, width=120, ansi=True)
    best = words.interval("average_accuracy", comparison["rows"][5]["metrics"]["average_accuracy"])
    assert f"\x1b[1m{best}" in ansi
    assert "illustration" in _printed(terminal.print_comparison, _compared()[0])


def test_nothing_heavy_is_imported():
    code = (
        "import sys, perdure.report.html, perdure.report.terminal, perdure.evaluation.ledger, "
        "perdure.evaluation.plasticity\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'jinja2', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
