"""The documentation names every plug-in, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.config import ProtocolConfig, TrainingConfig
from perdure.registry import HEADS, METHODS
from tests.conformance import matrix_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = METHODS.names()  # now: other tests register methods of their own
MADE_FROM = {DOCS / "results.md": ROOT / "results" / "ledger.jsonl"}
"""Pages that `make docs` writes from a file; a link to one is good as long as there is nothing to write it from."""

_BLOCK = re.MULTILINE | re.DOTALL
_FENCE = re.compile(r"^```.*?^```", _BLOCK)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def prose(text: str) -> str:
    return _CODE.sub("", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    found = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def broken(page: Path) -> Iterator[str]:
    for target in _LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            source = MADE_FROM.get(path)
            if source is None or source.exists():
                yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"{target}: {path.name} has no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_page(name: str) -> None:
    page = DOCS / "methods" / f"{name}.md"
    assert page.is_file(), f"docs/methods/{name}.md is missing"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {name}:")
    for setting in METHODS.get(name).Config.model_fields:
        assert f"`{setting}`" in text, f"{page.name} does not name the setting {setting!r}"


def test_every_page_is_about_a_method() -> None:
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == set(NAMES)


@pytest.mark.parametrize(("block", "page"), [(TrainingConfig, "training.md"), (ProtocolConfig, "protocol.md")])
def test_every_setting_of_training_and_protocol_is_explained(
    block: type[TrainingConfig | ProtocolConfig], page: str
) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [field for field in block.model_fields if f"`{field}`" not in text] == []


def test_the_page_of_methods_on_hosts_says_what_the_battery_checks() -> None:
    matrix = matrix_page.read_matrix()
    assert set(NAMES) <= set(matrix)
    assert (DOCS / "hosts.md").read_text(encoding="utf-8") == matrix_page.page(matrix), "run `make docs`"


@pytest.mark.parametrize("name", HEADS.names())
def test_every_head_is_in_heads(name: str) -> None:
    text = (DOCS / "heads.md").read_text(encoding="utf-8")
    assert name in anchors(text)
    for setting in HEADS.get(name).Config.model_fields:
        assert f"`{setting}`" in text, f"heads.md does not name the setting {setting!r} of {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_resolve(page: Path) -> None:
    assert not list(broken(page))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_the_front_pages_resolve(page: Path) -> None:
    assert not list(broken(page))


# ---- what stands in code blocks
def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block of a language, docs and front pages."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
    texts = [(page.name, page.read_text(encoding="utf-8")) for page in pages]
    return [(name, block) for name, text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, _BLOCK)]


def lines(word: str) -> list[tuple[str, list[str]]]:
    """(page, arguments) of every line of a shell block that runs the program `word`."""
    found = [(page, shlex.split(line, comments=True)) for page, block in blocks("sh") for line in block.splitlines()]
    return [(page, arguments[1:]) for page, arguments in found if arguments[:1] == [word]]


def test_commands_in_the_docs_exist() -> None:
    import typer

    from perdure.cli import app
    from perdure.recipe import recipe_names

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name for full in recipe_names() for name in (full, full.rpartition("/")[2])}
    seen = set()
    for page, (name, *arguments) in lines("perdure"):
        assert name in commands, f"{page}: perdure {name}"
        context = commands[name].make_context(name, list(arguments))  # refuses options that are not there
        recipe = context.params.get("recipe")
        assert recipe is None or recipe in known or recipe.endswith(".yaml"), f"{page}: there is no recipe {recipe}"
        seen.add(name)
    assert seen >= {"run", "compare", "report", "undo", "methods", "recipes", "doctor"}


def test_make_targets_in_the_docs_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [(page, target) for page, arguments in lines("make") for target in arguments]
    assert {target for _, target in named} >= {"demo", "test", "lint"}
    assert [(page, target) for page, target in named if target not in targets] == []


@pytest.mark.parametrize(("page", "block"), blocks("python"), ids=lambda value: value if value.endswith(".md") else "")
def test_python_in_the_docs_compiles(page: str, block: str) -> None:
    compile(textwrap.dedent(block), page, "exec")


def test_the_readme_pins_the_torch_that_the_constraints_pin() -> None:
    (pinned,) = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"pip install torch=={pinned} " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_link_check_finds_a_broken_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](none.md) [b](page.md#two) [c](#one-heading) `[d](no.md)` [e](https://x.org)\n")
    assert list(broken(page)) == ["none.md: there is no such file", "page.md#two: page.md has no such heading"]
