"""A one-layer autoencoder becomes conservative without tied weights (Chao et al. 2023, section 6).

R swish(W^T x + b) + c of the plane is trained on the penalty 1/2 ||J - J^T||_F^2 alone, its mean over a 40 x 40 grid of
[-10, 10]^2. Of every run are kept the penalty, the asymmetry |r_0.w_1 - r_1.w_0| (rows of R and W) and ||R - W||_F:
tied weights, R = W, would be one way to a penalty of 0, and are not the one that is found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from qcsbm_fast.nn import Autoencoder
from qcsbm_fast.penalty import asymmetry
from qcsbm_fast.studies.table import markdown, mean_and_spread, write_json

COLUMNS = {"penalty": "penalty", "symmetry": "abs(r0.w1 - r1.w0)", "distance": "‖R - W‖"}
_EVERY = 50


def train(seed: int, iterations: int) -> dict[str, Any]:
    """One run: `COLUMNS` at its end and, under "curve", every 50 iterations, and its weights `R` and `W`."""
    torch.manual_seed(seed)
    model = Autoencoder(2)
    axis = torch.linspace(-10.0, 10.0, 40)
    points = torch.cartesian_prod(axis, axis)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    curve = []
    for iteration in trange(iterations, desc=f"autoencoder, seed {seed}", mininterval=1.0):
        result = asymmetry(model, points, exact=True)
        if iteration % _EVERY == 0 or iteration == iterations - 1:
            curve.append({"iteration": iteration, "penalty": result.penalty.mean().item(), **_weights(model)})
        optimiser.zero_grad()
        result.surrogate.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        penalty = asymmetry(model.double(), points.double(), exact=True).penalty.mean().item()
    weights = {"R": model.R.tolist(), "W": model.W.tolist()}
    return {"seed": seed, "penalty": penalty, **_weights(model), **weights, "curve": curve}


def _weights(model: Autoencoder) -> dict[str, float]:
    r, w = model.R.detach(), model.W.detach()
    return {"symmetry": (r[0] @ w[1] - r[1] @ w[0]).abs().item(), "distance": (r - w).norm().item()}


def reproduce(out: Path, *, seeds: Sequence[int], iterations: int) -> list[dict[str, Any]]:
    """Trains one model per seed; writes table.md, results.json and curves.png to `out`.

    A seed whose file is in `out`, of as many iterations, is not trained again.
    """
    from qcsbm_fast.studies import autoencoder_plots

    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        done = out / f"seed-{seed}-{iterations}.json"
        if not done.is_file():
            write_json(done, train(seed, iterations))
        rows.append(json.loads(done.read_text()))
    lines = [[str(row["seed"]), *(f"{row[name]:.3g}" for name in COLUMNS)] for row in rows]
    if len(rows) > 1:
        lines.append(["all", *(mean_and_spread([row[name] for row in rows]) for name in COLUMNS)])
    table = markdown(["seed", *COLUMNS.values()], lines)
    (out / "table.md").write_text(table)
    write_json(out / "results.json", rows)
    autoencoder_plots.curves(out / "curves.png", rows)
    print(f"\n{table}")
    return rows
