"""Everything a training run can be told, as nested frozen dataclasses that check themselves.

Each section is a pydantic dataclass: a value of the wrong type or out of range, or a name that does not
exist, raises `pydantic.ValidationError`, whose title is the section and whose location is the field.
`from_mapping`, which reads what a YAML file holds, raises `ConfigError` with the field's dotted name instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from qcsbm_fast.train.errors import ConfigError

PresetName = Literal["digits", "checkerboard", "eight-gaussians", "spirals"]
Kind = Literal["unconstrained", "conservative", "quasi-conservative"]

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="data"))
class Data:
    """What to learn."""

    name: Literal["digits", "checkerboard", "eight-gaussians", "spirals"] = "digits"
    """Data set: scikit-learn's 8x8 handwritten digits, or one of the paper's 2-D densities."""
    points: Count = 50_000
    """Points drawn from a 2-D density; an image data set has its own number."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="sde"))
class Noise:
    """The diffusion that turns data into noise; each process reads its own two numbers."""

    name: Literal["ve", "vp", "sub-vp", "ou"] = "ve"
    """Variance exploding, variance preserving, sub-variance-preserving, Ornstein-Uhlenbeck."""
    sigma_min: Positive = 0.01
    """ve: the smallest noise level."""
    sigma_max: Positive = 50.0
    """ve: the largest noise level, about the largest distance between two samples of the data."""
    beta_min: Positive = 0.1
    """vp, sub-vp: noise rate at time 0."""
    beta_max: Positive = 20.0
    """vp, sub-vp: noise rate at time 1."""
    theta: Positive = 5.0
    """ou: rate of the drift towards 0."""
    stationary_std: Positive = 1.0
    """ou: standard deviation at rest."""

    @model_validator(mode="after")
    def _check_order(self) -> Noise:
        for low, high in (("sigma_min", "sigma_max"), ("beta_min", "beta_max")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} must be below {high}")
        return self

    def parameters(self) -> dict[str, float]:
        """The numbers that belong to the process `name`."""
        names = {"ve": ("sigma_min", "sigma_max"), "ou": ("theta", "stationary_std")}
        return {key: getattr(self, key) for key in names.get(self.name, ("beta_min", "beta_max"))}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="model"))
class Model:
    """The score model."""

    kind: Annotated[Kind, tyro.conf.arg(aliases=["--kind"])] = "quasi-conservative"
    """A free vector field, the gradient of a learnt energy, or a free field trained with the penalty."""
    network: Literal["toy-mlp", "image-mlp"] = "image-mlp"
    """toy-mlp: the paper's 2-D network; image-mlp: a residual MLP for small images."""
    width: Count = 512
    """image-mlp: features per layer."""
    depth: Count = 4
    """image-mlp: number of blocks."""
    conservative_activation: Literal["identity", "elu", "leaky_relu"] = "identity"
    """toy-mlp: activation of the network's output inside the energy of the conservative kind."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="objective"))
class Objective:
    """The denoising score matching loss."""

    half: Flag = True
    """1/2 ||sigma s + z||^2 as for images, or without the 1/2 as in the 2-D experiments."""
    t_min: BelowOne = 1e-5
    """Smallest time; times are uniform on [t_min, 1]."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="penalty"))
