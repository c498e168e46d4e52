"""The processor: its name, and what of its instructions products of matrices use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

# From many instructions to few: as told, the flag by which Linux names it, and what oneDNN calls the most it may use.
_SETS = (
    ("AMX", "amx_bf16", ("AMX", "AVX10", "ALL", "DEFAULT")),
    ("AVX-512 with bfloat16", "avx512_bf16", ("BF16", "FP16")),
    ("AVX-512", "avx512f", ("AVX512",)),
    ("AVX2", "avx2", ("AVX2",)),
    ("AVX", "avx", ("AVX",)),
    ("SSE4.1", "sse4_1", ("SSE41",)),
)


def name() -> str:
    """What the processor is called."""
    if found := _of_linux().get("model name"):
        return found
    if sys.platform == "darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return platform.machine()
    return platform.processor() or platform.machine()


def instructions() -> str:
    """The largest set of instructions that PyTorch's products of matrices may use, "AMX" or "AVX2"; empty if not known.

    Linux tells what there is, and ONEDNN_MAX_CPU_ISA what may be used of it. Of other systems and processors PyTorch is
    asked, where it is loaded.

    Example:
        >>> isinstance(instructions(), str)
        True
    """
    flags = set(_of_linux().get("flags", "").split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = next((index for index, (_, _, names) in enumerate(_SETS) if any(n in limit.upper() for n in names)), 0)
    if found := next((told for told, flag, _ in _SETS[allowed:] if flag in flags), ""):
        return found
    backends = getattr(sys.modules.get("torch"), "backends", None)
    return "" if backends is None else str(backends.cpu.get_cpu_capability())


@cache
def _of_linux() -> dict[str, str]:
    """What Linux says of the first core."""
    path = Path("/proc/cpuinfo")
    if sys.platform != "linux" or not path.is_file():
        return {}
    first = path.read_text().partition("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
