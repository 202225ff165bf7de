"""The CUDA kernels over rows (bias and activation, softmax): their PTX, executed on the CPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_ptx import MANGLED, TOLERANCE, accesses_of, has_nvcc, launch, poisoned
from qcsbm_fast.ops.registry import OPS, accumulate_dtype

ptxsim = pytest.importorskip("ptxsim")
if not has_nvcc():
    pytest.skip("needs nvcc to make PTX", allow_module_level=True)

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MANGLED}
ACTIVATIONS = {"swish": "NS_5SwishE", "elu": "NS_3EluE", "leaky_relu": "NS_9LeakyReluE"}
# (rows, cols): one number, fewer columns than a pack, several blocks of rows, columns for two blocks.
SIZES = [(1, 1), (7, 3), (150, 24), (700, 8), (3, 2072)]


def draw(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Pack, packs of a block and blocks of rows, as the launcher has them."""
    pack = 16 // dtype.itemsize
    pack = pack if cols % pack == 0 else 1
    packs = min(cols // pack, 256)
    return pack, packs, -(-rows // (256 // packs * 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "probes"), [("swish", 2), ("elu", 1), ("leaky_relu", 0)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bias_act(size: tuple[int, int], kind: str, probes: int, dtype: str) -> None:
    """Value and tangents, then the joint adjoint; with the learnt parameter for Swish, without bias for LeakyReLU."""
    t, (rows, cols) = DTYPES[dtype], size
    wide = accumulate_dtype(t)
    g, x = (draw(rows, cols, seed=i, dtype=t) for i in (0, 1))
    gdot, tangents = (draw(probes, rows, cols, seed=i, dtype=t) for i in (2, 3))
    bias = draw(cols, seed=4, dtype=wide) if kind != "leaky_relu" else None
    p = draw(cols, seed=5, dtype=wide) if kind == "swish" else None
    pack, packs, chunks = cut(rows, cols, t)
    columns = ptxsim.Struct("qiii", rows, cols, packs, probes)
    template = (ACTIVATIONS[kind], MANGLED[t], f"Li{pack}E")
    grid = chunks * -(-cols // pack // packs)

    y, ydot = poisoned(rows, cols, dtype=t), poisoned(probes, rows, cols, dtype=t)
    args = [x, tangents, bias, p, 0.7, y, ydot, columns]
    launch("bias_act.cu", "bias_act_kernel", template, grid, 256, args)
    expected = OPS["bias_act_jvp"].reference(x, tangents, bias, p, kind, 0.7)
    for ours, theirs in zip((y, ydot), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[t])

    gx, gt = poisoned(rows, cols, dtype=t), poisoned(probes, rows, cols, dtype=t)
    shares, gbias, gp = (poisoned(*s, dtype=wide) for s in ((2, chunks, cols), (cols,), (cols,)))
    value = None if kind == "swish" else g
    args = [value, gdot, x, tangents, bias, p, 0.7, gx, gt, shares, chunks, columns]
    launch("bias_act.cu", "bias_act_adjoint_kernel", template, grid, 256, args)
    args = [shares, gbias, gp, chunks, cols]
    launch("bias_act.cu", "sum_chunks_kernel", (MANGLED[wide],), -(-cols // 256), 256, args)
    expected = OPS["bias_act_jvp_vjp"].reference(value, gdot, x, tangents, bias, p, kind, 0.7)
    got = (gx, gt, gbias if bias is not None else gbias[:0], gp if p is not None else gp[:0])
    for ours, theirs in zip(got, expected, strict=True):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        tolerance = TOLERANCE[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_softmax(size: tuple[int, int], probes: int, dtype: str) -> None:
    """Value and tangents, then the joint adjoint, with and without a cotangent of the value."""
    t, (rows, cols) = DTYPES[dtype], size
    g, z = (draw(rows, cols, seed=i, dtype=t) for i in (0, 1))
    gdot, tangents = (draw(probes, rows, cols, seed=i, dtype=t) for i in (2, 3))
    template = (MANGLED[t], f"Li{cut(rows, cols, t)[0]}E")
    p, pdot = poisoned(rows, cols, dtype=t), poisoned(probes, rows, cols, dtype=t)
    sizes = [rows, cols, probes]
    launch("softmax.cu", "softmax_kernel", template, -(-rows // 8), 256, [z, tangents, p, pdot, *sizes])
    for ours, theirs in zip((p, pdot), OPS["softmax_jvp"].reference(z, tangents), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[t])

    value, p = None if probes == 2 else g, z.softmax(-1)
    gz, gd = poisoned(rows, cols, dtype=t), poisoned(probes, rows, cols, dtype=t)
    dots = poisoned(probes, rows, 2, dtype=accumulate_dtype(t))
    args = [value, gdot, p, tangents, gz, gd, dots, *sizes]
    launch("softmax.cu", "softmax_adjoint_kernel", template, -(-rows // 8), 256, args)
    expected = OPS["softmax_jvp_vjp"].reference(value, gdot, p, tangents)
    for ours, theirs in zip((gz, gd), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[t])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_aligned_path_moves_16_bytes_at_once(dtype: str) -> None:
    """Elements of two bytes are never moved one by one; what is narrower belongs to a column or a row."""
    template = (MANGLED[DTYPES[dtype]], "Li8E")
    for kernel, count in (("bias_act_kernel", 4), ("bias_act_adjoint_kernel", 6)):
        widths = accesses_of("bias_act.cu", kernel, ACTIVATIONS["swish"], *template)
        assert widths.count(16) >= count
        assert set(widths) <= {16, 4}
    for kernel, count in (("softmax_kernel", 7), ("softmax_adjoint_kernel", 11)):
        widths = accesses_of("softmax.cu", kernel, *template)
        assert widths.count(16) >= count
        assert set(widths) <= {16, 4}
