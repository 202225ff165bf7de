"""The image ops against PyTorch's own functions and their derivatives in float64; kernels against references."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcsbm_fast import ops
from qcsbm_fast.ops import backend
from qcsbm_fast.ops.registry import OPS

# (batch, channels, height, width, groups): one pixel, odd sizes, groups across vectors, large tasks.
SIZES = [
    (1, 4, 1, 1, 1),
    (2, 6, 3, 5, 3),
    (3, 20, 4, 3, 5),
    (2, 48, 5, 5, 12),
    (2, 64, 7, 9, 16),
    (1, 96, 6, 6, 2),
]
CHANNELS_LAST = {"channels-last": True, "contiguous": False}


def draw(*size, seed=0, dtype=torch.float64, channels_last=True):
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.movedim(-3, -1).contiguous().movedim(-1, -3) if channels_last and len(size) > 3 else x


def norm_inputs(size, probes=2, dtype=torch.float64, channels_last=True):
    b, c, h, w, groups = size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = 2 * draw(b, c, h, w, dtype=dtype, channels_last=channels_last) + 1
    t = draw(probes, b, c, h, w, seed=1, dtype=dtype, channels_last=channels_last)
    bias, gamma, beta = (draw(*s, seed=i, dtype=wide) for i, s in ((2, (b, c)), (3, (c,)), (4, (c,))))
    return x, t, bias, gamma, beta, groups


def plain_norm(x, bias, gamma, beta, groups, silu):
    y = F.group_norm(x if bias is None else x + bias[:, :, None, None], groups, gamma, beta, eps=1e-6)
    return y * torch.sigmoid(y) if silu else y


def plain_jvp(fn, x, tangents):
    """Tangents as derivatives of <J^T u, t> in u: differentiable in everything."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    u = torch.zeros_like(fn(x), requires_grad=True)
    (transposed,) = torch.autograd.grad(fn(x), x, u, create_graph=True)
    return fn(x), torch.stack(
        [torch.autograd.grad(transposed, u, t, create_graph=True, retain_graph=True)[0] for t in tangents]
    )


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", CHANNELS_LAST)
@pytest.mark.parametrize("size", SIZES)
def test_group_norm_silu_and_all_its_derivatives(size, layout, with_bias, silu):
    x, t, bias, gamma, beta, groups = norm_inputs(size, channels_last=CHANNELS_LAST[layout])
    bias = bias if with_bias else None
    leaves = [v.requires_grad_() for v in (x, bias, gamma, beta) if v is not None]
    value = ops.group_norm_silu(x, bias, gamma, beta, groups=groups, silu=silu)
    expected = plain_norm(x, bias, gamma, beta, groups, silu)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    g = draw(*x.shape, seed=7)
    for ours, theirs in zip(
        torch.autograd.grad(value, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    t = t.detach().requires_grad_()
    y, ydot = ops.group_norm_silu_jvp(x, t, bias, gamma, beta, groups=groups, silu=silu)
    expected, expected_dot = plain_jvp(lambda x: plain_norm(x, bias, gamma, beta, groups, silu), x, t)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ydot, expected_dot, rtol=1e-10, atol=1e-10)
    gdot = draw(*t.shape, seed=8)
    for weight in (0.0, 1.0):  # the cotangent of the tangents alone, and of both
        ours = (ydot * gdot).sum() + (weight * (y * g).sum() if weight else 0.0)
        theirs = (expected_dot * gdot).sum() + weight * (expected * g).sum()
        gradients = zip(
            torch.autograd.grad(ours, [*leaves, t], retain_graph=True),
            torch.autograd.grad(theirs, [*leaves, t], retain_graph=True),
            strict=True,
        )
        for mine, other in gradients:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())
    (mine,) = torch.autograd.grad(y, x, g)  # the value's alone: J^T g
    torch.testing.assert_close(mine, torch.autograd.grad(expected, x, g)[0], rtol=1e-10, atol=1e-10)


def test_group_norm_of_shifted_data():
    """A mean a thousand times the deviation costs float32 three digits, not six: the variance is two-pass."""
    x = 1000 + draw(2, 8, 16, 16)
    gamma, beta = torch.ones(8), torch.zeros(8)
    y = ops.group_norm_silu(x.float(), None, gamma, beta, groups=2, silu=False)
    exact = plain_norm(x.float().double(), None, gamma.double(), beta.double(), 2, False)
    assert (y - exact).abs().max() < 1e-3


