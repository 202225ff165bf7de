"""The training step and the sampler's step can be captured as CUDA graphs: what a CPU can tell of that.

`tape` stands for the GPU: it records what a step launches and replays it with the same tensors and the same numbers.
On the meta device, where there are no values, a step that asked for one would raise.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tape
from qcsbm_fast import NoiseStream, Score, cuda_graph, sde
from qcsbm_fast.nn import NCSNpp, NCSNppConfig, ToyMLP
from qcsbm_fast.nn.program import NetworkProgram
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.sampling import pc
from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.train import build
from qcsbm_fast.train.config import Optim
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.trainer import Trainer

TINY = NCSNppConfig(image_size=8, num_channels=1, nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,),
                    init_scale=1.0)  # fmt: skip
QUARTER: dict[str, Any] = {"balancing_factor": 1e-2, "fraction": 0.5, "time_density": "inverse-sigma"}
STEPS: dict[str, dict[str, Any]] = {
    "no penalty": {"objective": {}},
    "part of the batch": {"objective": QUARTER},
    "exact": {"objective": {"balancing_factor": 0.1, "exact": True, "half": False}},
    "symmetric, two probes": {"objective": {**QUARTER, "estimator": "symmetric", "probes": 2}},
    "conservative": {"kind": "conservative", "objective": {}},
    "likelihood weighting": {"objective": {"likelihood_weighting": True}},
    "accumulated": {"objective": QUARTER, "optim": {"accumulate": 2}},
    "scaled": {"objective": QUARTER, "trainer": {"scaled": True}},
    "no clipping, no average": {"objective": QUARTER, "optim": {"clip": 0.0, "ema": 0.0}},
    "images, dropout": {"objective": QUARTER, "net": dataclasses.replace(TINY, dropout=0.3)},
    "images, positional": {
        "objective": QUARTER,
        "net": dataclasses.replace(TINY, embedding_type="positional", resblock_type="ddpm", dropout=0.0),
    },
}


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a tape a network runs layer by layer, and rounds otherwise than as one call
    monkeypatch.setattr(NetworkProgram, "fits", lambda self, x: False)
    monkeypatch.setattr(cuda_graph, "record", tape.record)
    monkeypatch.setattr(cuda_graph, "beside", lambda function, device: function())


def make_trainer(
    *,
    objective: dict[str, Any],
    kind: Any = "quasi-conservative",
    optim: dict[str, Any] | None = None,
    net: NCSNppConfig | None = None,
    trainer: dict[str, Any] | None = None,
    graph: bool = True,
    device: str = "cpu",
) -> Trainer:
    torch.manual_seed(0)
    with torch.device(device):
        score = Score(NCSNpp(net) if net else ToyMLP("identity"), sde.VE(0.1, 3.0), kind)
    stream = NoiseStream(3, device)
    shape = (1, 8, 8) if net else (2,)
    data = torch.rand(22, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    settings = Optim(**{"batch_size": 8, "lr": 1e-2, "warmup": 6, "ema": 0.9, "clip": 0.5, **(optim or {})})
    return Trainer(
        DenoisingObjective(score, stream=stream, **objective),
        data,
        settings,
        stream=stream,
        seed=0,
        flip=net is not None,
        graph=graph,
        **(trainer or {}),
    )


def numbers(trainer: Trainer) -> list[Tensor]:
    """All that a trainer keeps."""
    state = trainer.state_dict()
    return [value.detach().clone() for value in tree_leaves(state) if isinstance(value, Tensor)]


def assert_same(a: Trainer, b: Trainer) -> None:
    for ours, theirs in zip(numbers(a), numbers(b), strict=True):
        assert torch.equal(ours, theirs)


def run(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step()


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("name", STEPS)
def test_replayed_training_is_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over the warm-up of the rate, the ramp of the average and several passes; resumed too."""
    replayed = make_trainer(**STEPS[name])
    torch.manual_seed(7)
    run(replayed, 5)
    first = replayed.read_statistics()
    middle, generator = copy.deepcopy(replayed.state_dict()), torch.get_rng_state()
    run(replayed, 4)
    plain = make_trainer(**STEPS[name])
    plain._take = plain._update
    torch.manual_seed(7)
    run(plain, 5)
    assert plain.read_statistics() == first
    run(plain, 4)
    assert_same(replayed, plain)
    resumed = make_trainer(**STEPS[name])
    resumed.load_state_dict(middle)
    assert torch.equal(torch.get_rng_state(), generator)
    run(resumed, 4)
    assert_same(resumed, plain)


