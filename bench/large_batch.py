"""What each way to a larger batch costs: peak memory, time and variance of one training step of NCSN++.

A step is the loss and its gradients, without the optimiser, of the quasi-conservative objective with K probes. The
variance is that of the penalty's gradient, summed over all parameters, fresh data, times, noise and probes in each
draw, relative to the first row; a row without one has the first row's gradient, up to rounding. Memory is the
process's growth above what it holds between steps. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness import interleaved, report, with_memory
from qcsbm_fast import DenoisingObjective, NoiseStream, Score
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.sde import VE


@dataclass(frozen=True)
class Case:
    """Settings of the objective, parts of the batch, and what the network does; `other` gradients, or the same."""

    objective: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    again: bool = False
    bfloat16: bool = False
    other: bool = False


def cases(probes: int) -> dict[str, Case]:
    quarter = {"fraction": 0.25, "time_density": "inverse-sigma"}
    return {
        "at once": Case(),
        "batch in 2 parts": Case(parts=2),
        "batch in 4 parts": Case(parts=4),
        f"probes in chunks of {probes // 2}": Case({"probe_chunk": probes // 2}),
        "probes in chunks of 1": Case({"probe_chunk": 1}),
        "activations again": Case(again=True),
        "activations again, 4 parts": Case(again=True, parts=4),
        "bfloat16": Case(bfloat16=True),
        "one probe": Case({"probes": 1}, other=True),
        "quarter": Case(quarter, other=True),
        "quarter, one probe": Case({**quarter, "probes": 1}, other=True),
        "quarter, one probe, activations again": Case({**quarter, "probes": 1}, again=True),
        "quarter, one probe, bfloat16": Case({**quarter, "probes": 1}, bfloat16=True),
    }


class Step:
    """The step of a case: `step()` adds the gradients of one draw."""

    def __init__(self, case: Case, net: NCSNpp, batch: int, probes: int):
        self.case, self.net, self.batch = case, net, batch
        settings = {"balancing_factor": 1e-4, "probes": probes, **case.objective}
        self.objective = DenoisingObjective(Score(net, VE(0.01, 50.0)), stream=NoiseStream(0), **settings)
        self.x0 = torch.rand(batch, 3, 32, 32)

    def __call__(self) -> None:
        self.net.zero_grad(set_to_none=True)
        self.net.checkpoint_activations = self.case.again
        for part in self.x0.chunk(self.case.parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.case.bfloat16):
                loss = self.objective(part).loss
            (loss / self.case.parts).backward()

    def penalty_gradient(self, seed: int) -> Tensor:
        """The penalty's own: that of the same draw with it less that without."""
        found = []
        for factor in (1.0, 1e-30):
            self.objective.balancing_factor = factor
            self.objective.stream = NoiseStream(seed)
            self.x0 = torch.rand(self.batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            self()
            gradients = [p.grad.flatten() for p in self.net.parameters() if p.grad is not None]
            found.append(torch.cat(gradients).double())
        return found[0] - found[1]


def variance(step: Callable[[int], Tensor], draws: int) -> float:
    """Summed over the entries, by Welford's running sums."""
    mean = spread = torch.zeros(())
    for n in range(draws):
        value = step(n)
        off = value - mean
        mean = mean + off / (n + 1)
        spread = spread + off * (value - mean)
    return (spread / (draws - 1)).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nf", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", type=int, default=40, help="of the variance; 0 leaves it out")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    net = NCSNpp(NCSNppConfig(nf=a.nf, num_res_blocks=a.blocks, dropout=0.0, init_scale=1.0))
    steps = {name: Step(case, net, a.batch, a.probes) for name, case in cases(a.probes).items()}
    variances = {}
    if a.draws:
        chosen = [name for name, step in steps.items() if step.case.other or name == "at once"]
        found = {name: variance(steps[name].penalty_gradient, a.draws) for name in chosen}
        variances = {name: round(value / found["at once"], 2) for name, value in found.items()}
        steps = {name: Step(case, net, a.batch, a.probes) for name, case in cases(a.probes).items()}
    rows = with_memory(interleaved(steps, repeats=a.repeats, warmup=1), steps)
    report(
        f"large batch nf {a.nf} blocks {a.blocks} batch {a.batch} K {a.probes}: NCSN++ at 32 x 32",
        rows,
        variance=variances,
    )


if __name__ == "__main__":
    main()
