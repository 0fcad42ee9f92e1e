"""Reports and a comparison from accuracy matrices of other tools. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import COMPARISON_FILE, is_file, write_comparison, write_run
from .errors import BadInput
from .evaluation.matrix_files import MatrixFile, read_matrix_file
from .recipe import PAGE_FILE, REPORT_FILE, safe

UNKNOWN = "not known"
MATRICES = "matrices"
"""Name of the comparison that is made of them."""


def report_matrices(
    files: Sequence[str],
    output_dir: str | Path | None = None,
    *,
    scale: str = "auto",
    metric: str | None = None,
    reference: str | None = None,
) -> list[Path]:
    """Writes `report.json` and `report.html` of each matrix, and of several a comparison.

    Args:
        files: paths, each with `NAME=` before it where the method's name is not that of the file. Files of one name are
            seeds of one method: the seed is told by the file (`"seed"`, a name that ends in `-seed-3`), else they are
            counted from 0.
        output_dir: where the pages go; `runs/matrices/NAMES` when None.
        scale, metric: as in `read_matrix_file`, for all files.
        reference: the method that differences are taken to; the first when None.

    Returns:
        The pages, the last being the one that covers the most.

    Raises:
        BadInput: as `read_matrix_file`; one method has a seed twice; matrices of different width, metric or
            experiences; an unknown reference; or a folder with pages of something else.
    """
    if not files:
        raise BadInput("matrix: name at least one file")
    arms = _arms([_read(each, scale, metric) for each in files])
    _share_names([one for members in arms.values() for one in members])
    root = Path(output_dir) if output_dir is not None else Path("runs") / "matrices" / safe("+".join(arms))[:80]
    _refuse_other_pages(root, several=len(files) > 1)
    reports = {name: [_report(one) for one in members] for name, members in arms.items()}
    if len(files) == 1:
        if reference is not None:
            raise BadInput(f"reference: {reference!r} needs several matrices to compare; give more with --matrix")
        ((report,),) = reports.values()
        return [write_run(root, report, everything=True)]
    if len({safe(name) for name in arms}) < len(arms):
        raise BadInput(f"matrix: the names {', '.join(arms)} give two methods one folder; write others with NAME=FILE")
    folders = {name: [f"{safe(name)}/seed-{report['seed']}" for report in members] for name, members in reports.items()}
    # Compared first: what does not fit together is refused before a page is written.
    page = write_comparison(root, reports, MATRICES, reference, folders)[1]
    pages = [
        write_run(root / folder, report, everything=True)
        for name, members in reports.items()
        for folder, report in zip(folders[name], members, strict=True)
    ]
    return [*pages, page]


def _read(text: str, scale: str, metric: str | None) -> MatrixFile:
    name, sign, path = text.partition("=")
    if sign and not Path(text).exists():
        if not name.strip() or not path:
            raise BadInput(f"matrix: found {text!r}; write FILE or NAME=FILE")
        return read_matrix_file(path, name=name.strip(), scale=scale, metric=metric)
    return read_matrix_file(text, scale=scale, metric=metric)


def _arms(found: Sequence[MatrixFile]) -> dict[str, list[MatrixFile]]:
    """Method -> its matrices by rising seed."""
    arms: dict[str, list[MatrixFile]] = {}
    for one in found:
        arms.setdefault(one.name, []).append(one)
    for name, members in arms.items():
        told = {one.seed for one in members if one.seed is not None}
        free = (n for n in range(len(members) + len(told)) if n not in told)
        for one in members:
            one.seed = next(free) if one.seed is None else one.seed
        members.sort(key=lambda one: one.seed or 0)
        for one, other in zip(members, members[1:], strict=False):
            if one.seed == other.seed:
                raise BadInput(
                    f"matrix: {one.path} and {other.path} are both seed {one.seed} of {name!r}; name methods with "
                    "NAME=FILE, or seeds in the file names (-seed-0, -seed-1)"
                )
    return arms


def _share_names(found: Sequence[MatrixFile]) -> None:
    """Names of the experiences hold for the files that have none."""
    names = next((one.experiences for one in found if one.experiences), None)
    for one in found:
        if one.experiences is None and names is not None and len(names) == len(one.rows[0]):
            one.experiences = names


def _report(one: MatrixFile) -> dict[str, Any]:
    from .report.build import build_report

    return build_report(
        name=one.name, method=one.name, head=None, model=UNKNOWN, stream=UNKNOWN, objective=UNKNOWN,
        metric=one.metric, higher_is_better=one.metric != "perplexity", seed=one.seed or 0, protocol={}, training={},
        details={
            "arm": one.name,
            "stream": {"length": len(one.rows[0]), "experiences": one.experiences},
            "matrix_file": {"path": one.path.as_posix(), "sha256": one.digest},
        },
        matrix=one.rows, baseline=one.baseline,
        cost=dict.fromkeys(("seconds", "trainable_parameters", "stored_bytes")), status="complete",
        notes=[f"Read from {one.path.name}; perdure did not run it and knows no protocol and no cost.", *one.notes],
    )  # fmt: skip


def _refuse_other_pages(root: Path, several: bool) -> None:
    """Only a page of matrices is written over, and by one of its kind."""
    from .report import build

    mine = not any(is_file(root / name) for name in (COMPARISON_FILE, REPORT_FILE, PAGE_FILE))
    if several and is_file(root / COMPARISON_FILE):
        mine = build.read_comparison(root / COMPARISON_FILE)["recipe"] == MATRICES
    elif not several and is_file(root / REPORT_FILE):
        mine = "matrix_file" in build.read_report(root / REPORT_FILE)["details"]
    if not mine:
        raise BadInput(f"output_dir: {root} holds another page, and it would be written over; give --output-dir")
