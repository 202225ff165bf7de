"""Builds the two binary modules and maps kernels/ to qcsbm_fast.kernels.

`qcsbm_fast._ops` holds the ops, on torch's stable ABI: built against one torch, it runs with every torch >= 2.10.
`qcsbm_fast._host` (pybind11) holds what has no tensors. Ninja compiles the objects, setuptools links them.

Environment: QCSBM_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS, NVCC_APPEND_FLAGS.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import ninja
import pybind11
import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)
# Devices of one generation share a binary; the newest also carries PTX for those to come.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# One copy of every CPU kernel per instruction set, chosen at run time.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = {
        "baseline": ["-O1"],  # for processors from before 2013: quick to compile
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
# For processors with matrix registers: beside all of avx512's. Images have kernels of their own from avx2 on.
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16", "-mavx512bf16"]
# With torch's headers: compiled once for all of csrc/register.
REGISTER_HEADER = "register.h"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or /usr/local/cuda; never the first on PATH, which may be a wrapper without a toolkit."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    return None


def cuda_toolkit() -> tuple[Path | None, str]:
    """The nvcc to build with, or None, and the reason, for the build record."""
    wanted = os.environ.get("QCSBM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"QCSBM_CUDA: expected auto, 0 or 1, got {wanted!r}")
    nvcc = find_nvcc()
    if wanted == "0":
        return None, "switched off at build time by QCSBM_CUDA=0"
    if wanted == "1" and nvcc is None:
        sys.exit(
            "QCSBM_CUDA=1 needs nvcc: install the CUDA toolkit (12.4 or newer) and set CUDA_HOME to its folder."
        )
    if wanted == "1" and torch.version.cuda is None:
        sys.exit(
            "QCSBM_CUDA=1 needs a CUDA build of torch: install one before building without build isolation."
        )
    if nvcc is None:
        return None, "no nvcc at build time (CUDA_HOME or /usr/local/cuda)"
    if torch.version.cuda is None:
        return None, "built beside a CPU build of torch"
    return nvcc, "built"


class Edge(NamedTuple):
    """One compiler call; `variant` tells apart the objects of one source, `header` is one that it has compiled."""

    rule: str
    source: Path
    flags: list[str]
    variant: str = ""
    header: str = ""

    @property
    def object(self) -> str:
        if self.source.suffix == ".h":
            return f"{self.source.name}.gch"
        return "_".join([*self.source.relative_to(ROOT / "csrc").parts, self.variant]).rstrip("_") + ".o"


def sources(pattern: str) -> list[Path]:
    return sorted((ROOT / "csrc").glob(pattern))


def cuda_arch_flags(architectures: str) -> list[str]:
    """-gencode flags of a TORCH_CUDA_ARCH_LIST such as `8.0;9.0+PTX`."""
    flags = []
    for entry in architectures.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("a").isdigit():
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def has_amx_flags(cxx: str) -> bool:
    """Whether the compiler knows the instructions (GCC 11, Clang 12, on x86-64 Linux)."""
    command = [cxx, *AMX_FLAGS, "-fsyntax-only", "-x", "c++", os.devnull]
    known = sys.platform == "linux" and "avx512" in INSTRUCTION_SETS
    return known and subprocess.run(command, capture_output=True).returncode == 0


def build_record(cxx: str, instruction_sets: list[str], cuda: str, architectures: str) -> str:
    """What `qcsbm info` tells of the build, as a C++ header."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    record = {
        "torch": torch.__version__,
        "compiler": version,
        "instruction_sets": " ".join(instruction_sets),
        "cuda": cuda,
        "cuda_architectures": architectures,
    }
    return f'#define QCSBM_BUILD_RECORD R"({json.dumps(record)})"\n'


