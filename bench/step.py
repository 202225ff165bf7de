"""One training step of NCSN++: the package's against the nested baseline, plain denoising and the counted floor.

The floor of a step is `(3 + 4 f K)` times the FLOPs of one forward over the measured rate of a 3 x 3 convolution.
A step is the loss and its gradients, without the optimiser. "any module" is the package's step of the baseline's own
network, which knows nothing of duals. "split" takes float32's convolutions in three bfloat16 products each, as the
command line does on a CPU with matrix registers. On a GPU where there is one, on the CPU otherwise, and the table says
which; on a GPU also a step replayed as a CUDA graph. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from baseline_ncsnpp import PlainNCSNpp, denoising_step, nested_step
from harness import default_device, interleaved, report, with_memory
from qcsbm_fast import DenoisingObjective, NoiseStream, Score
from qcsbm_fast.cuda_graph import Replayed
from qcsbm_fast.dual import conv2d
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.ops import split_float32
from qcsbm_fast.ops.split import HAS_REGISTERS
from qcsbm_fast.sde import VE


class Precision(NamedTuple):
    """Of the network: bfloat16 by autocast, or float32, with matrix registers also with its products split in three."""

    bfloat16: bool
    split: bool

    @contextmanager
    def __call__(self, device: str) -> Iterator[None]:
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16), split_float32(self.split):
            yield


def precisions(device: str) -> dict[str, Precision]:
    """By what they add to a row's name."""
    split = {" split": Precision(False, True)} if device == "cpu" and HAS_REGISTERS else {}
    return {"": Precision(False, False), **split, " bf16": Precision(True, False)}


def convolution_rate(channels: int, batch: int, precision: Precision, device: str) -> float:
    """FLOP per second of a channels-last 3 x 3 convolution at 32 x 32 pixels."""
    form: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
    dtype = torch.bfloat16 if precision.bfloat16 else torch.float32
    x = torch.randn(batch, channels, 32, 32).to(dtype=dtype, **form)
    w = torch.randn(channels, channels, 3, 3).to(**form)

    def convolve() -> None:
        with torch.no_grad(), precision(device):
            conv2d(x, w, padding=1)

    rows = interleaved({"convolution": convolve}, repeats=9, device=device)
    seconds = rows[0].median
    return 2 * 9 * x.numel() * channels / seconds


@dataclass(frozen=True)
class Setting:
    """Width, residual blocks a level, batch size and probes."""

    nf: int = 32
    blocks: int = 1
    batch: int = 16
    probes: int = 1


class Variants(NamedTuple):
    """What is timed, the FLOPs of one forward, and how many forwards' FLOPs each row of the package costs."""

    functions: dict[str, Callable[[], None]]
    forward: int
    units: dict[str, float]


def variants(setting: Setting, compiled: bool = False, device: str = "cpu") -> Variants:
    torch.manual_seed(0)
    net = NCSNpp(NCSNppConfig(nf=setting.nf, num_res_blocks=setting.blocks, dropout=0.0, init_scale=1.0))
    net.to(device)
    plain = PlainNCSNpp(net)
    x0, sigma = (
        torch.rand(setting.batch, 3, 32, 32).to(device),
        torch.logspace(-2, 1, setting.batch).to(device),
    )
    # of torch's convolutions, which the counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).to("meta")(x0.to("meta"), sigma.to("meta"))

    def objective(network: nn.Module, factor: float, fraction: float = 1.0) -> DenoisingObjective:
        return DenoisingObjective(
            Score(network, VE(0.01, 50.0)),
            stream=NoiseStream(0, device),
            balancing_factor=factor,
            probes=setting.probes,
            fraction=fraction,
            time_density="uniform" if fraction == 1 else "inverse-sigma",
        )

    def ours(loss: DenoisingObjective, precision: Precision) -> None:
        loss.zero_grad(set_to_none=True)
        with split_float32(precision.split):
            with precision(device):
                value = loss(x0).loss
            value.backward()

    def baseline(merged: bool) -> None:
        plain.zero_grad(set_to_none=True)
        nested_step(plain, x0, sigma, 1e-4, setting.probes, merged=merged)

    def plain_denoising() -> None:
        plain.zero_grad(set_to_none=True)
        denoising_step(plain, x0, sigma)

    def sample(module: Callable[..., object], precision: Precision) -> None:
        with torch.no_grad(), precision(device):
            module(x0, sigma)

    exact = Precision(False, False)

    functions = {
        "nested": lambda: baseline(False),
        "nested, merged": lambda: baseline(True),
        "plain denoising": plain_denoising,
        "plain forward": lambda: sample(plain, exact),
    }
    for name, fraction in (("any module", 1.0), ("any module, quarter", 0.25)):
        loss = objective(plain, 1e-4, fraction)
        functions[name] = lambda loss=loss: ours(loss, exact)
    units: dict[str, float] = {}
    losses = {
        "quasi-conservative": (objective(net, 1e-4), 3 + 4 * setting.probes),
        "quasi-conservative, quarter": (objective(net, 1e-4, 0.25), 3 + setting.probes),
        "denoising": (objective(net, 0.0), 3),
    }
    for tail, precision in precisions(device).items():
        for name, (loss, count) in losses.items():
            functions[name + tail] = lambda loss=loss, precision=precision: ours(loss, precision)
            units[name + tail] = count
            if device == "cuda":
                replay = Replayed(functions[name + tail], torch.device(device))
                functions[f"{name} graph{tail}"] = replay
                units[f"{name} graph{tail}"] = count
        functions["forward" + tail] = lambda precision=precision: sample(net, precision)
        units["forward" + tail] = 1
        if compiled:
            functions["forward compiled" + tail] = partial(
                sample, torch.compile(net, fullgraph=True), precision
            )
            units["forward compiled" + tail] = 1
    return Variants(functions, counter.get_total_flops(), units)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Setting):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also time the forward under torch.compile")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    setting, device = Setting(a.nf, a.blocks, a.batch, a.probes), default_device()
    functions, forward, units = variants(setting, a.compile, device)
    rates = {
        tail: convolution_rate(2 * a.nf, a.batch, precision, device)
        for tail, precision in precisions(device).items()
    }
    floors = {
        name: count * forward / rates[next(tail for tail in reversed(rates) if name.endswith(tail))]
        for name, count in units.items()
    }
    warmup = 1 if device == "cpu" else 4  # in which graphs are captured
    rows = interleaved(functions, repeats=a.repeats, warmup=warmup, floors=floors, device=device)
    report(
        f"step nf {a.nf} blocks {a.blocks} batch {a.batch} K {a.probes}: NCSN++ at 32 x 32",
        with_memory(rows, functions, device),
        device,
        forward_gflop=round(forward / 1e9, 2),
        convolution_gflops=[round(rate / 1e9) for rate in rates.values()],
    )


if __name__ == "__main__":
    main()
