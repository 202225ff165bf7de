"""Statistics of the noise, and that a draw is a pure function of (seed, offset, i).

Each statistical check has a fixed seed and would reject sound noise with probability ALPHA; there are fewer than
100, so that one would fail for fewer than one choice of seeds in ten thousand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from qcsbm_fast import NoiseStream, ops
from qcsbm_fast.ops.registry import OPS
from qcsbm_fast.random import as_stream

ALPHA = 1e-6
Z = float(stats.norm.isf(ALPHA / 2))
N = 1_000_000
DRAWS = {
    "philox_normal": ops.philox_normal,
    "philox_uniform": ops.philox_uniform,
    "rademacher": ops.rademacher,
}


def state(seed: int, offset: int) -> Tensor:
    return torch.tensor([seed, offset])


def normals(seed: int, offset: int = 0, n: int = N) -> np.ndarray:
    return ops.philox_normal(state(seed, offset), [n], torch.float64).numpy()


def uniforms(seed: int, n: int = N) -> np.ndarray:
    return ops.philox_uniform(state(seed, 0), [n], torch.float64).numpy()


def assert_uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """Of values, magnitudes and squares: the sample correlation of n independent pairs is N(0, 1/n)."""
    for f in (lambda v: v, np.abs, np.square):
        assert abs(np.corrcoef(f(a), f(b))[0, 1]) * math.sqrt(len(a)) < Z


def test_normal_moments() -> None:
    """Standard errors of mean, variance, skewness and kurtosis of N normals: sqrt of 1, 2, 6, 24 over N."""
    z = normals(1)
    centred = z - z.mean()
    errors = (z.mean(), centred.var() - 1, stats.skew(z), stats.kurtosis(z))
    for error, variance in zip(errors, (1, 2, 6, 24), strict=True):
        assert abs(error) < Z * math.sqrt(variance / N)


def test_normal_distribution() -> None:
    assert stats.kstest(normals(2), "norm").pvalue > ALPHA


def test_normal_tails() -> None:
    """The number beyond 4 standard deviations, where radius and logarithm matter most, is Poisson."""
    z = normals(3, n=4 * N)
    for beyond in (z > 4, z < -4):
        expected = len(z) * stats.norm.sf(4)
        assert stats.poisson.cdf(beyond.sum(), expected) > ALPHA / 2
        assert stats.poisson.sf(beyond.sum() - 1, expected) > ALPHA / 2


def test_uniform_distribution() -> None:
    u = uniforms(4)
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    assert u.min() >= 0
    assert u.max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uniform_range(dtype: torch.dtype) -> None:
    """[0, 1) in every dtype: rounding to bfloat16 would give 1 in one of 512."""
    u = ops.philox_uniform(state(5, 0), [N], dtype)
    assert u.dtype == dtype
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    grid = 2.0 ** (8 if dtype == torch.bfloat16 else 24)
    assert torch.equal(u.double() * grid, (u.double() * grid).floor())


def test_rademacher_balance() -> None:
    """Overall, per bit of a block, and between neighbours."""
    v = ops.rademacher(state(6, 0), [128 * 8192], torch.float64)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert abs(v.mean().item()) * math.sqrt(v.numel()) < Z
    per_bit = v.reshape(-1, 128).mean(0) * math.sqrt(8192)
    assert per_bit.abs().max() < stats.norm.isf(ALPHA / 256)
    for lag in (1, 32, 128):
        product = v[:-lag] * v[lag:]
        assert abs(product.mean().item()) * math.sqrt(len(product)) < Z


def test_rademacher_runs() -> None:
    """Bytes made of eight consecutive signs are uniform on 0..255 (chi-square)."""
    v = ops.rademacher(state(7, 0), [8 * 131072], torch.float64).reshape(-1, 8)
    counts = torch.bincount(((v < 0).long() << torch.arange(8)).sum(1), minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > ALPHA


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 128, 1024])
def test_neighbours_are_independent(lag: int) -> None:
    z = normals(8)
    assert_uncorrelated(z[:-lag], z[lag:])


@pytest.mark.parametrize(
    "other",
    [(9, 1), (9, 2**32), (10, 0), (9 + 2**32, 0), (9 ^ 2**62, 0)],
    ids=["offset", "far offset", "seed", "high", "top"],
)
def test_streams_are_independent(other: tuple[int, int]) -> None:
    assert_uncorrelated(normals(9), normals(*other))


def test_pairs_fill_the_square() -> None:
    """Neighbouring uniforms are uniform on a 32 x 32 grid (chi-square)."""
    u = uniforms(11).reshape(-1, 2)
    cells = (u * 32).astype(int)
    counts = np.bincount(cells[:, 0] * 32 + cells[:, 1], minlength=1024)
    assert stats.chisquare(counts).pvalue > ALPHA


def test_normals_agree_with_reference() -> None:
    """The kernel's float32 arithmetic against float64 formulas on the same words: a few ulp of each value."""
    s = state(2**40 + 12345, 2**33 + 7)
    got = ops.philox_normal(s, [N], torch.float64)
    exact = OPS["philox_normal"].reference(s, [N], torch.float64)
    # Angles whose cosine is 0 leave 1e-16 in the float64 reference.
    assert ((got - exact).abs() <= 4e-7 * exact.abs() + 1e-15).all()


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prefixes_agree(name: str, dtype: torch.dtype) -> None:
    """A draw is a pure function of (seed, offset, i): its length and shape do not matter."""
    longest = DRAWS[name](state(12, 34), [50_021], dtype)
    for n in (0, 1, 2, 3, 5, 127, 128, 129, 1023, 1025, 4096, 4097, 33_333):
        assert torch.equal(DRAWS[name](state(12, 34), [n], dtype), longest[:n])
    assert torch.equal(DRAWS[name](state(12, 34), (7, 11, 13), dtype).flatten(), longest[: 7 * 11 * 13])


