"""Scenarios: labelled rows -> experiences. Pure functions of rows, settings and a seed. Imports no torch.

Class-, domain- and task-incremental: van de Ven, Tuytelaars, Tolias, "Three types of incremental learning", Nature
Machine Intelligence 2022. `B50-Inc5` as in PyCIL: 50 classes first, then 5 at a time; class order seed 1993 likewise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data import Row, Rows
from ..errors import BadInput
from .experience import Experience
from .rows import CheckedRows, as_rows, labels_of, sort_labels

_SPLIT_PATTERN = re.compile(r"B(\d{1,9})-?Inc(\d{1,9})", re.IGNORECASE)


@dataclass(frozen=True)
class Splits:
    """Labelled rows as a source gives them.

    Attributes:
        name: of the source.
        train, test, valid: rows; `test` and `valid` may be empty.
        classes: labels in the source's own order; empty where it declares none.
        domains: values of the domain field in the source's own order; empty where it declares none.
        details: JSON-able facts about the source.
    """

    name: str
    train: Rows
    test: Rows = ()
    valid: Rows = ()
    classes: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in ("train", "test", "valid"):
            object.__setattr__(self, split, as_rows(getattr(self, split), f"source {self.name!r}, {split} rows"))
        if not len(self.train):
            raise BadInput(f"source {self.name!r} is empty: it has no training rows; check the file")


@dataclass(frozen=True)
class Selection:
    """Which rows of each class are used. All draws are seeded, by class, and keep the order of the rows.

    Attributes:
        rows_per_class, valid_rows_per_class, test_rows_per_class: at most so many rows of each class in an experience.
        rows_per_experience, test_rows_per_experience: at most so many rows of an experience, for rows without labels.
        validation: a share below 1, or a number of rows of each class, taken from the TRAINING rows before any cap; the
            source's own validation rows are then unused. None for the source's own.
        test_share: share of the training rows of each class that becomes the test rows of a source without any.
        seed: of the draws.
    """

    rows_per_class: int | None = None
    test_rows_per_class: int | None = None
    valid_rows_per_class: int | None = None
    rows_per_experience: int | None = None
    test_rows_per_experience: int | None = None
    validation: float | int | None = None
    test_share: float | None = None
    seed: int = 0


# ---- choosing rows
def _generator(seed: int, *words: str) -> Any:
    import numpy as np

    key = hashlib.sha256("\x00".join(words).encode()).digest()[:8]
    return np.random.default_rng([seed, int.from_bytes(key, "little")])


def _groups(rows: Rows) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("label", ""), []).append(i)
    return groups


def _draw(places: Sequence[int], count: int, generator: Any) -> list[int]:
    if count >= len(places):
        return list(places)
    return sorted(places[i] for i in generator.permutation(len(places))[:count])


def _cap(rows: Rows, per_class: int | None, total: int | None, seed: int, purpose: str) -> Rows:
    if per_class is not None:
        kept: list[int] = []
        for label, places in _groups(rows).items():
            kept += _draw(places, per_class, _generator(seed, purpose, label))
        rows = CheckedRows(rows[i] for i in sorted(kept))
    if total is not None and len(rows) > total:
        rows = CheckedRows(rows[i] for i in _draw(range(len(rows)), total, _generator(seed, purpose, "rows")))
    return rows


def take_aside(rows: Rows, amount: float, seed: int, purpose: str, where: str) -> tuple[Rows, Rows]:
    """Splits rows into (kept, taken), class by class; of plain text, the end is taken, so that no passage is cut twice.

    Args:
        amount: a share below 1 (at least one row of each class that has two), or a number of rows of each class.

    Raises:
        BadInput: a class would be left without rows.
    """
    taken: set[int] = set()
    for label, places in _groups(rows).items():
        count = round(len(places) * amount) if isinstance(amount, float) else amount
        count = max(1, count) if isinstance(amount, float) and len(places) > 1 else count
        if count >= len(places) and count > 0:
            raise BadInput(
                f"{purpose}: {count} rows of {where}{f', class {label!r},' if label else ''} were asked for, "
                f"but it has only {len(places)} training rows; ask for fewer"
            )
        plain = set(rows[0]) == {"text"}
        taken.update(places[len(places) - count :] if plain else _draw(places, count, _generator(seed, purpose, label)))
    kept = CheckedRows(row for i, row in enumerate(rows) if i not in taken)
    return kept, CheckedRows(rows[i] for i in sorted(taken))


def select(data: Splits, how: Selection, salt: str = "") -> Splits:
    """Applies a `Selection` to the rows of one experience (or of all, where classes do not meet again).

    Raises:
        BadInput: the settings do not fit the rows.
    """
    train, valid, test = data.train, data.valid, data.test
    if how.test_share is not None:
        if len(test):
            raise BadInput(f"test_share: source {data.name!r} has test rows of its own; remove the setting")
        train, test = take_aside(train, how.test_share, how.seed, f"test_share{salt}", f"source {data.name!r}")
    if how.validation is not None:
        train, valid = take_aside(train, how.validation, how.seed, f"validation{salt}", f"source {data.name!r}")
    train = _cap(train, how.rows_per_class, how.rows_per_experience, how.seed, f"train{salt}")
    valid = _cap(valid, how.valid_rows_per_class, None, how.seed, f"valid{salt}")
    test = _cap(test, how.test_rows_per_class, how.test_rows_per_experience, how.seed, f"test{salt}")
    return replace(data, train=train, valid=valid, test=test)


# ---- classes
def order_classes(data: Splits, order: int | str | Sequence[str] = "given") -> list[str]:
    """The order in which classes come.

    Args:
        order: "given" for the source's own order (its declared classes, else first appearance in the training rows); a
            list of labels (those it leaves out are not used); or a seed: `RandomState(seed).permutation` over the
            declared classes, else over the sorted labels, which is the convention of the field (seed 1993).

    Raises:
        BadInput: rows have no labels, or a listed label does not occur or occurs twice.
    """
    labels = labels_of(data.train)
    if not labels:
        raise BadInput(
            f"source {data.name!r}: rows have no field 'label', which this scenario needs; name it in `fields`"
        )
    present = set(labels)
    declared = [label for label in data.classes if label in present] if data.classes else labels
    if isinstance(order, int):
        import numpy as np

        if not 0 <= order < 2**32:
            raise BadInput(f"class_order: seed {order} is outside 0 to 4294967295, which RandomState takes")
        return [declared[i] for i in np.random.RandomState(order).permutation(len(declared))]
    if isinstance(order, str):
        if order != "given":
            raise BadInput(f"class_order: {order!r} is unknown; use a seed, 'given' or a list of labels")
        if data.classes:
            return declared
        return list(dict.fromkeys(row["label"] for row in data.train))
    listed = [str(label) for label in order]
    for label in listed:
        if label not in present:
            raise BadInput(f"class_order: no training row of {data.name!r} has label {label!r}; known: {_some(labels)}")
    if len(set(listed)) < len(listed):
        raise BadInput(f"class_order: a label occurs twice in {listed}")
    return listed


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")


def group_classes(ordered: Sequence[str], experiences: int | str | Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Cuts ordered classes into experiences.

    Args:
        experiences: a number (where it does not divide the classes, the first get one more), "B0-Inc10" (10 at a time),
            "B50-Inc5" (50 first, then 5 at a time; the last may be smaller), or the classes of each.

    Raises:
        BadInput: more experiences than classes, a pattern that is none, or an unknown or repeated label.
    """
    count = len(ordered)
    if isinstance(experiences, int):
        if not 1 <= experiences <= count:
            raise BadInput(f"experiences: {experiences} cannot be made of {count} classes; use 1 to {count}")
        size, more = divmod(count, experiences)
        sizes = [size + (i < more) for i in range(experiences)]
    elif isinstance(experiences, str):
        match = _SPLIT_PATTERN.fullmatch(experiences.strip())
        if match is None or int(match[2]) == 0:
            raise BadInput(
                f"experiences: {experiences!r} is not understood; use a number, 'B0-Inc10' or lists of labels"
            )
        base, step = int(match[1]), int(match[2])
        if max(base, step) > count:
            raise BadInput(f"experiences: {experiences!r} needs {max(base, step)} classes at once, there are {count}")
        rest = count - base
        sizes = ([base] if base else []) + [min(step, rest - i) for i in range(0, rest, step)]
    else:
        return _listed_groups(ordered, experiences)
    groups, start = [], 0
    for size in sizes:
        groups.append(tuple(ordered[start : start + size]))
        start += size
    return groups


