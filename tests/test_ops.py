"""The contract of an op, held for every entry of the table in cases.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    BATCHES,
    DTYPES,
    TABLE,
    arguments,
    assert_accurate,
    error,
    every_case,
    is_float,
    outputs,
)
from entry import allowance
from qcsbm_fast import _host, ops
from qcsbm_fast.ops import backend
from qcsbm_fast.ops.registry import OPS

VARIANTS = [(name, variant) for name, entry in TABLE.items() for variant in entry.variants]
PUBLIC = [(name, variant) for name, variant in VARIANTS if TABLE[name].public]
DIFFERENTIABLE = [(name, variant) for name, variant in VARIANTS if TABLE[name].order]


def odd(name: str, variant: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    return list(arguments(TABLE[name], variant, TABLE[name].sizes["odd"], dtype))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_table_is_complete() -> None:
    assert set(TABLE) == set(OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("name", "variant", "size"), list(every_case()))
@pytest.mark.usefixtures("poisoned_memory")
def test_accuracy(name: str, variant: str, size: str, dtype: torch.dtype) -> None:
    """Against the float64 reference: at most twice the same-dtype reference's error, plus the entry's ulps."""
    call = arguments(TABLE[name], variant, TABLE[name].sizes[size], dtype)
    assert_accurate(name, call, outputs(OPS[name](*call)))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_opcheck(name: str, variant: str) -> None:
    """Schema, fake kernel and, once per op, autograd registration and ahead-of-time dispatch: torch's own checks."""
    checks = ["test_schema", "test_faketensor"]
    if variant == next(iter(TABLE[name].variants)):
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(OPS[name].overload, tuple(odd(name, variant, torch.float32)), test_utils=checks)


def gradient_problem(name: str, variant: str) -> tuple[Any, list[Tensor]]:
    """The public function of its differentiable arguments, and these."""
    entry, call = TABLE[name], odd(name, variant)
    assert entry.public is not None
    where = [i for i in entry.differentiable if isinstance(call[i], Tensor) and call[i].numel()]

    public = entry.public

    def function(*values: Tensor) -> Any:
        full = list(call)
        for i, value in zip(where, values, strict=True):
            full[i] = value
        return public(*full)

    return function, [call[i].requires_grad_() for i in where]


@pytest.mark.parametrize(("name", "variant"), DIFFERENTIABLE)
def test_gradient(name: str, variant: str) -> None:
    """Against finite differences, in float64."""
    assert torch.autograd.gradcheck(*gradient_problem(name, variant))