@pytest.mark.parametrize("name", DRAWS)
def test_kernel_agrees_on_extreme_states(name: str) -> None:
    """All 64 bits of seed and offset count."""
    for seed, offset in ((0, 0), (2**63 - 1, 2**63 - 1), (-1, -1), (1, -(2**63)), (2**32, 2**32 - 1)):
        s = state(seed, offset)
        got = OPS[name](s, [1000], torch.float64)
        exact = OPS[name].reference(s, [1000], torch.float64)
        torch.testing.assert_close(got, exact, rtol=4e-7, atol=1e-15)


def test_smaller_dtypes_round_the_same_draw() -> None:
    s = state(13, 5)
    z = ops.philox_normal(s, [10_000], torch.float32)
    assert torch.equal(ops.philox_normal(s, [10_000], torch.float64), z.double())
    assert torch.equal(ops.philox_normal(s, [10_000], torch.bfloat16), z.bfloat16())


def test_stream_draws() -> None:
    """Each draw has the next offset; the same seed gives the same noise, another seed other noise."""
    stream = NoiseStream(17)
    states = [stream.draw() for _ in range(3)]
    assert [s.tolist() for s in states] == [[17, 0], [17, 1], [17, 2]]
    a, b = NoiseStream(17), NoiseStream(17)
    first = a.normal((2, 3))
    assert torch.equal(first, b.normal((2, 3)))
    assert not torch.equal(first, a.normal((2, 3)))
    assert not torch.equal(first, NoiseStream(18).normal((2, 3)))


def test_stream_methods() -> None:
    stream = NoiseStream(19)
    for method, op in (
        (stream.normal, ops.philox_normal),
        (stream.uniform, ops.philox_uniform),
        (stream.rademacher, ops.rademacher),
    ):
        offset = int(stream.state_dict()["state"][1])
        values = method((3, 4), dtype=torch.float64)
        assert values.dtype == torch.float64
        assert torch.equal(values, op(state(19, offset), (3, 4), torch.float64))


def test_stream_state_resumes() -> None:
    stream = NoiseStream(23)
    stream.draw()
    saved = stream.state_dict()
    expected = [stream.normal((5,)) for _ in range(3)]
    other = NoiseStream(0)
    other.load_state_dict(saved)
    assert all(torch.equal(other.normal((5,)), e) for e in expected)
    assert saved["state"].tolist() == [23, 1]


@pytest.mark.parametrize(
    "bad", [{}, {"state": torch.zeros(3, dtype=torch.int64)}, {"state": torch.zeros(2)}, {"seed": 1}]
)
def test_stream_refuses_bad_states(bad: dict) -> None:
    with pytest.raises(ValueError, match="NoiseStream: state expected"):
        NoiseStream(0).load_state_dict(bad)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_stream_refuses_bad_seeds(seed: int) -> None:
    with pytest.raises(ValueError, match="NoiseStream: seed expected 0 <= seed"):
        NoiseStream(seed)


def test_as_stream() -> None:
    """A stream is itself; a generator, or torch's own, seeds a new one."""
    stream = NoiseStream(1)
    assert as_stream(stream, "cpu") is stream
    torch.manual_seed(5)
    a = as_stream(None, "cpu").draw()
    assert not torch.equal(a, as_stream(None, "cpu").draw())
    torch.manual_seed(5)
    assert torch.equal(a, as_stream(None, "cpu").draw())
    assert torch.equal(a, as_stream(torch.Generator().manual_seed(5), "cpu").draw())
    with pytest.raises(ValueError, match="generator: expected a NoiseStream on meta"):
        as_stream(stream, "meta")
    with pytest.raises(
        TypeError, match=r"generator: expected NoiseStream, torch\.Generator or None, got int"
    ):
        as_stream(3, "cpu")  # pyright: ignore[reportArgumentType]


def test_bad_draws() -> None:
    for call in (
        lambda: ops.philox_normal(state(1, 2), [-1]),
        lambda: ops.rademacher(state(1, 2), [3], torch.int64),
    ):
        with pytest.raises((ValueError, TypeError), match=r"(size|dtype) expected .* got "):
            call()