class NinjaBuild(build_ext):
    """Compiles every object with ninja, then lets setuptools link each extension from its objects."""

    def build_extensions(self) -> None:
        nvcc, cuda = cuda_toolkit()
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES if nvcc else ""
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        # Not build_temp, which is a new folder for each editable install: ninja would start afresh.
        folder = ROOT / "build" / f"{sys.platform}-{platform.machine()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        instruction_sets = dict(INSTRUCTION_SETS)
        if has_amx_flags(cxx):
            instruction_sets["amx"] = [*INSTRUCTION_SETS["avx512"], *AMX_FLAGS]
        headers = {
            "build_record.h": build_record(cxx, [*instruction_sets], cuda, architectures),
            REGISTER_HEADER: f'#include "{ROOT}/csrc/register/common.h"\n',
        }
        for name, text in headers.items():  # one that is as it was keeps its time, and what it makes
            if not (folder / name).exists() or (folder / name).read_text() != text:
                (folder / name).write_text(text)

        edges = self.edges(folder, architectures, instruction_sets)
        self.run_ninja(folder, edges, cxx, nvcc)
        for extension in self.extensions:
            extension.extra_objects = [str(folder / edge.object) for edge in edges[extension.name]]
            extension.depends = extension.extra_objects
            if nvcc and extension.name == "qcsbm_fast._ops":
                extension.library_dirs.append(str(nvcc.parents[1] / "lib64"))
                extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extensions()

    def edges(
        self, folder: Path, architectures: str, instruction_sets: dict[str, list[str]]
    ) -> dict[str, list[Edge]]:
        """What to compile for each extension."""
        common = ["-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-ffp-contract=fast", "-fno-math-errno", *os.environ.get("CXXFLAGS", "").split()]
        target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
        detect = ["-DQCSBM_AMX"] * ("amx" in instruction_sets)
        torch_flags = [
            *common,
            *detect,
            "-O1",
            "-DTORCH_STABLE_ONLY",
            target,
            *(f"-isystem{p}" for p in include_paths()),
        ]
        python = [f"-isystem{path}" for path in (pybind11.get_include(), *self.include_dirs)]

        ops: list[Edge] = []
        if architectures:  # first: these take longest
            nvcc_flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            nvcc_flags += cuda_arch_flags(architectures)
            ops += [Edge("nvcc", source, nvcc_flags) for source in sources("cuda/*.cu")]
            ops += [Edge("cxx", source, torch_flags) for source in sources("register/cuda/*.cpp")]
        for isa, flags in instruction_sets.items():
            isa_flags = [*common, *flags, "-fopenmp", f"-DQCSBM_ISA={isa}"]
            images = {"avx2": "vectors", "avx512": "vectors", "amx": "amx"}.get(isa)
            own = [*sources("images/*.cpp"), *sources(f"{images}/*.cpp")] if images else []
            ops += [Edge("cxx", source, isa_flags, isa) for source in [*sources("cpu/*.cpp"), *own]]
        header = Edge("cxx", folder / REGISTER_HEADER, [*torch_flags, "-x", "c++-header"])
        torch_flags = [*torch_flags, "-include", REGISTER_HEADER]
        ops += [
            Edge("cxx", source, torch_flags, header=header.object) for source in sources("register/*.cpp")
        ]
        host = Edge("cxx", ROOT / "csrc/host.cpp", [*common, *detect, "-O1", *python, f"-I{folder}"])
        return {"": [header], "qcsbm_fast._ops": ops, "qcsbm_fast._host": [host]}

    def run_ninja(self, folder: Path, edges: dict[str, list[Edge]], cxx: str, nvcc: Path | None) -> None:
        lines = ["ninja_required_version = 1.5"]
        for rule, compiler in (("cxx", cxx), ("nvcc", nvcc)):
            lines += [f"rule {rule}", f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        for edge in (edge for group in edges.values() for edge in group):
            needs = f" | {edge.header}" if edge.header else ""
            lines += [f"build {edge.object}: {edge.rule} {edge.source}{needs}"]
            lines += [f"  flags = {' '.join(edge.flags)}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode:
            sys.exit("qcsbm-fast: compiling failed (see the compiler's messages above).")


setup(
    packages=[*find_packages(include=["qcsbm_fast", "qcsbm_fast.*"]), "qcsbm_fast.kernels"],
    package_dir={"qcsbm_fast.kernels": "kernels"},
    ext_modules=[
        Extension(
            "qcsbm_fast._ops",
            [],
            libraries=["torch_cpu"],
            library_dirs=library_paths(),
            extra_link_args=["-fopenmp"],
            language="c++",
            py_limited_api=True,
        ),
        Extension("qcsbm_fast._host", [], language="c++"),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
