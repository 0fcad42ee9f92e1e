"""YAML as people mean it: `on` is a word, `1e-3` is a number, a key given twice is an error. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import BadInput

_RESOLVERS = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9](?:_?[0-9])*$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    # YAML 1.2's core schema: the 1.1 default reads `on` as true and `1e-3` as text.
    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands here twice; keep one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def _integer(loader: yaml.Loader, node: yaml.ScalarNode) -> int:
    # PyYAML reads a leading zero as octal.
    return int(str(node.value).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
    )


_Dumper.add_representer(float, _float)


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # Other styles fold or lose line breaks of any kind, in keys above all.
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if value.isprintable() else '"')


_Dumper.add_representer(str, _text)


class _ShortDumper(_Dumper):
    pass


def _short_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    """3e-3 for 0.003, as people write rates."""
    digits = exponent = ""
    for size in range(17):
        digits, _, exponent = f"{value:.{size}e}".partition("e")
        if float(f"{digits}e{exponent}") == value:
            break
    text = f"{digits}e{int(exponent)}" if 0 < abs(value) < 0.1 else ""
    if not text or len(text) > len(repr(value)):
        return _float(dumper, value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_ShortDumper.add_representer(float, _short_float)


def load(text: str, where: str) -> Any:
    """Parses YAML.

    Raises:
        BadInput: the text is no YAML; the message names `where`, the line and the reason.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{where}{line}: {error.problem or 'is no YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{where}: is no YAML: {error}") from None


def dump(value: Any) -> str:
    """Block-style YAML in the order given; `load` gives the value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def inline(value: Any, *, short: bool = False) -> str:
    """The value on one line; with `short` small numbers as 3e-3."""
    dumper = _ShortDumper if short else _Dumper
    text = yaml.dump(value, Dumper=dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def compose(text: str, where: str) -> yaml.Node:
    """The nodes of a document, with the places in the text where they begin and end.

    Raises:
        BadInput: as `load`.
    """
    load(text, where)
    node = yaml.compose(text, _Loader)
    if node is None:
        raise BadInput(f"{where}: is empty")
    return node
