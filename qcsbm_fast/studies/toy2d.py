"""The two-dimensional experiments (Chao et al. 2023, Section 3.2): three kinds of models of three densities.

Every model is an ordinary run of the trainer with the paper's settings, in a folder of its own below the study's, where
an interrupted study finds what it has. Of each are measured, on 5000 points noised at 10 levels (times in the middle of
tenths of [0, 1]): Asym and NAsym (exact Jacobian), the score error against the noised empirical distribution of all
data; on 5000 held-out points the negative log-likelihood of the probability-flow ODE (exact divergence), and precision
and recall (k = 3) of 5000 samples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcsbm_fast.likelihood import log_likelihood
from qcsbm_fast.metrics import precision_recall, score_error
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.ode import probability_flow
from qcsbm_fast.score import Score
from qcsbm_fast.studies import toy2d_plots
from qcsbm_fast.studies.parallel import INTERRUPTED, run_all
from qcsbm_fast.studies.table import markdown, mean_and_spread, write_json
from qcsbm_fast.train import evaluate, run, trained
from qcsbm_fast.train.config import Config, Kind
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.folder import RunFolder, create
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.stats import read as read_statistics

KINDS: tuple[Kind, ...] = ("unconstrained", "conservative", "quasi-conservative")
COLUMNS = {
    "loss": "DSM loss",
    "nll": "NLL (nats)",
    "score_error": "score error",
    "asym": "Asym",
    "nasym": "NAsym",
    "precision": "precision",
    "recall": "recall",
}
_LEVELS = 10
_POINTS = 5000


@torch.no_grad()
def measure(score: Score, train: Tensor, test: Tensor, seed: int) -> dict[str, float]:
    """All columns but the loss, for a score of points `(N, 2)`; deterministic in `seed`."""
    stream = NoiseStream(seed)
    points = train[:_POINTS]
    times, values = evaluate.measure(score, points, stream, levels=_LEVELS, probes=1, exact=True, half=False)
    found = evaluate.over_levels(values)
    error = score_error(score, train, points, times, stream)
    # An energy with kinks makes the flow stiff where it slides along one: the usual tolerances take eight times as long
    # there. These change the mean by up to 0.003 nats, a tenth of its own error.
    nats = log_likelihood(score, test[:_POINTS], exact=True, rtol=1e-3, atol=1e-4)
    samples = probability_flow(score, (_POINTS, 2), stream=stream)
    quality = precision_recall(test[:_POINTS], samples)
    return {
        "nll": -nats.mean().item(),
        "score_error": error.mean().item(),
        "asym": found["asym"].mean,
        "nasym": found["nasym"].mean,
        "precision": quality.precision,
        "recall": quality.recall,
    }


def reproduce(
    out: Path, *, densities: Sequence[str], kinds: Sequence[Kind], seeds: Sequence[int], factors: Sequence[float],
    steps: int | None = None, workers: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and measures every combination, then writes table.md, results.json and the pictures to `out`.

    Args:
        densities: presets to run, such as "checkerboard".
        kinds: kinds of models.
        seeds: one training each.
        factors: balancing factors of the quasi-conservative models: the first is the table's; the others, for the
            first density and seed, are the sweep's.
        steps: optimiser steps in place of the paper's.
        workers: how many models are trained at a time.

    Raises:
        RunError: if training was interrupted; calling again goes on where it stopped.
    """
    cells = [
        _Cell(density, kind, seed, factors[0] if kind == "quasi-conservative" else 0.0)
        for density in densities
        for seed in seeds
        for kind in kinds
    ]
    if "quasi-conservative" in kinds:
        cells += [_Cell(densities[0], "quasi-conservative", seeds[0], factor) for factor in factors[1:]]
    pieces = {out / cell.name: (_config(cell, steps), out / cell.name) for cell in cells}
    run_all(
        _train_and_measure,
        pieces,
        workers=min(workers, len(pieces)),
        total=sum(config.optim.steps for config, _ in pieces.values()),
        done=lambda: sum(_steps_done(path) for path in pieces),
    )
    rows = [
        cell._asdict() | _train_and_measure(*piece)
        for cell, piece in zip(cells, pieces.values(), strict=True)
    ]
    tables = [format_table(rows, factors[0])]
    if len(factors) > 1:
        sweep = [row for row in rows if row["density"] == densities[0] and row["seed"] == seeds[0]]
        tables.append(format_sweep(sweep))
        toy2d_plots.factor_curves(out / "factors.png", sweep)
    write_json(out / "results.json", rows)
    (out / "table.md").write_text("\n".join(tables))
    print("\n" + "\n".join(tables))
    runs = {
        (c.density, c.kind): out / c.name
        for c in cells
        if c.seed == seeds[0] and c.factor in (0.0, factors[0])
    }
    toy2d_plots.gallery(out, {key: trained.load(RunFolder(path)).setup for key, path in runs.items()})
    return rows


class _Cell(NamedTuple):
    """A model of the study."""

    density: str
    kind: Kind
    seed: int
    factor: float

    @property
    def name(self) -> str:
        """Of its folder."""
        own = f"-factor{self.factor:g}" if self.kind == "quasi-conservative" else ""
        return f"{self.density}-{self.kind}-{self.seed}{own}"


def _config(cell: _Cell, steps: int | None) -> Config:
    preset = PRESETS[cell.density]
    return dataclasses.replace(
        preset,
        seed=cell.seed,
        model=dataclasses.replace(preset.model, kind=cell.kind),
        penalty=dataclasses.replace(preset.penalty, balancing_factor=cell.factor),
        optim=dataclasses.replace(preset.optim, steps=steps or preset.optim.steps),
        evaluation=dataclasses.replace(
            preset.evaluation, every=0
        ),  # at the end only: the study measures more
    )


def _train_and_measure(config: Config, path: Path) -> dict[str, float]:
    """The run's measurements, from its folder if it is complete."""
    done = path / "measurements.json"
    if done.is_file():
        return json.loads(done.read_text())
    folder = RunFolder(path) if (path / "config.yaml").is_file() else create(config, path)
    if not run.train(config, folder):
        raise RunError(INTERRUPTED)
    setup = trained.load(folder).setup
    rows = read_statistics(path / "stats.jsonl")
    last = [row["dsm"] for row in rows if "dsm" in row and row["step"] > config.optim.steps - 200]
    values = {"loss": sum(last) / len(last), **measure(setup.score, setup.train, setup.test, config.seed)}
    write_json(done, values)
    return values


def _steps_done(path: Path) -> int:
    rows = read_statistics(path / "stats.jsonl")
    return rows[-1]["step"] if rows else 0


def format_table(rows: Sequence[dict[str, Any]], factor: float) -> str:
    """Markdown: one line per density and kind, mean over seeds and, with several, half the range as the spread."""
    lines = []
    for key in dict.fromkeys((row["density"], row["kind"]) for row in rows):
        group = [r for r in rows if (r["density"], r["kind"]) == key and r["factor"] in (0.0, factor)]
        lines.append([*key, *(mean_and_spread([r[column] for r in group]) for column in COLUMNS)])
    return markdown(["density", "kind", *COLUMNS.values()], lines)


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per balancing factor of one density and seed, the unconstrained model's first."""
    rows = sorted((r for r in rows if r["kind"] != "conservative"), key=lambda row: row["factor"])
    lines = [[f"{row['factor']:g}", *(f"{row[column]:.4g}" for column in COLUMNS)] for row in rows]
    return markdown([f"factor ({rows[0]['density']}, seed {rows[0]['seed']})", *COLUMNS.values()], lines)
