"""Named settings to start from: small image models, those of the paper, its 2-D experiments."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qcsbm_fast.train.config import (
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Model,
    Noise,
    Objective,
    Optim,
    Penalty,
    Sampling,
)

_QUARTER = Penalty(balancing_factor=1e-4, probes=1, fraction=0.25, time_density="inverse-sigma")

_DIGITS = Config(
    preset="digits",
    data=Data(name="digits"),
    sde=Noise(name="ve", sigma_min=0.02, sigma_max=5.0),
    model=Model(network="ncsnpp", nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0),
    objective=Objective(half=True, t_min=1e-5),
    penalty=dataclasses.replace(_QUARTER, balancing_factor=1e-2),
    optim=Optim(steps=400, batch_size=64, lr=2e-3, warmup=100, ema=0.99),
    evaluation=Evaluation(every=200, points=200, levels=5),
    sampling=Sampling(sampler="pc", count=64, steps=150, snr=0.16),
    checkpoint=Checkpoint(every=200, keep=3),
)

_FASHION = Config(
    preset="fashion-mnist",
    precision="bfloat16",
    data=Data(name="fashion-mnist"),
    sde=Noise(name="ve", sigma_min=0.01, sigma_max=20.0),
    model=Model(nf=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), dropout=0.0),
    penalty=dataclasses.replace(_QUARTER, balancing_factor=1e-3),
    optim=Optim(steps=20_000, batch_size=64, lr=1e-3, warmup=200, ema=0.999),
    evaluation=Evaluation(every=2000, points=500, levels=10),
    sampling=Sampling(count=64, steps=500),
    checkpoint=Checkpoint(every=500, keep=2),
)
_MNIST = dataclasses.replace(_FASHION, preset="mnist-5k", data=Data(name="mnist-5k"))
_SMALL_RGB = dataclasses.replace(
    _FASHION,
    model=dataclasses.replace(_FASHION.model, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,)),
    sde=Noise(name="ve", sigma_min=0.01, sigma_max=50.0),
)
_EMOJI = dataclasses.replace(_SMALL_RGB, preset="emoji", data=Data(name="emoji"))
_FOLDER = dataclasses.replace(_SMALL_RGB, preset="folder", data=Data(name="folder", flip=True))


def _paper(name: Literal["cifar10", "cifar100", "svhn", "imagenet32"]) -> Config:
    """Section 5 of Chao et al. 2023, but for the penalty's samples (a quarter of the batch, mostly at low noise)
    and for training with the penalty from the start and not from step 600,000 on."""
    return Config(
        preset=name,
        precision="bfloat16",
        data=Data(name=name, flip=True),
        sde=Noise(name="ve", sigma_min=0.01, sigma_max=50.0),
        model=Model(),
        objective=Objective(half=True, t_min=1e-5),
        penalty=_QUARTER,
        optim=Optim(steps=750_000, batch_size=128, lr=2e-4, warmup=5000, clip=1.0, ema=0.999),
        evaluation=Evaluation(every=10_000, points=1000, levels=10),
        sampling=Sampling(count=64, steps=1000, snr=0.16),
        checkpoint=Checkpoint(every=5000, keep=3),
    )


def _two_dimensional(
    name: Literal["checkerboard", "eight-gaussians", "spirals"],
    steps: int,
    activation: Literal["elu", "leaky_relu"],
) -> Config:
    """Section 3.2 of Chao et al. 2023 with the settings of the authors' published configurations."""
    return Config(
        preset=name,
        data=Data(name=name, points=50_000),
        sde=Noise(name="ve", sigma_min=0.1, sigma_max=3.0),
        model=Model(network="toy-mlp", conservative_activation=activation),
        objective=Objective(half=False, t_min=0.0),
        penalty=Penalty(balancing_factor=0.1, exact=True, fraction=1.0, time_density="uniform"),
        optim=Optim(steps=steps, batch_size=5000, lr=7.5e-4, beta1=0.9, eps=1e-8, clip=1.0, ema=0.0),
        evaluation=Evaluation(every=500, points=5000, levels=10, exact=True),
        sampling=Sampling(sampler="ode", count=5000, rtol=1e-3, atol=1e-5),
        checkpoint=Checkpoint(every=500, keep=3),
    )


PRESETS: dict[str, Config] = {
    "digits": _DIGITS,
    "mnist-5k": _MNIST,
    "fashion-mnist": _FASHION,
    "emoji": _EMOJI,
    "cifar10": _paper("cifar10"),
    "cifar100": _paper("cifar100"),
    "svhn": _paper("svhn"),
    "imagenet32": _paper("imagenet32"),
    "folder": _FOLDER,
    "checkerboard": _two_dimensional("checkerboard", 4000, "elu"),
    "eight-gaussians": _two_dimensional("eight-gaussians", 2000, "leaky_relu"),
    "spirals": _two_dimensional("spirals", 2000, "elu"),
}
