"""Builds the compiled kernels: `million_ops/_cpu.so` and `_cuda.so` from csrc, on any torch >= 2.10 for any torch >= 2.10.

Without a C++ compiler, or without torch where this package is being installed, the package installs without them and
`million_ops.backends()` says so. The CUDA library is built where nvcc is and torch is a CUDA build. ``MILLION_BUILD=cpu`` and
``MILLION_BUILD=cuda`` make a missing library an error (``cuda`` builds it on a CPU torch too: it needs no GPU);
``MILLION_BUILD=none`` skips the build. ``MILLION_CUDA_ARCHS="90 100"`` chooses the GPUs.
torch is found, never imported: pip's isolated build environment has none of its own.
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CPU_SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
KERNELS = ("attention.cpp", "encode.cpp")  # compiled once per instruction set
CUDA_ARCHS = ("80", "90", "100", "120")  # as far as nvcc knows them
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
BUILD = os.environ.get("MILLION_BUILD", "")
STABLE_ABI = (2, 10)  # the oldest torch that the libraries load on
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
if platform.machine() in ("x86_64", "AMD64"):
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "vbmi")]
    ISAS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512, "-mprefer-vector-width=512"]}
else:
    ISAS = {"baseline": []}


def find_torch() -> Path:
    """The torch package that the built libraries will run with. Raises CompileError without one that is new enough."""
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages(), *sys.path):
        torch = Path(folder) / "torch"
        if (torch / "version.py").is_file():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
            if version and tuple(map(int, version.groups())) < STABLE_ABI:
                raise CompileError(f"torch {'.'.join(version.groups())} has no stable ABI, 2.10 or newer is needed")
            return torch
    raise CompileError("no torch beside this Python; install torch first, then this package")


def find_compiler() -> str:
    """The C++ compiler: $CXX, g++ or clang++. Raises CompileError without one."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise CompileError("no C++ compiler found (looked for $CXX, g++, c++, clang++)")


def find_cuda() -> Path:
    """The CUDA toolkit: $CUDA_HOME, nvcc's or /usr/local/cuda. Raises CompileError without one, or where torch has no use for it."""
    if BUILD != "cuda" and re.search(r"cuda[^=]*= None", (find_torch() / "version.py").read_text()):
        raise CompileError("torch is a CPU build; MILLION_BUILD=cuda builds the CUDA kernels all the same")
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    for toolkit in (Path(x) for x in places if x):
        if (toolkit / "bin" / "nvcc").is_file() and (toolkit / "include" / "cuda_runtime.h").is_file():
            return toolkit
    raise CompileError("no CUDA toolkit found (looked at $CUDA_HOME, nvcc on the PATH, /usr/local/cuda)")


def run(*command: str | Path) -> None:
    print(*command, flush=True)
    if subprocess.run([str(x) for x in command]).returncode:
        raise CompileError(f"{command[0]} failed, see above")


class BuildKernels(build_ext):
    """Compiles each library with one plain list of commands."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # no Python version in the name: no Python API inside

    def build_extension(self, ext: Extension) -> None:
        target, device = Path(self.get_ext_fullpath(ext.name)), ext.name.rpartition("_")[2]
        objects = Path(self.build_temp) / device
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch, compiler = find_torch(), find_compiler().split()
        stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", torch / "include"]
        jobs, libraries = (self.cpu_jobs if device == "cpu" else self.cuda_jobs)(compiler, objects, stable)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: run(*job[1:], "-o", job[0]), jobs))
        needed = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
        run(
            *compiler, "-shared", *(job[0] for job in jobs), "-o", target,
            f"-L{torch / 'lib'}", *needed, "-ltorch", "-ltorch_cpu", *libraries,
        )  # fmt: skip

    def cpu_jobs(self, compiler: list[str], objects: Path, stable: list) -> tuple[list[tuple], list[str]]:
        """(object file, command) of every translation unit, and the libraries to link."""
        jobs = [(objects / "bind.o", *compiler, *FLAGS, *stable, "-c", CPU_SOURCES / "bind.cpp")]
        for isa, flags in ISAS.items():
            for source in KERNELS:
                # One rounding a step, so that a token's code does not depend on how a compiler groups the sums.
                exact = ["-ffp-contract=off"] if source == "encode.cpp" else ["-ffp-contract=fast"]
                jobs.append(
                    (objects / f"{source}.{isa}.o", *compiler, *FLAGS, *flags, *exact, f"-DMILLION_ISA={isa}", "-c", CPU_SOURCES / source)
                )  # fmt: skip
        return jobs, []

    def cuda_jobs(self, compiler: list[str], objects: Path, stable: list) -> tuple[list[tuple], list[str]]:
        """The same for CUDA. No torch header reaches nvcc: kernels take raw pointers, bind.cpp is plain C++."""
        toolkit = find_cuda()
        include = ["-DUSE_CUDA", "-isystem", toolkit / "include"]
        jobs = [(objects / "bind.o", *compiler, *FLAGS, *stable, *include, "-c", CUDA_SOURCES / "bind.cpp")]
        chosen = os.environ.get("MILLION_CUDA_ARCHS", "").split()
        if not chosen:
            known = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
            chosen = [x for x in CUDA_ARCHS if f"compute_{x}" in known.split()]
        archs = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in chosen]
        for source in sorted(CUDA_SOURCES.glob("*.cu")):
            jobs.append(
                (
                    objects / f"{source.stem}.o",
                    toolkit / "bin" / "nvcc",
                    *CUDA_FLAGS,
                    *archs,
                    "--threads=0",
                    "-c",
                    source,
                )
            )
        folder = next((x for x in ("lib64", "lib") if (toolkit / x / "libcudart_static.a").is_file()), "lib64")
        return jobs, [f"-L{toolkit / folder}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the libraries use torch's stable ABI and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [Extension(f"million_ops._{x}", sources=[], optional=x != BUILD) for x in ("cpu", "cuda")]
setup(
    ext_modules=[] if BUILD == "none" else extensions,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
