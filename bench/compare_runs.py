"""Runs on the same images side by side: samples, and held-out denoising loss, Asym and NAsym by noise level.

    python bench/compare_runs.py RUN RUN --out docs/images/fashion.png

All runs are drawn from the same seeds and measured in float32, with the same images, noise and probes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness import RESULTS
from qcsbm_fast import NoiseStream, Score, ops
from qcsbm_fast.metrics import asymmetry_by_level
from qcsbm_fast.sampling.pc import predictor_corrector
from qcsbm_fast.train import build, trained
from qcsbm_fast.train.folder import open_run


@dataclass(frozen=True)
class Run:
    """A trained model with its figures at each of `sigma (L,)`."""

    title: str
    steps: int
    samples: Tensor
    sigma: list[float]
    dsm: list[float]
    asym: list[float]
    nasym: list[float]


def load(path: Path) -> tuple[Score, build.Setup, str, int]:
    config, setup, step = trained.load(open_run(path), device="cpu")
    factor = (
        f", factor {config.penalty.balancing_factor:g}" if config.model.kind == "quasi-conservative" else ""
    )
    return setup.score, setup, config.model.kind + factor, step


def denoising_loss(score: Score, x0: Tensor, times: Tensor) -> list[float]:
    """Mean of `1/2 ||sigma s + z||^2` at each of `times`."""
    losses, stream = [], NoiseStream(11)
    for time in times:
        t = time.repeat(len(x0))
        mean, sigma = score.sde.marginal(t)
        x, z = ops.perturb(x0, mean, sigma, stream.draw())
        with torch.no_grad():
            losses.append(
                ops.denoising_residual(score(x, t), sigma, torch.full_like(sigma, 0.5), z=z).mean().item()
            )
    return losses


def measure(path: Path, points: int, levels: int, count: int, steps: int, seed: int) -> Run:
    score, setup, title, done = load(path)
    exact = build.full_precision(score)
    times = (torch.arange(levels) + 0.5) / levels
    sigma = exact.sde.marginal(times)[1].tolist()
    x0 = setup.test[:points]
    by_level = asymmetry_by_level(exact, x0, times, NoiseStream(12))
    samples = predictor_corrector(
        score, (count, *setup.shape), steps=steps, snr=0.16, stream=NoiseStream(seed), progress=True
    )
    return Run(
        title,
        done,
        samples,
        sigma,
        denoising_loss(exact, x0, times),
        by_level.asym.tolist(),
        by_level.nasym.tolist(),
    )


def grid(samples: Tensor, columns: int) -> Tensor:
    """`(N, C, H, W)` in [0, 1] as one picture `(rows H', columns W', 3)` with white gaps."""
    rows = samples.clamp(0, 1).expand(-1, 3, -1, -1)
    rows = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
    return torch.cat([torch.cat(list(row), 2) for row in rows.split(columns)], 1).permute(1, 2, 0)


def draw(path: Path, runs: list[Run], columns: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(runs) + 1) + 0.6, 4.5), dpi=130, layout="constrained")
    widths = [1.0] * len(runs) + [0.95]
    cells = figure.add_gridspec(3, len(runs) + 1, width_ratios=widths)
    for index, run in enumerate(runs):
        axes = figure.add_subplot(cells[:, index])
        axes.imshow(grid(run.samples, columns).cpu().numpy(), interpolation="nearest")
        axes.set_title(run.title)
        axes.set_axis_off()
    names = (("dsm", "denoising loss"), ("asym", r"$\sigma^2$ Asym"), ("nasym", "NAsym"))
    colours = ("#8a8a8a", "#1f5fa8", "#d1661b")
    for row, (name, label) in enumerate(names):
        axes = figure.add_subplot(cells[row, -1])
        for run, colour in zip(runs, colours, strict=False):
            values = torch.tensor(getattr(run, name))
            if name == "asym":
                values = values * torch.tensor(run.sigma) ** 2
            axes.plot(run.sigma, values, color=colour, marker="o", markersize=3, label=run.title)
        axes.set(xscale="log", yscale="log", ylabel=label)
        axes.grid(True, which="major", color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.legend(frameon=False, fontsize=8)
        if row == len(names) - 1:
            axes.set_xlabel(r"noise level $\sigma$")
        else:
            axes.tick_params(labelbottom=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG picture")
    parser.add_argument("--points", type=int, default=200, help="held-out images at each level")
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--count", type=int, default=36, help="samples of each run")
    parser.add_argument("--steps", type=int, default=300, help="of the sampler")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    runs = [measure(path, a.points, a.levels, a.count, a.steps, a.seed) for path in tqdm(a.runs, "runs")]
    draw(a.out, runs, round(a.count**0.5))
    print("| model | steps | denoising loss | Asym | NAsym |\n|---|---|---|---|---|")
    for run in runs:
        mean = {name: sum(getattr(run, name)) / a.levels for name in ("dsm", "asym", "nasym")}
        print(f"| {run.title} | {run.steps} | {mean['dsm']:.2f} | {mean['asym']:.4g} | {mean['nasym']:.2g} |")
    RESULTS.mkdir(exist_ok=True)
    plain = [{key: value for key, value in vars(run).items() if key != "samples"} for run in runs]
    (RESULTS / f"{a.out.stem}.json").write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
