"""Where a run took place: versions, processor, memory, threads and the state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import paperworks
from paperworks import processor

_PACKAGES = (
    "accelerate",
    "botorch",
    "datasets",
    "gpytorch",
    "numpy",
    "peft",
    "POT",
    "pyro-ppl",
    "ray",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
    "torchmetrics",
    "transformers",
)


def environment() -> dict[str, Any]:
    """Describe this machine and the software on it, without importing anything heavy.

    Returns:
        `paperworks` and `python` (versions), `packages` (name to version of those installed), `os`, `host`,
        `cpu`, `instructions` (the largest set that products of matrices may use, such as "AMX" or "AVX2", empty
        where it is not known), `cores` (that this process may use), `threads` (PyTorch's where it is loaded), `gpu`
        (None without one or before PyTorch is loaded), `memory_gib`, `commit` and `dirty` (None outside a git
        checkout).

    Example:
        >>> described = environment()
        >>> described["cores"] >= 1, described["memory_gib"] > 0
        (True, True)
    """
    return {
        "paperworks": paperworks.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "os": platform.platform(),
        "host": platform.node(),
        "cpu": processor.name(),
        "instructions": processor.instructions(),
        "cores": _cores(),
        "threads": _threads(),
        "gpu": _gpu(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **_checkout(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads() -> int:
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else _cores()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count > 1 else str(torch.cuda.get_device_name(0))


def _checkout() -> dict[str, Any]:
    root = Path(paperworks.__file__).parents[2]
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None
    if not commit:
        return {"commit": None, "dirty": None}
    # Without optional locks a status never gets in the way of git commands that the user runs meanwhile.
    changes = _output("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
