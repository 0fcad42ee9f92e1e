"""The command line: what is printed where, and the exit codes."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import perdure
from perdure import errors, recipe, yamltext
from perdure.cli import app, main
from perdure.config import Strict

RECIPE = """
description: a test
model: {scratch: {family: bert, layers: 1, width: 16, heads: 2}}
stream: {source: stdlib, experiences: 2}
method: lora
training: {epochs: 1}
protocol: {passes: 1}
arms:
  lora: {}
  frozen: {method: linear_probe}
"""


@pytest.fixture
def mine(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def perdure_command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "perdure", *arguments], capture_output=True, text=True, check=False, **options
    )


def ends(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `main` in this process."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


# ---- every recipe through the real command line
@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_through_the_real_command_line(name, tmp_path):
    done = perdure_command("run", name, "--print-config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and list(tmp_path.iterdir()) == []
    shown = yamltext.load(done.stdout, name)
    loaded = recipe.load_recipe(name)
    assert shown == loaded.model_dump(mode="json", exclude={"arms"})


# ---- exit codes in a process of its own
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "{mine}", "method=morram", "--print-config"], 64, ["morram", "moram"]),
        (["run", "{mine}", "training.epochs=2", "--print-config"], 65, ["training.epochs", "1 pass"]),
        (["run"], 64, ["RECIPE"]),
    ],
)
def test_exit_codes_of_the_process(mine, arguments, code, words, tmp_path):
    done = perdure_command(*[each.format(mine=mine) for each in arguments], cwd=tmp_path)
    assert done.returncode == code
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no-such-recipe"], "no-such-recipe"),
        (["run", "{mine}", "training.lr=1"], "training.lr: unknown key"),
        (["run", "{mine}", "seed"], "expected key=value"),
        (["run", "{mine}", "--import", "nothing.py"], "nothing.py"),
        (["run", "{mine}", "--unknown"], "--unknown"),
        (["fly"], "fly"),
        (["methods", "morram"], "moram"),
        (["compare", "{mine}", "--seeds", "0"], "--seeds"),
        (["compare", "{mine}", "--seeds", "two"], "--seeds"),
        (["compare", "{mine}", "--seeds", "-1,"], "--seeds"),
        (["compare", "{mine}", "--methods", "lora,nothing"], "nothing"),
        (["compare", "{mine}", "--methods", "lora,frozen", "--reference", "er"], "reference"),
        (["compare", "{mine}", "--methods", " ,"], "--methods: found ' ,'"),
        (["compare", "{mine}", "output_dir=here"], "--output-dir here"),
        (["compare", "{mine}", "method=lora"], "every arm of a comparison brings its own"),
        (["sweep", "{mine}"], "declares no tuning.grid"),
        (["sweep", "{mine}", "--grid", "learning_rate=1e-3", "--arms", " ,"], "--arms: found ' ,'"),
        (["sweep", "{mine}", "--grid", "learning_rate=1e-3", "method=lora"], "choose arms with --arms"),
        (["sweep", "{mine}", "--grid", "learning_rate=1e-3", "--copy", "x.yaml"], "--copy x.yaml: is for --write"),
        (["sweep", "clinc150", "--write"], "clinc150 belongs to the package"),
        (["sweep", "{mine}", "--grid", "learning_rate=1e-3", "--table", "{mine}"], "is no results table of a sweep"),
        (["demo", "output_dir=here"], "--output-dir here"),
        (["demo", "method=[lora]"], "every arm of a comparison brings its own"),
        (["run", "{mine}", "name=" + "x" * 300], "name: a folder would have 300 bytes"),
        (["report", "{folder}/" + "x" * 300], "File name too long"),
        (["report", "{folder}"], "report.json"),
        (["undo", "{folder}"], "run folder"),
    ],
)
def test_usage_and_input_errors_end_with_64(capsys, mine, tmp_path, arguments, words):
    code, _, err = ends(capsys, *[each.format(mine=mine, folder=tmp_path) for each in arguments])
    assert code == errors.BAD_INPUT == 64
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadInput, 64),
        (errors.ProtocolRefused, 65),
        (errors.ForgotTooMuch, 66),
        (errors.NonFiniteLoss, 70),
        (errors.CannotWrite, 73),
        (errors.Interrupted, 130),
        (errors.DamagedState, 64),
        (KeyboardInterrupt, 130),
    ],
)
def test_errors_of_a_run_have_their_exit_codes(monkeypatch, capsys, mine, error, code):
    from perdure import run

    def fails(recipe, *, progress=True):
        raise error("what happened")

    monkeypatch.setattr(run, "run_recipe", fails)
    found, out, err = ends(capsys, "run", mine)
    assert found == code and out == ""
    assert error is KeyboardInterrupt or "perdure: what happened" in err


def test_an_unknown_error_keeps_its_traceback(monkeypatch, mine):
    from perdure import run

    def fails(recipe, *, progress=True):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(run, "run_recipe", fails)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["run", mine])


@pytest.mark.parametrize(
    "arguments",
    [["run", "{mine}", "output_dir={long}"], ["undo", "{long}"], ["compare", "{mine}", "--output-dir", "{long}/a"]],
    ids=lambda arguments: arguments[0],
)
def test_names_that_the_file_system_refuses_are_no_traceback(capsys, mine, tmp_path, arguments):
    code, _, err = ends(capsys, *[each.format(mine=mine, long=tmp_path / ("x" * 300)) for each in arguments])
    assert code in (64, 73) and "name too long" in err and "Traceback" not in err


def test_what_the_system_forbids_ends_with_73(monkeypatch, capsys, mine):
    from perdure import run

    def closed(recipe, *, progress=True):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/closed")

    monkeypatch.setattr(run, "run_recipe", closed)
    code, _, err = ends(capsys, "run", mine)
    assert code == 73 and "runs/closed: Permission denied" in err


def test_a_report_that_may_not_be_read_is_none_to_delete(monkeypatch, tmp_path):
    from perdure.run_folder import read_report

    (tmp_path / "report.json").write_text("{}")

    def closed(self, *arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(errors.CannotWrite, match=r"report\.json: .*Permission denied"):
        read_report(tmp_path)


# ---- run
def test_run_passes_the_recipe_on_and_prints_the_page_last(monkeypatch, capsys, mine):
    from perdure import run
    from perdure.report import html, terminal

    seen = []
    monkeypatch.setattr(run, "run_recipe", lambda recipe, *, progress: seen.append((recipe, progress)) or {"a": 1})
    monkeypatch.setattr(terminal, "print_run", lambda report, console: console.print(f"table of {report}"))
    monkeypatch.setattr(html, "render_run", lambda report, page: None)
    code, out, _ = ends(capsys, "run", mine, "method.lora.rank=3", "seed=5", "output_dir=runs/here", "--no-progress")
    ((loaded, progress),) = seen
    assert code == 0 and not progress
    assert loaded.seed == 5 and loaded.method[0]["lora"]["rank"] == 3 and loaded.output_dir == "runs/here"
    assert out.splitlines() == ["table of {'a': 1}", str(Path("runs/here/report.html"))]


def test_the_page_of_a_finished_run_that_was_deleted_is_made_again(monkeypatch, capsys, mine, tmp_path):
    from perdure import run
    from tests.unit.report_samples import sample

    monkeypatch.setattr(run, "run_recipe", lambda recipe, *, progress: sample(name="a :bomb:"))
    code, out, _ = ends(capsys, "run", mine, f"output_dir={tmp_path / 'run'}")
    page = Path(out.splitlines()[-1])
    assert code == 0 and page == tmp_path / "run" / "report.html" and "a :bomb:" in page.read_text(encoding="utf-8")
    assert "a :bomb:" in out


def test_own_methods_come_from_a_file(monkeypatch, capsys, mine, tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(
        "import perdure\n"
        "from perdure.methods import Method, MethodConfig\n"
        "@perdure.register_method('of_mine')\n"
        "class Mine(Method):\n"
        '    """My own method."""\n'
        "    class Config(MethodConfig):\n"
        "        strength: float = 2.0\n"
    )
    arguments = ("--import", str(file), "--print-config")
    try:
        code, out, err = ends(capsys, "run", mine, "method=of_mine", "method.of_mine.strength=3", *arguments)
        assert code == 0, err
        assert yamltext.load(out, "x")["method"] == [{"of_mine": {"strength": 3.0}}]
        assert ends(capsys, "run", mine, "method=of_mine", "method.of_mine.power=3", *arguments)[0] == 64
        assert "My own method" in ends(capsys, "methods", "--import", str(file))[1]
    finally:
        from perdure.registry import METHODS

        METHODS._classes.pop("of_mine", None)
    for text, words in (
        ("import perdure\nthis is no python\n", "my_method.py, line 2: invalid syntax: 'this is no python'"),
        ("x = 1\nimport no_such_module\n", "my_method.py, line 2: No module named 'no_such_module'"),
        ("from perdure import Nothing\n", "my_method.py, line 1: cannot import name 'Nothing'"),
    ):
        file.write_text(text)
        code, _, err = ends(capsys, "run", mine, *arguments)
        assert code == 64 and f"--import: {tmp_path}" in err and words in err and "Traceback" not in err
        monkeypatch.chdir(tmp_path)
        code, _, err = ends(capsys, "run", mine, "--import", "my_method.py")  # as it is typed most often
        assert code == 64 and words in err
    file.write_text("1 / 0\n")  # a defect of the file's own keeps its traceback
    with pytest.raises(ZeroDivisionError):
        main(["run", mine, *arguments])


def test_print_config_gives_each_value_with_its_source(capsys, mine):
    _, out, _ = ends(capsys, "run", mine, "method=frozen", "training.epochs=1", "--print-config")
    lines = {line.split("#")[0].strip(): line.split("#")[-1].strip() for line in out.splitlines() if "#" in line}
    assert lines["epochs: 1"] == "command line"
    assert lines["- linear_probe: {}"] == "arm frozen"
    assert lines["optimizer: adamw"] == "default"
    assert lines["passes: 1"] == "recipe mine"


# ---- compare and demo
def comparison_of(arms: list[str], seeds: list[int]) -> dict:
    figures = {"average_accuracy": 0.5, "forgetting": 0.25, "learning_accuracy": 0.75}
    metrics = {name: {"mean": value, "low": None, "high": None} for name, value in figures.items()}
    cost = {
        name: {"mean": 1.0, "low": None, "high": None} for name in ("seconds", "trainable_parameters", "stored_bytes")
    }
    row = {
        "head": "cosine",
        "seeds": seeds,
        "metrics": metrics,
        "cost": cost,
        "difference": None,
        "note": "",
        "runs": [0],
    }
    comparison = {"schema": 1, "recipe": "mine", "metric": "accuracy", "higher_is_better": True, "reference": arms[0]}
    return comparison | {
        "illustration": len(seeds) == 1,
        "rows": [{"arm": arm, "method": arm, "status": "verified", "runs": [0], **row} for arm in arms],
        "protocol": {},
        "stream": "s",
        "environment": {},
        "runs": ["r"],
    }


def test_compare_hands_over_arms_seeds_and_reference(monkeypatch, capsys, mine):
    from perdure import comparison

    seen = []

    def fake(recipe, arms, seeds, reference, output_dir, *, progress, say):
        seen.append((recipe.seed, arms, seeds, reference, output_dir, progress))
        return comparison_of(["lora", "moram"], seeds), Path("there/report.html")

    monkeypatch.setattr(comparison, "compare", fake)
    code, out, err = ends(
        capsys, "compare", mine, "seed=4", "--methods", "lora, moram", "--seeds", "2", "--reference", "lora",
        "--output-dir", "there", "--no-progress",
    )  # fmt: skip
    assert code == 0, err
    assert ends(capsys, "compare", mine, "--seeds", "0,7,")[0] == 0
    assert seen[0] == (4, ["lora", "moram"], [4, 5], "lora", "there", False)
    assert seen[1] == (0, None, [0, 7], None, None, True)
    assert "moram is equal to lora in average accuracy" in out and out.splitlines()[-1] == str(
        Path("there/report.html")
    )


def test_a_comparison_with_too_much_forgetting_ends_with_66_after_its_page(monkeypatch, capsys, mine):
    from perdure import comparison

    made = comparison_of(["lora"], [0]) | {"protocol": {"max_forgetting": 0.2}}
    made["rows"][0]["values"] = {"forgetting": [0.25]}
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: (made, Path("there/report.html")))
    code, out, err = ends(capsys, "compare", mine)
    assert code == 66 and out.splitlines()[-1] == str(Path("there/report.html"))
    assert "allows 0.2" in err and "lora, seed 0: 0.2500" in err


def test_the_demo_runs_every_arm_once_and_says_where_moram_stands(monkeypatch, capsys):
    from perdure import comparison

    seen = []

    def fake(recipe, arms, seeds, reference, output_dir, *, progress, say):
        seen.append((recipe.name, arms, seeds, output_dir))
        return comparison_of(list(recipe.arms), seeds), Path(output_dir) / "report.html"

    monkeypatch.setattr(comparison, "compare", fake)
    code, out, err = ends(capsys, "demo", "--seed", "3")
    assert code == 0, err
    assert seen == [("stdlib", None, [3], "runs/demo")]
    assert "illustration" in out
    for rival in ("frozen", "finetune", "lora"):
        assert f"moram is equal to {rival} in" in out
    assert "moram-protected+ridge is equal to frozen+ridge in" in out
    assert out.splitlines()[-1] == str(Path("runs/demo/report.html"))


# ---- report, undo, listings
def test_undo_says_where_the_run_stands(monkeypatch, capsys):
    from perdure import run

    seen = []
    monkeypatch.setattr(run, "undo", lambda folder, to: seen.append((folder, to)) or 3)
    assert "stands before experience 3" in ends(capsys, "undo", "runs/x")[1]
    ends(capsys, "undo", "runs/x", "--to", "1")
    assert seen == [("runs/x", None), ("runs/x", 1)]


def test_methods_lists_all_and_explains_one():
    runner = CliRunner()
    listed = runner.invoke(app, ["methods"]).output
    for name in ("moram", "lora", "er (replay)", "joint", "finetune", "linear_probe", "cosine", "ridge", "upper bound"):
        assert name in listed
    told = runner.invoke(app, ["methods", "moram"]).output
    assert "removal: structural" in told and "temperature: float, default 0.03" in told
    assert "Softmax temperature" in told and "arXiv 2506.21035" in told
    assert "closed form: yes" in runner.invoke(app, ["methods", "ridge"]).output
    both = runner.invoke(app, ["methods", "slda"]).output  # a preset and a head
    assert "linear_probe" in both and "scores = f w_c + b_c" in both and "shrinkage: float" in both
    assert "McDonnell" in runner.invoke(app, ["methods", "ranpac"]).output
    assert runner.invoke(app, ["methods", "replay"]).output.startswith("er: ")


def test_recipes_are_listed():
    listed = CliRunner().invoke(app, ["recipes"]).output
    for name in recipe.recipe_names():
        assert name in listed.splitlines()


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"perdure {perdure.__version__}\n"


def test_settings_are_documented():
    """What `perdure methods NAME` shows comes from the fields' own words."""
    from perdure.listing import field_words

    class Some(Strict):
        a: int = 1
        """The first."""
        b: int = 2

    assert field_words(Some) == {"a": "The first."}


