"""NCSN++ against reference runs of the authors' networks, and its derivatives over all options."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcsbm_fast.dual import Dual
from qcsbm_fast.nn.ncsnpp import NCSNpp, NCSNppConfig
from qcsbm_fast.nn.program import NetworkProgram
from qcsbm_fast.nn.reference_weights import (
    from_reference_state_dict,
    load_reference_checkpoint,
    to_reference_state_dict,
)
from qcsbm_fast.penalty import asymmetry

CASES = ("biggan_fir_residual", "biggan_outskip_inskip", "ddpm_positional_nofir")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Golden:
    def __init__(self, name: str, dtype: torch.dtype = torch.float64):
        data = np.load(Path(__file__).parent / "data" / f"{name}.npz")
        self.data = data
        self.config = NCSNppConfig.from_dict(ast.literal_eval(str(data["config"])))
        self.state = {k[6:]: torch.from_numpy(data[k]) for k in data.files if k.startswith("param/")}
        self.net = from_reference_state_dict(NCSNpp(self.config), self.state).to(dtype).eval()
        self.x, cond, self.v = (torch.from_numpy(data[k]).to(dtype) for k in ("x", "cond", "v"))
        c = self.config
        if c.embedding_type == "positional":  # the condition is a step of the noise levels
            cond = c.sigma_max * (c.sigma_min / c.sigma_max) ** (cond / (c.num_scales - 1))
        self.sigma = cond

    def score(self, x):
        return self.net(x, self.sigma) / self.sigma[:, None, None, None]

    def error(self, name: str, value: torch.Tensor) -> float:
        expected = torch.from_numpy(self.data[name])
        return ((value.detach().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_score_and_derivatives_of_the_reference(name, dtype):
    case, tolerance = Golden(name, dtype), TOLERANCE[dtype]
    x = case.x.requires_grad_()
    out = case.score(Dual(x, case.v[None]))
    (vjp,) = torch.autograd.grad(out.primal, x, case.v)
    penalty = 0.5 * (out.tangents[0] - vjp).square().flatten(1).sum(1)
    assert case.error("score", out.primal) < tolerance
    assert case.error("jvp", out.tangents[0]) < tolerance
    assert case.error("vjp", vjp) < tolerance
    assert case.error("penalty", penalty) < tolerance
    with torch.no_grad():
        assert case.error("score", case.score(case.x)) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_penalty_gradient_of_the_reference(name):
    """The symmetric estimator's gradient is the penalty's own: norms per parameter, by full second order."""
    case = Golden(name)
    result = asymmetry(case.score, case.x, v=case.v[None], estimator="symmetric")
    assert case.error("penalty", result.penalty) < 1e-10
    result.surrogate.sum().backward()
    # The gradients take the place of the parameters, so that the authors' names apply to them.
    with torch.no_grad():
        for p in case.net.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    gradients = to_reference_state_dict(case.net)
    prefix = "penalty_grad_norm/"
    norms = {k.removeprefix(prefix): float(case.data[k]) for k in case.data.files if k.startswith(prefix)}
    largest = max(norms.values())
    assert len(norms) > 100
    for key, norm in norms.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12 * largest), key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_go_both_ways_without_loss(name, prefix):
    case = Golden(name)
    net = NCSNpp(case.config)
    from_reference_state_dict(net, {prefix + k: v for k, v in case.state.items()})
    back = to_reference_state_dict(net)
    assert back.keys() == case.state.keys()
    for key, value in case.state.items():
        assert torch.equal(back[key], value), key


def test_checkpoint_files(tmp_path):
    case = Golden(CASES[0])
    model = {f"module.{k}": v for k, v in case.state.items()}
    trained = [k for k in case.state if k not in ("sigmas", "all_modules.0.W")]
    shadow = [case.state[k] + 1 for k in trained]
    path = tmp_path / "checkpoint_1.pth"
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict()
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow}
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 7}, path)
    raw = to_reference_state_dict(load_reference_checkpoint(NCSNpp(case.config), path, ema=False))
    averaged = to_reference_state_dict(load_reference_checkpoint(NCSNpp(case.config), path))
    for key, value in case.state.items():
        assert torch.equal(raw[key], value)
        assert torch.equal(averaged[key], value + 1 if key in trained else value)
    torch.save({"model": model, "ema": {"shadow_params": shadow[:-1]}}, path)
    with pytest.raises(ValueError, match=r"expected ema.shadow_params with \d+ tensors"):
        load_reference_checkpoint(NCSNpp(case.config), path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="key 'model'"):
        load_reference_checkpoint(NCSNpp(case.config), path)


def test_weights_that_do_not_fit_are_named():
    case = Golden(CASES[0])
    state = dict(case.state)
    state["all_modules.3.weight"] = torch.zeros(16, 1, 3, 3)
    state["all_modules.99.weight"] = state.pop("all_modules.1.bias")
    with pytest.raises(ValueError, match="fit the configuration") as error:
        from_reference_state_dict(case.net, state)
    for text in ("3.weight: expected (16, 3, 3, 3)", "99.weight: not in", "1.bias: missing"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"sigmas: expected 1000 levels from 50\.0 to 0\.01, got 10"):
        from_reference_state_dict(case.net, {**case.state, "sigmas": torch.ones(10)})


def tiny(seed=0, **options):
    """A small network with ordinary weights in float64; a fresh one is nearly linear."""
    torch.manual_seed(seed)
    settings = {
        "image_size": 8,
        "nf": 8,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (4,),
        "dropout": 0.0,
    }
    net = NCSNpp(NCSNppConfig(**{**settings, "init_scale": 1.0, **options})).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def inputs(net, batch=2, probes=2):
    c = net.config
    gen = torch.Generator().manual_seed(1)
    size = (batch, c.num_channels, c.image_size, c.image_size)
    x = torch.rand(size, dtype=torch.float64, generator=gen)
    v = torch.randn(probes, *size, dtype=torch.float64, generator=gen)
    return x, v, torch.logspace(-1, 0.5, batch, dtype=torch.float64)


def check_adjoint(net):
    """J v against a central difference of fourth order, J^T u against <u, J v>."""
    x, v, sigma = inputs(net)
    leaf = x.clone().requires_grad_()
    out = net(Dual(leaf, v), sigma)
    u = torch.randn_like(v)
    for k in range(2):
        (transposed,) = torch.autograd.grad(out.primal, leaf, u[k], retain_graph=True)
        left, right = (u[k] * out.tangents[k]).sum(), (transposed * v[k]).sum()
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(net(x, sigma), out.primal, rtol=1e-12, atol=1e-12)
        h = 1e-3
        difference = 8 * (net(x + h * v[0], sigma) - net(x - h * v[0], sigma))
        difference -= net(x + 2 * h * v[0], sigma) - net(x - 2 * h * v[0], sigma)
        scale = out.tangents[0].abs().max()
        assert (difference / (12 * h) - out.tangents[0]).abs().max() < 1e-6 * scale


@pytest.mark.parametrize(
    "options",
    [
        {"num_channels": 1, "image_size": 28, "ch_mult": (1, 1, 2), "attn_resolutions": (14,)},
        {"image_size": 64, "ch_mult": (1, 1, 2, 2), "attn_resolutions": (8,)},
        {"num_channels": 2, "num_res_blocks": 2, "centered": True, "attn_resolutions": (8, 4)},
        {"fir_kernel": (1, 2, 5, 3)},
        {"fir_kernel": (1, 2, 1), "progressive": "residual"},
        {"nf": 12, "ch_mult": (1, 3), "attn_resolutions": ()},
        {"ch_mult": (2,)},
    ],
)
def test_other_sizes(options):
    check_adjoint(tiny(**options))


def test_tangents_are_differentiable_in_every_parameter():
    """d/dtheta of <w, J v> + ||f||^2 along a random direction, against a central difference."""
    net = tiny(progressive="output_skip", progressive_input="input_skip")
    x, v, sigma = inputs(net)
    w = torch.randn_like(v)
    parameters = list(net.parameters())
    direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]

    def loss():
        out = net(Dual(x, v), sigma)
        return (out.tangents * w).sum() + out.primal.square().sum()

    grads = torch.autograd.grad(loss(), parameters)

    def at(step):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            value = loss()
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=step)
        return value

    h = 1e-4
    difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    product = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    torch.testing.assert_close(product, difference, rtol=1e-7, atol=0)


def test_dropout_has_one_mask_for_primal_and_tangents():
    net = tiny(dropout=0.3).train()
    x, v, sigma = inputs(net)

    def seeded(value):
        torch.manual_seed(5)
        return net(value, sigma)

    out = seeded(Dual(x, v))
    assert torch.equal(out.primal, seeded(x))
    h = 1e-3
    difference = 8 * (seeded(x + h * v[1]) - seeded(x - h * v[1]))
    difference -= seeded(x + 2 * h * v[1]) - seeded(x - 2 * h * v[1])
    assert (difference / (12 * h) - out.tangents[1]).abs().max() < 1e-6 * out.tangents.abs().max()
    assert not torch.equal(net(x, sigma), net(x, sigma))
    assert torch.equal(net.eval()(x, sigma), net(x, sigma))


def test_tangents_stay_channels_last():
    net = tiny()
    x, v, sigma = inputs(net)
    out = net(Dual(x, v), sigma)
    assert out.primal.is_contiguous(memory_format=torch.channels_last)
    assert out.tangents.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_scale_by_sigma_is_the_authors_division():
    """The field over sigma is the output of the authors' network either way."""
    with_scale, without = tiny(scale_by_sigma=True), tiny(scale_by_sigma=False)
    x, _, sigma = inputs(with_scale)
    torch.testing.assert_close(
        without(x, sigma), with_scale(x, sigma) * sigma[:, None, None, None], rtol=1e-13, atol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "image_size: expected a multiple of 8"),
        ({"progressive": "skip"}, "progressive: expected one of none, output_skip, residual, got 'skip'"),
        ({"resblock_type": "resnet"}, "resblock_type: expected one of biggan, ddpm"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"ch_mult": ()}, "ch_mult"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NCSNppConfig(**options)


