"""Modules written for tensors run on duals: every rule against autograd in float64, and what must not pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from baseline_ncsnpp import PlainNCSNpp
from oracles import parameter_gradient, probe_penalty
from qcsbm_fast import rules
from qcsbm_fast.dual import Dual, DualUnsupported
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.penalty import asymmetry

GEN = torch.Generator().manual_seed(0)


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=GEN)


W, B, VEC, CONV = draw(5, 4), draw(5), draw(4), draw(6, 4, 3, 3)
KEYS = draw(3, 6, 4)
MASK = draw(3, 6) > 0

# Functions of (3, 4): as many samples as tangents, so that a tangent broadcast to the wrong place shows.
ROWS = {
    "views": lambda x: x.reshape(2, 6).view(3, 4).permute(1, 0).transpose(0, 1).unsqueeze(1).squeeze(1),
    "views_2": lambda x: x.flatten().unflatten(0, (4, 3)).T.contiguous().expand(2, 3, 4).movedim(0, 1).mT,
    "parts": lambda x: torch.cat([*x.chunk(2, 1), *x.split([1, 3], 1), x.narrow(1, 0, 2), x[:, ::2]], 1),
    "rows": lambda x: torch.stack([row * i for i, row in enumerate(x)]) + x[torch.tensor([2, 0, 1])],
    "joins": lambda x: torch.stack([x, torch.ones_like(x)], 1).sum(1) + torch.hstack([x, x])[:, 2:6],
    "cat_batch": lambda x: torch.cat([x, VEC.expand(2, 4), x * x], 0),
    "sums": lambda x: x.sum(1, keepdim=True) * x - x.mean() + x.cumsum(1) + x.flip(1).roll(1, 0),
    "broadcast": lambda x: x.unsqueeze(1) * x + x.mean(0) - x.sum(1)[:, None] / (2 + x[0] * x[0]),
    "scalars": lambda x: 2 / (x * x + 1) + (3 - x) / 2 + x**3 - 2**x + x.pow(2).add(x, alpha=2),
    "from_tensors": lambda x: VEC * x + VEC - x + VEC / (x * x + 1) + torch.ones(3, 3).double() @ x,
    "linear": lambda x: F.linear(x, W, B) + x @ W.T + torch.matmul(x, W.T),
    "matmul": lambda x: x @ x.T @ x + torch.einsum("ij,kj->ik", x, x) @ x,
    "einsum": lambda x: torch.einsum("ij,ij,jk->ik", x, x + 1, W.T),
    "elementwise": lambda x: (
        F.relu(x) + x.sigmoid() + torch.tanh(x) + (-x.square()).exp() + F.gelu(x) + F.elu(x) + F.softplus(x)
        + (x.square() + 1).log().sqrt().rsqrt().reciprocal() + x.sin() * x.cos() + F.leaky_relu(x, 0.2)
        + x.clamp(-0.5, 0.5) + F.mish(x) + F.hardswish(x) + F.selu(x) + x.abs() + torch.erf(x)
    ),
    "silu": lambda x: F.silu(x) + x.T.contiguous().T * nn.SiLU()(x.T).T,
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, 0) * torch.softmax(x.unsqueeze(0), 1)[0],
    "layer_norm": lambda x: layer_norm(x, (4,), VEC, VEC + 1) + layer_norm(x, (4,), eps=0.1),
    "batch_norm": lambda x: F.batch_norm(x, VEC, VEC.square() + 0.1, VEC, VEC, eps=0.1),
    "where": lambda x: torch.where(x > 0, x * x, 0.1 * x) + torch.maximum(x, VEC) + x * (x < 0.3),
    "any_function": lambda x: torch.logsumexp(x, 1, True) + x.cumprod(1) + x.norm(dim=1, keepdim=True),
    "constants": lambda x: x * x.detach() + x.detach().sum() + x.new_ones(4) + x.shape[0] + x.size(1) * x,
    "in_place": lambda x: torch.relu_((x * 1).add_(x).mul_(2.0)) + F.silu(x * 2, inplace=True).clamp_(max=1),
    "in_place_operators": lambda x: twice(x + 1, x) + x,
    "interpolate_1d": lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear"),
    "copies": lambda x: (
        x.repeat(1, 2).tile(2, 1)[:3, :4] + x.repeat_interleave(2, 0)[:3]
        + x.index_select(1, torch.tensor([0, 0, 2, 1]))
        + x.clone().negative().ravel().reshape(3, 4) + x.swapaxes(0, 1).moveaxis(0, 1) + torch.subtract(x, 2 * x)
        + torch.tensor_split(x, 2, 1)[1].sum() + torch.divide(x, 3).true_divide(2) + torch.multiply(x, VEC)
    ),
    "dtypes": lambda x: x.to(torch.float64).double().type(torch.float64) * x.to(VEC).type_as(VEC),
    "overload": lambda x: torch.ops.aten.sigmoid.default(x) * torch.ops.aten.tanh(x),
}  # fmt: skip

# Functions of images (3, 4, 4, 6).
IMAGES = {
    "conv": lambda x: F.conv2d(x, CONV, draw_like(6), padding=1) + nn_conv(x),
    "conv_strided": lambda x: F.conv2d(x, CONV[:, :2], None, (2, 1), 1, 1, 2),
    "conv_transposed": lambda x: F.conv_transpose2d(x, CONV.transpose(0, 1), B.new_ones(6), stride=2),
    "conv_1d": lambda x: F.conv1d(x.flatten(2), CONV[..., 0]),
    "conv_unbatched": lambda x: F.conv2d(x[0], CONV),
    "group_norm": lambda x: F.group_norm(x, 2, VEC, VEC + 1, 1e-2) + F.silu(F.group_norm(x, 4)),
    "group_norm_used_twice": lambda x: kept(F.group_norm(x, 2, VEC)),
    "group_norm_in_place": lambda x: F.silu(F.group_norm(x, 2, VEC, VEC), inplace=True) * 2,
    "group_norm_1d": lambda x: F.silu(F.group_norm(x.flatten(2), 2)),
    "silu_channels_last": lambda x: F.silu(x.contiguous(memory_format=torch.channels_last)),
    "resampling": lambda x: (
        F.interpolate(x, scale_factor=2, mode="bilinear")
        + F.interpolate(F.avg_pool2d(x, 2), scale_factor=4) + F.pixel_shuffle(x, 2).sum(1, True).mean()
    ),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)) + F.pad(x, (1, 0, 2, 1), value=3.0) + F.pad(x, (0, 1, 1, 2), "replicate"),
    "resampling_2": lambda x: F.pixel_unshuffle(x, 2).mean() + F.adaptive_avg_pool2d(x, 2) * x[..., :2, :2],
    "conv_3d": lambda x: F.conv3d(x[:, None], CONV[:2, :1, None]),
    "conv_transposed_1d": lambda x: F.conv_transpose1d(x.flatten(2), CONV[:4, :2, 0], stride=2),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "attention": lambda x: attend(x.flatten(2)),
    "batch_norm": lambda x: F.silu(F.batch_norm(x, VEC, VEC.square() + 0.1)),
    "cat": lambda x: torch.cat([x, x.square(), torch.ones_like(x[:, :2])], 1),
    "dropout_off": lambda x: F.dropout(x, 0.5, training=False) * F.dropout2d(x, 0.0),
}  # fmt: skip


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """For tensors in full: the gradient of torch's own through two nested VJPs is wrong (torch 2.14)."""
    if isinstance(x, Dual):
        return F.layer_norm(x, shape, weight, bias, eps)
    centred = x - x.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    return normal if weight is None else normal * weight + bias


