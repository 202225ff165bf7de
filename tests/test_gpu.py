"""The GPU kernels on a GPU, over the table in cases.py: equality with the CPU kernels, streams, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import DTYPES, TABLE, arguments, every_case, outputs
from qcsbm_fast import NoiseStream, _host, ops
from qcsbm_fast.ops import backend
from qcsbm_fast.ops.registry import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
FLOAT32_EPS = torch.finfo(torch.float32).eps
NATIVE = [name for name in OPS if backend.has_kernel(name, "cuda")]
RANDOM = {
    "sde_step": lambda x, state: ops.sde_step(x, x, 1.0, 0.5, 0.1, state)[0],
    "perturb": lambda x, state: ops.perturb(x, 1.0, 0.5, state)[0],
    "langevin_step": lambda x, state: ops.langevin_step(x, x, 0.16, 1.0, state)[0],
    "denoising_residual": lambda x, state: ops.denoising_residual(x, 0.5, 1.0, state=state),
    "philox_normal": lambda x, state: ops.philox_normal(state, x.shape),
    "rademacher": lambda x, state: ops.rademacher(state, x.shape),
}


def on_gpu(call: tuple[Any, ...]) -> list[Any]:
    return [a.cuda() if isinstance(a, Tensor) else a for a in call]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("name", "variant", "size"), list(every_case()))
def test_equals_cpu(name: str, variant: str, size: str, dtype: torch.dtype) -> None:
    """The same call on both devices, a few ulp apart; every output written, in the same layout."""
    entry = TABLE[name]
    call = arguments(entry, variant, entry.sizes[size], dtype)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    got = outputs(OPS[name](*on_gpu(call)))
    torch.use_deterministic_algorithms(False)
    for g, e in zip(got, outputs(OPS[name](*call)), strict=True):
        assert (g.shape, g.dtype, g.is_contiguous()) == (e.shape, e.dtype, e.is_contiguous())
        if e.numel():
            scale = max(float(e.double().abs().max()), float(entry.cancels))
            allowed = 4 * entry.ulps * torch.finfo(g.dtype).eps * scale
            allowed += 8 * FLOAT32_EPS * max(scale, 1.0) * entry.noise
            assert (g.cpu().double() - e.double()).abs().max() <= allowed


@pytest.mark.parametrize("name", NATIVE)
def test_repeats_bit_for_bit(name: str) -> None:
    entry = TABLE[name]
    size = entry.sizes.get("large") or entry.sizes["odd"]
    call = on_gpu(arguments(entry, next(iter(entry.variants)), size, torch.float32))
    for a, b in zip(outputs(OPS[name](*call)), outputs(OPS[name](*call)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NATIVE)
def test_runs_on_the_current_stream(name: str) -> None:
    """The arguments are written late on a side stream; a kernel on another stream would read them too early."""
    entry = TABLE[name]
    call = on_gpu(arguments(entry, next(iter(entry.variants)), entry.sizes["odd"], torch.float32))
    expected = [y.clone() for y in outputs(OPS[name](*call))]
    late = [a.clone().zero_() if isinstance(a, Tensor) else a for a in call]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for source, target in zip(call, late, strict=True):
            if isinstance(source, Tensor):
                target.copy_(source)
        got = outputs(OPS[name](*late))
    torch.cuda.synchronize()
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", RANDOM)
def test_graph_replay_draws_fresh_noise(name: str) -> None:
    """Each replay of a captured step equals the next eager step of the same stream."""
    step: Callable[[Tensor, Tensor], Tensor] = RANDOM[name]
    x = torch.randn(4, 3, 16, 16, device="cuda")
    stream, eager = NoiseStream(5, "cuda"), NoiseStream(5, "cuda")
    step(x, eager.state_dict()["state"])  # tunes, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, stream.draw())
    results = []
    for _ in range(3):
        graph.replay()
        results.append(out.clone())
        assert torch.equal(results[-1], step(x, eager.draw()))
    assert not torch.equal(results[0], results[1])


def test_offsets_beyond_32_bits() -> None:
    """The last signs of a draw of more than 2^31 elements, against the words of their block."""
    n = 2**31 + 128
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6 GB of GPU memory")
    signs = ops.rademacher(torch.tensor([3, 4], device="cuda"), [n], torch.bfloat16)[-128:].cpu().float()
    words = torch.tensor(_host.philox(3, 4, n // 128 - 1))
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert torch.equal(signs, (1 - 2 * bits).flatten().float())


@pytest.mark.parametrize("name", [n for n in NATIVE if TABLE[n].order])
def test_gradient(name: str) -> None:
    """Against finite differences, in float64."""
    entry = TABLE[name]
    call = on_gpu(arguments(entry, next(iter(entry.variants)), entry.sizes["odd"], torch.float64))
    where = [i for i in entry.differentiable if isinstance(call[i], Tensor)]
    public = entry.public
    assert public is not None

    def function(*values: Tensor) -> Any:
        full = list(call)
        for i, value in zip(where, values, strict=True):
            full[i] = value
        return public(*full)

    assert torch.autograd.gradcheck(function, [call[i].requires_grad_() for i in where])


def test_compiled_step_draws_fresh_noise() -> None:
    x = torch.randn(3, 4, device="cuda")

    def step(stream: NoiseStream) -> Tensor:
        return ops.sde_step(x, x, 1.0, 0.5, 0.1, stream.draw())[0]

    compiled = torch.compile(step, fullgraph=True)
    eager_stream, compiled_stream = NoiseStream(5, "cuda"), NoiseStream(5, "cuda")
    for _ in range(3):
        torch.testing.assert_close(compiled(compiled_stream), step(eager_stream))
