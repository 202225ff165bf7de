"""From settings to objects: data on the device, score model, objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcsbm_fast import data
from qcsbm_fast.nn import ImageMLP, ToyMLP
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.sde import sde_from_name
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.errors import ConfigError


@dataclass(frozen=True)
class Setup:
    """What a run works with: `train (N, *)` and `test (M, *)` on `device`, and the untrained score model."""

    device: torch.device
    train: Tensor
    test: Tensor
    image: bool
    score: Score

    @property
    def shape(self) -> torch.Size:
        """The shape of one sample."""
        return self.train.shape[1:]


def build(config: Config) -> Setup:
    """Load the data and make the score model, its initial weights drawn from `config.seed`.

    Raises ConfigError where the device is not there.
    """
    device = find_device(config.device)
    dataset = data.load(config.data.name, points=config.data.points, seed=config.seed)
    sde = sde_from_name(config.sde.name, **config.sde.parameters())
    torch.manual_seed(config.seed)
    score = Score(_network(config, dataset.train.shape[1:]), sde, config.model.kind)
    return Setup(device, dataset.train.to(device), dataset.test.to(device), dataset.image, score.to(device))


def objective(config: Config, score: Score, stream: NoiseStream) -> DenoisingObjective:
    """The training objective; only the quasi-conservative kind has the penalty."""
    penalty = config.penalty
    return DenoisingObjective(
        score,
        stream=stream,
        balancing_factor=penalty.balancing_factor if config.model.kind == "quasi-conservative" else 0.0,
        probes=penalty.probes,
        estimator=penalty.estimator,
        distribution=penalty.distribution,
        exact=penalty.exact,
        fraction=penalty.fraction,
        time_density=penalty.time_density,
        half=config.objective.half,
        t_min=config.objective.t_min,
    )


def find_device(name: str) -> torch.device:
    """The torch device called `name`, "auto" being a GPU where there is one. ConfigError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _network(config: Config, shape: torch.Size) -> nn.Module:
    conservative = config.model.kind == "conservative"
    if config.model.network == "image-mlp":
        return ImageMLP(shape.numel(), config.model.width, config.model.depth, energy=conservative)
    return ToyMLP(config.model.conservative_activation if conservative else "identity")
