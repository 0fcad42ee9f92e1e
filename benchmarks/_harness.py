"""What benchmarks share: options, the facts about a machine that a ratio depends on, the file they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perdure.timing import Ratio, bootstrap_median, compare

__all__ = [
    "Ratio", "bootstrap_median", "bytes_of", "compare", "counted", "machine", "options_of", "roofline", "row", "tell",
    "write",
]  # fmt: skip

SIDE = 1024
"""Of the square matrices whose product stands for what the machine can do."""


def tell(loop: Any, losses: dict[str, float]) -> None:
    """An `on_step` of `Learner.learn`: a line about every 100 steps."""
    if losses and loop.position.step % 100 == 1:  # losses are logged on steps 1, 11, 21 ...
        print(f"step {loop.position.step}/{loop.steps_planned} loss {losses['loss']:.3f}", flush=True)


def options_of(
    parser: argparse.ArgumentParser, name: str, usual: int, argv: Sequence[str] | None, **tiny: Any
) -> argparse.Namespace:
    """Options that speed benchmarks share; `--smoke` takes the values of `tiny` and writes no file unasked."""
    import torch

    output = f"results/speed/{name}.json"
    parser.add_argument("--pairs", type=int, default=usual, help="timed pairs of the two arms")
    parser.add_argument("--seconds", type=float, help="a comparison of two arms ends here, with 3 pairs at least")
    parser.add_argument("--threads", type=int, help="threads of torch; its own default when absent")
    parser.add_argument("--output", default=output)
    parser.add_argument("--smoke", action="store_true", help="a tiny setting that writes only where --output says")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.smoke:
        vars(options).update(tiny, output=None if options.output == output else options.output)
    return options


def counted(one: Callable[[], Any], held: Iterable[Any] = ()) -> Any:
    """The `Meter` of one call: FLOPs, and bytes alive at the worst moment, those `held` before it included."""
    from perdure.metering import Meter

    with Meter(held) as meter:
        one()
    return meter


def roofline(
    one: Callable[[], Any], held: Iterable[Any], moved: int, pairs: int, seconds: float | None
) -> dict[str, Any]:
    """How near `one` comes to what the machine can do, each ceiling timed in turn with it.

    Args:
        held: tensors alive before it; they count in the peak.
        moved: bytes that it cannot help reading or writing: what it is given and what it returns, once.
    Returns:
        flops: of its matrix products (`perdure.metering`). peak_bytes. moved_bytes. roofline_share: time that a large
        matrix product or a copy (the slower of the two, `bound`) takes for as many FLOPs or bytes, over its time.
    """
    import torch

    meter = counted(one, held)
    left, right, source = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.randn(16 * SIDE * SIDE)
    target = torch.empty_like(source)
    product = compare(one, lambda: left @ right, pairs=pairs, warmup=1, seconds=seconds)
    copy = compare(one, lambda: target.copy_(source), pairs=pairs, warmup=1, seconds=seconds)
    shares = {
        "arithmetic": meter.flops / (2 * SIDE**3) / product.median,
        "memory": moved / (2 * source.nbytes) / copy.median,
    }
    bound = max(shares, key=shares.__getitem__)
    return {
        "flops": meter.flops, "peak_bytes": meter.peak_bytes, "moved_bytes": moved,
        "roofline_share": round(shares[bound], 4), "bound": bound,
    }  # fmt: skip


def bytes_of(*tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def machine() -> dict[str, Any]:
    """What a ratio depends on; no host name and no path."""
    import torch

    from perdure.memory.dispatch import quick_codes

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "quick_codes": quick_codes(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(path: str | Path, name: str, settings: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Writes one benchmark as JSON: `schema`, `name`, `machine`, `settings`, `rows`, `notes`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema": 1, "name": name, "machine": machine(), "settings": settings, "rows": rows, "notes": notes}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def row(case: dict[str, Any], against: str, ratio: Ratio) -> dict[str, Any]:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(ratio).items()}
    return {**case, "against": against, **rounded}
