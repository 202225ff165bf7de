"""What float32 and bfloat16 do to the asymmetry penalty: its bias, its gradient, the smallest NAsym they can show.

The same weights, noised images and probes in float64, in float32, in float32 with its convolutions split in three
bfloat16 products (a processor with matrix registers) and in bfloat16 (autocast), for a network of ordinary random
weights and for a trained one, level by level:

* bias: mean of `sigma^2` times the penalty over that of float64, minus 1;
* cosine: of the parameters' gradient of the penalty to float64's, one-sided estimator;
* floor: `1/2 ||e||^2 / (||J v||^2 + ||J^T v||^2)`, `e` the error of `J v - J^T v`: the NAsym that rounding alone shows.

Then the same training in float32, split, and in bfloat16, seed by seed: held-out denoising loss, Asym and NAsym,
measured in float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness import RESULTS
from qcsbm_fast import NoiseStream, Score
from qcsbm_fast.linearize import push
from qcsbm_fast.ops import split_float32
from qcsbm_fast.ops.split import HAS_REGISTERS
from qcsbm_fast.penalty import asymmetry, balance
from qcsbm_fast.train import build, trained
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.evaluate import evaluate
from qcsbm_fast.train.folder import open_run
from qcsbm_fast.train.precision import Precision
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.trainer import Trainer

# By name: the dtype of autocast, and whether products of float32 are split.
PRECISIONS = {
    "float32": (None, False),
    **({"float32, split": (None, True)} if HAS_REGISTERS else {}),
    "bfloat16": (torch.bfloat16, False),
}
TRAINED: tuple[Precision, ...] = ("float32", "bfloat16")


def small_digits(steps: int) -> Config:
    """The preset `digits` with a network of half the width and half the batch: several trainings take minutes."""
    base = PRESETS["digits"]
    return dataclasses.replace(
        base,
        device="cpu",
        model=dataclasses.replace(base.model, nf=16, init_scale=1.0),
        optim=dataclasses.replace(base.optim, steps=steps, batch_size=32, lr=2e-3, warmup=20, ema=0.98),
    )


def train(config: Config) -> Score:
    """The averaged weights after `config.optim.steps` steps."""
    setup = build.build(config)
    stream = NoiseStream(config.seed)
    objective = build.objective(config, setup.score, stream)
    trainer = Trainer(objective, setup.train, config.optim, stream=stream, seed=config.seed)
    for _ in tqdm(range(config.optim.steps), f"{config.precision}, seed {config.seed}", mininterval=5):
        trainer.step()
    return trainer.ema.module


def gradient(score: Score, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Of the mean of `sigma^2` times the penalty, all parameters in one vector."""
    sigma = score.sde.marginal(t)[1]
    result = asymmetry(lambda y: score(y, t), x, v=v)
    parameters = [p for p in score.parameters() if p.requires_grad]
    loss = (sigma**2 * result.surrogate).mean()
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.double().flatten() for part in parts])


