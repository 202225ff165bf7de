"""The Triton kernels' PTX, executed on the CPU with bounds, poison and race checks, and what the compiler made of it.

The launchers run as they are: each kernel is compiled ahead of time with the specialisations that the launch would
have had, and simulated in place of the GPU.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_static
from cases import TABLE, arguments, outputs
from qcsbm_fast.ops.registry import OPS

ptxsim = pytest.importorskip("ptxsim")
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

tiles = import_module("qcsbm_fast.kernels.tiles")

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.int64: "i64"}
KERNELS = [
    ("philox", "fill_normal"),
    ("philox", "fill_uniform"),
    ("philox", "fill_sign"),
    ("perturb", "kernel"),
    ("sde_step", "kernel"),
    ("langevin_step", "squares"),
    ("langevin_step", "coefficients"),
    ("denoising_residual", "kernel"),
]
# Rows of a few pieces that end within a tile, aligned and not; rows in a tile's company; one element.
SIZES = {
    "pieces": (2, 8240),
    "odd-pieces": (2, 4133),
    "image": (3, 6, 8),
    "odd": (5, 37),
    "points": (300, 2),
    "one": (1, 1),
}
FLOAT32_EPS = torch.finfo(torch.float32).eps


class Simulated:
    """`kernel[grid](...)` compiled as Triton's launcher would, run by ptxsim."""

    def __init__(self, kernel: Any, config: int, arch: int):
        autotuned = hasattr(kernel, "configs")
        self.function = kernel.fn if autotuned else kernel
        chosen = tiles.CONFIGS[config]
        self.options = {**chosen.kwargs, "num_warps": chosen.num_warps} if autotuned else {}
        self.arch = arch

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int | None = None, **named: Any) -> None:
            options = dict(self.options)
            warps = num_warps or options.pop("num_warps")
            values = {**dict(zip(self.function.arg_names, args, strict=False)), **named, **options}
            signature, constants, multiples = {}, {}, []
            for parameter in self.function.params:
                value = values[parameter.name]
                if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                    constants[parameter.name] = value
                    continue
                signature[parameter.name] = (
                    f"*{NAMES[value.dtype]}"
                    if isinstance(value, Tensor)
                    else "fp32"
                    if isinstance(value, float)
                    else "i32"
                )
                if (
                    not isinstance(value, float)
                    and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
                ):
                    multiples.append(parameter.name)
            ptx, meta = ptxsim.triton_ptx(
                self.function, signature, constants, cc=self.arch, num_warps=warps, divisible_by_16=multiples
            )
            programs = grid(values) if callable(grid) else grid
            run = ptxsim.launch_triton(ptx, meta, programs[0], {n: values[n] for n in meta.args})
            assert not run.races
            assert not run.warnings
            assert not run.uninitialised

        return launch


@pytest.fixture
def poisoned() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def simulate(monkeypatch: pytest.MonkeyPatch, config: int = 0, arch: int = 90) -> None:
    for file, name in KERNELS:
        module = import_module(f"qcsbm_fast.kernels.{file}")
        monkeypatch.setattr(module, name, Simulated(getattr(module, name), config, arch))


def check(name: str, variant: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    entry, op = TABLE[name], OPS[name]
    call = arguments(entry, variant, size, dtype)
    got = outputs(getattr(import_module(f"qcsbm_fast.kernels.{op.triton}"), name)(*call))
    for g, e in zip(got, outputs(op(*call)), strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        if name in ("philox_uniform", "rademacher"):
            assert torch.equal(g, e)
        elif g.numel():
            scale = max(float(e.double().abs().max()), 1.0)
            allowed = (8 * FLOAT32_EPS + (dtype == torch.bfloat16) * torch.finfo(g.dtype).eps) * scale
            assert (g.double() - e.double()).abs().max() <= allowed


CASES = [
    (name, variant, size, dtype)
    for name, op in OPS.items()
    if op.triton
    for variant in TABLE[name].variants
    for size, dtype in (
        *((s, torch.float32) for s in SIZES),
        *((s, torch.bfloat16) for s in ("pieces", "odd")),
    )
]


@pytest.mark.parametrize(
    ("name", "variant", "size", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.")
)
@pytest.mark.usefixtures("poisoned")
def test_simulated(
    monkeypatch: pytest.MonkeyPatch, name: str, variant: str, size: str, dtype: torch.dtype
) -> None:
    """No access out of bounds, no unwritten output, no race; the values are those of the CPU kernel."""
    simulate(monkeypatch)
    check(name, variant, SIZES[size], dtype)


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("config", range(1, len(tiles.CONFIGS)))
@pytest.mark.parametrize("name", ["rademacher", "sde_step"])
@pytest.mark.usefixtures("poisoned")
def test_simulated_tiles(monkeypatch: pytest.MonkeyPatch, name: str, config: int, arch: int) -> None:
    """Every tile that autotuning may choose, for the other generations of GPUs."""
    simulate(monkeypatch, config, arch)
    check(name, next(iter(TABLE[name].variants)), (2, 8240), torch.float32)


@pytest.mark.usefixtures("poisoned")
def test_simulated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)
    for name in ("philox_normal", "langevin_step", "denoising_residual"):
        check(name, next(iter(TABLE[name].variants)), (5, 37), torch.float64)


STATIC = [
    (kernel, element, arch, config)
    for kernel in gpu_static.TRITON
    for element, arch in (("fp32", 90), ("bf16", 80), ("bf16", 100))
    for config in gpu_static.configs(kernel)[slice(None) if arch == 90 else slice(-1, None)]
]


@pytest.mark.parametrize(
    ("kernel", "element", "arch", "config"), STATIC, ids=[f"{k.name}-{e}-{a}-{c}" for k, e, a, c in STATIC]
)
def test_aligned_path(
    kernel: gpu_static.TritonKernel, element: str, arch: int, config: tuple[int, int]
) -> None:
    """No spills, no local memory, and each element moved once, 16 bytes at a time."""
    made = gpu_static.compile_triton(kernel, element, arch, *config)
    used = gpu_static.triton_resources(made.asm["cubin"])
    assert used["stack"] == used["local"] == 0
    assert ".local" not in made.asm["ptx"]
    wide = sum(16 for n in gpu_static.global_accesses(made.asm["ptx"]) if n == 16)
    assert wide * 32 * config[1] / config[0] == kernel.moved * gpu_static.ELEMENT[element]


def test_coefficients_do_not_spill() -> None:
    made = gpu_static.compile_triton(gpu_static.COEFFICIENTS, "fp32", 90, 0, tiles.SUM_WARPS)
    used = gpu_static.triton_resources(made.asm["cubin"])
    assert used["stack"] == used["local"] == 0
