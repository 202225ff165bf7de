"""What the compilers make of every GPU kernel, without a GPU: registers, spills, occupancy, access width, bytes, FLOPs.

    python bench/gpu_static.py [--arch 80 90 100]

Triton kernels are compiled with every tile that autotuning may choose, CUDA kernels by nvcc. Per kernel: registers per
thread, spilled and stack bytes, shared memory, the occupancy that these allow, the widest global access, and for
Triton kernels on aligned rows bytes per element by 128-bit accesses against the least that the op must move, and
arithmetic per byte (a fused multiply-add counts two) and machine instructions per element.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
# Per multiprocessor: 64 Ki registers, in units of 256 per warp; threads, blocks and bytes of shared memory.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED = {80: 167936, 90: 233472, 100: 233472}
ELEMENT = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class TritonKernel:
    """A kernel as its launcher compiles it.

    `arguments`: `name:type` with T the element type, A the accumulation type, i64, f32 and f64 as they are, and names
    without a type are 32-bit integers. `moved`: elements that the op must read and write per element.
    """

    name: str
    module: str
    function: str
    arguments: str
    constants: dict[str, Any]
    moved: int
    block: int | None = None
    """The tile of a kernel that is not autotuned."""


_ROWS = "rows cols span"
_SAMPLER = f"x:T score:T a:A b:A c:A state:i64 after:T mean:T {_ROWS}"
_PERTURB = f"x0:T mean:A std:A state:i64 x:T noise:T {_ROWS}"
TRITON = [
    TritonKernel("philox_normal", "philox", "fill_normal", "out:T state:i64 n", {}, 1),
    TritonKernel("philox_uniform", "philox", "fill_uniform", "out:T state:i64 n scale:f32", {"BITS": 8}, 1),
    TritonKernel("rademacher", "philox", "fill_sign", "out:T state:i64 n", {}, 1),
    TritonKernel("perturb", "perturb", "kernel", _PERTURB, {"STORE": True}, 3),
    TritonKernel("perturb, dropped", "perturb", "kernel", _PERTURB, {"STORE": False}, 2),
    TritonKernel("sde_step", "sde_step", "kernel", _SAMPLER, {}, 4),
    TritonKernel(
        "langevin squares", "langevin_step", "squares", f"score:T state:i64 parts:A {_ROWS}", {}, 1, 2048
    ),
    TritonKernel(
        "residual, given",
        "denoising_residual",
        "kernel",
        f"score:T std:A weight:A z:T parts:A gradient:T {_ROWS}",
        {"state": None},
        3,
        2048,
    ),
    TritonKernel(
        "residual, drawn",
        "denoising_residual",
        "kernel",
        f"score:T std:A weight:A state:i64 parts:A gradient:T {_ROWS}",
        {"z": None},
        2,
        2048,
    ),
]
COEFFICIENTS = TritonKernel(
    "langevin coefficients",
    "langevin_step",
    "coefficients",
    "parts:A alpha:A out:A snr:f32 rows pieces",
    {"CHUNK": 512},
    0,
    0,
)


def configs(kernel: TritonKernel) -> list[tuple[int, int]]:
    """(BLOCK, warps) of the tiles that the launcher may choose."""
    tiles = import_module("qcsbm_fast.kernels.tiles")
    if kernel.block is not None:
        return [(kernel.block, tiles.SUM_WARPS)]
    return [(c.kwargs["BLOCK"], c.num_warps) for c in tiles.CONFIGS]


def compile_triton(
    kernel: TritonKernel,
    element: str,
    arch: int,
    block: int,
    warps: int,
    width: int = 4096,
    aligned: bool = True,
) -> Any:
    """Triton's compiled kernel (PTX, cubin, metadata) for rows of at most `width` elements.

    `aligned`: `cols` is a multiple of 16, as the launcher finds out; pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f"qcsbm_fast.kernels.{kernel.module}"), kernel.function)
    function = getattr(function, "fn", function) if hasattr(function, "configs") else function
    types = {"T": f"*{element}", "A": "*fp64" if element == "fp64" else "*fp32", "i64": "*i64"}
    scalars = {"f32": "fp32", "": "i32"}
    signature: dict[str, str] = {}
    for argument in kernel.arguments.split():
        name, _, kind = argument.partition(":")
        signature[name] = types.get(kind) or scalars[kind]
    constants = dict(kernel.constants)
    if block:
        constants["BLOCK"] = block
    if "cols" in signature:
        constants["WIDTH"] = width
    names = function.arg_names
    multiples = [
        n for n, t in signature.items() if t.startswith("*") or (aligned and n in ("cols", "span", "n"))
    ]
    source = ASTSource(
        function,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def triton_resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes that ptxas wrote into the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def sass_instructions(cubin: bytes) -> int:
    """Machine instructions of one thread of a straight-line kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    listing = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", text, re.MULTILINE)
    ends = [i for i, instruction in enumerate(listing) if "EXIT" in instruction]
    return ends[-1] + 1 if ends else len(listing)


def global_accesses(ptx: str) -> list[int]:
    """Bytes of each global load and store in the PTX."""
    found = re.findall(r"\b(?:ld|st)\.(?:\w+\.)*?global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\s", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def arithmetic(ptx: str) -> int:
    """Floating-point and integer operations of one thread of straight-line PTX."""
    fused = len(re.findall(r"\b(?:fma|mad)\.", ptx))
    return 2 * fused + len(
        re.findall(r"\b(?:add|sub|mul|div|sqrt|min|max|neg|and|or|xor|shl|shr|shf|lop3|cvt|setp|selp)\.", ptx)
    )


def occupancy(arch: int, registers: int, threads: int, shared: int) -> float:
    """The share of a multiprocessor's threads that may be resident."""
    per_warp = -(-registers * 32 // 256) * 256
    warps = threads // 32
    blocks = min(BLOCKS, THREADS // threads, REGISTERS // (per_warp * warps))
    if shared:
        blocks = min(blocks, SHARED[arch] // (shared + 1024))
    return blocks * threads / THREADS


def find_nvcc() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    return None


def cuda_ptx(source: Path, arch: int) -> str:
    """PTX of a CUDA source, compiled as setup.py does."""
    nvcc = find_nvcc()
    assert nvcc is not None, "nvcc is neither in CUDA_HOME nor /usr/local/cuda"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = [nvcc, "-ptx", f"-arch=compute_{arch}", "-std=c++20", "-O3", source, "-o", file.name]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return Path(file.name).read_text()


def cuda_resources(ptx: str, arch: int) -> Iterator[tuple[str, dict[str, int]]]:
    """(kernel, registers, stack, spilled and shared bytes, widest access) of every kernel in the PTX."""
    nvcc = find_nvcc()
    assert nvcc is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [nvcc.with_name("ptxas"), "-v", f"-arch=sm_{arch}", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
        r"loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    for name, stack, stores, loads, registers, shared in re.findall(pattern, text, re.DOTALL):
        body = ptx[ptx.index(f".entry {name}(") :]
        body = body[: body.index("\n}")]
        numbers = {"reg": registers, "stack": stack, "spill": int(stores) + int(loads), "shared": shared or 0}
        yield (
            name,
            {**{k: int(v) for k, v in numbers.items()}, "widest": max(global_accesses(body), default=0)},
        )


def print_triton(architectures: list[int]) -> None:
    print(f"{'Triton kernel':<24}{'sm':>4}{'type':>6}{'tile':>6}{'warps':>6}{'regs':>6}{'spill':>6}", end="")
    print(f"{'shared':>8}{'occup.':>8}{'widest':>8}{'B/elem':>8}{'least':>7}{'op/B':>7}{'instr/elem':>12}")
    for kernel in TRITON:
        for element in ("fp32", "bf16"):
            for arch in architectures:
                for block, warps in configs(kernel):
                    made = compile_triton(kernel, element, arch, block, warps)
                    used = triton_resources(made.asm["cubin"])
                    accesses = global_accesses(made.asm["ptx"])
                    per_element = 32 * warps / block
                    moved = sum(a for a in accesses if a == 16) * per_element
                    operations = arithmetic(made.asm["ptx"]) * per_element
                    share = occupancy(arch, used["reg"], 32 * warps, made.metadata.shared)
                    print(
                        f"{kernel.name:<24}{arch:>4}{element:>6}{block:>6}{warps:>6}{used['reg']:>6}"
                        f"{used['local'] + used['stack']:>6}{made.metadata.shared:>8}{share:>8.0%}"
                        f"{max(accesses):>8}{moved:>8.1f}{kernel.moved * ELEMENT[element]:>7}"
                        f"{operations / moved:>7.1f}{sass_instructions(made.asm['cubin']) * per_element:>12.0f}"
                    )


def readable(name: str) -> str:
    """`kernel<template arguments>` of a mangled name."""
    kernel, template = re.findall(r"\d+([a-z_]+_kernel)I(.*?)E?Ev", name)[0]
    types = {"f": "float", "d": "double"}
    words = ["".join(found) for found in re.findall(r"NS_\d+([a-zA-Z]+?\d*)E|Li(\d+)|([fd])", template)]
    return f"{kernel}<{', '.join(types.get(word, word) for word in words)}>"


def print_cuda(architectures: list[int]) -> None:
    print(
        f"\n{'CUDA kernel':<58}{'sm':>4}{'regs':>6}{'stack':>7}{'spill':>6}{'shared':>8}{'occup.':>8}{'widest':>8}"
    )
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for arch in architectures:
            for name, used in cuda_resources(cuda_ptx(source, arch), arch):
                share = occupancy(arch, used["reg"], 256, used["shared"])
                print(
                    f"{readable(name):<58}{arch:>4}{used['reg']:>6}{used['stack']:>7}{used['spill']:>6}"
                    f"{used['shared']:>8}{share:>8.0%}{used['widest']:>8}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    options = parser.parse_args()
    try:
        print_triton(options.arch)
    except ImportError as error:
        print(f"no Triton kernels: {error}", file=sys.stderr)
    if find_nvcc():
        print_cuda(options.arch)
    else:
        print("no CUDA kernels: nvcc is neither in CUDA_HOME nor /usr/local/cuda", file=sys.stderr)


if __name__ == "__main__":
    main()
