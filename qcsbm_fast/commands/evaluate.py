"""`qcsbm evaluate`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qcsbm_fast.commands.options import option
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.folder import open_run

_Number = Annotated[int | None, option("INT", "(default: by the kind of data)")]


@dataclass(frozen=True)
class Command:
    """Measure a trained model on held-out data: a table, a JSON file and pictures in RUN/evaluation/STEP.

    Denoising loss, Asym and NAsym over the noise levels, score error against the noised empirical
    distribution of the data, likelihood (bits per dimension of dequantised images), precision, recall,
    density, coverage and sliced Wasserstein-2 distance of samples, in the space of the data itself. The
    averaged weights are used.

    Images can be compared by the features of a network too, a function of MODULE that takes images (b, C, H, W)
    in [0, 1] to features (b, F), or to the pair of them and a classifier's logits: Frechet and kernel distance and
    classifier score, under its name. Those of torchmetrics' Inception, where its weights are there, are FID, KID
    and Inception score.

    - qcsbm evaluate runs/digits-quasi-conservative-1
    - qcsbm evaluate runs/digits-quasi-conservative-1 --nll-points 200 --repeats 5
    - qcsbm evaluate RUN --features my_network:features --samples 5000
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    points: _Number = None
    """Held-out samples for loss, Asym and NAsym."""
    levels: _Number = None
    """Noise levels, evenly spaced in time."""
    probes: _Number = None
    """Probes per sample and level; points of the plane have their whole Jacobian taken."""
    oracle_points: _Number = None
    """Held-out samples for the score error."""
    nll_points: _Number = None
    """Held-out samples for the likelihood."""
    repeats: _Number = None
    """Repeats of the likelihood of images, each with fresh dequantisation and probes."""
    samples: _Number = None
    """Samples to draw, by the run's own sampler."""
    features: Annotated[str | None, option("inception|MODULE:FUNCTION", "(default: none)")] = None
    """Network to compare images by."""
    checkpoint: Annotated[int | None, option("STEP", "(default: the newest)")] = None
    """Step of the checkpoint to use."""
    seed: int = 0
    """Seed of noise, probes and samples."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""

    def __post_init__(self) -> None:
        least = {"points": 2, "nll_points": 2, "samples": 6}
        for name in ("points", "levels", "probes", "oracle_points", "nll_points", "repeats", "samples"):
            value, low = getattr(self, name), least.get(name, 1)
            if value is not None and value < low:
                raise ConfigError(f"--{name.replace('_', '-')} should be {low} or more, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed should be 0 or more and below 2^63, got {self.seed}")


def run(command: Command) -> None:
    from qcsbm_fast.studies import evaluation

    folder = open_run(command.run)
    settings = evaluation.settings_for(image=folder.read_config().model.network != "toy-mlp")
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(settings)}
    settings = dataclasses.replace(settings, **{name: v for name, v in given.items() if v is not None})
    result = evaluation.evaluate_run(
        folder,
        settings,
        step=command.checkpoint,
        device=command.device,
        features=command.features,
        progress=sys.stderr.isatty(),
    )
    print(evaluation.format_table(result))
    print(f"Numbers and pictures: {folder.path / 'evaluation' / str(result['step'])}")
