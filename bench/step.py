"""One training step of NCSN++: the package's against the nested baseline, plain denoising and the counted floor.

The floor of a step is `(3 + 4 f K)` times the FLOPs of one forward over the measured rate of a 3 x 3 convolution.
A step is the loss and its gradients, without the optimiser. Run it alone on the machine.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from baseline_ncsnpp import PlainNCSNpp, denoising_step, nested_step
from harness import interleaved, report
from qcsbm_fast import DenoisingObjective, NoiseStream, Score
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.sde import VE


def convolution_rate(channels: int, batch: int, dtype: torch.dtype) -> float:
    """FLOP per second of a channels-last 3 x 3 convolution at 32 x 32 pixels."""
    x = torch.randn(batch, channels, 32, 32).to(dtype=dtype, memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3).to(dtype=dtype, memory_format=torch.channels_last)
    seconds = interleaved({"convolution": lambda: F.conv2d(x, w, padding=1)}, repeats=9)[0].median
    return 2 * 9 * x.numel() * channels / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("nf", 32),
        ("blocks", 1),
        ("batch", 16),
        ("probes", 1),
        ("repeats", 5),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    net = NCSNpp(NCSNppConfig(nf=a.nf, num_res_blocks=a.blocks, dropout=0.0, init_scale=1.0))
    plain = PlainNCSNpp(net)
    score = Score(net, VE(0.01, 50.0))
    x0, sigma = torch.rand(a.batch, 3, 32, 32), torch.logspace(-2, 1, a.batch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x0, sigma)
    forward = counter.get_total_flops()

    def objective(factor: float, fraction: float = 1.0) -> DenoisingObjective:
        density = "uniform" if fraction == 1 else "inverse-sigma"
        return DenoisingObjective(
            score,
            stream=NoiseStream(0),
            balancing_factor=factor,
            probes=a.probes,
            fraction=fraction,
            time_density=density,
        )

    def ours(loss: DenoisingObjective, bfloat16: bool) -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(x0).loss
        value.backward()

    def baseline(merged: bool) -> None:
        plain.zero_grad(set_to_none=True)
        nested_step(plain, x0, sigma, 1e-4, a.probes, merged=merged)

    def plain_denoising() -> None:
        plain.zero_grad(set_to_none=True)
        denoising_step(plain, x0, sigma)

    def sample(module: nn.Module, bfloat16: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            module(x0, sigma)

    functions = {
        "nested": lambda: baseline(False),
        "nested, merged": lambda: baseline(True),
        "plain denoising": plain_denoising,
        "plain forward": lambda: sample(plain, False),
    }
    floors: dict[str, float] = {}
    losses = {
        "quasi-conservative": (objective(1e-4), 3 + 4 * a.probes),
        "quasi-conservative, quarter": (objective(1e-4, 0.25), 3 + a.probes),
        "denoising": (objective(0.0), 3),
    }
    for dtype, bf in ((torch.float32, False), (torch.bfloat16, True)):
        rate, tail = convolution_rate(2 * a.nf, a.batch, dtype), " bf16" if bf else ""
        for name, (loss, units) in losses.items():
            functions[name + tail] = lambda loss=loss, bf=bf: ours(loss, bf)
            floors[name + tail] = units * forward / rate
        functions["forward" + tail] = lambda bf=bf: sample(net, bf)
        floors["forward" + tail] = forward / rate
    rows = interleaved(functions, repeats=a.repeats, warmup=1, floors=floors)
    report(
        f"step nf {a.nf} blocks {a.blocks} batch {a.batch} K {a.probes}: NCSN++ at 32 x 32",
        rows,
        forward_gflop=round(forward / 1e9, 2),
    )


if __name__ == "__main__":
    main()
