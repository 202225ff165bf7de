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

DataName = Literal[
    "digits", "mnist-5k", "fashion-mnist", "emoji", "cifar10", "cifar100", "svhn", "imagenet32", "folder",
    "checkerboard", "eight-gaussians", "spirals",
]  # fmt: skip
PresetName = DataName
Kind = Literal["unconstrained", "conservative", "quasi-conservative"]

Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Channels = Annotated[int, Field(ge=4, multiple_of=4, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", title="data"))
class Data:
    """What to learn."""

    name: DataName = "digits"
    """Data set: images, a folder of pictures, or one of the paper's 2-D densities."""
    root: str | None = None
    """Folder that holds the files of a data set that does not come with a package; for emoji, the font's file."""
    points: Count = 50_000
    """Points drawn from a 2-D density; an image data set has its own number."""
    size: Count = 32
    """folder: side of the square images that the pictures are cut and scaled to."""
    flip: Flag = False
    """Mirror each training image left to right with probability 1/2."""


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
    network: Literal["ncsnpp", "image-mlp", "toy-mlp"] = "ncsnpp"
    """ncsnpp: the image network of the paper; image-mlp: a residual MLP for small images; toy-mlp: the paper's
    2-D network."""
    nf: Channels = 128
    """ncsnpp: channels at the first resolution."""
    ch_mult: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 2, 2)
    """ncsnpp: multiple of nf at each resolution; each is half the one before."""
    num_res_blocks: Count = 8
    """ncsnpp: residual blocks per resolution."""
    attn_resolutions: tuple[Count, ...] = (16,)
    """ncsnpp: image sizes at which attention follows the blocks."""
    resblock_type: Literal["biggan", "ddpm"] = "biggan"
    """ncsnpp: blocks that resample themselves, or blocks with resampling layers between them."""
    resamp_with_conv: Flag = True
    """ncsnpp, ddpm blocks: whether the resampling layers have a convolution."""
    fir: Flag = True
    """ncsnpp: resampling by the filter fir_kernel, or by repetition and means."""
    fir_kernel: Annotated[tuple[Number, ...], Field(min_length=2)] = (1.0, 3.0, 3.0, 1.0)
    """ncsnpp: the filter."""
    skip_rescale: Flag = True
    """ncsnpp: whether residual sums are divided by the root of 2."""
    progressive: Literal["none", "output_skip", "residual"] = "none"
    """ncsnpp: output from the last resolution, as a sum of images or of features from all."""
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    """ncsnpp: input to the first resolution only, or the shrunken image or learnt features to all."""
    progressive_combine: Literal["sum", "cat"] = "sum"
    """ncsnpp: how input_skip joins them."""
    embedding_type: Literal["fourier", "positional"] = "fourier"
    """ncsnpp: embedding of the noise level."""
    fourier_scale: Positive = 16.0
    """ncsnpp: standard deviation of the Fourier frequencies of log sigma."""
    num_scales: Annotated[int, Field(ge=2, strict=True)] = 1000
    """ncsnpp: steps from sigma_max to sigma_min that the positional embedding tells apart."""
    conditional: Flag = True
    """ncsnpp: whether the blocks see the noise level."""
    scale_by_sigma: Flag = True
    """ncsnpp: whether the score is the last convolution divided by sigma, or the convolution itself."""
    centered: Flag = False
    """ncsnpp: leave the images as they are in place of mapping [0, 1] to [-1, 1]."""
    dropout: BelowOne = 0.1
    """ncsnpp: probability that training zeroes a feature of a block."""
    init_scale: NonNegative = 0.0
    """ncsnpp: scale of the layers that start near zero."""
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
    probe_chunk: CountOrZero = 0
    """Probes worked off at once; fewer save memory and cost time. 0 for all."""
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
    accumulate: CountOrZero = 1
    """Parts that a batch is worked off in, to save memory; must divide batch_size. 0 for as few as fit, found by
    measuring small ones."""
    checkpoint_activations: Flag = False
    """ncsnpp: compute each block again in the backward pass in place of keeping its activations, to save memory."""
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
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step as one CUDA graph; auto: on one GPU, where the settings allow it."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is infinite or not a number is never taken: stop there, or count it and go on."""

    @model_validator(mode="after")
    def _check_parts(self) -> Optim:
        if self.accumulate and self.batch_size % self.accumulate:
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

    sampler: Literal["pc", "ode", "heun"] = "pc"
    """pc: predictor-corrector; ode: the probability-flow ODE with adaptive steps; heun: the same in fixed steps."""
    count: Count = 64
    """Number of samples."""
    steps: Count = 200
    """pc, heun: number of steps."""
    predictor: Literal["reverse-diffusion", "euler-maruyama", "ancestral", "exponential", "none"] = (
        "reverse-diffusion"
    )
    """pc: step of the reverse-time process; ancestral for ve and vp, exponential for ou and vp."""
    corrector: Literal["langevin", "annealed-langevin", "none"] = "langevin"
    """pc: Langevin steps at each noise level, their size from the norms of score and noise or from the level."""
    corrector_steps: Count = 1
    """pc: corrector steps at each noise level."""
    snr: Positive = 0.16
    """pc: signal-to-noise ratio that sets the Langevin step."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """pc: capture a step of the sampler as a CUDA graph; auto: on a GPU."""
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
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's layers in training and sampling; weights, averages, optimiser and held-out
    measurements are float32. float16 is for GPUs and scales the loss."""
    log_every: Count = 50
    """Steps that one line of stats.jsonl averages over."""
    fsdp: Flag = False
    """Several processes: each keeps a share of weights, averages and Adam's moments (FSDP2) in place of all of them."""
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
        plane = self.data.name in ("checkerboard", "eight-gaussians", "spirals")
        if self.model.network == "toy-mlp" and not plane:
            raise ValueError(
                f"model.network: toy-mlp is for points of the plane; use ncsnpp for {self.data.name}"
            )
        if self.model.network == "ncsnpp" and plane:
            raise ValueError(f"model.network: ncsnpp is for images; use toy-mlp for {self.data.name}")
        return self


def to_mapping(config: Config) -> dict[str, Any]:
    """Plain nested dicts of strings, numbers, booleans and lists of numbers."""
    return dataclasses.asdict(config, dict_factory=_plain)


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


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


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
    return f"{name} {message.removeprefix('Input ').removeprefix('Tuple ')}, got {problem['input']!r}"


def _section_type(path: tuple[Any, ...]) -> type:
    """The dataclass of the section at `path`, () being the whole configuration."""
    return type(getattr(Config(), path[0])) if path else Config
