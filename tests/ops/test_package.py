"""Importing `million_ops`, and what it says of itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import million_ops
from million_ops import _loader, backends, has_kernels


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_lean_import():
    """No CUDA is touched, nothing of transformers or of million_cache is imported."""
    code = (
        "import sys, json, torch; before = set(sys.modules); import million_ops;"
        "print(json.dumps([torch.cuda.is_initialized(), sorted({x.split('.')[0] for x in set(sys.modules) - before})]))"
    )
    initialised, modules = json.loads(python(code))
    assert not initialised
    assert not {"transformers", "million_cache", "triton", "numpy.testing", "matplotlib"} & set(modules)


def test_backends():
    found = backends()
    assert set(found) == {"reference", "cpu", "cuda", "triton"}
    assert found["reference"] == "available on every device"
    for name, state in found.items():
        assert state.startswith(("available", "compiled", "missing: ")), name
        assert not state.startswith("missing") or ";" in state, f"{name} does not say how to get it"
    assert has_kernels("cpu") == found["cpu"].startswith("compiled")
    assert has_kernels("cuda") == found["cuda"].startswith("compiled")
    assert not has_kernels("mps")


@pytest.mark.parametrize("isa", ["baseline", "reference"])
def test_instruction_set_can_be_limited(isa):
    state = python("import million_ops; print(million_ops.backends()['cpu'])", MILLION_CPU_ISA=isa)
    assert has_kernels("cpu") is False or ("baseline" in state if isa == "baseline" else state.startswith("missing"))


@pytest.mark.parametrize(
    "name, given, known",
    [
        ("MILLION_GPU", "cuda", "triton"),
        ("MILLION_GPU_SHARED", "163K", "KiB"),
        ("MILLION_GPU_TABLES", "Wide", "wide, single, narrow"),
        ("MILLION_GPU_ROWS", "12", "4, 8, 16"),
        ("MILLION_CPU_ISA", "avx", "baseline"),
    ],
)
def test_unknown_settings(monkeypatch, name, given, known):
    monkeypatch.setenv(name, given)
    with pytest.raises(ValueError, match=rf"{name} is '{given}' .*{known}.*unset"):
        _loader._check_settings()
    monkeypatch.setenv(name, "")
    _loader._check_settings()


def test_unknown_settings_stop_the_import():
    env = {**os.environ, "MILLION_GPU_TABLES": "Wide"}
    done = subprocess.run([sys.executable, "-c", "import million_ops"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: MILLION_GPU_TABLES is 'Wide'" in done.stderr


def test_old_torch_is_told(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    loaded, state = _loader._load("cpu")
    assert not loaded and "torch >= 2.10" in state


def test_missing_library_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("MILLION_CPU_ISA", raising=False)
    monkeypatch.setattr(_loader, "__file__", str(tmp_path / "_loader.py"))
    loaded, state = _loader._load("cpu")
    assert not loaded and "MILLION_BUILD=cpu" in state
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "g++" in _loader._load("cpu")[1]
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    assert "does not load" in _loader._load("cpu")[1]


def test_ops_work_without_the_compiled_library():
    code = (
        "import torch, million_ops; x = torch.randn(1, 2, 3, 64); book = torch.randn(2, 256, 32, 2).half();"
        "print(million_ops.pq_decode(million_ops.pq_encode(x, book), book, torch.float32).shape)"
    )
    assert "[1, 2, 3, 64]" in python(code, MILLION_CPU_ISA="reference")


def test_kernels_include_no_torch():
    sources = Path(million_ops.__file__).parents[2] / "csrc"
    if not sources.is_dir():
        pytest.skip("installed without sources")
    including = [
        x.name for x in sources.rglob("*") if x.suffix in {".h", ".cpp", ".cu", ".cuh"} and "<torch/" in x.read_text()
    ]
    assert set(including) <= {"bind.cpp", "arguments.h"}


def test_who_may_import_whom():
    """`million_ops` imports neither transformers nor `million_cache` anywhere."""
    package = Path(importlib.util.find_spec("million_ops").origin).parent
    for source in package.rglob("*.py"):
        for line in source.read_text().splitlines():
            assert not line.strip().startswith(("import transformers", "from transformers", "from million_cache")), (
                source
            )