def _listed_groups(ordered: Sequence[str], experiences: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    groups = [tuple(str(label) for label in group) for group in experiences]
    seen: set[str] = set()
    for i, group in enumerate(groups):
        if not group:
            raise BadInput(f"experiences.{i}: is empty; name at least one label")
        for label in group:
            if label not in ordered:
                raise BadInput(f"experiences.{i}: no training row has label {label!r}; known: {_some(ordered)}")
            if label in seen:
                raise BadInput(
                    f"experiences.{i}: label {label!r} occurs twice; classes of experiences must be disjoint"
                )
            seen.add(label)
    return groups


def _check_declared(data: Splits) -> None:
    known = set(data.classes) if data.classes else set(labels_of(data.train))
    for split in ("train", "valid", "test"):
        for i, row in enumerate(getattr(data, split)):
            if row.get("label") not in known:
                kind = "the declared classes" if data.classes else "the labels of the training rows"
                raise BadInput(
                    f"source {data.name!r}, {split} row {i}: label {row.get('label')!r} is outside {kind} "
                    f"({_some(sort_labels(known))}); correct the label or declare it"
                )


def class_incremental(
    data: Splits,
    experiences: int | str | Sequence[Sequence[str]],
    class_order: int | str | Sequence[str] = "given",
    how: Selection | None = None,
    *,
    tasks: bool = False,
) -> list[Experience]:
    """Each experience brings new classes; with `tasks`, its task id as well (task-incremental).

    Returns:
        Experiences whose `classes` are their new classes. Rows of classes that are not asked for are left out.
    """
    _check_declared(data)
    groups = group_classes(order_classes(data, class_order), experiences)
    chosen = select(_only(data, {label for group in groups for label in group}), how or Selection())
    home = {label: i for i, group in enumerate(groups) for label in group}
    splits = {
        s: _share_out(getattr(chosen, s), len(groups), lambda r: home[r["label"]]) for s in ("train", "valid", "test")
    }
    return [
        Experience(
            i,
            _title(groups, i),
            classes=group,
            task=i if tasks else None,
            last=i == len(groups) - 1,
            train=splits["train"][i],
            valid=splits["valid"][i],
            test=splits["test"][i],
        )
        for i, group in enumerate(groups)
    ]


def task_incremental(
    data: Splits,
    experiences: int | str | Sequence[Sequence[str]],
    class_order: int | str | Sequence[str] = "given",
    how: Selection | None = None,
) -> list[Experience]:
    """As class-incremental, with a task id that the protocol may grant."""
    return class_incremental(data, experiences, class_order, how, tasks=True)


def _only(data: Splits, labels: set[str]) -> Splits:
    def keep(rows: Rows) -> Rows:
        return CheckedRows(row for row in rows if row["label"] in labels)

    return replace(data, train=keep(data.train), valid=keep(data.valid), test=keep(data.test))


def _share_out(rows: Rows, count: int, home: Callable[[Row], int]) -> list[Rows]:
    parts: list[list[Row]] = [[] for _ in range(count)]
    for row in rows:
        parts[home(row)].append(row)
    return [CheckedRows(part) for part in parts]


def _title(groups: Sequence[Sequence[str]], index: int) -> str:
    start, size = sum(len(group) for group in groups[:index]), len(groups[index])
    return f"classes {start}-{start + size - 1}" if size > 1 else groups[index][0]


# ---- domains
def by_field(data: Splits, domain_field: str, order: str | Sequence[str] = "given") -> list[Splits]:
    """Rows parted by a field, in the order of `order` or of first appearance.

    Raises:
        BadInput: a row lacks the field, or a listed domain has no training rows.
    """
    for split in ("train", "valid", "test"):
        for i, row in enumerate(getattr(data, split)):
            if domain_field not in row:
                raise BadInput(
                    f"source {data.name!r}, {split} row {i}: has no field {domain_field!r} (domain_field); "
                    f"found {', '.join(map(str, row))}"
                )
    known = list(dict.fromkeys(str(row[domain_field]) for row in data.train))
    if data.domains and set(known) <= set(data.domains):
        known = [domain for domain in data.domains if domain in known]
    domains = known if isinstance(order, str) else [str(domain) for domain in order]
    for domain in domains:
        if domain not in known:
            raise BadInput(f"domain_order: no training row has {domain_field} {domain!r}; known: {_some(known)}")
    if len(set(domains)) < len(domains):
        raise BadInput(f"domain_order: a domain occurs twice in {domains}")
    parts = []
    for domain in domains:
        train, valid, test = (
            CheckedRows(row for row in rows if str(row[domain_field]) == domain)
            for rows in (data.train, data.valid, data.test)
        )
        parts.append(replace(data, name=domain, train=train, valid=valid, test=test))
    return parts


def domain_incremental(parts: Sequence[Splits], how: Selection | None = None) -> list[Experience]:
    """One experience for each part: the same classes (or none, for language modelling) in another domain.

    Returns:
        Experiences whose `classes` are those of their own training rows, so that no class is known before it comes. The
        task id is the domain's number; a method sees it only where the protocol grants it.

    Raises:
        BadInput: a test or validation row has a label that no training row up to its own domain has.
    """
    made: list[Experience] = []
    known: set[str] = set()
    for i, part in enumerate(parts):
        part = select(part, how or Selection(), salt=f"/{part.name}")
        labels = labels_of(part.train)
        known |= set(labels)
        for split in ("valid", "test"):
            for number, row in enumerate(getattr(part, split)):
                if labels and row.get("label") not in known:
                    raise BadInput(
                        f"domain {part.name!r}, {split} row {number}: label {row.get('label')!r} is in no training row "
                        f"up to this domain ({_some(sort_labels(known))}); correct the label or leave the row out"
                    )
        ordered = [label for label in part.classes if label in labels] if set(labels) <= set(part.classes) else labels
        last = i == len(parts) - 1
        made.append(Experience(i, part.name, part.train, part.test, part.valid, tuple(ordered), task=i, last=last))
    return made


# ---- small portions
def online(blocks: Sequence[Experience], rows: int, seed: int = 0) -> list[Experience]:
    """Each experience of `blocks`, shuffled, in portions of `rows` rows; the last of a block may be shorter.

    Test and validation rows of a block come with its last portion.
    """
    made: list[Experience] = []
    for block in blocks:
        order = _generator(seed, "online", str(block.index)).permutation(len(block.train))
        for start in range(0, len(order), rows):
            ends = start + rows >= len(order)
            made.append(
                Experience(
                    len(made),
                    f"{block.name}, portion {start // rows}",
                    CheckedRows(block.train[int(i)] for i in order[start : start + rows]),
                    block.test if ends else (),
                    block.valid if ends else (),
                    task=block.task,
                    last=ends and block is blocks[-1],
                )
            )
    return made


def boundary_free(blocks: Sequence[Experience], rows: int, blend: float = 0.0, seed: int = 0) -> list[Experience]:
    """Portions of `rows` rows that do not end where blocks end.

    Every row of block b gets the time b + u + blend * v, u uniform in [0, 1), v uniform in [-1, 1); rows come in the
    order of time. `blend` 0 is class-blocked; larger values let neighbouring blocks flow into each other.

    Test and validation rows of a block come with the portion that holds its last training row.
    """
    import numpy as np

    times, owners = [], []
    for block in blocks:
        generator = _generator(seed, "boundary_free", str(block.index))
        u, v = generator.random(len(block.train)), generator.uniform(-1, 1, len(block.train))
        times.append(block.index + u + blend * v)
        owners += [(block.index, i) for i in range(len(block.train))]
    order = np.argsort(np.concatenate(times), kind="stable")
    ordered = [owners[i] for i in order]
    end_of = {owner: place // rows for place, (owner, _) in enumerate(ordered)}
    made: list[Experience] = []
    for index, start in enumerate(range(0, len(ordered), rows)):
        done = [block for block in blocks if end_of[block.index] == index]
        made.append(
            Experience(
                index,
                f"portion {index}",
                CheckedRows(blocks[owner].train[i] for owner, i in ordered[start : start + rows]),
                CheckedRows(row for block in done for row in block.test),
                CheckedRows(row for block in done for row in block.valid),
                last=start + rows >= len(ordered),
            )
        )
    return made
