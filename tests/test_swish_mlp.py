"""The fused network: its adjoint, threads and blocks, what it computes, and the toy network on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draws import Draw, swish_mlp
from qcsbm_fast import dual, ops
from qcsbm_fast.dual import Dual
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.nn.layers import bias_act
from qcsbm_fast.ops.split import HAS_REGISTERS
from tape import Tape

WIDTHS = [2, 64, 128, 256, 2]


def parameters(widths: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return swish_mlp(0)(Draw(dtype), (1, *widths))[2]


def toy(seed: int = 0, dtype: torch.dtype = torch.float64) -> ToyMLP:
    torch.manual_seed(seed)
    network = ToyMLP().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def by_layers(network: ToyMLP, x: Tensor | Dual, sigma: Tensor) -> Tensor | Dual:
    """The toy network layer by layer, the concatenation formed."""
    n = network.noise(sigma[:, None])
    h = dual.cat([network.trunk(x), n], 1)
    return x - network.head(bias_act(h, None, network.join, "swish"))  # pyright: ignore[reportArgumentType]


def test_the_toy_network_is_its_layers() -> None:
    """Values, tangents, and every parameter's gradient of a function of both, in float64."""
    network = toy()
    x, t, sigma = (
        torch.randn(300, 2).double(),
        torch.randn(2, 300, 2).double(),
        torch.rand(300).double() + 0.1,
    )
    results = []
    for run in (network, lambda x, sigma: by_layers(network, x, sigma)):
        network.zero_grad()
        leaf, tangents = x.clone().requires_grad_(), t.clone().requires_grad_()
        y = run(Dual(leaf, tangents), sigma)
        assert isinstance(y, Dual)
        (y.primal.sin().sum() + (y.tangents**3).sum()).backward()
        gradients = [p.grad for p in network.parameters()]
        results.append([y.primal, y.tangents, run(x, sigma), leaf.grad, tangents.grad, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("probes", [1, 4])
def test_adjoint(probes: int) -> None:
    """<u, J v> = <J^T u, v>, through the op's tangents and its backward."""
    p = parameters(WIDTHS, torch.float64)
    x, v = torch.randn(150, 2).double().requires_grad_(), torch.randn(probes, 150, 2).double()
    y, jv = ops.swish_mlp_jvp(x, v, p, WIDTHS)
    for k in range(probes):
        u = torch.randn_like(y)
        (jtu,) = torch.autograd.grad(y, x, u, retain_graph=True)
        torch.testing.assert_close((u * jv[k]).sum(1), (jtu * v[k]).sum(1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_same_bits_for_any_number_of_threads(split: bool) -> None:
    p = parameters(WIDTHS).requires_grad_()
    x, t = torch.randn(2000, 2), torch.randn(1, 2000, 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with ops.split_float32(split):
                y, jv = ops.swish_mlp_jvp(x, t, p, WIDTHS)
                found.append((y, jv, *torch.autograd.grad((y * jv[0]).sum(), p)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("widths", [WIDTHS, [3, 96, 40, 64, 5], [64, 32, 64]])
@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("rows", [1, 47, 300])
def test_split_products(rows: int, probes: int, widths: list[int]) -> None:
    """In three products of bfloat16, where the processor has them: all results to 2^-12, of one sample's too.

    Single samples cancel most; the worst error of 1080 draws was a third of the bound.
    """
    torch.manual_seed(0)
    exact = parameters(widths, torch.float64)
    x, t = torch.randn(rows, widths[0]).double(), torch.randn(probes, rows, widths[0]).double()
    u, w = torch.randn(rows, widths[-1]).double(), torch.randn(probes, rows, widths[-1]).double()
    results = []
    for dtype, split in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        p, leaf, tangents = (value.to(dtype).requires_grad_() for value in (exact, x, t))
        with ops.split_float32(split):
            y, jv = ops.swish_mlp_jvp(leaf, tangents, p, widths)
            scalar = (y * u.to(dtype)).sum() + (jv**2 * w.to(dtype)).sum()
            found = torch.autograd.grad(scalar, (leaf, tangents, p), materialize_grads=True)
        results.append((y, jv, *found))
    for truth, plain, found in zip(*results, strict=True):
        assert (found - truth).norm() <= 2.5e-4 * truth.norm()
        assert (plain - truth).norm() <= 1.2e-5 * truth.norm()
    assert torch.equal(results[1][-1], results[2][-1]) != HAS_REGISTERS


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 129])
def test_a_sample_does_not_see_the_others(rows: int) -> None:
    """Blocks end anywhere: the first samples of a batch are those of the whole batch, to rounding."""
    p, x, t = parameters(WIDTHS), torch.randn(200, 2), torch.randn(3, 200, 2)
    whole, part = ops.swish_mlp_jvp(x, t, p, WIDTHS), ops.swish_mlp_jvp(x[:rows], t[:, :rows], p, WIDTHS)
    torch.testing.assert_close(part[0], whole[0][:rows])
    torch.testing.assert_close(part[1], whole[1][:, :rows])


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    """J^T v asks for none of the weights, though these require one; training asks for none of `x`."""
    p, x = parameters(WIDTHS).requires_grad_(), torch.randn(50, 2)
    leaf = x.clone().requires_grad_()
    y, jv = ops.swish_mlp_jvp(leaf, torch.randn(1, 50, 2), p, WIDTHS)
    with Tape() as tape:
        torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        torch.autograd.grad(y.sum() + jv.sum(), p)
        ops.swish_mlp(x, p, WIDTHS).sum().backward()
    wanted = [arguments[-2:] for arguments in tape.arguments("qcsbm::swish_mlp_vjp")]
    assert wanted == [(True, False), (False, True), (False, True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [2, 2]}, "widths expected three or more positive numbers"),
        ({"x": torch.randn(3, 3)}, r"x expected \(B, 2\)"),
        ({"parameters": torch.randn(5)}, r"parameters expected \(42752,\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.randn(3, 2), "parameters": parameters(WIDTHS), "widths": WIDTHS, **change}
    with pytest.raises(ValueError, match=message):
        ops.swish_mlp(**arguments)  # pyright: ignore[reportArgumentType]


def test_the_pre_activations_have_no_derivative() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    pre = torch.ops.qcsbm.swish_mlp(x, None, parameters(WIDTHS), WIDTHS)[2]
    with pytest.raises(NotImplementedError, match="pre-activations"):
        pre.sum().backward()