class Penalty:
    """The penalty 1/2 ||J - J^T||^2, J the score's Jacobian; only the quasi-conservative kind has it."""

    balancing_factor: NonNegative = 1e-4
    """Weight of the penalty, on top of sigma^2."""
    probes: Count = 1
    """Random probe vectors per sample."""
    estimator: Literal["one_sided", "symmetric"] = "one_sided"
    """Gradient estimator: the cheaper one, or the less noisy one for large weights."""
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    """Law of the probes."""
    exact: Flag = False
    """Use every unit vector instead of random probes; for low dimension."""
    fraction: Share = 1.0
    """Share of the batch that the penalty sees."""
    time_density: Literal["uniform", "inverse-sigma"] = "uniform"
    """How that share is drawn: evenly, or mostly at low noise, weighted so that the penalty is the same."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="optim"))
class Optim:
    """Adam and the length of the training."""

    steps: Annotated[Count, tyro.conf.arg(aliases=["--steps"])] = 10_000
    """Optimiser steps in all, those before a resume included."""
    batch_size: Count = 128
    """Samples per optimiser step."""
    accumulate: Count = 1
    """Parts that a batch is worked off in, to save memory; must divide batch_size."""
    lr: Positive = 2e-4
    """Learning rate."""
    beta1: BelowOne = 0.9
    """Adam's decay of the mean gradient."""
    beta2: BelowOne = 0.999
    """Adam's decay of the mean squared gradient."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    clip: NonNegative = 1.0
    """Largest norm of the gradient, beyond which it is scaled down; 0 for no limit."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate rises linearly; 0 for none."""
    ema: BelowOne = 0.999
    """Decay of the averaged weights that evaluation and sampling use; 0 for the plain weights."""

    @model_validator(mode="after")
    def _check_parts(self) -> Optim:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} must divide batch_size = {self.batch_size}")
        return self


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="evaluation"))
class Evaluation:
    """Measurements on held-out data."""

    every: CountOrZero = 1000
    """Steps between two evaluations; 0 for one at the end only."""
    points: Count = 1000
    """Held-out samples used, at each noise level."""
    levels: Count = 10
    """Noise levels, evenly spaced in time."""
    probes: Count = 1
    """Probes per sample and level for Asym and NAsym."""
    exact: Flag = False
    """Asym and NAsym from the whole Jacobian; for low dimension."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="sampling"))
class Sampling:
    """How samples are drawn from the model."""

    sampler: Literal["pc", "ode"] = "pc"
    """pc: reverse diffusion steps with a Langevin corrector; ode: the probability-flow ODE, adaptive."""
    count: Count = 64
    """Number of samples."""
    steps: Count = 200
    """pc: number of steps."""
    corrector: Literal["langevin", "none"] = "langevin"
    """pc: one Langevin step at each noise level, or none."""
    snr: Positive = 0.16
    """pc: signal-to-noise ratio that sets the Langevin step."""
    rtol: Positive = 1e-4
    """ode: relative tolerance."""
    atol: Positive = 1e-5
    """ode: absolute tolerance."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="checkpoint"))
class Checkpoint:
    """Saving and keeping."""

    every: Count = 1000
    """Steps between two checkpoints; one is always saved at the end, on Ctrl-C and on SIGTERM."""
    keep: Count = 3
    """Newest checkpoints kept."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="config"))
class Config:
    """A whole run."""

    preset: PresetName = "digits"
    """Settings to start from; whatever else is given overrides them."""
    seed: Seed = 0
    """Seed of weights, data order, noise and probes."""
    device: str = "auto"
    """auto: a GPU where there is one, otherwise the CPU; or a torch device such as cpu or cuda:1."""
    log_every: Count = 50
    """Steps that one line of stats.jsonl averages over."""
    data: Data = dataclasses.field(default_factory=Data)
    sde: Noise = dataclasses.field(default_factory=Noise)
    model: Model = dataclasses.field(default_factory=Model)
    objective: Objective = dataclasses.field(default_factory=Objective)
    penalty: Penalty = dataclasses.field(default_factory=Penalty)
    optim: Optim = dataclasses.field(default_factory=Optim)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)

    @model_validator(mode="after")
    def _check_network(self) -> Config:
        if self.model.network == "toy-mlp" and self.data.name == "digits":
            raise ValueError("model.network: toy-mlp is for points of the plane; use image-mlp for digits")
        return self


def to_mapping(config: Config) -> dict[str, Any]:
    """Plain nested dicts of strings, numbers and booleans."""
    return dataclasses.asdict(config)


def from_mapping(mapping: Mapping[str, Any], base: Config) -> Config:
    """`base` with the (possibly few) settings in `mapping` replaced.

    Raises ConfigError where a field is unknown, of the wrong type or out of range.
    """
    merged = to_mapping(base)
    for key, value in mapping.items():
        section = merged.get(key)
        merged[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def describe(error: ValidationError) -> str:
    """What is wrong with the settings, one line per field, each beginning with the field's dotted name."""
    return "\n".join(_describe_one(error.title, problem) for problem in error.errors())


def _describe_one(section: str, problem: Any) -> str:
    path = (*(() if section == "config" else (section,)), *problem["loc"])
    name = ".".join(str(part) for part in path)
    if problem["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(_section_type(path[:-1])))
        return f"{name}: no such setting; there are: {known}"
    if problem["type"] == "dataclass_type":
        return f"{name} should be a section of settings, got {problem['input']!r}"
    message = problem["msg"]
    if problem["type"] == "value_error":
        return f"{name}: {message.removeprefix('Value error, ')}".removeprefix(": ")
    return f"{name} {message.replace('Input should', 'should')}, got {problem['input']!r}"


def _section_type(path: tuple[Any, ...]) -> type:
    """The dataclass of the section at `path`, () being the whole configuration."""
    return type(getattr(Config(), path[0])) if path else Config
