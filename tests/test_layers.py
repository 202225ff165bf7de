"""A network's layers as one call are its layers: the same numbers, and never where somebody could tell."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from qcsbm_fast import ops
from qcsbm_fast.dual import Dual
from qcsbm_fast.nn import NCSNpp, NCSNppConfig, program
from qcsbm_fast.nn.image_layers import Conv
from qcsbm_fast.nn.program import NetworkProgram
from qcsbm_fast.nn.res_block import ResBlock
from qcsbm_fast.ops.layers import HAS_LAYERS
from test_ncsnpp_options import STRUCTURES, combination, ordinary_network

pytestmark = pytest.mark.skipif(not HAS_LAYERS, reason="needs a processor with AVX2")

fits = NetworkProgram.fits


@contextmanager
def path(as_one_call: bool) -> Iterator[list[bool]]:
    """Runs networks as one call or by their layers; notes for each whether it could be one."""
    could: list[bool] = []

    def decide(self: NetworkProgram, x: Any) -> bool:
        could.append(fits(self, x))
        return as_one_call and could[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkProgram, "fits", decide)
        yield could


@pytest.fixture
def float64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take float64 images, by plain loops; networks do not ask them to."""
    monkeypatch.setattr(program, "has_image_kernels", lambda x: True)
    monkeypatch.setattr(program, "_is_plain", lambda parameter: True)


