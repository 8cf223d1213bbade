"""Registers the reference for every device and loads the compiled kernels that this installation has."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path

import torch

from million_ops import reference
from million_ops._schema import LIBRARY

STABLE_ABI = (2, 10)  # the oldest torch that a compiled library loads on
_REINSTALL = "MILLION_BUILD=cpu pip install --force-reinstall --no-deps <this package>"
_NAMES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}

for _name, _function in reference.IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _load_cpu() -> tuple[bool, str]:
    """Whether the CPU kernels were loaded, and what `backends` says about them."""
    path = Path(__file__).with_name("_cpu.so")
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < STABLE_ABI:
        return False, (
            f"missing: torch {torch.__version__} has no stable ABI, the kernels need torch >= 2.10; "
            "upgrade torch, then reinstall this package"
        )
    if os.environ.get("MILLION_CPU_ISA") == "reference":
        return False, "missing: switched off by MILLION_CPU_ISA=reference; unset it"
    if not path.exists():
        compiler = any(map(shutil.which, ("g++", "c++", "clang++")))
        why = "torch or the compiler was missing, or it failed," if compiler else "there was no C++ compiler"
        how = "" if compiler else "install one (Debian, Ubuntu: apt-get install g++), then "
        return (
            False,
            f"missing: not built, {why} when the package was installed; {how}{_REINSTALL} builds it or says why not",
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return False, f"missing: {path.name} does not load ({error}); rebuild it: {_REINSTALL}"
    isa = ctypes.CDLL(str(path)).million_cpu_isa
    isa.restype = ctypes.c_char_p
    return True, f"compiled, {_NAMES[isa().decode()]}, stable ABI {'.'.join(map(str, STABLE_ABI))}"


_CPU_LOADED, _CPU_STATUS = _load_cpu()


def backends() -> dict[str, str]:
    """What computes the ops in this installation: backend to its state, and for a missing one how to get it."""
    return {
        "reference": "available on every device",
        "cpu": _CPU_STATUS,
        "cuda": "missing: this version has no CUDA kernels; the reference runs on the GPU",
        "triton": "missing: this version has no Triton kernels; the reference runs on the GPU",
    }


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels serve tensors on ``device_type`` (else the reference does)."""
    return device_type == "cpu" and _CPU_LOADED
