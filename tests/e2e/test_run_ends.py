"""How a run ends: interrupted, locked out, with a full disk, undone, refused, beyond its limits; and goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from perdure import run_folder
from perdure.state import RunLock, StateStore

from . import tiny
from .nursery import Done, Nursery, point

QUIET = "--no-progress"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """The folder of a finished run of MoRAM that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny.write_recipe(folder, {"moram": tiny.MORAM})
    done = nursery.run(folder, "run", str(recipe), "output_dir=run", QUIET)
    assert done.code == 0, done.output
    return folder


@pytest.fixture
def again(whole: Path, tmp_path: Path, nursery: Nursery):
    """Runs the same recipe in this test's own folder."""

    def call(*overrides: str, at=(), output_dir: str = "run") -> Done:
        arguments = (str(whole / "tiny.yaml"), f"output_dir={output_dir}", *overrides, QUIET)
        return nursery.run(tmp_path, "run", *arguments, at=at)

    return call


# ---- Ctrl-C
@pytest.mark.parametrize(
    "where", [point("update", 4, "interrupt"), point("evaluate", 3, "interrupt"), point("growth", 2, "interrupt")]
)
def test_ctrl_c_saves_and_the_same_command_goes_on(again, whole, tmp_path, where):
    done = again(at=(where,))
    assert done.code == 130
    assert "the same command goes on" in done.output and "Traceback" not in done.output
    if where["where"] == "update":  # no step is lost
        assert StateStore(tmp_path / "run" / "state").load().values["counters"]["steps"] == 4
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []


def test_ctrl_c_twice_stops_at_once_and_the_last_checkpoint_stands(again, whole, tmp_path):
    done = again(at=(point("update", 5, "twice"),))
    assert done.code == 130 and "interrupted" in done.output and "Traceback" not in done.output
    assert StateStore(tmp_path / "run" / "state").load().values["counters"]["steps"] == 3  # step 5 was not saved
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []


# ---- folders
def test_a_second_run_in_one_folder_is_refused_and_names_the_process(again, tmp_path):
    assert again(at=(point("update", 4, "kill"),)).code == -9
    before = tiny.contents(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        done = again()
        assert done.code == 73
        assert f"process {os.getpid()}" in done.output and "Traceback" not in done.output
    assert {**tiny.contents(tmp_path / "run"), ".lock": b""} == {**before, ".lock": b""}
    assert again().code == 0


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_is(again, whole, tmp_path):
    assert again(at=(point("update", 4, "kill"),)).code == -9
    before = tiny.contents(tmp_path / "run")
    done = again("training.learning_rate=0.02")
    assert done.code == 64
    assert "output_dir" in done.output and "0.01" in done.output and "0.02" in done.output
    assert tiny.contents(tmp_path / "run") == before
    assert again("seed=1").code == 64


def older(run: Path, *without: str) -> None:
    """The recipe as a version wrote it that did not have these settings yet."""
    path = run / "recipe.yaml"
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0].strip() not in without]
    assert len(kept) < len(path.read_text().splitlines())
    path.write_text("\n".join(kept) + "\n")


def test_a_setting_that_is_younger_than_a_run_leaves_it_the_same_run(again, whole, tmp_path):
    assert again(at=(point("update", 4, "kill"),)).code == -9
    older(tmp_path / "run", "keep_boundaries", "renormalise", "max_test_rows")
    done = again("training.keep_boundaries=7")
    assert done.code == 64 and "keep_boundaries: null" in done.output and "keep_boundaries: 7" in done.output
    assert again("name=renamed").code == 0  # goes on; a name is no setting
    assert tiny.without_times(tiny.report(tmp_path / "run"))["matrix"] == tiny.report(whole / "run")["matrix"]
    older(tmp_path / "run", "keep_boundaries")
    before = tiny.contents(tmp_path / "run")
    assert again(at=(point("update", 1, "kill"),)).code == 0  # finished: given back
    assert tiny.contents(tmp_path / "run") == before


def test_a_recipe_that_this_version_cannot_read_is_refused(again, tmp_path):
    assert again(at=(point("update", 4, "kill"),)).code == -9
    with (tmp_path / "run" / "recipe.yaml").open("a") as file:
        file.write("gone_again: 1\n")
    done = again()
    assert done.code == 64 and "cannot read" in done.output and "gone_again" in done.output


@pytest.mark.parametrize("text", ['{"status": "complete"}', '{"schema": 1, "status"', "[]"])
def test_a_report_that_is_none_is_named(again, tmp_path, text):
    assert again(at=(point("update", 4, "kill"),)).code == -9
    (tmp_path / "run" / "report.json").write_text(text)
    done = again()
    assert done.code == 64 and "report.json" in done.output and "delete the file" in done.output
    assert "Traceback" not in done.output
    (tmp_path / "run" / "report.json").unlink()
    assert again().code == 0


