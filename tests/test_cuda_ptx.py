"""The CUDA ops without a GPU: host code and compiled kernels executed on the CPU, over the table in cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_static
from cases import DTYPES, IMAGES, TABLE, Draw, arguments, assert_accurate, every_case
from cuda_ptx import SOURCES, Simulator, has_nvcc
from qcsbm_fast.ops.registry import OPS

pytest.importorskip("ptxsim")
if not has_nvcc():
    pytest.skip("needs nvcc to make PTX", allow_module_level=True)

FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES, torch.float16)}
# Convolutions are cuDNN's, the layers of a plain network cuBLAS's.
CPU_OPS = ("attention_block", "convolve", "res_block", "swish_mlp")
CUDA_OPS = [name for name, op in OPS.items() if not op.triton and not name.startswith(CPU_OPS)]
# How a kernel of 2-byte elements that are read eight at a time is mangled.
WIDE = {"bfloat16": ("NS_8bfloat16E", "Li8E"), "float16": ("NS_7float16E", "Li8E")}
# How often a kernel reads or writes 16 bytes at once.
PACKED = {
    ("asymmetry", "asymmetry_kernel"): 3,
    ("bias_act", "bias_act_kernel"): 4,
    ("bias_act", "bias_act_adjoint_kernel"): 6,
    ("fir", "fir_kernel"): 2,
    ("group_norm_silu", "group_norm_silu_kernel"): 7,
    ("group_norm_silu_adjoint", "group_norm_silu_adjoint_kernel"): 10,
    ("scaled_add", "scaled_add_kernel"): 3,
    ("softmax", "softmax_kernel"): 7,
    ("softmax", "softmax_adjoint_kernel"): 11,
}
# Values that an op asks memory and caches for, and those it writes, per element, for two probes where it has tangents;
# what belongs to a row, channel or block comes on top. docs/gpu.md has them for any number.
TRAFFIC = {
    ("asymmetry", "one-probe"): (2, 1),
    ("scaled_add", "add"): (2, 1),
    ("bias_act", "silu"): (1, 1),
    ("bias_act_vjp", "swish"): (2, 1),
    ("bias_act_jvp", "swish"): (3, 3),
    ("bias_act_jvp_vjp", "swish"): (6, 3),
    ("softmax", "softmax"): (3, 1),
    ("softmax_vjp", "softmax"): (4, 1),
    ("softmax_jvp", "probes"): (10, 3),
    ("softmax_jvp_vjp", "both"): (15, 3),
    ("fir", "up"): (24, 4),
    ("fir", "down"): (5.5, 0.25),
    ("group_norm_silu", "silu"): (3, 1),
    ("group_norm_silu_vjp", "silu"): (4.5, 1),
    ("group_norm_silu_jvp", "silu"): (12, 3),
    ("group_norm_silu_jvp_vjp", "silu"): (25.5, 3),
}


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    return Simulator(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "variant", "size"), [case for case in every_case() if case[0] in CUDA_OPS])
def test_accuracy(simulator: Simulator, name: str, variant: str, size: str, dtype: str) -> None:
    call = arguments(TABLE[name], variant, TABLE[name].sizes[size], FLOATS[dtype])
    assert_accurate(name, call, simulator(name, *call))


def calls_of_odd_geometry(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """Calls whose grids the table does not reach: long rows, ragged last blocks, groups within and across packs."""
    d = Draw(dtype)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for probes, batch, dim in ((3, 2, 37), (2, 5, 64), (1, 2, 2056), (4, 1, 1024)):
        calls.append(("asymmetry", (d.normal(probes, batch, dim), d.normal(probes, batch, dim))))
    for size in ((150, 24), (700, 8), (3, 2072)):
        x, tangents = d.normal(*size), d.normal(2, *size)
        vectors = (d.vector(size[-1]), d.vector(size[-1]), "swish", 1.0)
        calls.append(("bias_act_jvp", (x, tangents, *vectors)))
        calls.append(("bias_act_jvp_vjp", (x, tangents, x, tangents, *vectors)))
        calls.append(("softmax_jvp", (x, tangents)))
        calls.append(("softmax_jvp_vjp", (x, tangents, x.softmax(-1), tangents)))
    for b, c, h, w, groups in ((1, 18, 1, 1, 3), (2, 40, 5, 4, 10), (1, 96, 3, 3, 2), (2, 20, 9, 7, 5)):
        x, tangents = 2 * d.images(b, c, h, w) + 1, d.images(2, b, c, h, w)
        call = (x, tangents, d.vector(b, c), d.vector(c), d.vector(c))
        calls.append(("group_norm_silu_jvp", (*call, groups, 1e-6, True)))
        statistics = OPS["group_norm_silu_jvp"].reference(*call, groups, 1e-6, True)[2:]
        calls.append(("group_norm_silu_jvp_vjp", (x, tangents, *call, *statistics, groups, True)))
    for channels in (3, 16, 272):
        x, taps = d.images(2, channels, 5, 4), [0.125, 0.375, 0.3, 0.2]
        calls += [("fir", (x, taps, *numbers)) for numbers in ((1, 1, 0, 2, 1), (3, 2, -1, 4, 3))]
    return calls


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", range(len(calls_of_odd_geometry(torch.float32))))
def test_odd_geometry(simulator: Simulator, number: int, dtype: str) -> None:
    name, call = calls_of_odd_geometry(FLOATS[dtype])[number]
    assert_accurate(name, call, simulator(name, *call))


@pytest.mark.parametrize("name", ["asymmetry", "bias_act_jvp", "softmax_jvp", "scaled_add", "fir"])
def test_misaligned_memory_takes_narrow_accesses(simulator: Simulator, name: str) -> None:
    """A tensor that begins in the middle of 16 bytes: a wide access there would be refused."""

    def shifted(x: Tensor) -> Tensor:
        stored = x.movedim(-3, -1) if x.dim() >= 4 and name in ("scaled_add", "fir") else x
        moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(stored.shape).copy_(stored)
        return moved.movedim(-1, -3) if stored is not x else moved

    variant = next(iter(TABLE[name].variants))
    call = arguments(TABLE[name], variant, (2, 8, 8, 8), torch.float32)
    first, *rest = call
    call = (shifted(first), *rest)
    assert_accurate(name, call, simulator(name, *call))
    assert "Li1E" in simulator.launches[0]
    simulator(name, first, *rest)
    assert "Li4E" in simulator.launches[0]


@pytest.mark.parametrize("name", CUDA_OPS)
def test_registration_refuses_strided_memory(simulator: Simulator, name: str) -> None:
    call = list(arguments(TABLE[name], next(iter(TABLE[name].variants)), (2, 8, 4, 4), torch.float32))
    call[0] = torch.stack([call[0], call[0]], -1)[..., 0]
    with pytest.raises(RuntimeError, match=r"expected (contiguous|channels-last)"):
        simulator(name, *call)


@pytest.mark.parametrize(("name", "variant"), TRAFFIC)
def test_traffic(simulator: Simulator, name: str, variant: str) -> None:
    """Each result is written once; what is read more than once is read as often as the documentation says."""
    size = (4, 64, 16, 16) if TABLE[name].sizes is IMAGES else (64, 512)
    simulator(name, *arguments(TABLE[name], variant, size, torch.float32))
    elements = torch.Size(size).numel()
    for moved, expected in zip((simulator.loaded, simulator.stored), TRAFFIC[name, variant], strict=True):
        assert expected <= moved / 4 / elements <= expected + 0.4


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills(simulator: Simulator, source: str) -> None:
    for name, used in gpu_static.cuda_resources(simulator.ptx[source], 90):
        assert used["spill"] == used["stack"] == 0, name


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("source", "kernel"), PACKED)
def test_aligned_path_moves_16_bytes_at_once(
    simulator: Simulator, source: str, kernel: str, dtype: str
) -> None:
    """Elements of two bytes are never moved one by one; what is narrower belongs to a row, column, sample or group."""
    activation = ("NS_5SwishE",) if source == "bias_act" else ()
    widths = simulator.accesses(source, kernel, *activation, *WIDE[dtype])
    assert widths.count(16) >= PACKED[source, kernel]
    assert set(widths) <= {16, 4}