@pytest.mark.parametrize("name", [n for n, entry in TABLE.items() if entry.order])
def test_gradient_under_compile(name: str) -> None:
    """Ahead-of-time autograd finds the same gradient."""
    function, inputs = gradient_problem(name, next(iter(TABLE[name].variants)))
    torch._dynamo.reset()
    gradients = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        total = sum(y.square().sum() for y in outputs(run(*inputs)))
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("name", "variant"), DIFFERENTIABLE)
def test_second_derivative(name: str, variant: str) -> None:
    """It is right where it exists, and raises, rather than dropping a term, where it does not."""
    function, inputs = gradient_problem(name, variant)
    if TABLE[name].order > 1:
        assert torch.autograd.gradgradcheck(function, inputs)
        return
    total = sum((y * torch.randn_like(y)).sum() for y in outputs(function(*inputs)))
    assert isinstance(total, Tensor)
    first = torch.autograd.grad(total, inputs, create_graph=True)
    for gradient in first:
        with pytest.raises(NotImplementedError, match=name.partition("_jvp")[0]):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_no_gradient_is_dropped(name: str, variant: str) -> None:
    """A backward pass that would reach an argument without a derivative raises."""
    differentiable = TABLE[name].differentiable
    for i, argument in enumerate(odd(name, variant)):
        if is_float(argument) and i not in differentiable:
            call = odd(name, variant)
            call[i].requires_grad_()
            total = sum(y.sum() for y in outputs(OPS[name](*call)))
            assert isinstance(total, Tensor)
            with pytest.raises(NotImplementedError, match=name):
                total.backward()


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, v in VARIANTS if TABLE[n].tangent_of])
def test_adjoint(name: str, variant: str) -> None:
    """<u, J v> = <J^T u, v>: the tangents against the backward of the op, and against their own backward."""
    entry, call = TABLE[name], odd(name, variant)
    primal = TABLE[entry.tangent_of or ""].public
    assert primal is not None
    assert entry.public is not None
    x, tangents = call[0].requires_grad_(), call[1].requires_grad_()
    y = primal(x, *call[2:])
    value, ydot = entry.public(x, tangents, *call[2:])
    torch.testing.assert_close(value, y, rtol=1e-13, atol=1e-13)
    u = torch.randn_like(ydot)
    for uk, tk, dk in zip(u, tangents, ydot, strict=True):
        (jtu,) = torch.autograd.grad(y, x, uk, retain_graph=True)
        torch.testing.assert_close((uk * dk).sum(), (jtu * tk).sum(), rtol=1e-11, atol=1e-11)
    (gt,) = torch.autograd.grad(ydot, tangents, u)
    torch.testing.assert_close((u * ydot).sum(), (gt * tangents).sum(), rtol=1e-11, atol=1e-11)


def strided(value: Any) -> Any:
    """The same values, every other element of a larger tensor."""
    return torch.stack((value, value + 1), -1)[..., 0] if isinstance(value, Tensor) else value


def channels_last(value: Any) -> Any:
    """The same values with dimension -3 stored innermost."""
    if isinstance(value, Tensor) and value.dim() >= 4:
        return value.movedim(-3, -1).contiguous().movedim(-1, -3)
    return value


@pytest.mark.parametrize(("name", "variant"), PUBLIC)
def test_layouts(name: str, variant: str) -> None:
    """Strided and channels-last arguments give what contiguous ones give: noise counts in logical order."""
    entry = TABLE[name]
    assert entry.public is not None
    for size, layout in (("odd", strided), ("image", strided), ("image", channels_last)):
        if size in entry.sizes:
            call = arguments(entry, variant, entry.sizes[size], torch.float64)
            expected = outputs(entry.public(*call))
            got = outputs(entry.public(*(layout(a) for a in call)))
            for g, e in zip(got, expected, strict=True):
                torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, e in TABLE.items() if backend.has_kernel(n, "cpu")])
def test_kernel_refuses_strided_memory(name: str) -> None:
    call = odd(name, next(iter(TABLE[name].variants)))
    with pytest.raises(RuntimeError, match=f"{name}: .* expected (contiguous|channels-last)"):
        OPS[name](*(strided(a) for a in call))


def bad_calls(name: str, variant: str) -> Iterator[tuple[str, list[Any]]]:
    """Calls that are wrong in one argument, with its name."""
    names = [a.name for a in OPS[name].overload._schema.arguments]
    good = odd(name, variant, torch.float32)
    first = good[0]
    for i, (argument, value) in enumerate(zip(names, good, strict=True)):
        if isinstance(value, Tensor):
            wrong: list[Any] = [value.unsqueeze(-1)] if i else []
            if not is_float(value):
                wrong += [value.float(), value.tolist()]
            elif not i:
                wrong += [value.long(), value.half(), value.tolist(), value.sum()]
            elif value.dim() >= first.dim():
                wrong += [value.double(), value.long(), value.tolist()]
            for replacement in wrong:
                yield argument, [*good[:i], replacement, *good[i + 1 :]]