def test_a_folder_with_somebody_elses_report_is_refused(again, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("mine")
    before = tiny.contents(tmp_path)
    done = again()
    assert done.code == 64 and "report.html" in done.output
    assert tiny.contents(tmp_path) == before
    (tmp_path / "file").write_text("mine")
    done = again(output_dir="file")
    assert done.code == 64 and "is a file" in done.output


def test_a_finished_run_is_given_back_without_work(again, whole, tmp_path):
    again()
    before = tiny.contents(tmp_path / "run")
    assert again(at=(point("update", 1, "kill"), point("evaluate", 1, "kill"))).code == 0
    assert tiny.contents(tmp_path / "run") == before


def test_a_changed_stream_is_not_taken_for_the_same_run(tmp_path, nursery):
    recipe = str(tiny.write_recipe(tmp_path, "lora"))
    nursery.run(tmp_path, "run", recipe, "output_dir=run", QUIET, at=(point("update", 4),))
    tiny.write_stream(tmp_path, train=11)
    done = nursery.run(tmp_path, "run", recipe, "output_dir=run", QUIET)
    assert done.code == 64 and "stream" in done.output and "changed" in done.output


def test_a_finished_run_is_not_given_back_for_other_files(tmp_path, nursery):
    recipe = str(tiny.write_recipe(tmp_path, "linear_probe"))

    def run():
        return nursery.run(tmp_path, "run", recipe, "output_dir=run", QUIET)

    assert run().code == 0 and run().code == 0
    tiny.write_stream(tmp_path, train=11)
    done = run()
    assert done.code == 64 and "files changed" in done.output and "another output_dir" in done.output
    (tmp_path / "train.jsonl").unlink()  # what is gone has not changed
    assert run().code == 0
    tiny.write_stream(tmp_path)
    assert run().code == 0


# ---- disk
@pytest.mark.parametrize("where", ["document", "update", "evaluate"])
def test_a_full_disk_loses_nothing_saved(again, whole, tmp_path, where):
    done = again(at=(point(where, 4, "full"),))
    assert done.code == 73, done.output
    assert "full" in done.output and "Traceback" not in done.output
    state = StateStore(tmp_path / "run" / "state").load()  # whole, by its checksums
    assert state.step >= 3
    assert not list((tmp_path / "run" / "state").glob(".saving-*"))
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []


def test_a_folder_that_cannot_be_made_is_no_traceback(again, tmp_path):
    (tmp_path / "file").write_text("")
    done = again(output_dir="file/run")
    assert done.code == 73 and "Traceback" not in done.output


# ---- undo
def test_undo_takes_back_the_last_experience_and_run_learns_it_again(again, whole, tmp_path, nursery):
    done = again(at=(point("evaluate", 8),))  # killed while it scores the last experience
    assert done.code == -9
    two = (tmp_path / "run" / "report.json").read_bytes()
    assert len(json.loads(two)["matrix"]) == 2
    assert again().code == 0
    assert len(tiny.report(tmp_path / "run")["matrix"]) == 3

    done = nursery.run(tmp_path, "undo", "run")
    assert done.code == 0 and "before experience 2" in done.output
    assert tiny.without_times(tiny.report(tmp_path / "run")) == tiny.without_times(json.loads(two))
    assert not (tmp_path / "run" / "report.html").exists()
    assert StateStore(tmp_path / "run" / "state").load().boundary == 2
    lines = (tmp_path / "run" / "losses.jsonl").read_text().splitlines()
    assert {json.loads(line)["experience"] for line in lines} == {0, 1}
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []


def test_undo_further_back_and_to_the_start(again, whole, tmp_path, nursery):
    assert again(at=(point("update", 15),)).code == -9  # in the middle of the last experience
    assert "before experience 2" in nursery.run(tmp_path, "undo", "run").output
    assert "before experience 1" in nursery.run(tmp_path, "undo", "run").output
    assert len(tiny.report(tmp_path / "run")["matrix"]) == 1
    assert "before experience 0" in nursery.run(tmp_path, "undo", "run", "--to", "0").output
    assert not (tmp_path / "run" / "report.json").exists()
    for arguments, words in ((("run",), "nothing"), (("run", "--to", "2"), "kept: 0")):
        done = nursery.run(tmp_path, "undo", *arguments)
        assert done.code == 64 and words in done.output
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []


@pytest.mark.parametrize("where", ["report", "page", "first state", "second state", "losses"])
def test_an_undo_that_is_killed_leaves_a_run_that_goes_on(again, whole, tmp_path, monkeypatch, where):
    shutil.copytree(whole / "run", tmp_path / "run")
    seen = []

    def killed(real):
        def call(*arguments, **options):
            seen.append(real)
            if len(seen) == (2 if where == "second state" else 1):
                raise MemoryError("stands for signal 9")
            return real(*arguments, **options)

        return call

    where_from = {"report": (run_folder, "_put_report_back"), "losses": (run_folder, "truncate")}
    where_from["page"] = StateStore, "rollback"
    owner, name = where_from.get(where, (StateStore, "_discard"))
    monkeypatch.setattr(owner, name, killed(getattr(owner, name)))
    with pytest.raises(MemoryError):
        run_folder.undo(tmp_path / "run")
    gone = 3 not in StateStore(tmp_path / "run" / "state").boundaries()
    assert gone == (where in ("second state", "losses"))
    assert not gone or tiny.report(tmp_path / "run")["status"] != "complete"
    assert again().code == 0
    assert tiny.differences(whole / "run", tmp_path / "run") == []
    assert (tmp_path / "run" / "report.html").is_file()


# ---- limits
def test_a_loss_that_is_not_finite_ends_with_70_and_keeps_the_last_good_state(again, tmp_path):
    done = again("training.learning_rate=1e30", "training.max_grad_norm=null")
    assert done.code == 70 and "Traceback" not in done.output
    tensors = StateStore(tmp_path / "run" / "state").load().tensors
    assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


OVERFLOW = """
from perdure.methods import Method, register

@register("overflow")
class Overflow(Method):
    '''One weight of the bank becomes VALUE in the last step of the first experience.'''

    def after_update(self, before):
        if self.loop.step == 4:
            weights = dict(self.loop.host.model.named_parameters())
            next(w for name, w in weights.items() if name.endswith("new_values")).view(-1)[0] = VALUE
"""


@pytest.mark.parametrize(("value", "what"), [("float('inf')", "frozen_values"), ("3e38", "features")])
def test_a_weight_that_overflows_in_the_last_step_ends_with_70_and_is_not_saved(value, what, tmp_path, nursery):
    (tmp_path / "overflow.py").write_text(OVERFLOW.replace("VALUE", value))
    training = {"max_grad_norm": None, "save_steps": None}
    recipe = str(tiny.write_recipe(tmp_path, [{"moram": tiny.MORAM}, "overflow"], training=training))
    done = nursery.run(tmp_path, "run", recipe, "output_dir=run", QUIET, "--import", "overflow.py")
    assert done.code == 70 and f"{what}: holds NaN or infinity after step 5" in done.output, done.output
    state = StateStore(tmp_path / "run" / "state").load()
    assert state.step == 0 and all(bool(t.isfinite().all()) for t in state.tensors.values() if t.is_floating_point())
    assert not (tmp_path / "run" / "report.json").exists()


NAN = """
from perdure.methods import Method, register

@register("poison")
class Poison(Method):
    '''A method whose loss is not a number in step 5.'''

    def losses(self, batch, output):
        return {"poison": output.logits.sum() * (float("nan") if self.loop.step == 5 else 0.0)}
"""


def test_nan_from_a_users_own_method(tmp_path, nursery):
    (tmp_path / "poison.py").write_text(NAN)
    recipe = str(tiny.write_recipe(tmp_path, [{"lora": {"rank": 2}}, "poison"]))
    done = nursery.run(tmp_path, "run", recipe, "output_dir=run", QUIET, "--import", "poison.py")
    assert done.code == 70 and "poison" in done.output and "step 5" in done.output
    assert StateStore(tmp_path / "run" / "state").load().step == 5  # the end of the first experience
    without = nursery.run(tmp_path, "run", recipe, "output_dir=other", QUIET)
    assert without.code == 64 and "'poison' is unknown" in without.output and not (tmp_path / "other").exists()


def test_too_much_forgetting_ends_with_66_and_the_report_stands(again, tmp_path):
    for _ in range(2):  # a finished run says so again
        done = again("protocol.max_forgetting=-1")
        assert done.code == 66
        assert "max_forgetting" in done.output and "undo" in done.output
    report = tiny.report(tmp_path / "run")
    assert report["status"] == "complete" and report["metrics"]["forgetting"] > -1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method={er: {budget: 10}}"], "rehearsal"),
        (["protocol.passes=1", "training.epochs=2"], "pass"),
    ],
)
def test_what_the_protocol_does_not_grant_ends_with_65_before_a_model_is_loaded(
    overrides, words, whole, tmp_path, monkeypatch, capsys
):
    from perdure import models
    from perdure.cli import main

    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as end:
        main(["run", str(whole / "tiny.yaml"), f"output_dir={tmp_path / 'run'}", *overrides])
    assert end.value.code == 65
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