@pytest.mark.usefixtures("taped")
def test_a_graph_changes_nothing_but_the_last_bit_of_the_average() -> None:
    with_graph, without = (make_trainer(**STEPS["part of the batch"], graph=graph) for graph in (True, False))
    for trainer in (with_graph, without):
        run(trainer, 9)
    for a, b in zip(with_graph.objective.parameters(), without.objective.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(with_graph.ema.module.parameters(), without.ema.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_keeps_stays_in_its_place(name: str) -> None:
    """A graph writes where it was told to: no tensor that outlives a step is replaced by another."""
    trainer = make_trainer(**STEPS[name], graph=False)

    def places() -> list[int]:
        held = [
            trainer.state_dict(),
            trainer._failure,
            trainer._stream._state,
            trainer._rate,
            trainer._number,
        ]
        held.append([trainer.optimizer.param_groups[0]["lr"]])
        skip = ("torch_rng", "stream", "batches")  # copies, and what a graph does not touch
        leaves = [v for k, v in held[0].items() if k not in skip] + held[1:]
        return [value.data_ptr() for value in tree_leaves(leaves) if isinstance(value, Tensor)]

    run(trainer, 2)
    before = places()
    run(trainer, 3)
    trainer.read_statistics()
    run(trainer, 1)
    assert places() == before


class OnDevice(TorchDispatchMode):
    """No tensor of the host is an argument and nothing comes back to the host."""

    # changed in place, without a rule for tensors without values
    without_rule = ("aten::_fused_adam_", "aten::_fused_sgd_", "aten::_amp_update_scale_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        self._check(f"{name} takes", (args, kwargs))
        if name in self.without_rule:
            return args[0] if func._schema.returns else None
        out = func(*args, **kwargs)
        self._check(f"{name} makes", out)
        return out

    def _check(self, what: str, values: Any) -> None:
        for value in tree_leaves(values):
            here = isinstance(value, Tensor) and value.device.type == "cpu"
            assert not here, f"{what} a tensor of the host"


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without values, which fused Adam takes for this test."""
    optimizer: Any = importlib.import_module("torch.optim.optimizer")
    devices = optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*devices, "meta"])
    return "meta"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_asks_for_no_value(name: str, meta: str) -> None:
    """Forward, backward, optimiser and average where there are no values to ask for."""
    trainer = make_trainer(**STEPS[name], device=meta)
    x0 = torch.empty(8, *trainer._batches._data.shape[1:], device=meta)
    with OnDevice():
        trainer._update(x0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU without values or time, and without gradients, whose engine wants a driver: zeros take their place."""

    def backward(loss: Tensor) -> None:
        pass

    def grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ([inputs] if isinstance(inputs, Tensor) else inputs))

    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield "cuda"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_hands_a_gpu_nothing_from_the_host(name: str, fake_gpu: str) -> None:
    """On a GPU some spellings copy a number from the host where the CPU has none to copy (`steps[-1] = n`)."""
    trainer = make_trainer(**STEPS[name], device=fake_gpu)
    assert trainer._capturable
    x0 = torch.empty(8, *trainer._batches._data.shape[1:], device=fake_gpu)
    for p in trainer.objective.parameters():
        p.grad = torch.zeros_like(p)
    with OnDevice():
        trainer._update(x0)


def test_the_tape_sees_what_a_graph_would_not() -> None:
    """A number that changes on the host is frozen, a new tensor is missed, a value that is asked for is refused."""
    total, calls = torch.zeros(()), []

    def counts() -> None:
        calls.append(1)
        total.add_(len(calls))

    replay = tape.record(counts, total.device)
    for _ in range(3):
        replay()
    assert total == 3  # 1 + 1 + 1, not 1 + 2 + 3
    for read in (lambda: total.item(), lambda: total[None][total[None] > 0], lambda: bool(total > 0)):
        with pytest.raises(tape.HostReads):
            tape.record(read, total.device)


class Rotation(nn.Module):
    """A score that is not zero anywhere and not symmetric."""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return -x + 0.3 * x.flip(1)


SAMPLERS = [
    ("ve", "reverse-diffusion", "langevin"),
    ("ve", "ancestral", "annealed-langevin"),
    ("vp", "euler-maruyama", "langevin"),
    ("vp", "exponential", "none"),
    ("ou", "none", "annealed-langevin"),
]


def sampled(name: str, predictor: str, corrector: str, stream: NoiseStream, **settings: Any) -> list[Tensor]:
    parameters = {
        "ve": {"sigma_min": 0.1, "sigma_max": 3.0},
        "ou": {},
        "vp": {"beta_min": 0.1, "beta_max": 4.0},
    }
    score = Score(Rotation(), sde.sde_from_name(name, **parameters[name]))
    seen: list[Tensor] = []
    x = pc.predictor_corrector(
        score,
        (6, 4),
        steps=9,
        predictor=predictor,
        corrector=corrector,
        corrector_steps=2,
        stream=stream,
        watch=lambda _, mean: seen.append(mean),
        **settings,
    )
    return [x, *seen]


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("by_index", [False, True], ids=["stream", "by sample"])
@pytest.mark.parametrize(("name", "predictor", "corrector"), SAMPLERS)
def test_replayed_sampling_is_the_plain_one(
    name: str, predictor: str, corrector: str, by_index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, what is watched included; by sample index to rounding, as the plain step fuses its products."""

    def stream() -> NoiseStream:
        return SampleNoise(5, 3) if by_index else NoiseStream(5)

    plain = sampled(name, predictor, corrector, stream())
    monkeypatch.setattr(pc, "wanted", lambda choice, obstacle: True)
    replayed = sampled(name, predictor, corrector, stream())
    assert len({value.data_ptr() for value in replayed}) == len(plain)  # what is watched is not overwritten
    for a, b in zip(plain, replayed, strict=True):
        if by_index:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("by_index", [False, True], ids=["stream", "by sample"])
@pytest.mark.parametrize(("name", "predictor", "corrector"), SAMPLERS)
def test_a_samplers_step_takes_and_gives_nothing_on_the_host(
    name: str, predictor: str, corrector: str, by_index: bool, monkeypatch: pytest.MonkeyPatch, fake_gpu: str
) -> None:
    class Enough(Exception):
        pass

    class FirstStep(pc._Captured):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            assert self._state[0].device.type == "cuda"
            with OnDevice():
                self._step()
            raise Enough

    monkeypatch.setattr(pc, "_Captured", FirstStep)
    stream = SampleNoise(5, 3, fake_gpu) if by_index else NoiseStream(5, fake_gpu)
    with pytest.raises(Enough):
        sampled(name, predictor, corrector, stream, cuda_graph="on")


def test_the_networks_of_a_sampler_hand_a_gpu_nothing(fake_gpu: str) -> None:
    for net in (STEPS["images, dropout"]["net"], STEPS["images, positional"]["net"]):
        with torch.device(fake_gpu):
            score = Score(NCSNpp(net), sde.VE(0.1, 3.0)).eval()
        x, t = torch.empty(3, 1, 8, 8, device=fake_gpu), torch.empty(3, device=fake_gpu)
        with OnDevice(), torch.no_grad():
            assert score(x, t).shape == x.shape


def test_where_a_step_is_captured() -> None:
    gpu, base = torch.device("cuda"), PRESETS["cifar10"]

    def decide(device: torch.device = gpu, several: bool = False, **changes: Any) -> bool:
        return build.captures_step(dataclasses.replace(base, **changes), device, several=several)

    on, off = (dataclasses.replace(base.optim, cuda_graph=choice) for choice in ("on", "off"))
    symmetric = dataclasses.replace(base.penalty, estimator="symmetric")
    conservative = dataclasses.replace(base.model, kind="conservative")
    assert decide()
    assert decide(optim=on)
    assert not decide(optim=off)
    assert decide(penalty=symmetric, model=dataclasses.replace(base.model, dropout=0.0))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("needs an NVIDIA GPU and this run is on cpu", {"device": torch.device("cpu")}),
        ("several processes", {"several": True}),
        ("the symmetric estimator draws each dropout mask twice", {"penalty": symmetric}),
        ("the conservative kind draws each dropout mask twice", {"model": conservative}),
    ]
    for why, changes in refused:
        assert not decide(**changes)
        with pytest.raises(ConfigError, match=rf"optim\.cuda_graph: expected 'auto' or 'off', .*{why}"):
            decide(**changes, optim=on)


def test_a_sampler_that_cannot_be_captured_says_so() -> None:
    with pytest.raises(ValueError, match=r"cuda_graph: .* 'on', but that needs an NVIDIA GPU .* on cpu"):
        sampled("ve", "none", "langevin", NoiseStream(5), cuda_graph="on")
