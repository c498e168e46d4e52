from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

import paperworks
from paperworks import processor
from paperworks.lab import environment as module
from paperworks.lab.environment import environment


def test_it_says_what_machine_and_versions_there_are():
    described = environment()
    assert described["paperworks"] == paperworks.__version__
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["cores"] == len(psutil.Process().cpu_affinity())
    assert described["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert described["cpu"] and described["os"] and described["host"]
    assert "numpy" in described["packages"] and "no-such-package" not in described["packages"]
    assert json.loads(json.dumps(described)) == described


def test_it_imports_no_torch():
    code = (
        "import sys; from paperworks.lab.environment import environment; described = environment();"
        "assert 'torch' not in sys.modules; assert described['gpu'] is None; print(described['threads'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=_environ(OMP_NUM_THREADS="7"),
    )
    assert found.stdout.strip() == "7"


def test_threads_and_gpu_are_those_of_torch_where_it_is_loaded(monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda index: "NVIDIA H100"
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 5, cuda=cuda))
    described = environment()
    assert described["threads"] == 5 and described["gpu"] == "2 x NVIDIA H100"


EPYC = "avx avx2 avx512f avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "limit", "told"),
    [
        (f"{EPYC} amx_bf16 amx_tile", None, "AMX"),
        (f"{EPYC} amx_bf16 amx_tile", "AVX512_CORE_AMX", "AMX"),
        (f"{EPYC} amx_bf16 amx_tile", "AVX512_CORE_BF16", "AVX-512 with bfloat16"),
        (f"{EPYC} amx_bf16 amx_tile", "avx512_core", "AVX-512"),
        (EPYC, None, "AVX-512 with bfloat16"),
        (EPYC, "ALL", "AVX-512 with bfloat16"),
        (EPYC, "AVX2_VNNI", "AVX2"),
        ("avx avx2 avx512f", "AVX512_CORE_FP16", "AVX-512"),
        ("avx avx2", None, "AVX2"),
        ("sse4_1 avx", None, "AVX"),
        ("sse4_1", None, "SSE4.1"),
    ],
)
def test_the_largest_set_of_instructions_that_may_be_used_is_told(flags, limit, told, monkeypatch):
    monkeypatch.setattr(processor, "_of_linux", lambda: {"flags": flags, "model name": "Chip"})
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    described = environment()
    assert (described["cpu"], described["instructions"]) == ("Chip", told)


def test_of_other_processors_torch_is_asked_where_it_is_loaded(monkeypatch):
    monkeypatch.setattr(processor, "_of_linux", lambda: {"Features": "asimd sve"})
    backends = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "SVE256"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(backends=backends))
    assert processor.instructions() == "SVE256"
    monkeypatch.delitem(sys.modules, "torch")
    assert processor.instructions() == ""


def test_the_commit_of_a_checkout_is_told_and_whether_it_is_changed(tmp_path, monkeypatch):
    package = tmp_path / "src" / "paperworks"
    package.mkdir(parents=True)
    monkeypatch.setattr(module.paperworks, "__file__", str(package / "__init__.py"))
    assert _state() == (None, None)
    _git(tmp_path, "init", "-q")
    assert _state() == (None, None)
    (package / "__init__.py").write_text("")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert _state() == (commit, False)
    (package / "__init__.py").write_text("changed = True")
    assert _state() == (commit, True)


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module.paperworks, "__file__", str(tmp_path / "src" / "paperworks" / "__init__.py"))
    monkeypatch.setenv("PATH", "")
    assert _state() == (None, None)


def _state() -> tuple[str | None, bool | None]:
    described = environment()
    return described["commit"], described["dirty"]


def _git(folder, *command: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _environ(**values: str) -> dict[str, str]:
    import os

    return os.environ | values
