"""The scalar formulas of csrc/math against numpy, autograd and published vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qcsbm_fast import _host

FLOAT32_MAX = float(np.finfo(np.float32).max)


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the float32 spacing at the exact value."""
    return float(np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))))


def apply(function: Callable[[float], float], points: np.ndarray) -> np.ndarray:
    return np.array([function(float(x)) for x in points], dtype=np.float64)


def float32_grid(low: float, high: float, count: int) -> np.ndarray:
    return np.linspace(low, high, count).astype(np.float32).astype(np.float64)


def test_exponential() -> None:
    points = float32_grid(-87.3, 88.3, 200_001)
    assert ulps(apply(_host.exponential, points), np.exp(points)) <= 2


def test_exponential_saturates() -> None:
    low, high = _host.exponential(-87.3), _host.exponential(88.3)
    for x in (-88.0, -1e4, -FLOAT32_MAX, -math.inf):
        assert _host.exponential(x) == low
    for x in (89.0, 1e4, FLOAT32_MAX, math.inf):
        assert _host.exponential(x) == high
    assert 0 < low < 1.3e-38
    assert 2e38 < high < math.inf
    assert math.isnan(_host.exponential(math.nan))
    assert _host.exponential(0.0) == 1.0


def test_logarithm() -> None:
    everywhere = np.exp(np.linspace(-87, 88, 100_001)).astype(np.float32).astype(np.float64)
    near_one = float32_grid(0.5, 2.0, 100_001)
    closest = 1 + np.arange(-64, 64) * 2.0**-24
    for points in (everywhere, near_one, closest.astype(np.float32).astype(np.float64)):
        points = points[points != 1]
        assert ulps(apply(_host.logarithm, points), np.log(points)) <= 2
    assert _host.logarithm(1.0) == 0.0


def test_sincospi() -> None:
    """All 25-bit angles of a coarse grid, and every one near the zeros of both functions."""
    steps = np.arange(-(2**24), 2**24, 257)
    zeros = np.concatenate([k * 2**23 + np.arange(-40, 41) for k in range(-1, 2)])
    t = np.concatenate([steps, zeros]) * 2.0**-24
    sine, cosine = np.array([_host.sincospi(float(x)) for x in t], dtype=np.float64).T
    # Reduced exactly before the library sees it, so that the oracle is right next to the zeros.
    quadrant = np.rint(2 * t)
    x = math.pi * (t - quadrant / 2)
    s, c, q = np.sin(x), np.cos(x), quadrant.astype(np.int64) % 4
    exact_sine = np.choose(q, [s, c, -s, -c])
    exact_cosine = np.choose(q, [c, -s, -c, s])
    for got, exact in ((sine, exact_sine), (cosine, exact_cosine)):
        assert ulps(got[exact != 0], exact[exact != 0]) <= 2
        assert np.all(got[exact == 0] == 0)


# Known-answer vectors of Random123 (Salmon et al. 2011) for philox4x32, 10 rounds: counter, key, result.
PHILOX_VECTORS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), PHILOX_VECTORS)
def test_philox(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    block, offset, seed = (low | high << 32 for low, high in (counter[:2], counter[2:], key))
    assert _host.philox(seed, offset, block) == result


def test_uniform() -> None:
    assert _host.uniform(0) == 0.0
    assert _host.uniform(255) == 0.0
    assert _host.uniform(256) == 2.0**-24
    assert _host.uniform(0xFFFFFFFF) == 1 - 2.0**-24


def test_box_muller_extremes() -> None:
    """The largest radius is finite, the smallest is zero, and the angle turns once."""
    largest, _ = _host.box_muller(0, 0)
    assert largest == pytest.approx(math.sqrt(2 * math.log(2**32)), rel=1e-6)
    assert _host.box_muller(0xFFFFFFFF, 0) == (0.0, 0.0)
    for word, direction in ((0, (1, 0)), (1 << 30, (0, 1)), (2 << 30, (-1, 0)), (3 << 30, (0, -1))):
        assert _host.box_muller(0, word) == pytest.approx([largest * d for d in direction], abs=0)


def test_bfloat16() -> None:
    """Round to nearest even, subnormals, overflow to infinity, NaN: as torch rounds."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1, 0x8000, 0x18000],
        np.uint32,
    )
    halves = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, edges, halves]).view(np.float32)
    values = values[~np.isnan(values)]
    got = torch.tensor([_host.bfloat16(float(x)) for x in values])
    torch.testing.assert_close(got, torch.from_numpy(values).bfloat16().float(), rtol=0, atol=0)
    assert math.isnan(_host.bfloat16(math.nan))


def activation(kind: str, x: Tensor, p: Tensor) -> Tensor:
    if kind == "swish":
        return x * torch.sigmoid(p * x)
    return torch.where(x > 0, x, p * torch.expm1(x) if kind == "elu" else p * x)


@pytest.mark.parametrize("kind", ["swish", "elu", "leaky_relu"])
def test_activation_jets(kind: str) -> None:
    """Value, d/dx, d2/dx2, d/dp, d2/dxdp against float64 autograd, in double and in float."""
    x0 = torch.cat((torch.linspace(-30, 30, 601), torch.tensor([1e-3, -1e-3]))).double()
    x0 = x0[x0 != 0]
    for p0 in (0.1, 1.0, 1.7):
        x, p = x0.clone().requires_grad_(), torch.full_like(x0, p0).requires_grad_()
        y = activation(kind, x, p)
        dx, dp = torch.autograd.grad(y.sum(), (x, p), create_graph=True)
        dxx, dxp = torch.autograd.grad(dx.sum(), (x, p), allow_unused=True)
        jets = [y, dx, torch.zeros_like(x) if dxx is None else dxx, dp, dxp]
        exact = torch.stack([j.detach() for j in jets], -1)
        got = torch.tensor([_host.activation(kind, float(a), p0) for a in x0], dtype=torch.float64)
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)
        single = torch.tensor([_host.activation_float(kind, float(a), p0) for a in x0], dtype=torch.float64)
        # 1 - sigmoid has an error of eps where it is small, and d/dp multiplies it by x^2.
        assert ((single - exact).abs() <= 2 * 2.0**-23 * (1 + x0.square()[:, None])).all()