def small(**options: Any) -> NCSNpp:
    torch.manual_seed(3)
    settings = {"image_size": 8, "nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
    net = NCSNpp(NCSNppConfig(**{**settings, "dropout": 0.0, "init_scale": 1.0, **options}))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def draw(net: NCSNpp, probes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Images, tangents, cotangents of both, noise levels."""
    c, gen = net.config, torch.Generator().manual_seed(probes)
    shape = (2, c.num_channels, c.image_size, c.image_size)
    numbers = torch.randn(2 + 2 * probes, *shape, dtype=torch.float64, generator=gen).to(dtype)
    x, u, t, w = numbers.split([1, 1, probes, probes])
    return x[0], t, u[0], w, torch.tensor([0.3, 2.0], dtype=dtype)


def everything(net: NCSNpp, probes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Value and tangents, J^T u, and the joint gradients of images, tangents and parameters."""
    x, t, u, w, sigma = draw(net, probes, dtype)
    x.requires_grad_()
    t.requires_grad_()
    out = net(Dual(x, t), sigma) if probes else net(x, sigma)
    results = [out.primal, out.tangents] if isinstance(out, Dual) else [out]
    cotangents = [value.to(out.dtype) for value in (u, w)[: len(results)]]
    (transposed,) = torch.autograd.grad(results[0], x, cotangents[0], retain_graph=True)
    leaves = [x, *([t] if probes else []), *net.parameters()]
    return [*results, transposed, *torch.autograd.grad(results, leaves, cotangents)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of all results together, each over its own norm, unless that is rounding itself."""
    largest = max(value.norm().item() for value in expected)
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, expected, strict=True)
        if b.norm() > 1e-6 * largest
    )


@pytest.mark.parametrize("structure", range(len(STRUCTURES)))
def test_one_call_is_the_layers(structure: int, float64_too: None) -> None:
    """Over all structural options: value, tangents and all gradients, in float64."""
    net = ordinary_network({**combination(structure, structure % 4), "dropout": 0.0}, structure)
    for probes in (0, 2):
        results = []
        for as_one_call in (True, False):
            with path(as_one_call) as could:
                results.append(everything(net, probes))
            assert could == [True]
        assert distance(*results) < 1e-10, net.config


@pytest.mark.parametrize("precision", ["float32", "split float32", "bfloat16"])
def test_rounds_no_worse_than_the_layers(precision: str) -> None:
    """Errors against float64 in the precisions that networks run in, in the mean of four draws of weights."""
    errors = {True: 0.0, False: 0.0}
    for _ in range(4):
        net = small()
        exact = everything(copy.deepcopy(net).double(), 1)
        for as_one_call in errors:
            with (
                path(as_one_call) as could,
                ops.split_float32(precision == "split float32"),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
            ):
                found = everything(net, 1, torch.float32)
            assert could == [True]
            squares = [(a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)]
            errors[as_one_call] += (sum(squares) / sum(b.square().sum() for b in exact)).sqrt().item() / 4
    assert errors[True] < 1.3 * errors[False]
    assert errors[True] < (0.05 if precision == "bfloat16" else 1e-4)


@pytest.mark.parametrize("which", ["value", "tangents", "frozen parts", "input alone", "no gradient"])
def test_only_what_is_asked_for(which: str, float64_too: None) -> None:
    """A loss of one of the results, and gradients of some of the leaves."""
    results = []
    for as_one_call in (True, False):
        net = small().double()
        x, t, u, w, sigma = draw(net, 1)
        leaves = [*net.parameters()]
        if which == "frozen parts":
            net.middle.requires_grad_(False)
            net.input.requires_grad_(False)
            leaves = [p for p in leaves if p.requires_grad]
        if which == "input alone":
            leaves = [x.requires_grad_(), t.requires_grad_()]
        with path(as_one_call), torch.set_grad_enabled(which != "no gradient"):
            out = net(Dual(x, t), sigma)
        found = [out.primal, out.tangents]
        if which != "no gradient":
            loss = (out.tangents * w).sum() if which != "value" else (out.primal * u).sum()
            found += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append(found)
    assert results[0][0].requires_grad == (which != "no gradient")
    assert distance(*results) < 1e-10


def test_no_images(float64_too: None) -> None:
    net = small().double()
    with path(True) as could:
        x = torch.zeros(0, 3, 8, 8).double().requires_grad_()
        y = net(x, torch.ones(0).double())
    assert could == [True]
    assert y.shape == x.shape
    for gradient in torch.autograd.grad(y.sum(), list(net.parameters())):
        assert not gradient.any()


def test_no_probes() -> None:
    """A dual of no tangents has the value and the gradients of its primal."""
    net = small()
    x, *_, sigma = draw(net, 0, torch.float32)
    results = []
    with path(True) as could, torch.autocast("cpu", torch.bfloat16):
        for value in (x, Dual(x, x.new_zeros(0, *x.shape))):
            out: Any = net(value, sigma)
            primal = out.primal if isinstance(out, Dual) else out
            results.append([primal, *torch.autograd.grad(primal.sum(), list(net.parameters()))])
    assert out.tangents.shape == (0, *x.shape)
    assert could == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_bits_for_any_number_of_threads() -> None:
    net, threads, results = small(), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.autocast("cpu", torch.bfloat16), path(True) as could:
            results.append(everything(net, 1, torch.float32))
        assert could == [True]
    torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def hooked(net: NCSNpp) -> None:
    net.middle[0].register_forward_hook(lambda module, given, out: 2 * out)


def patched(net: NCSNpp) -> None:
    forward = net.middle[0].forward
    net.middle[0].forward = lambda *given: 2 * forward(*given)


def parametrised(net: NCSNpp) -> None:
    parametrize.register_parametrization(net.middle[0].conv_in, "weight", Doubled())


class OtherConv(Conv):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def replaced(net: NCSNpp) -> None:
    other = OtherConv(3, 32)
    other.load_state_dict(net.input.state_dict())
    net.input = other


def subclassed(net: NCSNpp) -> None:
    net.input.__class__ = OtherConv


def appended(net: NCSNpp) -> None:
    net.middle.append(OtherConv(64, 64))


@pytest.mark.parametrize("change", [hooked, patched, parametrised, replaced, subclassed, appended])
@pytest.mark.parametrize("before", [True, False])
def test_changes_are_seen(change: Any, before: bool) -> None:
    """A network that was changed, after it ran or before, computes by its layers what they compute now."""
    net = small()
    x, *_, sigma = draw(net, 0, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if before:
            net(x, sigma)
        unchanged = small()(x, sigma)
        change(net)
        with path(True) as could:
            found = net(x, sigma)
        with path(False):
            expected = net(x, sigma)
    assert could == [False]
    assert torch.equal(found, expected)
    assert not torch.equal(found, unchanged)


def test_a_new_part_of_the_same_kind_is_run() -> None:
    net, other = small(), small()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x, *_, sigma = draw(net, 0, torch.float32)
        net(x, sigma)
        other.input.weight.mul_(2)
        net.input = other.input
        with path(True) as could:
            assert torch.equal(net(x, sigma), other(x, sigma))
    assert could == [True, True]


def test_other_precisions_modes_and_copies() -> None:
    """float32 without leave, dropout, checkpointing and dispatch modes go by the layers; copies have their own."""
    net = small(dropout=0.2)
    x, *_, sigma = draw(net, 0, torch.float32)
    with path(True) as could:
        net(x, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            net.train()(x, sigma)
            net.eval()(x, sigma)
            net.checkpoint_activations = True
            net(x, sigma)
            net.checkpoint_activations = False
            with torch.no_grad(), FlopCounterMode(display=False):
                net(x, sigma)
            for same in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
                with torch.no_grad():
                    net.input.weight.add_(1)
                    assert not torch.equal(same(x, sigma), net(x, sigma))
    assert could == [False, False, True, False, True, True, True, True]


def test_a_second_derivative_is_refused() -> None:
    net = small()
    x, _, u, _, sigma = draw(net, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.requires_grad_(), sigma)
    (gradient,) = torch.autograd.grad(out, x, u.to(out.dtype), create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative of this order"):
        gradient.sum().backward()


def test_gradients_are_stored_as_their_parameters() -> None:
    """Strides too, along sizes of 1 as well: DistributedDataParallel warns of others."""
    net = small(num_channels=1)
    x, *_, sigma = draw(net, 0, torch.float32)
    with path(True) as could, torch.autocast("cpu", torch.bfloat16):
        net(x, sigma).sum().backward()
    assert could == [True]
    for parameter in net.get_submodule("down").parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_profilers_see_the_layers() -> None:
    """Each layer under the name of its op, as often as it runs, forward and in the adjoint."""
    net = small()
    x, *_, sigma = draw(net, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profiler:
        net(x.requires_grad_(), sigma).sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    blocks = sum(isinstance(part, ResBlock) for part in net.modules())
    for name, count in (("res_block", blocks), ("attention_block", 3), ("fir", 1), ("join", 4)):
        assert counts[f"qcsbm::{name}"] == count, name
        assert counts[f"qcsbm::{name}_vjp"] == count, name
    assert counts["qcsbm::layers"] == counts["qcsbm::layers_vjp"] == 1


def test_spoiled_calls_are_refused() -> None:
    """Fields, numbers, parameters and kept tensors changed at random: an error, or a result, never a crash."""
    net = small()
    x, t, u, w, sigma = draw(net, 1, torch.float32)
    prog, rng = net._program(), random.Random(0)
    parameters = [p.detach() for p in prog._parameters()]
    embedding = net.embed(net.features(sigma)).detach()
    last = [v.contiguous(memory_format=torch.channels_last) for v in (x, u)]
    (x, u), (t, w) = last, (ops.layout.to_channels_last(v) for v in (t, w))
    fields, numbers = prog._program.fields, prog._program.numbers
    call, adjoint = torch.ops.qcsbm.layers.default, torch.ops.qcsbm.layers_vjp.default
    _, _, *kept = call(x, t, embedding, parameters, fields, numbers, True)

    def spoil(values: list[Any]) -> list[Any]:
        values, at = list(values), rng.randrange(len(values))
        if isinstance(values[at], Tensor):
            value = values[at]
            values[at] = rng.choice(
                [value[:0], value.double(), value.flatten(), value[..., :1], value.reshape(-1, 1)]
            )
        else:
            values[at] = rng.choice([-1, 0, 1, 2, 5, 1000, 2**40])
        return values if rng.random() < 0.9 else values[:at]

    refused = 0
    for _ in range(600):
        given = [parameters, kept, fields, numbers]
        which = rng.randrange(3)  # numbers are numbers: any will do
        given[which] = spoil(given[which])
        p, k, f, n = given
        try:
            if rng.random() < 0.3:
                call(x, t, embedding, p, f, n, True)
            else:
                adjoint(u, w, x, t, embedding, p, k, f, n, True, True)
        except RuntimeError:
            refused += 1
    assert refused > 300
