"""What saves memory changes nothing else: probes in chunks, activations computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import parameter_gradient
from qcsbm_fast import DenoisingObjective, NoiseStream, Score, asymmetry
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.sde import VE

SETTINGS = NCSNppConfig(
    image_size=8, num_channels=1, nf=4, num_res_blocks=1, ch_mult=(1, 2), attn_resolutions=(4,), dropout=0.3,
    init_scale=1.0,
)  # fmt: skip


def images() -> NCSNpp:
    torch.manual_seed(0)
    return NCSNpp(SETTINGS)


def foreign() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(0.3), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 6)
    ).double()


class Kept:
    """Bytes that autograd keeps for the backward pass, each tensor's memory once."""

    def __enter__(self) -> Kept:
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value)
        self._hooks.__enter__()
        return self

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return value

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self.bytes = sum(self._storages.values())


@pytest.mark.parametrize("estimator", ["one_sided", "symmetric"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("network", ["ours", "foreign"])
def test_probes_in_chunks_give_the_same(network, size, estimator):
    """Penalty, NAsym, score, and the gradient of a loss of score and surrogate; four probes, one dropout mask."""
    net = images().double() if network == "ours" else foreign()
    shape, sigma = ((2, 1, 8, 8) if network == "ours" else (5, 6)), torch.tensor([0.3, 1.0]).double()
    x, v = torch.randn(shape).double(), torch.randn(4, *shape).double()
    weight = torch.rand(shape[0]).double()

    def fn(y):
        return net(y, sigma) if network == "ours" else net(y)

    found = []
    for chunk in (None, size):
        torch.manual_seed(1)
        result = asymmetry(fn, x, v=v, estimator=estimator, probe_chunk=chunk)
        loss = (weight * result.surrogate).sum() + result.score.square().sum()
        after = torch.rand(1)
        values = (result.penalty, result.nasym, result.score.detach(), result.surrogate.detach(), after)
        found.append((*values, parameter_gradient(loss, net)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_chunks_keep_one_and_not_all():
    net = images().double()
    sigma = torch.tensor([0.3, 1.0]).double()
    x = torch.randn(2, 1, 8, 8).double()
    kept = {}
    for chunk in (None, 8, 1):
        with Kept() as memory:
            asymmetry(lambda y: net(y, sigma), x, probes=8, probe_chunk=chunk, generator=NoiseStream(0))
        kept[chunk] = memory.bytes
    assert kept[8] == kept[None]
    assert kept[1] < 0.2 * kept[None]


def test_chunks_without_a_graph():
    net = foreign().eval()
    x = torch.randn(5, 6).double()
    with torch.no_grad():
        whole, parts = (
            asymmetry(net, x, probes=4, probe_chunk=c, generator=NoiseStream(3)) for c in (None, 3)
        )
    torch.testing.assert_close(parts.penalty, whole.penalty, rtol=1e-12, atol=0)
    assert not parts.score.requires_grad
    assert not parts.surrogate.requires_grad


def test_bad_chunks_are_refused():
    x = torch.randn(5, 6).double()
    with pytest.raises(ValueError, match="probe_chunk: expected at least 1, got 0"):
        asymmetry(foreign(), x, probe_chunk=0)
    with pytest.raises(ValueError, match="exact"):
        asymmetry(foreign(), x, exact=True, probe_chunk=2)


@pytest.mark.parametrize("settings", [{}, {"balancing_factor": 0.1, "probes": 2, "fraction": 0.5}])
@pytest.mark.parametrize("kind", ["quasi-conservative", "conservative"])
def test_activations_computed_again_give_the_same_bits(kind, settings):
    """Tensors and duals, dropout included; much less is kept."""
    if kind == "conservative":
        settings = {}
    x0 = torch.rand(4, 1, 8, 8)
    found, kept = [], []
    for again in (False, True):
        net = images()
        net.checkpoint_activations = again
        objective = DenoisingObjective(Score(net, VE(0.01, 50.0), kind), stream=NoiseStream(0), **settings)
        torch.manual_seed(1)
        with Kept() as memory:
            result = objective(x0)
        result.loss.backward()
        kept.append(memory.bytes)
        found.append((result.loss, *(p.grad for p in net.parameters() if p.grad is not None), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    if kind != "conservative":
        assert kept[1] < 0.5 * kept[0]
