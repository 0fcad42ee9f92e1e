"""Starting is light: help and listings load no heavy library."""

from __future__ import annotations

import subprocess
import sys

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
        ["methods"],
        ["methods", "moram"],
        ["recipes"],
        ["run", "clinc150", "--print-config"],
    ],
    ids=" ".join,
)
def test_commands_that_load_nothing_heavy(arguments):
    assert loaded(LOADED.format(arguments=arguments, heavy=HEAVY)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import perdure; dir(perdure); perdure.Stream, perdure.register_method, perdure.load_recipe",
        "import perdure.config, perdure.registry, perdure.streams, perdure.recipe, perdure.models, perdure.comparison",
        "from perdure.registry import METHODS, HEADS, OBJECTIVES; [r.names() for r in (METHODS, HEADS, OBJECTIVES)]",
        "import perdure.evaluation.metrics, perdure.doctor, perdure.cli",
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
