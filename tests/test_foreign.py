"""Modules that know nothing of duals: right, or an error; never silently wrong."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from oracles import jacobians, parameter_gradient, probe_penalty
from qcsbm_fast.penalty import asymmetry


@torch.library.custom_op("qcsbm_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@cube.register_fake
def _(x):
    return torch.empty_like(x)


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("qcsbm_test::no_rule", mutates_args=())
def no_rule(x: torch.Tensor) -> torch.Tensor:
    return x**3


class DropsTerms(torch.autograd.Function):
    """A backward whose result hides from autograd how it depends on the cotangent: half the terms are lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x * g + x * g.detach()


class OldFunction(torch.autograd.Function):
    """Differentiable twice, but with no rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.inner(x, x, x, need_weights=False)[0]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(x)
        h.mul_(h.detach() * 0 + 2.0)
        return nn.functional.relu(h.add_(x.tanh()), inplace=True) + x


class Checkpointed(nn.Module):
    """Its middle is run again in the backward pass, in place of keeping what it needs."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.middle = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6), nn.Tanh())

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return self.last(h)


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


def with_function(function):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(function(self.a(x)))

    return Wrapped()


MODULES = {
    "tanh": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), (6,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1)
        ),
        (2, 4, 4),
    ),
    "batch_norm_eval": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.SiLU(), nn.Linear(6, 6)).eval(),
        (6,),
    ),
    "attention": (Attention, (5, 8)),
    "scaled_dot_product": (ScaledDotProduct, (5, 8)),
    "checkpointed": (lambda: Checkpointed(reentrant=False), (6,)),
    "in_place": (InPlace, (6,)),
    "old_function": (lambda: with_function(OldFunction.apply), (6,)),
    "custom_op": (lambda: with_function(cube), (6,)),
}


@pytest.mark.filterwarnings("ignore:J v comes from two nested VJPs", "ignore:fn goes through")
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_value_and_gradient_equal_full_second_order(name, probes):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    net = make().double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    v = torch.randn(probes, *x.shape, dtype=torch.float64)
    result = asymmetry(net, x, v=v, estimator="symmetric")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        oracle = probe_penalty(net, x, v)
        theirs = parameter_gradient(oracle.sum(), net)
    torch.testing.assert_close(result.penalty, oracle.detach(), rtol=1e-10, atol=1e-14)
    ours = parameter_gradient(result.surrogate.sum(), net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def test_a_custom_op_is_never_given_a_zero_tangent():
    torch.manual_seed(0)
    net = with_function(cube).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="qcsbm_test::cube has no tangent rule"):
        result = asymmetry(net, x, exact=True)
    j = jacobians(net, x)
    expected = 0.5 * (j - j.transpose(1, 2)).square().sum((1, 2))
    torch.testing.assert_close(result.penalty, expected.detach(), rtol=1e-11, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [no_rule, DropsTerms.apply])
def test_what_would_be_silently_wrong_raises(function):
    torch.manual_seed(0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        asymmetry(with_function(function), torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore:J v comes from two nested VJPs", "ignore:fn goes through")
def test_what_cannot_be_pushed_call_by_call_says_so():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    with pytest.warns(
        UserWarning, match="forward mode as a whole, slower: nothing is done in place on this Dual"
    ):
        asymmetry(InPlace(), x)
    with pytest.warns(UserWarning, match="J v comes from two nested VJPs"):
        asymmetry(with_function(OldFunction.apply), x)


def test_layer_norm_where_only_nested_vjps_reach():
    """The gradient of torch's own layer norm through two nested VJPs is wrong; here the oracle has it in full."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(6).double()
    norm.weight.data.normal_()
    net = nn.Sequential(with_function(OldFunction.apply).double(), norm)
    x, v = torch.randn(4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)

    def in_full(y):
        y = net[0](y)
        centred = y - y.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
        return normal * norm.weight + norm.bias

    ours = parameter_gradient(asymmetry(net, x, v=v, estimator="symmetric").surrogate.sum(), net)
    theirs = parameter_gradient(probe_penalty(in_full, x, v).sum(), net)
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def test_dropped_terms_are_named():
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="drops second-order terms"):
        asymmetry(with_function(DropsTerms.apply), torch.randn(4, 6))


@pytest.mark.parametrize("estimator", ["one_sided", "symmetric"])
def test_dropout_has_one_mask(estimator):
    """A diagonal Jacobian is symmetric under any mask, but not if J v and J^T v see different ones."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Tanh()).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    result = asymmetry(net, x, probes=3, estimator=estimator)
    assert result.penalty.abs().max() < 1e-25
    assert (result.score == 0).any()
    assert (result.score != 0).any()


def test_errors_of_the_function_are_its_own():
    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asymmetry(broken, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        asymmetry(nn.Linear(4, 3), torch.ones(2, 3))
