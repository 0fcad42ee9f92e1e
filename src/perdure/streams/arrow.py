"""Records of Arrow tables, as parquet files and the library `datasets` hold them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import BadInput
from .rows import CANONICAL


def arrow_records(
    table: Any, fields: Mapping[str, str], required: Sequence[str], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) for each row of a table.

    Columns that are used and hold dates or decimals become text. Columns that nothing uses are kept where a row can
    hold their values and left out elsewhere.

    Args:
        table: a `pyarrow.Table`.
        fields, required: as in `perdure.streams.sources.Reading`.
        where: how errors name the table.

    Raises:
        BadInput: a column name occurs twice, or a column that is used has a type that is no text, number or picture.
    """
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{where}: a column name occurs twice in {names}; rename one")
    used = {*fields.values(), *required, *(name for name in CANONICAL if name not in fields)}
    for place in reversed(range(len(names))):
        if _plain(table.schema.field(place).type):
            continue
        if names[place] in used:
            text = _as_text(table.column(place), f"{where}, field {names[place]!r}")
            table = table.set_column(place, names[place], text)
        else:
            table = table.remove_column(place)
    image = fields.get("image", "image")
    number = 0
    for batch in table.to_batches():
        for record in batch.to_pylist():
            if isinstance(record.get(image), dict):  # how `datasets` stores pictures
                record[image] = record[image].get("bytes") or record[image].get("path")
            yield f"row {number}", record
            number += 1


def _plain(kind: Any) -> bool:
    """Whether a row can hold what Python makes of the type: text, numbers, bytes, and lists and mappings of these."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_nested(kind):
        return not types.is_union(kind) and all(_plain(kind.field(i).type) for i in range(kind.num_fields))
    checks = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
        types.is_binary_view, types.is_fixed_size_binary, types.is_null, types.is_boolean, types.is_integer,
        types.is_floating,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _as_text(column: Any, where: str) -> Any:
    """Dates and times in ISO form, decimals as they are written; what is missing stays None."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_temporal(kind) or pa.types.is_decimal(kind)):
        raise BadInput(f"{where}: has type {kind}, expected text, numbers, dates, bytes or a picture; store it as text")
    try:
        if getattr(kind, "unit", None) == "ns":  # Python's dates know microseconds
            zone = getattr(kind, "tz", None)
            coarse = {"timestamp": pa.timestamp("us", zone), "time64": pa.time64("us"), "duration": pa.duration("us")}
            column = column.cast(coarse[str(kind).partition("[")[0]], safe=False)
        values = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:
        raise BadInput(f"{where}: a {kind} cannot become a date of Python's ({error}); store it as text") from None
    texts = [None if v is None else v.isoformat() if hasattr(v, "isoformat") else str(v) for v in values]
    return pa.array(texts, pa.string())
