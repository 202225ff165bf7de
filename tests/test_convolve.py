"""The CPU's convolution: its accuracy, its adjoint, what it computes, and who may use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcsbm_fast import dual, ops
from qcsbm_fast.dual import Dual
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.nn.program import NetworkProgram
from qcsbm_fast.ops import backend, registry
from qcsbm_fast.ops.registry import OPS
from qcsbm_fast.ops.split import HAS_REGISTERS
from tape import Tape

pytestmark = pytest.mark.skipif(
    not backend.has_kernel("convolve", "cpu"), reason="needs a processor with AVX2"
)

# Batch, probes, channels, channels out, height, width: several images a band, several bands an image, ragged channels.
SIZES = [
    (2, 1, 32, 32, 32, 32),
    (1, 3, 32, 16, 5, 7),
    (3, 2, 17, 33, 4, 4),
    (40, 1, 48, 32, 4, 4),
    (2, 1, 100, 40, 64, 64),
    (2, 1, 256, 128, 64, 48),
    (9, 4, 16, 16, 7, 7),
    (1, 1, 32, 32, 3, 200),
    (2, 1, 512, 32, 32, 32),
]
# Of the norm: some roundings of 2^-24 times what the transforms magnify them; split 2^-16 a product; 2^-8 a stored
# bfloat16.
ERRORS = {"float32": 3e-6, "split": 6e-6, "bfloat16": 2.5e-3}
splits = pytest.mark.parametrize("split", [False, True] if HAS_REGISTERS else [False])


def images(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.movedim(-3, -1).contiguous().movedim(-1, -3).to(dtype)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("precision", ERRORS if HAS_REGISTERS else ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taps", [3, 1])
def test_accuracy(taps: int, size: tuple[int, ...], precision: str) -> None:
    """Images, tangents, adjoint and weight gradient against float64."""
    b, k, c, d, h, w = size
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, t = images(b, c, h, w, dtype=dtype), images(k, b, c, h, w, dtype=dtype, seed=1)
    g, gt = images(b, d, h, w, dtype=dtype, seed=2), images(k, b, d, h, w, dtype=dtype, seed=3)
    weight, bias = images(d, c, taps, taps, seed=4), torch.randn(d)
    calls = {
        "convolve_jvp": ((x, t, weight, bias, False), (g, gt, weight, None, True)),
        "convolve": ((x, weight, bias, False), (gt, weight, None, True)),
        "convolve_weight": ((x, g, t, gt, taps), (x, g, None, None, taps)),
    }
    for name, arguments in calls.items():
        for call in arguments:
            exact = OPS[name].reference(*(a.double() if isinstance(a, Tensor) else a for a in call))
            with ops.split_float32(precision == "split"):
                got = OPS[name](*call)
            pairs = [(got, exact)] if isinstance(got, Tensor) else zip(got, exact, strict=True)
            for ours, theirs in pairs:
                assert relative_error(ours, theirs) < ERRORS[precision], name


@splits
def test_errors_are_unbiased(split: bool) -> None:
    """The split's too are rounding errors: over many products of one sign they cancel, as float32's do."""
    x, weight = images(64, 64, 16, 16).abs(), images(64, 64, 3, 3, seed=1).abs()
    exact = OPS["convolve"].reference(x.double(), weight.double(), None, False)
    with ops.split_float32(split):
        errors = (ops.convolve(x, weight).double() - exact) / exact
    # 4 standard errors of 16384 pixels whose errors share the 36864 weights
    assert errors.abs().max() < 2e-5
    assert abs(errors.mean()) < 4e-7


@splits
def test_adjoint_is_exact_to_rounding(split: bool) -> None:
    """<u, A v> = <A^T u, v>: the same weights both ways, which is what keeps a small asymmetry visible."""
    v, u, weight = images(16, 64, 16, 16), images(16, 64, 16, 16, seed=1), images(64, 64, 3, 3, seed=2)
    with ops.split_float32(split):
        forward, back = OPS["convolve"](v, weight, None, False), OPS["convolve"](u, weight, None, True)
    scale = forward.double().norm() * u.double().norm()
    assert abs((u.double() * forward).sum() - (back.double() * v).sum()) < 1e-7 * scale


def test_torchs_own_matrix_registers_are_left_alone() -> None:
    """Kernels of torch that configure the same registers, in turn with these."""
    a, b = torch.randn(64, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    x, weight = images(2, 32, 8, 8, dtype=torch.bfloat16), images(32, 32, 3, 3)
    products, convolutions = [], []
    for _ in range(3):
        products.append(a @ b)
        convolutions.append(ops.convolve(x, weight))
    assert all(torch.equal(p, products[0]) for p in products)
    assert all(torch.equal(y, convolutions[0]) for y in convolutions)
    torch.testing.assert_close(products[0].float(), a.float() @ b.float(), rtol=2e-2, atol=1e-1)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that are called."""
    called: list[str] = []
    call = registry.Op.__call__

    def record(self: registry.Op, *arguments: object) -> object:
        called.append(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(registry.Op, "__call__", record)
    return called


def test_which_convolutions_it_takes(used: list[str]) -> None:
    x, weight = images(2, 16, 8, 8), images(16, 16, 3, 3)
    dual.conv2d(x, weight, padding=0)
    dual.conv2d(x.double(), weight.double(), padding=1)
    dual.conv2d(x[:, :3], weight[:, :3], padding=1)
    assert not used
    y = dual.conv2d(x, weight, padding=1)
    assert used == ["convolve"]
    assert relative_error(y, F.conv2d(x.double(), weight.double(), padding=1)) < ERRORS["float32"]
    with torch.autocast("cpu", torch.bfloat16):
        assert dual.conv2d(x, weight, padding=1).dtype == torch.bfloat16
    assert used == ["convolve"] * 2


def test_float32_is_split_only_where_allowed() -> None:
    """Within the innermost context that says so, whoever calls, and nowhere after it."""
    x, weight = images(2, 32, 8, 8), images(32, 32, 3, 3)
    plain = ops.convolve(x, weight)
    with ops.split_float32():
        with ops.split_float32(False):
            assert torch.equal(ops.convolve(x, weight), plain)
        split = ops.convolve(x, weight)
    assert torch.equal(ops.convolve(x, weight), plain)
    assert torch.equal(split, plain) != HAS_REGISTERS
    with pytest.raises(KeyError), ops.split_float32():
        raise KeyError
    assert torch.equal(ops.convolve(x, weight), plain)


def test_a_vector_jacobian_product_has_no_weight_gradient(used: list[str]) -> None:
    """Which would cost as much as itself; `backward` and `grad` by the weight have it."""
    x, weight = images(2, 16, 8, 8).requires_grad_(), images(16, 16, 3, 3).requires_grad_()
    t = images(1, 2, 16, 8, 8, seed=1)
    y, ydot = ops.convolve_jvp(x, t, weight)
    torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert used == ["convolve_jvp", "convolve"]
    used.clear()
    (gw,) = torch.autograd.grad(ydot.square().sum(), weight, retain_graph=True)
    assert used == ["convolve_weight"]
    used.clear()
    (y.sum() + ydot.square().sum()).backward()
    assert used == ["convolve", "convolve_weight"]
    assert weight.grad is not None
    ones = OPS["convolve_weight"](x.detach(), torch.ones_like(y), None, None, 3)[0]
    torch.testing.assert_close(weight.grad, gw + ones, rtol=1e-4, atol=1e-3)


def test_each_gradient_alone() -> None:
    """Of one argument at a time, the bias too, what all at once give."""
    leaves = [
        images(2, 16, 8, 8),
        images(1, 2, 16, 8, 8, seed=1),
        images(16, 16, 3, 3, seed=2),
        torch.randn(16),
    ]
    x, t, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    y, ydot = ops.convolve_jvp(x, t, weight, bias)
    total = y.square().sum() + ydot.square().sum() + ops.convolve(x, weight, bias).square().sum()
    together = torch.autograd.grad(total, leaves, retain_graph=True)
    for leaf, gradient in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(total, leaf, retain_graph=True)
        torch.testing.assert_close(alone, gradient)


def test_a_network_in_split_products_is_the_network() -> None:
    """NCSN++ on a dual and its gradients: float32 in both ways against float64."""
    torch.manual_seed(0)
    config = NCSNppConfig(
        image_size=16, nf=16, attn_resolutions=(8,), num_res_blocks=1, dropout=0.0, init_scale=1.0
    )
    net = NCSNpp(config)
    x, v, sigma = torch.rand(4, 3, 16, 16), torch.randn(1, 4, 3, 16, 16), torch.logspace(-2, 1, 4)

    def results(module: NCSNpp, *arguments: Tensor) -> list[Tensor]:
        x, v, sigma = arguments
        out = module(Dual(x.requires_grad_(), v), sigma)
        (jtv,) = torch.autograd.grad(out.primal, x, v[0], create_graph=True)
        parameters = [p for p in module.parameters() if p.requires_grad]
        loss = (out.tangents[0] * sigma[:, None, None, None]).square().sum()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in gradient])
        return [out.primal.detach(), out.tangents.detach(), jtv.detach(), flat]

    plain = results(net, x, v, sigma)
    with ops.split_float32():
        tape = Tape()
        with tape:
            split = results(net, x, v, sigma)
    assert tape.names.count("qcsbm::res_block") >= 10
    exact = results(net.double(), x.detach().double(), v.double(), sigma.double())
    for ours, theirs, truth in zip(split, plain, exact, strict=True):
        assert relative_error(theirs, truth) < 2e-5
        assert relative_error(ours, truth) < 2e-4  # of bfloat16 it would be 0.06


def test_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile(fullgraph=True)`: the layers' numbers, and other ones where split products are allowed."""
    # as one call the network splits its other convolutions too
    monkeypatch.setattr(NetworkProgram, "fits", lambda self, x: False)
    torch.manual_seed(0)
    config = NCSNppConfig(
        image_size=8, nf=16, ch_mult=(1, 1), attn_resolutions=(), num_res_blocks=1, dropout=0.0
    )
    net, x, sigma = NCSNpp(config), torch.rand(2, 3, 8, 8), torch.tensor([0.1, 1.0])
    torch._dynamo.reset()
    results = []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        for split in (False, True):
            with ops.split_float32(split):
                out = run(x, sigma)
                out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
            net.zero_grad(set_to_none=True)
    plain, plain_split, compiled, compiled_split = results
    for one, other in ((plain, compiled), (plain_split, compiled_split)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(compiled[0], compiled_split[0]) != HAS_REGISTERS
    assert torch.equal(plain[0], plain_split[0]) != HAS_REGISTERS
