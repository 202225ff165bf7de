"""Predictor-corrector sampling and the evaluation of asymmetry, NCSN++ at 32 x 32, against plain eager PyTorch.

The baseline runs the network of `baseline_ncsnpp.py` in the same sampler (reverse diffusion, one Langevin step of SNR
0.16), written with eager operations, and estimates `tr J J^T - tr J J` from two VJPs as the paper does. "network alone"
makes the sampler's network calls and nothing else. On a GPU where there is one, there also with the step as a CUDA
graph, and the table says where. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from baseline_ncsnpp import PlainNCSNpp
from harness import default_device, interleaved, report
from qcsbm_fast import NoiseStream, Score, asymmetry
from qcsbm_fast.cuda_graph import Choice
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.ops import split_float32
from qcsbm_fast.ops.split import HAS_REGISTERS
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.sde import VE

LOW, HIGH, SNR = 0.01, 50.0, 0.16


@torch.no_grad()
def plain_sampler(
    score: Callable[[Tensor, Tensor], Tensor], size: tuple[int, ...], steps: int, device: str
) -> Tensor:
    """Song et al. 2021, algorithm 1, for the variance exploding process."""
    x = mean = HIGH * torch.randn(size, device=device)
    sigmas = torch.logspace(math.log10(HIGH), math.log10(LOW), steps, device=device)
    for step, sigma in enumerate(sigmas):
        level = sigma.expand(size[0])
        s, z = score(x, level), torch.randn(size, device=device)
        norms = [value.flatten(1).norm(dim=1).mean() for value in (z, s)]
        length = 2 * (SNR * norms[0] / norms[1]) ** 2
        x = x + length * s + torch.sqrt(2 * length) * z
        growth = torch.sqrt(sigma**2 - (sigmas[step + 1] if step + 1 < steps else 0.0 * sigma) ** 2)
        mean = x + growth**2 * score(x, level)
        x = mean + growth * torch.randn(size, device=device)
    return mean


def plain_asymmetry(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`||J^T v||^2 - <J^T J^T v, v>`, `(B,)`."""
    x = x.detach().requires_grad_()
    v = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
    value = score(x)
    (once,) = torch.autograd.grad(value, x, v, retain_graph=True)
    (twice,) = torch.autograd.grad(value, x, once)
    return (once.square() - twice * v).flatten(1).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("nf", 32), ("batch", 16), ("steps", 4), ("repeats", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    device = default_device()
    net = NCSNpp(NCSNppConfig(nf=a.nf, num_res_blocks=1, dropout=0.0, init_scale=1.0)).eval().to(device)
    plain, sde = PlainNCSNpp(net).eval(), VE(LOW, HIGH)
    size = (a.batch, 3, 32, 32)

    def plain_score(x: Tensor, sigma: Tensor) -> Tensor:
        return plain(x, sigma) / sigma[:, None, None, None]

    def sample(score: Score, cuda_graph: Choice = "off") -> None:
        stream = NoiseStream(0, device)
        predictor_corrector(score, size, steps=a.steps, stream=stream, snr=SNR, cuda_graph=cuda_graph)

    x, t = torch.rand(size).to(device), torch.full((a.batch,), 0.5, device=device)

    def network_alone(score: Score) -> None:
        with torch.no_grad():
            for _ in range(2 * a.steps):
                score(x, t)

    def evaluate(score: Score) -> None:
        with torch.no_grad():
            asymmetry(lambda y: score(y, t), x, generator=NoiseStream(0, device))

    def within(split: bool, run: Callable[..., None], *arguments: object) -> Callable[[], None]:
        def call() -> None:
            with split_float32(split):
                run(*arguments)

        return call

    exact = Score(net, sde)
    models = {"": (exact, False), " bf16": (Score(net, sde, autocast=torch.bfloat16), False)}
    if device == "cpu" and HAS_REGISTERS:  # as the command line takes float32
        models[" split"] = (exact, True)
    sampling: dict[str, Callable[[], object]] = {
        "plain eager": lambda: plain_sampler(plain_score, size, a.steps, device)
    }
    evaluation: dict[str, Callable[[], object]] = {
        "two VJPs": lambda: plain_asymmetry(lambda y: plain_score(y, sde.marginal(t)[1]), x)
    }
    for tail, (score, split) in models.items():
        sampling["ours" + tail] = within(split, sample, score)
        if device == "cuda":  # its capture included: take --steps 100
            sampling["ours, graph" + tail] = within(split, sample, score, "on")
        sampling["network alone" + tail] = within(split, network_alone, score)
        evaluation["ours" + tail] = within(split, evaluate, score)
    title = f"nf {a.nf}, batch {a.batch}"
    for name, functions in (
        (f"pc sampling: {title}, {a.steps} steps", sampling),
        (f"asymmetry evaluation: {title}", evaluation),
    ):
        report(name, interleaved(functions, repeats=a.repeats, warmup=1, device=device), device)


if __name__ == "__main__":
    main()