FIRS = [((1, 3, 3, 1), 2, 1, (2, 1)), ((1, 3, 3, 1), 1, 2, (1, 1)), ((1.0, 2.0, 5.0), 3, 2, (2, 4)),
        ((1.0, -2.0, 3.0, 0.5, 1.0), 1, 1, (2, 2)), ((1, 1), 2, 1, (1, 0)), ((2.0, 1.0), 1, 3, (-1, 3))]  # fmt: skip


def fir_matrix(size, taps, up, down, pad):
    """The map along one axis, built from the definition."""
    padded = torch.zeros(size * up + sum(pad), size, dtype=torch.float64)
    for m in range(size):
        if 0 <= m * up + pad[0] < padded.shape[0]:
            padded[m * up + pad[0], m] = 1
    count = (padded.shape[0] - len(taps)) // down + 1
    kernel = torch.tensor(taps, dtype=torch.float64).flip(0)
    return torch.stack([kernel @ padded[o * down : o * down + len(taps)] for o in range(count)])


@pytest.mark.parametrize("layout", CHANNELS_LAST)
@pytest.mark.parametrize("channels", [1, 5, 24])
@pytest.mark.parametrize(("taps", "up", "down", "pad"), FIRS)
def test_fir_is_its_matrix(taps, up, down, pad, channels, layout):
    x = draw(2, channels, 6, 9, channels_last=CHANNELS_LAST[layout]).requires_grad_()
    rows, cols = (fir_matrix(n, taps, up, down, pad) for n in (6, 9))
    y = ops.fir(x, taps, up=up, down=down, pad=pad)
    torch.testing.assert_close(y, rows @ x @ cols.T, rtol=1e-13, atol=1e-13)
    g = draw(*y.shape, seed=3)
    (gx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gx, rows.T @ g @ cols, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cols", [1, 3, 16, 37])
def test_softmax_and_all_its_derivatives(cols):
    z = (3 * draw(2, 5, cols)).requires_grad_()
    p = ops.softmax(z)
    torch.testing.assert_close(p, torch.softmax(z, -1), rtol=1e-13, atol=1e-13)
    t = draw(3, 2, 5, cols, seed=1, channels_last=False).requires_grad_()
    y, ydot = ops.softmax_jvp(z, t)
    expected, expected_dot = plain_jvp(lambda z: torch.exp(z) / torch.exp(z).sum(-1, keepdim=True), z, t)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ydot, expected_dot, rtol=1e-12, atol=1e-13)
    g, gdot = draw(2, 5, cols, seed=2), draw(*t.shape, seed=3, channels_last=False)
    for ours, theirs in (
        ((p * g).sum(), (expected * g).sum()),
        ((ydot * gdot).sum(), (expected_dot * gdot).sum()),
        ((ydot * gdot).sum() + (y * g).sum(), (expected_dot * gdot).sum() + (expected * g).sum()),
    ):
        for mine, other in zip(
            torch.autograd.grad(ours, [z, t], retain_graph=True, allow_unused=True),
            torch.autograd.grad(theirs, [z, t], retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)


def test_softmax_of_large_numbers():
    z = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e30, 0.0, 1.0]])
    torch.testing.assert_close(ops.softmax(z), torch.softmax(z, -1))


def test_scaled_add():
    a, b = draw(2, 3, 5, 4).requires_grad_(), draw(2, 3, 5, 4, seed=1, channels_last=False).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.scaled_add(a, b, 0.7), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.scaled_add(a, b, 0.7), (a, b))
    torch.testing.assert_close(ops.scaled_add(a, b, 0.7), 0.7 * (a + b), rtol=1e-15, atol=0)