def test_authors_settings():
    """What the network has in one form only is checked, settings of other things are ignored."""
    config = NCSNppConfig.from_dict({"nf": 64, "ema_rate": 0.9, "nonlinearity": "swish", "ch_mult": [1, 2]})
    assert config == dataclasses.replace(NCSNppConfig(), nf=64, ch_mult=(1, 2))
    with pytest.raises(ValueError, match="nonlinearity: expected 'swish', got 'elu'"):
        NCSNppConfig.from_dict({"nonlinearity": "elu"})
    with pytest.raises(ValueError, match="channels: expected a multiple of 4"):
        NCSNpp(NCSNppConfig(nf=18))


class Calls(TorchDispatchMode):
    """Counts the calls of every function on tensors."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"resblock_type": "ddpm", "fir": False}, {"progressive": "residual"}], ids=str
)
def test_the_vjp_does_not_pass_through_the_tangents(options):
    """J^T v after a dual pass runs the functions that it runs after a plain one: no zeros flow back to tangents."""
    net = tiny(**options)
    x, v, sigma = inputs(net)
    leaf = x.requires_grad_()
    counts = []
    for value in (net(leaf, sigma), net(Dual(leaf, v), sigma).primal):
        with Calls() as calls:
            torch.autograd.grad(value, leaf, v[0], retain_graph=True)
        counts.append(calls.counts)
    work = [
        name
        for name in counts[0] | counts[1]
        if name.startswith("qcsbm") or name.endswith(("backward", "mm"))
    ]
    assert counts[0]["aten::convolution_backward"] > 10
    for name in work:
        assert counts[1][name] == counts[0][name], name


def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch):
    """`torch.compile(fullgraph=True)` of the network: value and parameter gradients as without it."""
    # as one call the network has kernels for other convolutions too
    monkeypatch.setattr(NetworkProgram, "fits", lambda self, x: False)
    torch.manual_seed(0)
    config = NCSNppConfig(
        image_size=8, nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), init_scale=1.0
    )
    net = NCSNpp(config).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, sigma = torch.rand(2, 3, 8, 8), torch.tensor([0.1, 2.0])
    results = []
    for function in (net, compiled):
        net.zero_grad()
        value = function(x, sigma)
        value.square().sum().backward()
        results.append([value.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
