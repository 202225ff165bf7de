"""Everything that can be said of a trained run: a table, numbers, pictures."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast import data
from qcsbm_fast.likelihood import dequantized_bits_per_dim, log_likelihood
from qcsbm_fast.metrics import density_coverage, precision_recall, score_error, sliced_wasserstein2
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.sampling.noise import SampleNoise
from qcsbm_fast.score import Score
from qcsbm_fast.studies import extractors
from qcsbm_fast.studies.table import write_json
from qcsbm_fast.train import build, trained
from qcsbm_fast.train.draw import draw
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.evaluate import measure, over_levels
from qcsbm_fast.train.folder import RunFolder

FILE = "evaluation.json"
LABELS = {
    "dsm": "denoising loss",
    "asym": "Asym",
    "nasym": "NAsym",
    "score_error": "score error (oracle)",
    "nll": "NLL (nats)",
    "bits_per_dim": "NLL (bits/dim)",
    "precision": "precision (k = 3)",
    "recall": "recall (k = 3)",
    "density": "density (k = 5)",
    "coverage": "coverage (k = 5)",
    "sliced_w2": "sliced W2",
}


@dataclass(frozen=True)
class Settings:
    """How much to measure; `levels` noise levels, the rest are numbers of samples, probes and repeats."""

    points: int
    levels: int
    probes: int
    oracle_points: int
    nll_points: int
    repeats: int
    samples: int
    seed: int = 0


def settings_for(image: bool) -> Settings:
    """What is measured by default: points are cheap, and their Jacobian is taken whole."""
    if image:
        return Settings(
            points=500, levels=10, probes=1, oracle_points=50, nll_points=50, repeats=2, samples=150
        )
    return Settings(5000, 20, 1, oracle_points=2000, nll_points=2000, repeats=1, samples=5000)


def evaluate_run(
    folder: RunFolder,
    settings: Settings,
    *,
    step: int | None = None,
    device: str = "auto",
    features: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the averaged weights of a checkpoint, by default the newest, on held-out data.

    Writes evaluation/<step>/ in the run folder, with evaluation.json, table.md and the pictures, and returns
    what is in the JSON: under "values" a pair of mean and standard error by name (the error None where it is
    not known), under "levels" those of the denoising loss, Asym and NAsym by noise level. `features` names a
    network to compare images by (see `extractors`); `progress` shows bars of what takes long.

    Raises RunError where the network is not there, or points are to be compared by one.
    """
    config, setup, step = trained.load(folder, step, device=device)
    if features and not setup.image:
        raise RunError("--features is for images: points are compared as they are")
    network = extractors.find(features, setup.device) if features else None
    score = build.full_precision(setup.score)
    exact = not setup.image
    stream = NoiseStream(settings.seed, device=setup.device)
    test = setup.test[: settings.points]
    times, values = measure(
        score, test, stream, levels=settings.levels, probes=settings.probes, exact=exact,
        half=config.objective.half, batch_size=100 if setup.image else 1000,
    )  # fmt: skip
    found: dict[str, tuple[float, float | None]] = dict(over_levels(values))
    train = data.as_float(setup.train)
    errors = score_error(score, train, test[: settings.oracle_points], times, stream)
    found["score_error"] = (errors.mean().item(), None)
    held_out = setup.test[: settings.nll_points]
    found |= _likelihood(score, held_out, stream, settings, config.data.name, exact, progress)
    samples = draw_samples(setup.score, setup, config.sampling, settings, progress=progress)
    real, fake = (images[: min(len(setup.test), len(samples))] for images in (setup.test, samples))
    found |= _quality(real, fake)
    if features and network:
        found |= extractors.compare(features, network, real, fake)
    by_level = values.mean(2), values.std(2) / math.sqrt(values.shape[2])
    result = {
        "run": str(folder.path),
        "step": step,
        "settings": vars(settings),
        "values": {name: list(pair) for name, pair in found.items()},
        "levels": {
            "sigma": score.sde.marginal(times)[1].tolist(),
            "dsm": by_level[0][0].tolist(),
            "dsm_error": by_level[1][0].tolist(),
            "asym": by_level[0][1].tolist(),
            "asym_error": by_level[1][1].tolist(),
            "nasym": by_level[0][2].tolist(),
            "nasym_error": by_level[1][2].tolist(),
        },
    }
    out = folder.path / "evaluation" / str(step)
    _write(out, result, score, setup, config.objective.t_min, train, samples)
    return result