@pytest.mark.parametrize(("name", "variant"), PUBLIC)
def test_bad_arguments(name: str, variant: str) -> None:
    """The error names op and argument, what was expected and what came."""
    public = TABLE[name].public
    assert public is not None
    calls = list(bad_calls(name, variant))
    assert calls
    for argument, call in calls:
        with pytest.raises((ValueError, TypeError)) as caught:
            public(*call)
        message = str(caught.value)
        assert message.startswith(f"{name.removesuffix('_jvp')}: {argument} expected "), message
        assert ", got " in message


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_forward_mode_raises(name: str, variant: str) -> None:
    """torch.func.jvp through a custom op would return a zero tangent."""
    for i, argument in enumerate(call := odd(name, variant)):
        if is_float(argument):
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode AD"):
                torch.func.jvp(
                    lambda a, i=i, call=call: OPS[name](*call[:i], a, *call[i + 1 :]),
                    (argument,),
                    (argument,),
                )


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, v in VARIANTS if "large" in TABLE[n].sizes])
def test_threads_do_not_change_results(name: str, variant: str) -> None:
    call = arguments(TABLE[name], variant, TABLE[name].sizes["large"], torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(outputs(OPS[name](*call)))
    torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")
AVAILABLE = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(_host.best_isa()) + 1]
SETTINGS = [
    {"QCSBM_BACKEND": "reference"},
    *({"QCSBM_CPU_CAPABILITY": i, "QCSBM_BACKEND": "native"} for i in AVAILABLE),
]


def results_with(settings: dict[str, str], path: Path) -> dict[str, tuple[Tensor, ...]]:
    program = f"import cases; cases.save_results({str(path)!r})"
    environment = {
        **os.environ,
        "QCSBM_BACKEND": "",
        "QCSBM_CPU_CAPABILITY": "",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, check=True)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s.values()))
def test_backends_and_instruction_sets_agree(settings: dict[str, str], tmp_path: Path) -> None:
    results = results_with(settings, tmp_path / "results.pt")
    assert {key.split()[0] for key in results} >= {"bias_act", "sde_step"}
    for key, other in results.items():
        name, variant, size, dtype = key.split()
        images = getattr(torch, dtype.removeprefix("torch."))
        call = arguments(TABLE[name], variant, TABLE[name].sizes[size], images)
        for a, b in zip(other, outputs(OPS[name](*call)), strict=True):
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            allowed = 4 * allowance(TABLE[name], b.dtype, images, max(scale, 1.0))
            assert error(a, b.double()) <= allowed, key


@pytest.mark.parametrize("capability", [i for i in AVAILABLE if i != "baseline"])
@pytest.mark.parametrize("name", ["swish_mlp", "swish_mlp_vjp", "group_norm_silu_jvp_vjp"])
def test_no_instruction_set_wastes_its_vectors(name: str, capability: str) -> None:
    """Kernels that compute much beat plain torch, 2 to 14 times, with vectors that registers hold. Wider ones,
    which the compiler takes apart, would make them 5 to 15 times slower than that."""
    program = f"import cases; print(*cases.times({name!r}))"
    environment = {**os.environ, "QCSBM_BACKEND": "native", "QCSBM_CPU_CAPABILITY": capability}
    run = [sys.executable, "-c", program]
    found = subprocess.run(
        run, cwd=Path(__file__).parent, env=environment, check=True, capture_output=True, text=True
    )
    kernel, reference = map(float, found.stdout.split())
    assert kernel < reference


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCSBM_BACKEND", "fast")
    with pytest.raises(ValueError, match="QCSBM_BACKEND: expected one of reference, native, got 'fast'"):
        backend._load()


def test_native_without_kernel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "WANTED", "native")
    monkeypatch.setattr(backend, "has_kernel", lambda name, device: False)
    with pytest.raises(
        NotImplementedError, match=r"rademacher: QCSBM_BACKEND=native, but .* no compiled kernel for cpu"
    ):
        ops.rademacher(torch.zeros(2, dtype=torch.int64), [3])


