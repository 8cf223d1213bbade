"""Registers the reference for every device, loads the compiled kernels that this installation has, and Triton's without them.

Where the compiled CUDA kernels are missing and triton can be imported, `triton_kernels` serves CUDA tensors; triton itself is
imported by the first call. Environment (another value is a ValueError here, so that a typing error does not choose kernels):

* ``MILLION_GPU=triton``: leave the compiled CUDA kernels out, so that Triton's run.
* ``MILLION_GPU_SHARED=163``: take the compiled CUDA kernels that so many KiB of shared memory a block allow (`dispatch`, csrc/cuda/bind.cpp).
* ``MILLION_GPU_TABLES=wide``, ``single`` (wide, but keys' once) or ``narrow``: where the tensor core kernel has them, whatever the GPU and the length (csrc/cuda/attention_mma.cu).
* ``MILLION_GPU_ROWS=4``, ``8`` or ``16``: so many query rows of a block of the tensor core kernel, where it has them and there are so many.
* ``MILLION_CPU_ISA=reference``: leave the compiled CPU kernels out; ``baseline``, ``avx2``, ``avx512``: at most that instruction set.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch

from million_ops import reference
from million_ops._schema import LIBRARY

STABLE_ABI = (2, 10)  # the oldest torch that a compiled library loads on
_REINSTALL = "MILLION_BUILD={} pip install --force-reinstall --no-deps <this package>"
# What builds a library: programs, what they are, the Debian package that has one.
_COMPILERS = {
    "cpu": (("g++", "c++", "clang++"), "C++ compiler", "g++"),
    "cuda": (("nvcc",), "CUDA compiler (nvcc)", "nvidia-cuda-toolkit"),
}
_NAMES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}

_SETTINGS = {
    "MILLION_GPU": r"triton",
    "MILLION_GPU_SHARED": r"[1-9]\d*",
    "MILLION_GPU_TABLES": r"wide|single|narrow",
    "MILLION_GPU_ROWS": r"4|8|16",
    "MILLION_CPU_ISA": r"reference|baseline|avx2|avx512",
}


def _check_settings() -> None:
    for name, known in _SETTINGS.items():
        given = os.environ.get(name, "")
        if given and not re.fullmatch(known, given):
            what = "a number of KiB" if name == "MILLION_GPU_SHARED" else known.replace("|", ", ")
            raise ValueError(f"{name} is {given!r} in the environment; it can be {what}, or unset")


_check_settings()
for _name, _function in reference.IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def _load(name: str) -> tuple[bool, str]:
    """Whether the compiled kernels for ``name`` ("cpu", "cuda") were loaded, and what `backends` says about them."""
    path = Path(__file__).with_name(f"_{name}.so")
    reinstall = _REINSTALL.format(name)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < STABLE_ABI:
        return False, (
            f"missing: torch {torch.__version__} has no stable ABI, the kernels need torch >= 2.10; "
            "upgrade torch, then reinstall this package"
        )
    if name == "cuda" and torch.version.cuda is None:
        return (
            False,
            f"missing: torch {torch.__version__} is a build without CUDA; install one with CUDA, then {reinstall}",
        )
    if name == "cuda" and os.environ.get("MILLION_GPU") == "triton":
        return False, "missing: switched off by MILLION_GPU=triton; unset it"
    if name == "cpu" and os.environ.get("MILLION_CPU_ISA") == "reference":
        return False, "missing: switched off by MILLION_CPU_ISA=reference; unset it"
    if not path.exists():
        programs, what, debian = _COMPILERS[name]
        compiler = any(map(shutil.which, programs))
        why = "torch or the compiler was missing, or it failed," if compiler else f"there was no {what}"
        how = "" if compiler else f"install one (Debian, Ubuntu: apt-get install {debian}), then "
        return (
            False,
            f"missing: not built, {why} when the package was installed; {how}{reinstall} builds it or says why not",
        )
    try:
        torch.ops.load_library(str(path))
        if name == "cuda":
            return True, f"compiled, stable ABI {'.'.join(map(str, STABLE_ABI))}"
        isa = ctypes.CDLL(str(path)).million_cpu_isa
    except (OSError, AttributeError) as error:
        return False, f"missing: {path.name} does not load ({error}); rebuild it: {reinstall}"
    isa.restype = ctypes.c_char_p
    return True, f"compiled, {_NAMES[isa().decode()]}, stable ABI {'.'.join(map(str, STABLE_ABI))}"


def _register_triton() -> str:
    """Lets Triton's kernels serve CUDA tensors, if nothing compiled does and triton is there; what `backends` says about them."""
    if importlib.util.find_spec("triton") is None:
        return "missing: triton is not installed; pip install triton (torch with CUDA brings it along)"
    if _LOADED["cuda"][0]:
        return "available, not in use: the compiled CUDA kernels serve GPUs; MILLION_GPU=triton takes Triton's instead"

    def lazily(name: str):
        def call(*args):
            from million_ops import triton_kernels  # importing triton takes a second, which a CPU need not pay

            return triton_kernels.IMPLEMENTATIONS[name](*args)

        return call

    for name in ("pq_encode", "pq_attention", "pq_attention_lse"):
        LIBRARY.impl(name, lazily(name), "CUDA")
    if torch.version.cuda is None and torch.version.hip is None:
        return f"available, not in use: torch {torch.__version__} is a build without CUDA or ROCm"
    return "available: serves pq_encode and attention on GPUs, compiled by their first call"


_LOADED = {name: _load(name) for name in ("cpu", "cuda")}
_TRITON = _register_triton()


def backends() -> dict[str, str]:
    """What computes the ops in this installation: backend to its state, and for a missing one how to get it."""
    return {
        "reference": "available on every device",
        **{name: status for name, (_, status) in _LOADED.items()},
        "triton": _TRITON,
    }


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels serve tensors on ``device_type`` (else Triton's or the reference)."""
    return device_type in _LOADED and _LOADED[device_type][0]
