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

import ninja
import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)
# Devices of one generation share a binary; the newest also carries PTX for those to come.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# One copy of every CPU kernel per instruction set, chosen at run time.
INSTRUCTION_SETS = {"baseline": [""]}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = {
        "baseline": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }


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
        sys.exit("QCSBM_CUDA=1 needs nvcc: install the CUDA toolkit (12.4 or newer) and set CUDA_HOME to its folder.")
    if wanted == "1" and torch.version.cuda is None:
        sys.exit("QCSBM_CUDA=1 needs a CUDA build of torch: install one before building without build isolation.")
    if nvcc is None:
        return None, "no nvcc at build time (CUDA_HOME or /usr/local/cuda)"
    if torch.version.cuda is None:
        return None, "built beside a CPU build of torch"
    return nvcc, "built"


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


class NinjaBuild(build_ext):
    """Compiles every object with ninja, then lets setuptools link each extension from its objects."""

    def build_extensions(self) -> None:
        nvcc, cuda_reason = cuda_toolkit()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        common = ["-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-ffp-contract=fast", "-fno-math-errno", *os.environ.get("CXXFLAGS", "").split()]
        stable = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)]
        stable += [f"-isystem{path}" for path in include_paths()]
        python = [f"-isystem{path}" for path in (pybind11.get_include(), *self.include_dirs)]

        compiles: dict[str, list[tuple[str, Path, list[str]]]] = {"qcsbm_fast._ops": [], "qcsbm_fast._host": []}
        ops = compiles["qcsbm_fast._ops"]
        for isa, flags in INSTRUCTION_SETS.items():
            for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
                ops.append(("cxx", source, [*common, *flags, "-fopenmp", f"-DQCSBM_ISA={isa}"]))
        ops += [("cxx", s, [*common, "-O1", *stable]) for s in sorted((ROOT / "csrc/register").glob("*.cpp"))]
        if nvcc:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
            nvcc_flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *cuda_arch_flags(architectures)]
            ops += [("nvcc", s, nvcc_flags) for s in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
            ops += [("cxx", s, [*common, "-O1", *stable]) for s in sorted((ROOT / "csrc/register/cuda").glob("*.cpp"))]
        record = {
            "torch": torch.__version__,
            "compiler": subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.split("\n")[0],
            "instruction_sets": " ".join(INSTRUCTION_SETS),
            "cuda": cuda_reason,
            "cuda_architectures": os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES if nvcc else "",
        }
        (folder / "build_record.h").write_text(f"#define QCSBM_BUILD_RECORD R\"({json.dumps(record)})\"\n")
        host = [*common, *python, f"-I{folder}"]
        compiles["qcsbm_fast._host"].append(("cxx", ROOT / "csrc/host.cpp", host))

        self.run_ninja(folder, compiles, cxx, nvcc)
        for ext in self.extensions:
            ext.extra_objects = [str(folder / name) for name in self.objects[ext.name]]
            ext.depends = ext.extra_objects
        if nvcc:
            cuda_lib = nvcc.parents[1] / "lib64"
            ops_extension = next(e for e in self.extensions if e.name == "qcsbm_fast._ops")
            if any(o.endswith(".cu.o") for o in ops_extension.extra_objects):
                ops_extension.library_dirs.append(str(cuda_lib))
                ops_extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extensions()

    def run_ninja(self, folder: Path, compiles: dict, cxx: str, nvcc: Path | None) -> None:
        lines = ["ninja_required_version = 1.5"]
        lines += ["rule cxx", f"  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule nvcc", f"  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
        self.objects: dict[str, list[str]] = {}
        for extension, jobs in compiles.items():
            self.objects[extension] = []
            for rule, source, flags in jobs:
                isa = next((f.split("=")[1] for f in flags if f.startswith("-DQCSBM_ISA")), "")
                name = "_".join([*source.relative_to(ROOT / "csrc").parts, isa]).rstrip("_") + ".o"
                self.objects[extension].append(name)
                lines += [f"build {name}: {rule} {source}", f"  flags = {' '.join(flags)}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command).returncode:
            sys.exit("qcsbm-fast: compiling failed (see the compiler's messages above).")


setup(
    packages=["qcsbm_fast", *(f"qcsbm_fast.{p}" for p in ("ops", "nn", "sampling", "metrics", "data", "train", "studies")), "qcsbm_fast.kernels"],
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
