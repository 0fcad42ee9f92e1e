"""Starting is light: help and listings load no heavy library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "accelerate", "peft", "matplotlib", "datasets", "pandas", "pyarrow")

LOADED = """
import sys
sys.argv = ["perdure", *{arguments!r}]
from perdure.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *[name for name in {heavy!r} if name in sys.modules])
"""

IMPORTED = """
import sys
{statement}
print("LOADED", *[name for name in {heavy!r} if name in sys.modules])
"""


def loaded(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["sweep", "--help"],
        ["methods"],
        ["methods", "moram"],
        ["recipes"],
        ["run", "clinc150", "--print-config"],
    ],
    ids=" ".join,
)
def test_commands_that_load_nothing_heavy(arguments):
    assert loaded(LOADED.format(arguments=arguments, heavy=HEAVY)) == []


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "moram"]], ids=" ".join)
def test_listings_build_no_recipe(arguments):
    ours = ("perdure.recipe", "perdure.evaluation.ledger", "yaml")
    assert loaded(LOADED.format(arguments=arguments, heavy=ours)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import perdure; dir(perdure); perdure.Stream, perdure.register_method, perdure.load_recipe",
        "import perdure.config, perdure.registry, perdure.streams, perdure.recipe, perdure.models, perdure.comparison",
        "from perdure.registry import METHODS, HEADS, OBJECTIVES; [r.names() for r in (METHODS, HEADS, OBJECTIVES)]",
        "import perdure.evaluation.metrics, perdure.doctor, perdure.cli, perdure.sweep.command, perdure.sweep.worker",
    ],
)
def test_imports_that_load_nothing_heavy(statement):
    assert loaded(IMPORTED.format(statement=statement, heavy=HEAVY)) == []


def test_the_check_would_see_a_heavy_import():
    assert loaded(IMPORTED.format(statement="import torch", heavy=("torch",))) == ["torch"]


def test_public_names_are_there():
    import perdure

    for name in perdure.__all__:
        assert getattr(perdure, name) is not None, name
    assert perdure.Learner.__module__ == "perdure.learner"
    assert callable(perdure.attach) and callable(perdure.detach)
    with pytest.raises(AttributeError, match="no attribute 'Lerner'"):
        perdure.Lerner  # noqa: B018


@pytest.mark.parametrize("kind", ["methods", "heads"])
def test_the_index_says_what_the_classes_say(kind):
    from perdure import registry

    registered = {"methods": registry.METHODS, "heads": registry.HEADS}[kind]
    index = Path(registry.__file__).with_name(kind) / registry.INDEX_FILE
    assert index.read_text(encoding="utf-8") == registry.index_text(registered), (
        "run `python -m perdure.registry`: a plug-in is not listed in the index as its class describes itself"
    )


def test_the_listing_reads_the_index_and_knows_a_users_own_plug_in(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from perdure.methods import Method, register\n@register('own')\nclass Own(Method):\n    '''Mine.'''\n",
        encoding="utf-8",
    )
    code = (
        "import sys\nfrom perdure.registry import METHODS, import_file\n"
        "plain = [each['name'] for each in METHODS.listing()]\nassert 'perdure.methods.moram' not in sys.modules\n"
        f"import_file({str(own)!r})\nmore = METHODS.listing()\n"
        "assert [e['name'] for e in more if e['name'] != 'own'] == plain and 'moram' in plain\n"
        "assert next(e for e in more if e['name'] == 'own')['title'] == 'Mine'\nprint('LOADED')"
    )
    assert loaded(code) == []
