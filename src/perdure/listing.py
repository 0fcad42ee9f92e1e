"""What `perdure methods` prints: all methods, heads and presets, or one of them in detail. Imports no torch."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

import typer

from .presets import PRESETS
from .registry import HEADS, METHODS
from .results import lines_of


def explain(name: str) -> None:
    """Prints what is known of a method, head or preset.

    Raises:
        BadInput: there is none of that name.
    """
    if name in PRESETS:
        preset = PRESETS[name]
        settings = f"\n\nsettings: {preset.settings}" if preset.settings else ""
        typer.echo(f"{name}: {preset.title}\n\n{preset.details}{settings}")
        if name not in HEADS.names():
            return
        typer.echo("\nthe head of that name:\n")
    known = HEADS if name in HEADS.names() and name not in METHODS.names() else METHODS
    _explain(known.get(name))


def list_all() -> None:
    """Prints all methods, heads and presets."""
    aliases = {value: key for key, value in METHODS.aliases.items()}
    rows = []
    for each in METHODS.listing():
        label = f"{each['name']} ({aliases[each['name']]})" if each["name"] in aliases else each["name"]
        rows.append((label, each["title"], each["status"], ", ".join(each["needs"]) or "–", each["removal"]))
    _columns(("method", "what it is", "status", "needs", "removal"), rows)
    typer.echo("")
    heads = [(each["name"], each["title"], "yes" if each["closed_form"] else "no") for each in HEADS.listing()]
    _columns(("head", "what it is", "closed form"), heads)
    typer.echo("")
    _columns(("preset", "methods and head under one name"), [(name, each.title) for name, each in PRESETS.items()])


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table; rich would cost more time than the listing itself."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for number, row in enumerate(table):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            typer.echo("  ".join("─" * width for width in widths))


def _explain(cls: Any) -> None:
    typer.echo(f"{cls.name}: {cls.title}\n")
    # A method's formulas stand in its module, which holds it alone; a head's in its class.
    text = inspect.getdoc(inspect.getmodule(cls)) if hasattr(cls, "needs") and inspect.getmodule(cls) else None
    typer.echo((text or inspect.getdoc(cls) or "") + "\n")
    if hasattr(cls, "needs"):
        typer.echo(
            f"status:  {cls.status}\nneeds:   {', '.join(sorted(cls.needs)) or 'nothing'}\nremoval: {cls.removal}"
        )
    else:
        typer.echo(f"closed form: {'yes' if cls.closed_form else 'no'}")
    known = lines_of(cls.name)
    typer.echo("\nresults, rivals beside them in docs/results.md:" if known else "\nresults: none in the ledger")
    for line in known:
        typer.echo(f"  {line}")
    typer.echo("\nsettings:")
    fields, told = cls.Config.model_fields, field_words(cls.Config)
    if not fields:
        typer.echo("  none")
    for key, field in fields.items():
        kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        typer.echo(f"  {key}: {kind.replace('typing.', '').replace('NoneType', 'None')}, {default}")
        if key in told:
            typer.echo(f"      {told[key]}")


def field_words(config: type) -> dict[str, str]:
    """The text that stands below each field of a settings class, its bases included."""
    words: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not hasattr(cls, "model_fields") or cls.__module__.startswith("pydantic"):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                words[field.target.id] = " ".join(str(text.value.value).split())
    return words
