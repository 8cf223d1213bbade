"""Builds the compiled kernels: `million_ops/_cpu.so` from csrc/cpu, on any torch >= 2.10 for any torch >= 2.10.

Without a C++ compiler, or without torch where this package is being installed, the package installs without them and
`million_ops.backends()` says so. ``MILLION_BUILD=cpu`` makes that an error; ``MILLION_BUILD=none`` skips the build.
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
KERNELS = ("attention.cpp", "encode.cpp")  # compiled once per instruction set
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


def run(*command: str | Path) -> None:
    print(*command, flush=True)
    if subprocess.run([str(x) for x in command]).returncode:
        raise CompileError(f"{command[0]} failed, see above")


class BuildKernels(build_ext):
    """Compiles each library with one plain list of commands."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # no Python version in the name: no Python API inside

    def build_extension(self, ext: Extension) -> None:
        self.build_cpu(Path(self.get_ext_fullpath(ext.name)))

    def build_cpu(self, target: Path) -> None:
        torch, compiler, objects = find_torch(), find_compiler().split(), Path(self.build_temp) / "cpu"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", torch / "include"]
        jobs = [(CPU_SOURCES / "bind.cpp", objects / "bind.o", stable)]
        for isa, flags in ISAS.items():
            for source in KERNELS:
                # One rounding a step, so that a token's code does not depend on how a compiler groups the sums.
                exact = ["-ffp-contract=off"] if source == "encode.cpp" else ["-ffp-contract=fast"]
                jobs.append(
                    (CPU_SOURCES / source, objects / f"{source}.{isa}.o", [*flags, *exact, f"-DMILLION_ISA={isa}"])
                )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: run(*compiler, *FLAGS, *job[2], "-c", job[0], "-o", job[1]), jobs))
        needed = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
        run(
            *compiler,
            "-shared",
            *(job[1] for job in jobs),
            "-o",
            target,
            f"-L{torch / 'lib'}",
            *needed,
            "-ltorch",
            "-ltorch_cpu",
        )


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the libraries use torch's stable ABI and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# csrc/cuda becomes `million_ops._cuda` here, with a build_cuda beside build_cpu.
extensions = [] if BUILD == "none" else [Extension("million_ops._cpu", sources=[], optional=BUILD != "cpu")]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