# ---- doctor
def test_doctor_names_what_is_missing(monkeypatch, tmp_path):
    from perdure import doctor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(doctor.models, "minilm_folder", lambda: None)
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package", ("extra", "a purpose"))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert f"{tmp_path / 'nothing'} is no folder" in done.output
    assert (
        "needed for a purpose: pip install 'perdure[extra]'" in done.output and "package not installed" in done.output
    )
    assert "torch" in done.output and "threads" in done.output and "GB free" in done.output


def test_doctor_is_content(monkeypatch, tmp_path):
    from perdure import doctor

    (tmp_path / "MANIFEST.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    monkeypatch.setattr(doctor.models, "minilm_folder", lambda: tmp_path)
    wrong = [each for each in doctor.examine(tmp_path) if each.state == "wrong"]
    assert [each.what for each in wrong] == ["minilm weights"] and "expected 53aa51172d14" in wrong[0].found
    monkeypatch.setattr(doctor.models, "MINILM_SHA256", doctor.models.sha256_of(tmp_path / "model.safetensors"))
    assert [each for each in doctor.examine(tmp_path) if each.state == "wrong"] == []
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    (closed,) = [each for each in doctor.examine(tmp_path) if each.state == "wrong"]
    assert "output_dir=FOLDER for run, --output-dir for compare" in closed.remedy
    monkeypatch.undo()
    monkeypatch.setenv("PERDURE_DATA", str(tmp_path))
    monkeypatch.setattr(doctor.models, "minilm_folder", lambda: None)
    monkeypatch.setattr(doctor, "LOW_DISK", 2**70)
    assert [each.what for each in doctor.examine(tmp_path) if each.state == "wrong"] == ["disk"]
