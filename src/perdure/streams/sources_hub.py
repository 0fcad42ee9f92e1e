"""Hugging Face `datasets` by id; the library is imported when one is asked for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data import Rows
from ..errors import BadInput
from .arrow import arrow_records
from .rows import CheckedRows
from .scenarios import Splits
from .sources import Reading, to_row


def read_hub(
    hf: str,
    *,
    config: str | None = None,
    train: str = "train",
    test: str | None = "test",
    valid: str | None = None,
    revision: str | None = None,
    how: Reading | None = None,
) -> Splits:
    """Rows of a data set on the Hugging Face hub, in its cache, or in a local folder that `datasets` can read.

    Args:
        hf: id such as "ag_news", or a local folder.
        config: the data set's configuration.
        train, test, valid: names of its splits, also slices such as "train[:1000]".
        revision: branch, tag or commit.
        how: fields. Class numbers become the names that the data set declares.

    Raises:
        BadInput: the library is missing, the hub cannot be reached, or a split or field does not exist.
    """
    try:
        import datasets
    except ImportError:
        raise BadInput(f'source.hf: {hf!r} needs the library `datasets`; run: pip install "perdure[data]"') from None
    how = how or Reading()
    splits, classes = {}, ()
    for split, name in (("train", train), ("test", test), ("valid", valid)):
        if name is None:
            continue
        try:
            table = datasets.load_dataset(hf, config, split=name, revision=revision)
        except ImportError as error:
            raise BadInput(f"source.hf: {hf!r} needs a further library: {error}") from None
        except Exception as error:  # the hub, its cache and the readers each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"source.hf: {hf!r}, split {name!r}, cannot be loaded ({type(error).__name__}: {reason}); "
                "check the id, the split and the network, or load it once with a network so that it is in the cache"
            ) from error
        names = _class_names(table.features, how.fields.get("label", "label"))
        splits[split] = _rows(table, names, how, f"{hf}, {name}")
        classes = classes or tuple(names)
    return Splits(hf.rstrip("/").rsplit("/", 1)[-1], **splits, classes=classes, details={"revision": revision})


def _class_names(features: Mapping[str, Any], label: str) -> list[str]:
    return list(getattr(features.get(label), "names", None) or [])


def _rows(table: Any, names: list[str], how: Reading, where: str) -> Rows:
    label = how.fields.get("label", "label")
    made = []
    plain = table.with_format("arrow")[:]  # pictures stay encoded until a row is read
    for place, record in arrow_records(plain, how.fields, how.required, where):
        if names and isinstance(record.get(label), int):
            if not 0 <= record[label] < len(names):
                raise BadInput(
                    f"{where}, {place}: has no label (class number {record[label]}); choose a labelled split"
                )
            record[label] = names[record[label]]
        made.append(to_row(record, how, f"{where}, {place}"))
    return CheckedRows(made)