def calls(dtype, size=(2, 40, 9, 7, 5)) -> dict[str, tuple]:
    """Arguments of every op, of an odd size."""
    x, t, bias, gamma, beta, groups = norm_inputs(size, dtype=dtype)
    g, gdot = draw(*x.shape, seed=5, dtype=dtype), draw(*t.shape, seed=6, dtype=dtype)
    vectors, rest = (bias, gamma, beta), (groups, 1e-6, True)
    _, _, *stats = OPS["group_norm_silu_jvp"].reference(x, t, *vectors, *rest)
    z, d, gz, gd = (
        2 * draw(*s, seed=i, dtype=dtype, channels_last=False)
        for i, s in enumerate(((3, 7, 45), (2, 3, 7, 45), (3, 7, 45), (2, 3, 7, 45)))
    )
    p = torch.softmax(z.double(), -1).to(dtype)
    return {
        "group_norm_silu": (x, *vectors, *rest),
        "group_norm_silu_jvp": (x, t, *vectors, *rest),
        "group_norm_silu_vjp": (g, x, *vectors, stats[0], groups, True),
        "group_norm_silu_jvp_vjp": (g, gdot, x, t, *vectors, *stats, groups, True),
        "softmax": (z,),
        "softmax_jvp": (z, d),
        "softmax_vjp": (gz, p),
        "softmax_jvp_vjp": (gz, gd, p, d),
        "fir": (x, [0.25, 0.75, 0.75, 0.25], 2, 1, 2, 18, 14),
        "scaled_add": (x, g, 0.7071),
    }


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", calls(torch.float64))
def test_kernels_are_as_accurate_as_references(name, dtype):
    """Error to the float64 reference on the same inputs: at most twice the same-dtype reference's, plus 4 ulp."""
    if not backend.has_kernel(name, "cpu"):
        pytest.skip("the extension is not built")
    arguments = calls(dtype)[name]
    wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    outs = [OPS[name].overload(*arguments), OPS[name].reference(*arguments), OPS[name].reference(*wide)]
    outs = [(o,) if isinstance(o, Tensor) else o for o in outs]
    for index, (ours, same, exact) in enumerate(zip(*outs, strict=True)):
        assert (ours.dtype, ours.shape, ours.stride()) == (same.dtype, same.shape, same.stride()), index
        assert error(ours, exact) <= 2 * error(same, exact) + 4 * torch.finfo(dtype).eps, index


@pytest.mark.parametrize("name", calls(torch.float64))
def test_opcheck(name):
    torch.library.opcheck(OPS[name].overload, calls(torch.float32, (2, 8, 3, 5, 2))[name])


@pytest.mark.parametrize(
    "name", ["group_norm_silu_vjp", "group_norm_silu_jvp_vjp", "softmax_vjp", "softmax_jvp_vjp"]
)
def test_missing_derivatives_raise(name):
    arguments = [a.requires_grad_() if isinstance(a, Tensor) else a for a in calls(torch.float64)[name]]
    out = OPS[name].overload(*arguments)
    with pytest.raises(NotImplementedError, match=f"{name} has no derivative of this order"):
        (out if isinstance(out, Tensor) else out[0]).sum().backward()


@pytest.mark.parametrize("size", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_empty_images(size):
    x, gamma = torch.randn(size), torch.ones(8)
    x.requires_grad_()
    t = torch.randn(2, *size)
    assert ops.group_norm_silu(x, None, gamma, gamma, groups=2).shape == size
    y, ydot = ops.group_norm_silu_jvp(x, t, None, gamma, gamma, groups=2)
    (y.sum() + ydot.sum()).backward()
    assert y.shape == size
    assert ydot.shape == (2, *size)
    assert x.grad is not None
    assert ops.scaled_add(x, x, 1.0).shape == size
    if size[0] == 0:
        assert ops.fir(x, (1, 1), up=2, pad=(1, 0)).shape == (0, 8, 8, 8)


EIGHT = torch.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.group_norm_silu(x[0], None, EIGHT, EIGHT, groups=2), "group_norm_silu: x expected"),
        (lambda x: ops.group_norm_silu(x, None, EIGHT[:3], EIGHT, groups=2), r"gamma expected \(8,\)"),
        (lambda x: ops.group_norm_silu(x, EIGHT, EIGHT, EIGHT, groups=2), r"bias expected \(2, 8\)"),
        (lambda x: ops.group_norm_silu(x, None, EIGHT, EIGHT, groups=3), "groups expected a divisor of 8"),
        (lambda x: ops.group_norm_silu_jvp(x, x, None, EIGHT, EIGHT, groups=2), "tangents expected"),
        (lambda x: ops.fir(x, (), up=2), "fir: x expected images large enough for 0 taps"),
        (lambda x: ops.fir(x, (1, 1), up=0), "fir: up, down expected"),
        (lambda x: ops.fir(x.long(), (1, 1)), "fir: x expected a floating-point tensor"),
        (lambda x: ops.scaled_add(x, x[:1], 1.0), "scaled_add: b expected"),
        (lambda x: ops.softmax_jvp(x, x), "softmax: tangents expected"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 8, 4, 4))


def test_results_do_not_depend_on_the_number_of_threads():
    calls_ = calls(torch.float32, (5, 64, 16, 16, 16))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append([OPS[name].overload(*arguments) for name, arguments in calls_.items()])
    torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        pairs = [(a, b)] if isinstance(a, Tensor) else list(itertools.chain(zip(a, b, strict=True)))
        assert all(torch.equal(p, q) for p, q in pairs)
