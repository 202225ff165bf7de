"""CUDA ops executed on the CPU: their own host code, and their kernels' PTX in ptxsim.

The registrations and launchers of csrc are compiled as they are, but registered for CPU tensors, and linked with
cuda_runtime.cpp in place of CUDA's runtime: every line that the host of a GPU runs is run here, and each launch goes to
the simulator with the grid, the block and the arguments that the launcher chose.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

import gpu_static
from qcsbm_fast.ops.registry import OPS

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
# What makes the registrations take CPU tensors and the stand-in's stream.
CHANGES = (
    ("(qcsbm, CUDA, m)", "(qcsbm_simulated, CPU, m)"),
    ("is_cuda()", "is_cpu()"),
    ('"libtorch_cuda.so"', '"libqcsbm_simulated.so"'),
)
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)


def has_nvcc() -> bool:
    return gpu_static.find_nvcc() is not None


class Simulator:
    """The CUDA ops, each callable as `simulator(name, *arguments)` on CPU tensors, compiled into `folder`."""

    def __init__(self, folder: Path):
        import ptxsim

        self.folder = folder
        self._build()
        self.ptx = {stem: (folder / f"{stem}.ptx").read_text() for stem in SOURCES}
        self._modules = {stem: ptxsim.Module(ptx) for stem, ptx in self.ptx.items()}
        self._kernels = {
            name: self._modules[stem]
            for stem, ptx in self.ptx.items()
            for name in re.findall(r"\.entry (\w+)", ptx)
        }
        self._buffers: list[np.ndarray] = []
        self._failure: Exception | None = None
        self.launches: list[str] = []
        self.loaded = self.stored = 0  # bytes of global memory that the last call asked for
        self._library = torch.library.Library("qcsbm_simulated", "DEF")
        for op in OPS.values():
            self._library.define(str(op.overload._schema).removeprefix("qcsbm::"))
        torch.ops.load_library(str(folder / "libqcsbm_simulated.so"))
        self._callback = LAUNCH(self._launch)
        ctypes.CDLL(str(folder / "libqcsbm_simulated.so")).simulate_launches_with(self._callback)

    def __call__(self, name: str, *arguments: Any) -> tuple[Tensor, ...]:
        """What the op returns; every memory that it allocates is poisoned first.

        Out-of-bounds accesses, races and reads of unwritten memory raise.
        """
        op = getattr(torch.ops.qcsbm_simulated, name).default
        self._buffers = [storage_bytes(a) for a in arguments if isinstance(a, Tensor) and a.numel()]
        self._failure, self.launches = None, []
        self.loaded = self.stored = 0
        try:
            with Allocations(self._buffers):
                result = op._op_dk(torch._C.DispatchKey.CPU, *arguments)
        except RuntimeError as error:
            raise self._failure or error from error
        return result if isinstance(result, tuple) else (result,)

    def _launch(self, name: bytes, grid: Any, block: Any, values: Any, shared: int) -> int:
        try:
            kernel = name.decode()
            self.launches.append(kernel)
            module = self._kernels[kernel]
            run = module.launch(
                kernel,
                grid=tuple(grid.contents),
                block=tuple(block.contents),
                args=[
                    self._argument(parameter, values[i])
                    for i, parameter in enumerate(module.program(kernel).function.params)
                ],
                shared_bytes=shared,
            )
            self.loaded += run.stats.bytes_loaded["global"]
            self.stored += run.stats.bytes_stored["global"]
            faults = [*run.races, *run.warnings, *run.uninitialised]
            assert not faults, (kernel, faults)
        except Exception as error:
            self._failure = error
            return 1
        return 0

    def _argument(self, parameter: Any, value: int) -> Any:
        """The argument at address `value` for the simulator: a place in a known buffer, or bytes."""
        from ptxsim import Pointer

        raw = ctypes.string_at(value, parameter.size)
        if parameter.size == 8:
            address = int.from_bytes(raw, "little")
            for buffer in self._buffers:
                offset = address - buffer.ctypes.data
                if 0 <= offset < buffer.nbytes:
                    return Pointer(buffer, offset)
        return raw  # a number, a struct, null, or an address that the simulator will refuse to touch

    def _build(self) -> None:
        source = self.folder / "csrc"
        shutil.copytree(CSRC, source)
        changed = dict.fromkeys(CHANGES, 0)
        for path in (source / "register/cuda").iterdir():
            text = path.read_text()
            for old, new in CHANGES:
                changed[old, new] += text.count(old)
                text = text.replace(old, new)
            path.write_text(text)
        assert all(changed.values()), "the registrations have changed: see CHANGES"
        nvcc = gpu_static.find_nvcc()
        cxx = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-fPIC", "-c", "-DTORCH_STABLE_ONLY"]
        cxx += [f"-isystem{path}" for path in include_paths()]
        device = [
            str(nvcc),
            "-std=c++20",
            "-O3",
            "-Xcompiler=-fPIC",
            "-gencode=arch=compute_90,code=compute_90",
        ]
        commands = [
            [
                *device,
                "--keep",
                f"--keep-dir={self.folder}",
                "-c",
                f"{source}/cuda/{stem}.cu",
                "-o",
                f"{stem}.cu.o",
            ]
            for stem in SOURCES
        ]
        hosts = [*(source / "register/cuda").glob("*.cpp"), Path(__file__).parent / "cuda_runtime.cpp"]
        commands += [[*cxx, str(path), "-o", f"{path.stem}.o"] for path in hosts]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, commands))
        objects = [str(path) for path in self.folder.glob("*.o")]
        # its own symbols before those that a CUDA build of torch has
        link = [
            "-shared",
            "-Wl,-Bsymbolic",
            f"-L{TORCH_LIB_PATH}",
            "-ltorch_cpu",
            "-o",
            "libqcsbm_simulated.so",
        ]
        link += ["-Wl,-soname,libqcsbm_simulated.so"]
        self._run([cxx[0], *objects, *link])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def kernel_name(self, source: str, kernel: str, *template: str) -> str:
        """The mangled name of `kernel<template...>`, each argument as it is mangled."""
        names = re.findall(rf"\.entry (\w*?\d+{kernel}I\w*)", self.ptx[source])
        return next(n for n in names if n.partition(f"{kernel}I")[2].startswith("".join(template) + "E"))

    def accesses(self, source: str, kernel: str, *template: str) -> list[int]:
        """Bytes of each global access of a kernel, in the order of its PTX."""
        ptx = self.ptx[source]
        body = ptx[ptx.index(f".entry {self.kernel_name(source, kernel, *template)}(") :]
        return gpu_static.global_accesses(body[: body.index("\n}")])


class Allocations(TorchDispatchMode):
    """Poisons what is allocated under it and adds it to `buffers`."""

    def __init__(self, buffers: list[np.ndarray]):
        super().__init__()
        self.buffers = buffers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default) and result.numel():
            self.buffers.append(storage_bytes(result))
            result.fill_(torch.nan)
        return result


def storage_bytes(x: Tensor) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()
