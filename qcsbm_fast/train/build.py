"""From settings to objects: data on the device, score model, objective."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcsbm_fast import cuda_graph, data
from qcsbm_fast.nn import ImageMLP, NCSNpp, NCSNppConfig, ToyMLP
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.score import Score
from qcsbm_fast.sde import sde_from_name
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.precision import policy


@dataclass(frozen=True)
class Setup:
    """What a run works with, on `device`: data and the untrained score model.

    `train (N, *)` is float32, or uint8 for images that `data.as_float` makes float32; `test (M, *)` is float32.
    """

    device: torch.device
    train: Tensor
    test: Tensor
    image: bool
    score: Score

    @property
    def shape(self) -> torch.Size:
        """The shape of one sample."""
        return self.train.shape[1:]

    def copy(self) -> Setup:
        """The same with a model of its own."""
        return dataclasses.replace(self, score=copy.deepcopy(self.score))


def build(config: Config) -> Setup:
    """Load the data and make the score model, its initial weights drawn from `config.seed`.

    Raises ConfigError where the device or the data set is not there, the device does not take the precision, or the
    network does not fit the images.
    """
    device = find_device(config.device)
    try:
        dataset = data.load(
            config.data.name,
            root=config.data.root,
            points=config.data.points,
            size=config.data.size,
            seed=config.seed,
        )
    except data.DataError as error:
        raise ConfigError(f"data: {error}") from None
    sde = sde_from_name(config.sde.name, **config.sde.parameters())
    torch.manual_seed(config.seed)
    autocast = policy(config.precision, device).autocast
    score = Score(_network(config, dataset.train.shape[1:]), sde, config.model.kind, autocast=autocast)
    test = data.as_float(dataset.test).to(device)
    return Setup(device, dataset.train.to(device), test, dataset.image, score.to(device))


def full_precision(score: Score) -> Score:
    """The same model, sharing its weights, without autocast: for measurements."""
    exact = copy.copy(score)
    exact.autocast = None
    return exact


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
        probe_chunk=penalty.probe_chunk or None,
        fraction=penalty.fraction,
        time_density=penalty.time_density,
        half=config.objective.half,
        t_min=config.objective.t_min,
    )


def captures_step(config: Config, device: torch.device, *, several: bool) -> bool:
    """Whether a training step is a CUDA graph, `several` being whether several processes train together.

    Raises ConfigError where the settings insist on one and it cannot be.
    """
    obstacle = None
    twice = config.model.kind == "conservative" or (
        config.penalty.estimator == "symmetric" and not config.penalty.exact
    )
    if device.type != "cuda":
        obstacle = f"that needs an NVIDIA GPU and this run is on {device}"
    elif several:
        obstacle = "several processes train together, which exchange gradients outside of a graph"
    elif 0 < config.penalty.probe_chunk < config.penalty.probes and not config.penalty.exact:
        obstacle = "probes in chunks draw each dropout mask again, which a graph cannot; set penalty.probe_chunk to 0"
    elif config.optim.checkpoint_activations and config.model.dropout > 0:
        obstacle = (
            "blocks that run again draw each dropout mask again, which a graph cannot; set model.dropout to 0"
        )
    elif twice and config.model.network == "ncsnpp" and config.model.dropout > 0:
        why = "the conservative kind" if config.model.kind == "conservative" else "the symmetric estimator"
        obstacle = f"{why} draws each dropout mask twice, which a graph cannot; set model.dropout to 0"
    try:
        return cuda_graph.wanted(config.optim.cuda_graph, obstacle)
    except ValueError as error:
        raise ConfigError(f"optim.{error}") from None


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
    model = config.model
    conservative = model.kind == "conservative"
    if config.optim.checkpoint_activations and model.network != "ncsnpp":
        raise ConfigError(f"optim.checkpoint_activations: expected model.network ncsnpp, got {model.network}")
    if model.network == "image-mlp":
        return ImageMLP(shape.numel(), model.width, model.depth, energy=conservative)
    if model.network == "toy-mlp":
        return ToyMLP(model.conservative_activation if conservative else "identity")
    channels, height, width = shape
    if height != width:
        raise ConfigError(f"model.network: ncsnpp takes square images, got {height} x {width}")
    fields = {field.name for field in dataclasses.fields(NCSNppConfig)}
    options: dict[str, Any] = {name: value for name, value in vars(model).items() if name in fields}
    options |= {"sigma_min": config.sde.sigma_min, "sigma_max": config.sde.sigma_max}
    try:
        net = NCSNpp(NCSNppConfig(image_size=height, num_channels=channels, **options))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    net.checkpoint_activations = config.optim.checkpoint_activations
    return net
