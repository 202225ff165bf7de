"""The blocks of NCSN++ as single ops: they are their layers, and compute what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from block_draws import attention_block, res_block
from draws import Draw
from qcsbm_fast import ops
from qcsbm_fast.dual import Dual
from qcsbm_fast.nn.attention import Attention
from qcsbm_fast.nn.image_layers import Resample
from qcsbm_fast.nn.res_block import ResBlock
from qcsbm_fast.ops import backend
from tape import Tape

TAPS = (1.0, 3.0, 3.0, 1.0)
Run = Callable[[Any], Any]


def images(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64).movedim(-3, -1).contiguous().movedim(-1, -3)


def with_ordinary_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    return module.double()


def residual(
    out: int, direction: Literal["up", "down"] | None, taps: tuple[float, ...] | None
) -> tuple[nn.Module, Run, Run]:
    """A block, its layers, and the op."""
    resample = None if direction is None else Resample(direction, taps)
    block = ResBlock(8, out, 16, dropout=0.0, resample=resample, scale=0.7, init_scale=1.0)
    with_ordinary_weights(block)
    bias = torch.randn(3, out).double()
    return block, lambda x: block(x, bias), lambda x: block._as_one_op(x, bias)


def attention() -> tuple[nn.Module, Run, Run]:
    block = Attention(8, 0.7, 1.0)
    with_ordinary_weights(block)
    return (
        block,
        block,
        lambda x: block._as_one_op(x, *block._projection(), block.out.weight[:, :, None, None]),
    )


BLOCKS = {
    "identity": lambda: residual(8, None, None),
    "wider": lambda: residual(16, None, None),
    "up": lambda: residual(8, "up", TAPS),
    "down": lambda: residual(12, "down", TAPS),
    "plain-up": lambda: residual(12, "up", None),
    "plain-down": lambda: residual(8, "down", None),
    "attention": attention,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_layers(name: str) -> None:
    """Values, tangents, J^T v, and every gradient of a function of all, in float64."""
    torch.manual_seed(0)
    block, layers, one_op = BLOCKS[name]()
    x, t = images(3, 8, 6, 4), images(2, 3, 8, 6, 4)
    results = []
    for run in (layers, one_op):
        leaf, tangents = x.clone().requires_grad_(), t.clone().requires_grad_()
        y = run(Dual(leaf, tangents))
        (jtv,) = torch.autograd.grad(y.primal, leaf, torch.ones_like(y.primal), retain_graph=True)
        inputs = [leaf, tangents, *block.parameters()]
        gradients = torch.autograd.grad(
            y.primal.sin().sum() + (y.tangents**3).sum(), inputs, allow_unused=True
        )
        results.append([y.primal, y.tangents, run(x), jtv, *(g for g in gradients if g is not None)])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("probes", [1, 3])
def test_adjoint(name: str, probes: int) -> None:
    """<u, J v> = <J^T u, v>, through the op's tangents and its backward."""
    torch.manual_seed(1)
    _, _, one_op = BLOCKS[name]()
    x, v = images(3, 8, 4, 6).requires_grad_(), images(probes, 3, 8, 4, 6)
    y = one_op(Dual(x, v))
    for k in range(probes):
        u = torch.randn_like(y.primal)
        (jtu,) = torch.autograd.grad(y.primal, x, u, retain_graph=True)
        sums = [(a * b).flatten(1).sum(1) for a, b in ((u, y.tangents[k]), (jtu, v[k]))]
        torch.testing.assert_close(*sums, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not backend.has_kernel("res_block", "cpu"), reason="needs a processor with AVX2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_in_training_is_one_call_each_way(dtype: torch.dtype) -> None:
    """Also under autocast; J^T v computes no gradient of a weight."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        [ResBlock(32, 32, None, dropout=0.1, scale=1.0, init_scale=1.0).eval(), Attention(32, 1.0, 1.0)]
    )
    x, v = torch.randn(2, 32, 8, 8).requires_grad_(), torch.randn(1, 2, 32, 8, 8)
    tape = Tape()
    with tape, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = blocks[1](blocks[0](Dual(x, v), torch.randn(2, 32)))
        torch.autograd.grad(y.primal, x, torch.ones_like(y.primal), retain_graph=True)
        (y.primal.sum() + y.tangents.square().sum()).backward()
    own = [name for name in tape.names if name.startswith("qcsbm::")]
    backward = ["qcsbm::attention_block_vjp", "qcsbm::res_block_vjp"]
    assert own == ["qcsbm::res_block", "qcsbm::attention_block", *backward, *backward]
    for name in backward:
        assert [arguments[-1] for arguments in tape.arguments(name)] == [False, True]
    found = [name for name, p in blocks.named_parameters() if p.grad is not None and p.grad.isfinite().all()]
    assert set(found) == {name for name, _ in blocks.named_parameters()} - {"0.conv_in.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(8, 4, 4)}, r"x expected images \(B, C, H, W\)"),
        ({"weight_in": torch.randn(8, 4, 1, 1)}, r"weight_in expected float32 \(8, 4, 3, 3\)"),
        ({"shortcut": None}, r"shortcut expected \(8, 4, 1, 1\)"),
        ({"groups": (3, 2)}, "groups_in expected a divisor of 4"),
        ({"resample": ((), 2, 1, 0)}, "resample expected taps"),
        ({"tangents": torch.randn(1, 2, 4, 4, 3)}, r"tangents expected \(K, \*\) beside x"),
        ({"gamma_out": torch.randn(3)}, r"gamma_out expected \(8,\)"),
    ],
)
def test_bad_arguments_of_a_residual_block_are_named(change: dict[str, Any], message: str) -> None:
    names = [
        "x",
        "tangents",
        "bias",
        "gamma_in",
        "beta_in",
        "weight_in",
        "gamma_out",
        "beta_out",
        "weight_out",
        "bias_out",
        "shortcut",
    ]
    call = dict(zip(names, res_block(0, 8)(Draw(torch.float32), (2, 4, 4, 4)), strict=False))
    with pytest.raises(ValueError, match=message):
        ops.res_block(**{**call, "groups": (2, 2), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(8, 4, 4)}, r"x expected images \(B, C, H, W\)"),
        ({"weight": torch.randn(4, 4, 1, 1)}, r"weight expected float32 \(12, 4, 1, 1\)"),
        ({"groups": 3}, "groups expected a divisor of 4"),
        ({"bias": torch.randn(4)}, r"bias expected \(12,\)"),
    ],
)
def test_bad_arguments_of_an_attention_block_are_named(change: dict[str, Any], message: str) -> None:
    names = ("x", "tangents", "gamma", "beta", "weight", "bias", "weight_out", "bias_out")
    call = dict(zip(names, attention_block(0)(Draw(torch.float32), (2, 4, 4, 4)), strict=False))
    with pytest.raises(ValueError, match=message):
        ops.attention_block(**{**call, "groups": 2, **change})


@pytest.mark.parametrize("name", ["res_block", "attention_block"])
def test_what_is_kept_has_no_derivative(name: str) -> None:
    build = res_block(0) if name == "res_block" else attention_block(0)
    x, *rest = build(Draw(torch.float32), (2, 4, 4, 4))
    kept = getattr(torch.ops.qcsbm, name)(x.requires_grad_(), *rest)[2]
    with pytest.raises(NotImplementedError, match="what it keeps"):
        kept.sum().backward()
