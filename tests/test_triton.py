"""The Triton kernels, interpreted on the CPU, against the float64 reference and the C++ kernels.

One process of its own interprets all cases: TRITON_INTERPRET counts when a kernel's module is imported.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from cases import TABLE, outputs
from qcsbm_fast.ops.registry import OPS
from triton_kernels import DRAW, NAMES, SCORES, STATES, bad_score, call_of, interpreted, key

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

FLOAT32_EPS = torch.finfo(torch.float32).eps
Results = dict[str, tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "QCSBM_BACKEND": ""}
    program = f"import triton_kernels; triton_kernels.save_results({str(path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, check=True)
    return torch.load(path, weights_only=True)


def in_float64(call: tuple[Any, ...]) -> list[Any]:
    return [
        a.double()
        if isinstance(a, Tensor) and a.is_floating_point()
        else torch.float64
        if isinstance(a, torch.dtype)
        else a
        for a in call
    ]


@pytest.mark.parametrize(
    ("name", "variant", "size", "dtype"), list(interpreted()), ids=lambda v: str(v).removeprefix("torch.")
)
def test_accuracy(results: Results, name: str, variant: str, size: str, dtype: torch.dtype) -> None:
    """Twice the error of the same-dtype reference, plus a few ulp (the interpreter truncates to bfloat16)."""
    entry, op = TABLE[name], OPS[name]
    call = call_of(name, variant, size, dtype)
    got, same = results[key(name, variant, size, dtype)], outputs(op.reference(*call))
    exact = same if name in ("philox_uniform", "rademacher") else outputs(op.reference(*in_float64(call)))
    for g, s, e in zip(got, same, exact, strict=True):
        assert (g.shape, g.dtype) == (s.shape, s.dtype)
        if not g.numel():
            continue
        scale = float(e.double().abs().max())
        allowed = 4 * torch.finfo(g.dtype).eps * scale + 4 * FLOAT32_EPS * max(scale, 1.0) * entry.noise
        assert (g.double() - e).abs().max() <= 2 * (s.double() - e).abs().max() + allowed


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", ["philox_normal", "philox_uniform", "rademacher"])
def test_noise_is_that_of_the_cpu_kernel(results: Results, name: str, state: tuple[int, int]) -> None:
    """Same seed, offset and index: words, uniforms and signs exactly, normals to a few ulp of each value."""
    (got,) = results[key(name, state)]
    expected = OPS[name](torch.tensor(state), [1000], torch.float32)
    assert ((got - expected).abs() <= (4e-7 if name == "philox_normal" else 0) * expected.abs()).all()


def test_normal_statistics(results: Results) -> None:
    """Moments, distribution and independence of two offsets, each rejected one time in a million if sound."""
    alpha = 1e-6
    z = float(stats.norm.isf(alpha / 2))
    a, b = (results[key("draw", offset)][0].double().numpy() for offset in (0, 1))
    centred = a - a.mean()
    moments = (a.mean(), centred.var() - 1, stats.skew(a), stats.kurtosis(a))
    for error, variance in zip(moments, (1, 2, 6, 24), strict=True):
        assert abs(error) < z * math.sqrt(variance / DRAW)
    assert stats.kstest(a, "norm").pvalue > alpha
    for one, other in ((a, b), (a[1:], a[:-1]), (a**2, b**2)):
        assert abs(stats.pearsonr(one, other).statistic) * math.sqrt(DRAW) < z


@pytest.mark.parametrize("score", SCORES)
def test_langevin_step_of_bad_scores(results: Results, score: str) -> None:
    """No direction, no step; a NaN spoils the batch, an infinity its own element: as documented of the op."""
    expected = OPS["langevin_step"](
        torch.ones(4, 6), bad_score(SCORES[score]), 0.16, torch.ones(4), torch.tensor([3, 1])
    )
    for got, wanted in zip(results[key("langevin", score)], expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_strided_memory_is_refused() -> None:
    from qcsbm_fast.kernels.perturb import perturb

    x, one, state = torch.ones(4, 6)[:, ::2], torch.ones(4), torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match="perturb: x0 expected contiguous"):
        perturb(x, one, one, state, True)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_is_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qcsbm::{name}", "CUDA")


def test_import_leaves_triton_alone() -> None:
    program = "import qcsbm_fast, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
