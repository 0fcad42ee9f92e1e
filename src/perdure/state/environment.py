"""What outside a state can change its floats: versions, processor, threads, flags."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "safetensors", "perdure")
_INFORMATION = frozenset({"platform"})
"""Recorded for the report; names the kernel, which computes no float."""


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """JSON values that describe where a run computes. Imports no package; opens CUDA only for a CUDA `device`."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    found |= {
        "commit": perdure_commit(),
        "platform": platform.platform(),
        "system": platform.system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "device": _device_name(device),
    }
    if torch.version.cuda is not None:
        found |= {
            "cuda": torch.version.cuda,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }
    return found


def environment_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as `torch: 2.6.0 -> 2.7.0` for all that can change floats; empty when a resumed run is bit-identical.

    A key that only one of the two records (another perdure wrote it) is not compared.
    """
    keys = [key for key in old if key in new and key not in _INFORMATION]
    return [f"{key}: {old[key]} -> {new[key]}" for key in keys if old[key] != new[key]]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device | str | None) -> str:
    kind = torch.device(device or "cpu")
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else kind.type


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def perdure_commit() -> str | None:
    """Commit of the source tree that perdure runs from, with `+changes` where it was edited; None when installed.

    A repository that merely contains an installed copy does not count.
    """
    package = Path(__file__).resolve().parents[1]
    if _git(package, "ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit.strip() + ("+changes" if _git(package, "status", "--porcelain", "--", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
