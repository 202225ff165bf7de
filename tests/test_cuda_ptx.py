"""The CUDA kernels' PTX, executed on the CPU with bounds, poison and race checks, against the reference."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from qcsbm_fast.ops.registry import OPS, accumulate_dtype

ptxsim = pytest.importorskip("ptxsim")
if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
    pytest.skip("needs nvcc to make PTX", allow_module_level=True)

CSRC = Path(__file__).parents[1] / "csrc"
TYPES = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "NS_8bfloat16E"}


@pytest.fixture(scope="module")
def asymmetry_ptx():
    return ptxsim.nvcc(str(CSRC / "cuda/asymmetry.cu"), arch="compute_90", options=["-O3", "-std=c++20"])


def kernel_name(ptx: str, dtype: torch.dtype, pack: int) -> str:
    names = re.findall(r"\.entry (\w*asymmetry_kernel\w*)", ptx)
    return next(n for n in names if re.search(rf"kernelI(N?S?_?.*{TYPES[dtype]}|{TYPES[dtype]})Li{pack}E", n))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("probes", "batch", "dim", "threads"),
    [(1, 3, 2, 32), (3, 2, 37, 32), (2, 5, 64, 64), (1, 2, 2056, 256), (4, 1, 1024, 256)],
)
def test_asymmetry(asymmetry_ptx, dtype, probes, batch, dim, threads):
    torch.manual_seed(0)
    jv, vjp = torch.randn(2, probes, batch, dim).to(dtype)
    expected = OPS["asymmetry"].reference(jv, vjp)
    pack = 16 // dtype.itemsize
    pack = pack if dim % pack == 0 else 1
    vectors = [torch.full((batch,), torch.nan, dtype=accumulate_dtype(dtype)) for _ in range(3)]
    seed = torch.full_like(jv, torch.nan)
    module = ptxsim.Module(asymmetry_ptx)
    launch = module.launch(
        kernel_name(asymmetry_ptx, dtype, pack),
        grid=batch,
        block=threads,
        args=[jv.contiguous(), vjp.contiguous(), *vectors, seed, dim, probes],
    )
    assert not launch.races
    assert not launch.uninitialised
    tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    for ours, theirs in zip(vectors, expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(seed, expected[3], rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_aligned_path_moves_16_bytes_at_once(asymmetry_ptx):
    body = asymmetry_ptx[asymmetry_ptx.index(kernel_name(asymmetry_ptx, torch.float32, 4)) :]
    body = body[: body.index("\n}")]
    loads = re.findall(r"ld\.global\.\S+", body)
    assert loads
    assert all(".v4." in load for load in loads)
    assert len(re.findall(r"st\.global\.v4\.\S+", body)) == 1