def _likelihood(
    score: Score, x: Tensor, stream: NoiseStream, settings: Settings, name: str, exact: bool, progress: bool
) -> dict[str, tuple[float, float | None]]:
    try:
        if exact:
            nats = -log_likelihood(score, x, exact=True, batch_size=1000, progress=progress)
            return {"nll": (nats.mean().item(), nats.std().item() / math.sqrt(len(x)))}
        bits = dequantized_bits_per_dim(
            score, x, stream, repeats=settings.repeats, quantization=17 if name == "digits" else 256,
            progress=progress,
        )  # fmt: skip
    except RuntimeError as error:
        raise RunError(f"no likelihood: {error}") from error
    return {"bits_per_dim": (bits.mean, bits.error)}


def draw_samples(
    score: Score, setup: build.Setup, sampling: Any, settings: Settings, *, progress: bool = False
) -> Tensor:
    """As many samples as the settings say, by the run's own sampler and in its precision, in batches."""
    size = 100 if setup.image else 5000
    parts = [
        draw(
            score,
            setup.shape,
            sampling,
            SampleNoise(settings.seed, first, setup.device),
            count=min(size, settings.samples - first),
            progress=progress,
        )
        for first in range(0, settings.samples, size)
    ]
    return torch.cat(parts)


def _quality(real: Tensor, fake: Tensor) -> dict[str, tuple[float, float | None]]:
    """Nearest-neighbour metrics and, where POT is there, the sliced distance, of as many held-out samples as drawn."""
    quality = precision_recall(real, fake)._asdict() | density_coverage(real, fake)._asdict()
    found: dict[str, tuple[float, float | None]] = {name: (value, None) for name, value in quality.items()}
    with contextlib.suppress(ImportError):  # POT is an extra
        found["sliced_w2"] = (sliced_wasserstein2(real, fake), None)
    return found


def format_table(result: dict[str, Any]) -> str:
    """Markdown: a line per value with its standard error."""
    lines = [f"| {result['run']}, step {result['step']} | value | standard error |", "|---|---|---|"]
    for label, (mean, error) in labelled(result["values"]).items():
        lines.append(f"| {label} | {mean:.4g} | {'' if error is None else f'{error:.2g}'} |")
    return "\n".join(lines) + "\n"


def labelled(values: dict[str, Any]) -> dict[str, Any]:
    """The values by what a table calls them, in its order; those by a network's features have names already."""
    known = {label: values[name] for name, label in LABELS.items() if name in values}
    return known | {name: value for name, value in values.items() if name not in LABELS}


def samples_of(folder: Path, result: dict[str, Any]) -> Path:
    """The picture of the samples that belongs to an evaluation of the run in `folder`."""
    return folder / "evaluation" / str(result["step"]) / "samples.png"


def newest(folder: Path) -> dict[str, Any]:
    """The evaluation of the latest checkpoint that has one. Raises RunError where none has."""
    found = [p for p in (folder / "evaluation").glob(f"*/{FILE}") if p.parent.name.isdecimal()]
    if not found:
        raise RunError(f"{folder}: not evaluated yet\nRun: qcsbm evaluate {folder}")
    return json.loads(max(found, key=lambda path: int(path.parent.name)).read_text())


def _write(
    out: Path,
    result: dict[str, Any],
    score: Score,
    setup: build.Setup,
    t_min: float,
    train: Tensor,
    samples: Tensor,
) -> None:
    from qcsbm_fast.studies import evaluation_plots
    from qcsbm_fast.train import plots

    out.mkdir(parents=True, exist_ok=True)
    evaluation_plots.asymmetry_by_sigma(out / "asymmetry.png", result["levels"])
    if setup.image:
        plots.image_grid(out / "samples.png", samples[:100])
        evaluation_plots.nearest_neighbours(out / "neighbours.png", samples[:10], train)
    else:
        plots.scatter(out / "samples.png", samples, setup.test)
        axis = torch.linspace(-plots.EXTENT, plots.EXTENT, 40, device=setup.device)
        points = torch.cartesian_prod(axis, axis)
        t = torch.full((len(points),), t_min, device=setup.device)
        with torch.no_grad():
            plots.vector_field(
                out / "field.png", points, score(points, t), "score at the smallest noise level"
            )
    (out / "table.md").write_text(format_table(result))
    write_json(out / FILE, result)