def test_instruction_set_names() -> None:
    """Read once per process, at the first call."""
    program = "import _host; print(_host.active_isa())"
    folder = Path(_host.__file__).parent
    run = [sys.executable, "-c", program]
    for name in AVAILABLE:
        environment = {**os.environ, "QCSBM_CPU_CAPABILITY": name}
        assert subprocess.run(
            run, cwd=folder, env=environment, capture_output=True, text=True
        ).stdout.split() == [name]
    failed = subprocess.run(
        run, cwd=folder, env={**os.environ, "QCSBM_CPU_CAPABILITY": "sse9"}, capture_output=True, text=True
    )
    assert "QCSBM_CPU_CAPABILITY: expected baseline, avx2, avx512 or amx, got sse9" in failed.stderr


def langevin(score: Tensor, snr: float = 0.16) -> tuple[Tensor, ...]:
    x = torch.ones_like(score)
    return ops.langevin_step(x, score, snr, 1.0, torch.tensor([3, 1]))


def test_langevin_step_size() -> None:
    """The step along the noise is `snr` times the step along the score, in the batch means of the norms."""
    score = torch.randn(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after, mean = langevin(score, snr=0.2)
    h = ((mean - 1) / score).flatten()
    torch.testing.assert_close(h, h[:1].expand_as(h), rtol=1e-9, atol=0)
    z = (after - mean) / (2 * h[0]).sqrt()
    torch.testing.assert_close(z, ops.philox_normal(torch.tensor([3, 1]), score.shape, torch.float64))
    ratio = h[0] * score.flatten(1).norm(dim=1).mean() / ((2 * h[0]).sqrt() * z.flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(ratio.item(), 0.2, rtol=1e-6, atol=0)


def test_langevin_step_at_zero_score() -> None:
    """Documented: no direction, no step."""
    after, mean = langevin(torch.zeros(4, 6))
    assert torch.equal(after, torch.ones(4, 6))
    assert torch.equal(mean, torch.ones(4, 6))


def test_langevin_step_shows_bad_scores() -> None:
    """Documented: a NaN spoils the batch, an infinity its own element, with no step elsewhere."""
    score = torch.ones(4, 6)
    score[2, 3] = torch.nan
    assert all(y.isnan().all() for y in langevin(score))
    score[2, 3] = torch.inf
    for y in langevin(score):
        assert y[2, 3].isnan()
        assert y.nansum() == y.numel() - 1


def test_residual_needs_one_source_of_noise() -> None:
    score, state = torch.randn(3, 4), torch.tensor([1, 2])
    for given in ({}, {"z": score, "state": state}):
        with pytest.raises(ValueError, match="denoising_residual: expected exactly one of z and state, got"):
            ops.denoising_residual(score, 1.0, 1.0, **given)


def test_residual_of_regenerated_noise() -> None:
    """`perturb` and the residual from one state agree, whether the noise is stored or drawn again."""
    x0, std, state = torch.randn(5, *BATCHES["image"][1:]), torch.rand(5) + 0.1, torch.tensor([7, 9])
    x, z = ops.perturb(x0, 1.0, std, state)
    without, empty = ops.perturb(x0, 1.0, std, state, store_noise=False)
    assert torch.equal(x, without)
    assert empty.numel() == 0
    kept = ops.denoising_residual(-x, std, 1.0, z=z)
    assert torch.equal(kept, ops.denoising_residual(-x, std, 1.0, state=state))


def test_compiled_region_draws_fresh_noise() -> None:
    """A NoiseStream inside torch.compile moves on at every call, as it does outside."""
    from qcsbm_fast import NoiseStream

    x = torch.randn(3, 4)

    def step(stream: NoiseStream) -> Tensor:
        return ops.sde_step(x, x, 1.0, 0.5, 0.1, stream.draw())[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_stream, compiled_stream = NoiseStream(5), NoiseStream(5)
    for _ in range(3):
        torch.testing.assert_close(compiled(compiled_stream), step(eager_stream))
