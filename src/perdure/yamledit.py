"""Changes values inside YAML text and leaves everything else of it, comments above all, as it is. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from . import yamltext
from .errors import BadInput

_Change = tuple[int, int, str]
"""Characters from, to, and what stands there afterwards."""


def edited(text: str, wanted: Any, where: str) -> str:
    """`text` changed in as few places as it takes to mean `wanted`.

    A value that changes is replaced where it stands, a key that is new stands behind the others of its mapping, a key
    that is gone takes its lines along; a mapping in braces that loses a key, or a list that changes its length, is
    written anew on one line.

    Raises:
        BadInput: the text is no YAML, or cannot be changed so (an anchor that stands for several places).
    """
    changes: list[_Change] = []
    _compare(yamltext.compose(text, where), yamltext.load(text, where), wanted, text, None, changes)
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        same = yamltext.load(text, where) == wanted
    except BadInput:
        same = False
    if not same:
        raise BadInput(f"{where}: cannot be changed line by line (anchors, or an unusual layout); change it by hand")
    return text


def _compare(node: yaml.Node, old: Any, new: Any, text: str, above: yaml.Node | None, changes: list[_Change]) -> None:
    """Adds what must change for `node`, which stands in `above`, to mean `new`."""
    if type(old) is type(new) and old == new:
        return
    flow = _in_braces(node) or _in_braces(above)
    if isinstance(node, yaml.MappingNode) and old and isinstance(new, dict) and _keeps(old, new, flow):
        for (name, below), (key, value) in zip(node.value, old.items(), strict=True):
            if key in new:
                _compare(below, value, new[key], text, node, changes)
            else:
                changes.append(_removal(name, below, text))
        more = {key: value for key, value in new.items() if key not in old}
        if more:
            changes.append(_insertion(node, more, text, flow))
    elif isinstance(node, yaml.SequenceNode) and isinstance(new, list) and len(old) == len(new):
        for below, value, wanted in zip(node.value, old, new, strict=True):
            _compare(below, value, wanted, text, node, changes)
    else:
        start, end = node.start_mark.index, _end(node, text)
        # A list may stand as far left as its key, nothing else may; and nothing at all is what stands behind `key:`.
        level = isinstance(above, yaml.MappingNode) and not flow and node.start_mark.column == above.start_mark.column
        changes.append((start, end, ("  " if level else " " if start == end else "") + _written(new, flow)))


def _in_braces(node: yaml.Node | None) -> bool:
    return bool(getattr(node, "flow_style", False))


def _keeps(old: dict[Any, Any], new: dict[Any, Any], flow: bool) -> bool:
    """Whether a mapping can stay and its entries change."""
    return set(old) <= set(new) if flow else bool(set(old) & set(new))


def _insertion(node: yaml.MappingNode, more: dict[Any, Any], text: str, flow: bool) -> _Change:
    last = _end(node.value[-1][1], text)
    written = [f"{_key(key)}: {_written(value, flow)}" for key, value in more.items()]
    if node.flow_style:
        return last, last, "".join(f", {each}" for each in written)
    newline = "\r\n" if "\r\n" in text else "\n"
    rest = re.compile(r"[^\r\n]*").match(text, last)
    at = rest.end() if rest else last  # behind a comment on the same line
    pad = " " * node.start_mark.column
    return at, at, "".join(f"{newline}{pad}{each}" for each in written)


def _removal(name: yaml.Node, below: yaml.Node, text: str) -> _Change:
    """The lines of a key of a block mapping."""
    start = name.start_mark.index - name.start_mark.column
    rest = re.compile(r"[^\n]*\n?").match(text, _end(below, text))
    return start, rest.end() if rest else len(text), ""


def _key(key: Any) -> str:
    return "'on'" if key == "on" else yamltext.inline(key)  # other readers of YAML take a bare `on` for true


def _written(value: Any, flow: bool) -> str:
    if flow and not isinstance(value, (dict, list)):  # commas and brackets of a text are quoted inside a list
        return yamltext.inline([value], short=True)[1:-1]
    return yamltext.inline(value, short=True)


def _end(node: yaml.Node, text: str) -> int:
    """Where the node's own text ends; of a block, which PyYAML ends at the next token, that of its last value."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last, text)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip())