def products(score: Score, x: Tensor, t: Tensor, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`sigma J v` and `sigma J^T v`, balanced as the penalty takes them, in float64."""
    at = push(lambda y: score(y, t), x, v)
    scale = sigma[:, None, None, None]
    jv = at.jv.detach()
    return jv.double() * scale, balance(v, jv, at.vjp(v)).double() * scale


def compare(score: Score, x0: Tensor, levels: list[float], seed: int = 1) -> list[dict[str, float | str]]:
    """One row per noise level (a time in [0, 1]) and precision, and rows with the images' times spread evenly."""
    exact = copy.deepcopy(score).double().requires_grad_()
    exact.autocast = None
    rows: list[dict[str, float | str]] = []
    spread = (torch.arange(len(x0), dtype=torch.float64) + 0.5) / len(x0)
    for t in [*(torch.full_like(spread, level) for level in levels), spread]:
        stream = NoiseStream(seed)
        mean, sigma = exact.sde.marginal(t)
        x = (
            x0.double() * mean[:, None, None, None]
            + sigma[:, None, None, None] * stream.normal(x0.shape).double()
        )
        x = x.float().double()  # the same numbers in every precision
        v = stream.rademacher((1, *x0.shape)).double()
        jv, jtv = products(exact, x, t, v, sigma)
        penalty, whole = (jv - jtv).square().sum(), (jv.square() + jtv.square()).sum()
        direction = gradient(exact, x, t, v)
        for name, (autocast, split) in PRECISIONS.items():
            rounded = copy.deepcopy(score).requires_grad_()
            rounded.autocast = autocast
            arguments = x.float(), t.float(), v.float()
            with split_float32(split):
                jv_, jtv_ = products(rounded, *arguments, sigma)
                other = gradient(rounded, *arguments)
            error = (jv_ - jtv_) - (jv - jtv)
            rows.append(
                {
                    "sigma": "all" if t is spread else f"{sigma[0].item():.3g}",
                    "precision": name,
                    "nasym": (0.5 * penalty / whole).item(),
                    "bias": ((jv_ - jtv_).square().sum() / penalty - 1).item(),
                    "cosine": torch.cosine_similarity(direction, other, dim=0).item(),
                    "floor": (0.5 * error.square().sum() / whole).item(),
                }
            )
    return rows


def train_both(steps: int, seeds: int) -> list[dict[str, float | str]]:
    """Held-out figures of the same training in both precisions, with the same seeds."""
    rows = []
    for seed in range(seeds):
        for precision in TRAINED:
            config = dataclasses.replace(small_digits(steps), precision=precision, seed=seed)
            with split_float32():
                score = build.full_precision(train(config))
                test = build.build(config).test[:100]
                values = evaluate(score, test, NoiseStream(99), levels=10, probes=1, exact=False, half=True)
            rows.append({"precision": precision, "seed": seed, **values})
    return rows


def print_levels(title: str, rows: list[dict]) -> None:
    print(
        f"\n| {title}, sigma | precision | NAsym | bias | 1 - cosine | NAsym floor |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['sigma']} | {row['precision']} | {row['nasym']:.2g} | {100 * row['bias']:+.2g}% "
            f"| {1 - row['cosine']:.1e} | {row['floor']:.1e} |"
        )


def print_trainings(rows: list[dict], steps: int) -> None:
    """Means over the seeds, the spread of one precision over seeds, and that of the paired difference."""
    names = ("test_dsm", "test_asym", "test_nasym")
    print(f"\n| after {steps} steps | DSM loss | Asym | NAsym |\n|---|---|---|---|")
    columns = {
        precision: [[row[name] for row in rows if row["precision"] == precision] for name in names]
        for precision in TRAINED
    }
    for precision, values in columns.items():
        cells = [f"{statistics.mean(v):.4g} ± {statistics.stdev(v):.2g}" for v in values]
        print(f"| {precision}, mean and spread over seeds | {' | '.join(cells)} |")
    pairs = zip(*columns.values(), strict=True)
    gaps = [[b / a - 1 for a, b in zip(first, second, strict=True)] for first, second in pairs]
    cells = [f"{100 * statistics.mean(g):+.2g} ± {100 * statistics.stdev(g):.2g} %" for g in gaps]
    print(f"| bfloat16 over float32, same seed | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, help="run folder with the trained model; otherwise one is trained here"
    )
    parser.add_argument("--steps", type=int, default=300, help="of the trainings made here")
    parser.add_argument(
        "--seeds", type=int, default=3, help="trainings in each precision, at least 2; 0 for none"
    )
    parser.add_argument("--batch", type=int, default=32, help="images at each noise level")
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[0.05, 0.35, 0.65, 0.95], help="times in [0, 1]"
    )
    a = parser.parse_args()

    config = (
        dataclasses.replace(open_run(a.run).read_config(), device="cpu") if a.run else small_digits(a.steps)
    )
    ordinary = dataclasses.replace(config, model=dataclasses.replace(config.model, init_scale=1.0))
    setup = build.build(ordinary)
    x0 = setup.test[: a.batch]
    result: dict[str, object] = {"torch": torch.__version__, "model": dataclasses.asdict(config.model)}
    models = {"random weights": setup.score.eval()}
    if a.run:
        _, finished, step = trained.load(open_run(a.run), device="cpu")
        result["steps"] = step
        models[f"{config.data.name}, {step} steps"] = finished.score
    else:
        models[f"digits, {a.steps} steps"] = train(config)
    for title, score in models.items():
        result[title] = compare(score, x0, a.levels)
        print_levels(title, result[title])  # pyright: ignore[reportArgumentType]
    if a.seeds:
        result["trainings"] = trainings = train_both(a.steps, a.seeds)
        print_trainings(trainings, a.steps)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "precision.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