def draw_like(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, n, dtype=torch.float64)


def nn_conv(x):
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    with torch.no_grad():
        layer.weight.copy_(CONV.flip(0))
        layer.bias.copy_(draw_like(6))
    return layer(x)


def twice(x, y):
    same = x
    x += y
    x *= y
    x -= 1
    x /= 2
    return same  # the name that did not take part shows what happened in place


def kept(x):
    return F.silu(x) + x + F.silu(x)


def attend(x):
    q = x.mT[:, :6]
    causal = F.scaled_dot_product_attention(q, q + 1, q, is_causal=True)
    masked = F.scaled_dot_product_attention(q, q * 2, q, MASK[:, None] | torch.eye(6, dtype=torch.bool))
    return causal + masked + F.scaled_dot_product_attention(q, KEYS, KEYS * 2, scale=0.3)


def by_name(name):
    function = getattr(torch, name, None) or getattr(F, name)
    arguments = {"pow": (3.0,), "clamp": (-0.5, 0.5), "clamp_min": (0.1,), "clamp_max": (0.1,)}.get(name, ())
    positive = name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal")
    return lambda x: function(x * x + 0.1 if positive else x, *arguments)


ROWS |= {f"elementwise_{name}": by_name(name) for name in rules._NAMES["elementwise"].split()}
CASES = [(f, (3, 4)) for f in ROWS.values()] + [(f, (3, 4, 4, 6)) for f in IMAGES.values()]


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(("fn", "shape"), CASES, ids=[*ROWS, *(f"image_{name}" for name in IMAGES)])
def test_value_tangents_and_their_gradients(fn, shape, probes):
    """Against `J v` by two nested VJPs, and the gradient of a function of value and tangents through those."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    v = torch.randn(probes, *shape, dtype=torch.float64)
    out = fn(Dual(x, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = fn(x)
        u = torch.zeros_like(value, requires_grad=True)
        (back,) = torch.autograd.grad(value, x, u, create_graph=True)
        jv = torch.stack([torch.autograd.grad(back, u, t, create_graph=True)[0] for t in v])
    torch.testing.assert_close(out.primal, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.tangents, jv, rtol=1e-10, atol=1e-11)
    w, c = torch.randn_like(jv), torch.randn_like(value)
    ours = torch.autograd.grad((out.tangents * w).sum() + (out.primal * c).sum(), x)[0]
    theirs = torch.autograd.grad((jv * w).sum() + (value * c).sum(), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.library.custom_op("qcsbm_test::linear", mutates_args=())
def linear(x: torch.Tensor) -> torch.Tensor:
    return x**3


def changed_view(x):
    y = x * 1
    y[:, 0].mul_(2)
    return y


def changed_under_a_view(x):
    y = x * 1
    view = y.reshape(4, 3)
    y += 1
    return view


def filled(x):
    y = torch.zeros(3, 4)
    y[:, 0] = x[:, 0]
    return y


def without_graph(x):
    with torch.no_grad():
        return x * 2


def hooked(x):
    y = x * 2
    y.register_hook(lambda g: g * 2)
    return y


@pytest.mark.parametrize(
    "fn",
    [
        linear, torch.ops.qcsbm_test.linear.default, changed_view, changed_under_a_view, filled, without_graph, hooked,
        lambda x: torch.autograd.grad(x.sum(), x)[0],
        lambda x: x.requires_grad_(), lambda x: x.data, lambda x: x * float(x.sum()), lambda x: x * 2 if x else x,
        lambda x: torch.zeros(3, 4).copy_(x), lambda x: torch.zeros(3, 4).add_(x), lambda x: x.copy_(torch.ones(3, 4)),
        lambda x: torch.add(x, x, out=torch.empty(3, 4)), lambda x: x.view(torch.int32),
        lambda x: F.batch_norm(x, None, None, training=True), lambda x: x[x > 0] if False else x.nonsense(),
        torch.compile(lambda x: x.data * 2, backend="eager"),
    ],
)  # fmt: skip
def test_what_a_rule_would_get_wrong_raises(fn):
    x = torch.ones(3, 4, requires_grad=True)
    with pytest.raises((DualUnsupported, NotImplementedError, TypeError)):
        fn(Dual(x, torch.ones(1, 3, 4)))


def test_branches_on_values_are_constants():
    """What a comparison gives is a plain tensor, as autograd sees it."""
    x = Dual(torch.tensor([[1.0, -1.0]]), torch.ones(1, 1, 2))
    chosen = x > 0
    assert isinstance(chosen, torch.Tensor)
    assert (x.detach() == x.primal).all()
    assert (x != 0).all()
    assert len(x) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reentrant", [False])
def test_checkpointed_parts_run_again_as_duals(reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Dropout(0.5), nn.SiLU(), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)
    )
    net = net.double()
    x, v = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)

    def again(y):
        return torch.utils.checkpoint.checkpoint(net, y, use_reentrant=reentrant)

    found = []
    for fn in (net, again):
        torch.manual_seed(1)
        result = asymmetry(fn, x, v=v, estimator="symmetric")
        found.append((result.penalty, parameter_gradient(result.surrogate.sum(), net)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("probes", [1, 3])
def test_a_plain_network_of_images(probes):
    """The score network of the benchmarks in eager PyTorch: the penalty's gradient by full second-order autograd."""
    torch.manual_seed(0)
    config = NCSNppConfig(
        image_size=8, num_channels=1, nf=4, num_res_blocks=1, ch_mult=(1, 2), attn_resolutions=(4,), dropout=0.0,
        init_scale=1.0,
    )  # fmt: skip
    net = PlainNCSNpp(NCSNpp(config)).double()
    sigma = torch.rand(2, dtype=torch.float64) + 0.3
    x, v = torch.randn(2, 1, 8, 8).double(), torch.randn(probes, 2, 1, 8, 8).double()
    before = copy.deepcopy(net.state_dict())

    def fn(y):
        return net(y, sigma)

    assert isinstance(fn(Dual(x, v)), Dual)
    result = asymmetry(fn, x, v=v, estimator="symmetric")
    oracle = probe_penalty(fn, x, v)
    torch.testing.assert_close(result.penalty, oracle.detach(), rtol=1e-10, atol=1e-14)
    ours, theirs = (parameter_gradient(value.sum(), net) for value in (result.surrogate, oracle))
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
