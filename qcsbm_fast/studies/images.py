"""Images (Chao et al. 2023, section 5), of a size for a CPU.

As in the paper, one unconstrained model is trained first; from its checkpoint the training goes on once as it
was and once with the penalty, so that the two differ in the penalty alone. A conservative model, whose
network is an energy's, is trained from the start for as many steps in all. Each is an ordinary run, below the
study's folder, measured as `qcsbm evaluate` does.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcsbm_fast.studies.evaluation import LABELS, Settings, evaluate_run, newest, samples_of
from qcsbm_fast.studies.table import markdown, mean_and_spread, write_json
from qcsbm_fast.train import checkpoint, run
from qcsbm_fast.train.config import Config, Kind
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.folder import RunFolder, create

KINDS: tuple[Kind, ...] = ("unconstrained", "conservative", "quasi-conservative")
_COLUMNS = (
    "dsm",
    "bits_per_dim",
    "score_error",
    "asym",
    "nasym",
    "precision",
    "recall",
    "density",
    "coverage",
)


def reproduce(
    out: Path, base: Config, *, seeds: Sequence[int], first_steps: int, more_steps: int, settings: Settings
) -> list[dict[str, Any]]:
    """Trains and measures the three kinds for every seed; writes table.md, results.json and the pictures to `out`.

    Args:
        base: the settings of data, network and training; kind, seed and steps are the study's.
        first_steps: of the unconstrained model that two of the kinds begin with.
        more_steps: of the kinds after that.
        settings: how much to measure.

    Raises RunError if training was interrupted; calling again goes on where it stopped.
    """
    from qcsbm_fast.studies import evaluation_plots

    rows, results = [], {}
    for seed in seeds:
        trunk = out / f"trunk-{seed}"
        _train(_config(base, "unconstrained", seed, first_steps), trunk)
        for kind in KINDS:
            path = out / f"{kind}-{seed}"
            start = None if kind == "conservative" else trunk
            _train(_config(base, kind, seed, first_steps + more_steps), path, start)
            results[kind, seed] = result = _evaluation(path, settings)
            rows.append({"kind": kind, "seed": seed, "values": result["values"]})
    table = format_table(rows)
    write_json(out / "results.json", rows)
    (out / "table.md").write_text(table)
    evaluation_plots.side_by_side(
        out / "comparison.png",
        {kind: results[kind, seeds[0]]["levels"] for kind in KINDS},
        {kind: samples_of(out / f"{kind}-{seeds[0]}", results[kind, seeds[0]]) for kind in KINDS},
    )
    print(f"\n{table}")
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per kind, the mean over the seeds with half the range."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        values = [row["values"] for row in rows if row["kind"] == kind]
        lines.append([kind, *(mean_and_spread([v[name][0] for v in values]) for name in _COLUMNS)])
    return markdown(["kind", *(LABELS[name] for name in _COLUMNS)], lines)


def _config(base: Config, kind: Kind, seed: int, steps: int) -> Config:
    return dataclasses.replace(
        base,
        seed=seed,
        model=dataclasses.replace(base.model, kind=kind),
        optim=dataclasses.replace(base.optim, steps=steps),
    )


def _train(config: Config, path: Path, start: Path | None = None) -> None:
    """Train, or go on, to the settings' last step; a new run begins with the newest checkpoint of the run `start`."""
    folder = RunFolder(path) if (path / "config.yaml").is_file() else create(config, path)
    if start and not checkpoint.steps(folder.checkpoints):
        folder.checkpoints.mkdir(exist_ok=True)
        newest_checkpoint = checkpoint.find(RunFolder(start).checkpoints)
        with open(newest_checkpoint, "rb") as source:
            checkpoint.write_whole(
                folder.checkpoints / newest_checkpoint.name, lambda file: shutil.copyfileobj(source, file)
            )
    steps = checkpoint.steps(folder.checkpoints)
    if (not steps or steps[-1] < config.optim.steps) and not run.train(config, folder):
        raise RunError("the study was interrupted; the same command goes on where it stopped")


def _evaluation(path: Path, settings: Settings) -> dict[str, Any]:
    """The run's measurements, those in its folder if they are of its last step and of these settings."""
    try:
        found = newest(path)
    except RunError:
        found = None
    last = checkpoint.steps(RunFolder(path).checkpoints)[-1]
    if found is None or found["step"] != last or found["settings"] != dataclasses.asdict(settings):
        found = evaluate_run(RunFolder(path), settings, progress=True)
    return found
