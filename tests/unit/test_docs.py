"""The documentation names every plug-in, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.registry import HEADS, METHODS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = METHODS.names()  # now: other tests register methods of their own
MADE_FROM = {DOCS / "results.md": ROOT / "results" / "ledger.jsonl"}
"""Pages that `make docs` writes from a file; a link to one is good as long as there is nothing to write it from."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
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


@pytest.mark.parametrize("name", HEADS.names())
def test_every_head_is_in_heads(name: str) -> None:
    text = (DOCS / "heads.md").read_text(encoding="utf-8")
    assert name in anchors(text)
    for setting in HEADS.get(name).Config.model_fields:
        assert f"`{setting}`" in text, f"heads.md does not name the setting {setting!r} of {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_resolve(page: Path) -> None:
    assert not list(broken(page))


def test_the_link_check_finds_a_broken_link(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](none.md) [b](page.md#two) [c](#one-heading) `[d](no.md)` [e](https://x.org)\n")
    assert list(broken(page)) == ["none.md: there is no such file", "page.md#two: page.md has no such heading"]
