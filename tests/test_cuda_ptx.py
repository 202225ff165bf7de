"""The CUDA kernels' PTX, executed on the CPU with bounds, poison and race checks, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gpu_static
from cuda_ptx import (
    CSRC,
    MANGLED,
    TOLERANCE,
    accesses_of,
    has_nvcc,
    launch,
    poisoned,
    ptx_of,
)
from qcsbm_fast.ops.registry import OPS, accumulate_dtype

ptxsim = pytest.importorskip("ptxsim")
if not has_nvcc():
    pytest.skip("needs nvcc to make PTX", allow_module_level=True)

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in MANGLED}
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))


def draw(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills(source: str) -> None:
    for name, used in gpu_static.cuda_resources(ptx_of(source), 90):
        assert used["spill"] == used["stack"] == 0, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("probes", "batch", "dim", "threads"),
    [(1, 3, 2, 32), (3, 2, 37, 32), (2, 5, 64, 64), (1, 2, 2056, 256), (4, 1, 1024, 256)],
)
def test_asymmetry(dtype: str, probes: int, batch: int, dim: int, threads: int) -> None:
    t = DTYPES[dtype]
    jv, vjp = (draw(probes, batch, dim, seed=seed, dtype=t) for seed in (0, 1))
    expected = OPS["asymmetry"].reference(jv, vjp)
    pack = 16 // t.itemsize
    pack = pack if dim % pack == 0 else 1
    vectors = [poisoned(batch, dtype=accumulate_dtype(t)) for _ in range(3)]
    seed = poisoned(*jv.shape, dtype=t)
    launch(
        "asymmetry.cu",
        "asymmetry_kernel",
        (MANGLED[t], f"Li{pack}E"),
        batch,
        threads,
        [jv, vjp, *vectors, seed, dim, probes],
    )
    for ours, theirs in zip([*vectors, seed], expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[t])


# (batch, channels, height, width, groups): one pixel, groups within and across packs, ragged last block, long groups.
IMAGES = [(1, 6, 1, 1, 3), (2, 8, 3, 5, 2), (2, 40, 5, 4, 10), (1, 96, 3, 3, 2), (2, 20, 9, 7, 5)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(-1, -3)


def norm_problem(
    size: tuple[int, ...], probes: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], tuple[int, int, int]]:
    """Images `(*, H, W, C)`: g, gdot, x, tangents; bias, gamma, beta; (pack, span, blocks) as the launcher has them."""
    b, c, h, w, groups = size
    images = [draw(*lead, b, h, w, c, seed=i, dtype=dtype) for i, lead in enumerate([(), (probes,)] * 2)]
    images[2] = 2 * images[2] + 1
    wide = accumulate_dtype(dtype)
    vectors = [draw(*s, seed=9 + i, dtype=wide) for i, s in enumerate([(b, c), (c,), (c,)])]
    pack = 16 // dtype.itemsize
    pack = pack if c % pack == 0 else 1
    width = span = c // groups
    while span < c and (span % pack or span * dtype.itemsize < 64):
        span += width
    return images, vectors, (pack, span, b * -(-c // span))


def norm_geometry(
    size: tuple[int, ...], probes: int, dtype: torch.dtype, pack: int, span: int
) -> tuple[object, int]:
    b, c, h, w, groups = size
    images = ptxsim.Struct("qqiiii", b, h * w, c, groups, span, probes)
    return images, accumulate_dtype(dtype).itemsize * (256 * pack + span + 2 * (span // (c // groups)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [0, 1, 2])
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_group_norm_silu(size: tuple[int, ...], probes: int, dtype: str) -> None:
    t, (b, c, *_, groups) = DTYPES[dtype], size
    (_, _, x, tangents), vectors, (pack, span, blocks) = norm_problem(size, probes, t)
    silu, wide = probes != 2, accumulate_dtype(t)
    outs = [poisoned(*x.shape, dtype=t), poisoned(*tangents.shape, dtype=t)]
    outs += [poisoned(b, groups, 2, dtype=wide), poisoned(probes, b, groups, 2, dtype=wide)]
    images, shared = norm_geometry(size, probes, t, pack, span)
    launch(
        "group_norm_silu.cu",
        "group_norm_silu_kernel",
        (MANGLED[t], f"Li{pack}E"),
        blocks,
        256,
        [x, tangents, *vectors, *outs, images, 1e-6, silu],
        shared,
    )
    call = (channels_last(x), channels_last(tangents), *vectors, groups, 1e-6, silu)
    for ours, theirs in zip(outs, OPS["group_norm_silu_jvp"].reference(*call), strict=True):
        ours = channels_last(ours) if ours.dtype == t and ours.shape[-1] == c and ours.dim() > 3 else ours
        torch.testing.assert_close(ours, theirs, **TOLERANCE[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [0, 1, 2])
@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_group_norm_silu_adjoint(size: tuple[int, ...], probes: int, dtype: str) -> None:
    t, (b, c, *_, groups) = DTYPES[dtype], size
    (g, gdot, x, tangents), vectors, (pack, span, blocks) = norm_problem(size, probes, t)
    value = None if probes == 2 else g
    wide = accumulate_dtype(t)
    call = (channels_last(x), channels_last(tangents), *vectors, groups)
    statistics = OPS["group_norm_silu_jvp"].reference(*call, 1e-6, True)[2:]
    gx, gt = poisoned(*x.shape, dtype=t), poisoned(*tangents.shape, dtype=t)
    gbias, ggamma, gbeta = (poisoned(*v.shape, dtype=wide) for v in vectors)
    means, shares = poisoned(probes, b, groups, 2, dtype=wide), poisoned(2, b, c, dtype=wide)
    images, shared = norm_geometry(size, probes, t, pack, span)
    launch(
        "group_norm_silu_adjoint.cu",
        "group_norm_silu_adjoint_kernel",
        (MANGLED[t], f"Li{pack}E"),
        blocks,
        256,
        [value, gdot, x, tangents, *vectors, *statistics, gx, gt, gbias, means, shares, images, True],
        shared,
    )
    launch(
        "group_norm_silu_adjoint.cu",
        "sum_samples_kernel",
        (MANGLED[wide],),
        1,
        256,
        [shares, ggamma, gbeta, b, c],
    )
    expected = OPS["group_norm_silu_jvp_vjp"].reference(
        None if value is None else channels_last(value),
        channels_last(gdot),
        *call[:-1],
        *statistics,
        groups,
        True,
    )
    got = (channels_last(gx), channels_last(gt), gbias, ggamma, gbeta)
    # Groups of two or three elements leave differences near 0 of values near 1 / std.
    scale = max(10.0, *(float(e.abs().max()) for e in expected if e.numel()))
    for ours, theirs in zip(got, expected, strict=True):
        tolerance = TOLERANCE[ours.dtype if t == torch.float64 or ours.dtype == t else torch.float32]
        torch.testing.assert_close(ours, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 16, 272])
@pytest.mark.parametrize(
    ("up", "down", "pad", "rows", "cols"),
    [(2, 1, 2, 10, 6), (1, 2, 1, 3, 2), (1, 1, 0, 2, 1), (3, 2, -1, 4, 3)],
    ids=["up", "down", "same", "cropped"],
)
def test_fir(up: int, down: int, pad: int, rows: int, cols: int, channels: int, dtype: str) -> None:
    t = DTYPES[dtype]
    x, taps = draw(2, 5, 4, channels, seed=0, dtype=t), [0.125, 0.375, 0.3, 0.2]
    pack = 16 // t.itemsize
    pack = pack if channels % pack == 0 else 1
    y = poisoned(2, rows, cols, channels, dtype=t)
    letter = "d" if t == torch.float64 else "f"
    filter_ = ptxsim.Struct(f"32{letter}4i", *taps, *[0.0] * 28, 4, up, down, pad)
    sizes = ptxsim.Struct("q5i", 2, 5, 4, channels, rows, cols)
    launch("fir.cu", "fir_kernel", (MANGLED[t], f"Li{pack}E"), 2 * rows, 256, [x, y, filter_, sizes])
    expected = OPS["fir"].reference(channels_last(x), taps, up, down, pad, rows, cols)
    torch.testing.assert_close(channels_last(y), expected, **TOLERANCE[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 2064])
def test_scaled_add(size: int, dtype: str) -> None:
    t = DTYPES[dtype]
    a, b, y = draw(size, seed=0, dtype=t), draw(size, seed=1, dtype=t), poisoned(size, dtype=t)
    pack = 16 // t.itemsize
    pack = pack if size % pack == 0 else 1
    template, blocks = (MANGLED[t], f"Li{pack}E"), -(-size // pack // 256)
    launch("scaled_add.cu", "scaled_add_kernel", template, blocks, 256, [a, b, y, 0.7, size])
    wide = accumulate_dtype(t)
    torch.testing.assert_close(y, (0.7 * (a.to(wide) + b.to(wide))).to(t), **TOLERANCE[t])


# Kernel: how often 16 bytes are read or written, and what narrower accesses may be: numbers per sample or channel.
WIDE = {
    ("asymmetry.cu", "asymmetry_kernel"): 3,
    ("fir.cu", "fir_kernel"): 2,
    ("scaled_add.cu", "scaled_add_kernel"): 3,
    ("group_norm_silu.cu", "group_norm_silu_kernel"): 7,
    ("group_norm_silu_adjoint.cu", "group_norm_silu_adjoint_kernel"): 10,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("source", "kernel"), WIDE)
def test_aligned_path_moves_16_bytes_at_once(source: str, kernel: str, dtype: str) -> None:
    """Elements of two bytes are never moved one by one; what is narrower belongs to a sample, channel or group."""
    widths = accesses_of(source, kernel, MANGLED[DTYPES[dtype]], "Li8E")
    assert widths.count(16) >= WIDE[source, kernel]
    assert set(widths) <= {16, 4}
