"""A training step of the 2-D experiments: ours against the exact Jacobian by double backward.

    python bench/toy_step.py

Batch 5000, the paper's network, Adam and clipping included. "split" takes the network's products in three of bfloat16
each, as the command line does on CPUs with matrix registers. The floor counts matrix products only, at the measured
rate of the network's largest in float32: one forward is 1 unit; a step costs 3 units without penalty, 9 in exact mode
(two tangents, forward and backward; no transposed product is needed), 7 with one probe, and the sub-batch that share
of the extra units.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import harness
from baselines import PlainToyMLP, exact_jacobian_loss, nested_loss
from qcsbm_fast import DenoisingObjective, NoiseStream, Score, data
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.ops import split_float32
from qcsbm_fast.ops.split import HAS_REGISTERS
from qcsbm_fast.sde import VE

FORWARD_FLOP = 2 * (2 * 64 + 64 * 128 + 128 * 256 + 257 * 2)


def step(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.Adam(module.parameters(), lr=7.5e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return run


def ours(x0: torch.Tensor, **arguments: object) -> Callable[[], object]:
    torch.manual_seed(0)
    score = Score(ToyMLP(), VE(0.1, 3.0), "quasi-conservative")
    objective = DenoisingObjective(score, stream=NoiseStream(0), half=False, t_min=0.0, **arguments)  # pyright: ignore[reportArgumentType]
    return step(objective, lambda: objective(x0).loss)


def baseline(x0: torch.Tensor, loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
    torch.manual_seed(0)
    network = PlainToyMLP()
    return step(network, lambda: loss(network, x0, 0.1, 0.1, 30.0))


def plain_denoising(
    network: nn.Module, x0: torch.Tensor, factor: float, low: float, ratio: float
) -> torch.Tensor:
    sigma = low * ratio ** torch.rand(x0.shape[0])
    z = torch.randn_like(x0)
    score = network(x0 + sigma[:, None] * z, sigma) / sigma[:, None]
    return (sigma[:, None] * score + z).square().sum(1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    x0 = data.load("checkerboard", points=arguments.batch).train
    sub_batch = {"fraction": 0.25, "time_density": "inverse-sigma"}
    functions = {
        "exact Jacobian, double backward": baseline(x0, exact_jacobian_loss),
        "one probe, nested VJPs": baseline(x0, nested_loss),
        "ours, exact": ours(x0, balancing_factor=0.1, exact=True),
        "ours, exact, quarter batch": ours(x0, balancing_factor=0.1, exact=True, **sub_batch),
        "ours, one probe": ours(x0, balancing_factor=0.1),
        "ours, one probe, quarter batch": ours(x0, balancing_factor=0.1, **sub_batch),
        "ours, no penalty": ours(x0),
        "plain eager, no penalty": baseline(x0, plain_denoising),
    }
    ours_alone = [name for name in functions if name.startswith("ours")]
    if HAS_REGISTERS:
        functions |= {f"{name}, split": split_float32()(functions[name]) for name in ours_alone}
    rate = harness.matmul_rate(arguments.batch, 128, 256)
    unit = FORWARD_FLOP * arguments.batch / rate
    units = {
        "ours, exact": 9,
        "ours, exact, quarter batch": 4.5,
        "ours, one probe": 7,
        "ours, one probe, quarter batch": 4,
        "ours, no penalty": 3,
    }
    rows = harness.interleaved(
        functions, repeats=arguments.repeats, floors={name: count * unit for name, count in units.items()}
    )
    harness.report("toy step", rows, batch=arguments.batch, matmul_gflops=round(rate / 1e9))


if __name__ == "__main__":
    main()
