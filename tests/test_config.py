"""Settings: what is accepted, what is refused and how, and the presets' numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from qcsbm_fast.nn import NCSNppConfig
from qcsbm_fast.train import config_file
from qcsbm_fast.train.config import Config, Model, Noise, Optim, Penalty, describe
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.presets import PRESETS


def read(tmp_path: Path, text: str, preset: str | None = None) -> Config:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return config_file.read(path, preset)


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_gives_back_every_setting(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(
        PRESETS[name], seed=7, optim=Optim(lr=1e-5, eps=1e-12, steps=3), penalty=Penalty(exact=True)
    )
    path = tmp_path / "config.yaml"
    config_file.write(path, config)
    assert config_file.read(path) == config
    assert "!!" not in path.read_text()  # plain YAML: no Python tags


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("2.e+0", 2.0), (".5", 0.5), ("3", 3.0)]
)
def test_yaml_numbers(tmp_path: Path, text: str, value: float) -> None:
    config = read(tmp_path, f"penalty: {{balancing_factor: {text}}}")
    assert config.penalty.balancing_factor == value


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    config = read(tmp_path, "preset: checkerboard\noptim: {steps: 5}")
    expected = dataclasses.replace(
        PRESETS["checkerboard"], optim=dataclasses.replace(PRESETS["checkerboard"].optim, steps=5)
    )
    assert config == expected
    assert read(tmp_path, "") == PRESETS["digits"]
    assert read(tmp_path, "preset: checkerboard", preset="spirals") == PRESETS["spirals"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("penalty: {balancing_factor: -1}", "penalty.balancing_factor should be greater than or equal to 0"),
        ("penalty: {fraction: 1.5}", "penalty.fraction should be less than or equal to 1, got 1.5"),
        ("penalty: {fraction: true}", "penalty.fraction should be a valid number, got True"),
        ("penalty: {exact: 1}", "penalty.exact should be a valid boolean"),
        ("penalty: {factor: 1}", "penalty.factor: no such setting; there are: balancing_factor, probes"),
        ("optim: {steps: '10'}", "optim.steps should be a valid integer, got '10'"),
        ("optim: {lr: 0}", "optim.lr should be greater than 0"),
        ("optim: {lr: .inf}", "optim.lr should be a finite number"),
        ("optim: {ema: 1.0}", "optim.ema should be less than 1"),
        ("optim: {accumulate: 3, batch_size: 10}", "accumulate = 3 must divide batch_size = 10"),
        ("sde: {sigma_min: 60}", "sigma_min must be below sigma_max"),
        ("model: {kind: energy}", "model.kind should be 'unconstrained', 'conservative' or"),
        ("model: {nf: 18}", "model.nf should be a multiple of 4, got 18"),
        ("model: {ch_mult: []}", "model.ch_mult should have at least 1 item"),
        ("model: {ch_mult: [1, 0]}", "model.ch_mult.1 should be greater than or equal to 1, got 0"),
        ("model: {progressive: sum}", "model.progressive should be 'none', 'output_skip' or 'residual'"),
        ("precision: int8", "precision should be 'float32', 'bfloat16' or 'float16'"),
        ("preset: spirals\nmodel: {network: ncsnpp}", "ncsnpp is for images; use toy-mlp for spirals"),
        ("model: {network: toy-mlp}", "settings.yaml: model.network: toy-mlp is for points of the plane"),
        ("penalty: 3", "penalty should be a section of settings, got 3"),
        ("seed:", "seed should be a valid integer, got None"),
        ("sed: 1", "sed: no such setting"),
        ("preset: mnist", "preset: expected one of digits, mnist-5k"),
        ("- 1", "expected settings such as `seed: 1`, got list"),
        ("seed: [", "not YAML"),
        ("seed: !!python/object/apply:os.getpid []", "not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "settings.yaml" in str(error.value)


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "seed: -1\noptim: {clip: -1}\npenalty: {probes: 0}")
    for name in ("seed", "optim.clip", "penalty.probes"):
        assert f"{name} should be" in str(error.value)


def test_python_values_are_checked_too() -> None:
    with pytest.raises(ValidationError) as error:
        Penalty(fraction=0.0)
    assert describe(error.value) == "penalty.fraction should be greater than 0, got 0.0"
    with pytest.raises(ValidationError):
        dataclasses.replace(Optim(), steps=0)
    with pytest.raises(ValidationError):
        Penalty(weight=1.0)  # pyright: ignore[reportCallIssue]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        config_file.read(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "steps", "activation"),
    [("checkerboard", 4000, "elu"), ("eight-gaussians", 2000, "leaky_relu"), ("spirals", 2000, "elu")],
)
def test_two_dimensional_presets_have_the_papers_settings(name: str, steps: int, activation: str) -> None:
    config = PRESETS[name]
    optim, penalty = config.optim, config.penalty
    assert (config.sde.name, config.sde.sigma_min, config.sde.sigma_max) == ("ve", 0.1, 3.0)
    assert config.sde.parameters() == {"sigma_min": 0.1, "sigma_max": 3.0}
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.clip) == (7.5e-4, 0.9, 0.999, 1e-8, 1.0)
    assert (optim.steps, optim.batch_size, optim.warmup, optim.ema) == (steps, 5000, 0, 0.0)
    assert (penalty.balancing_factor, penalty.exact, penalty.fraction) == (0.1, True, 1.0)
    assert (penalty.time_density, config.objective.half, config.objective.t_min) == ("uniform", False, 0.0)
    assert (config.data.points, config.seed) == (50_000, 0)
    assert (config.model.network, config.model.conservative_activation) == ("toy-mlp", activation)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "imagenet32"])
def test_image_presets_have_the_papers_settings(name: str) -> None:
    config = PRESETS[name]
    optim, model, penalty = config.optim, config.model, config.penalty
    assert (config.sde.name, config.sde.sigma_min, config.sde.sigma_max) == ("ve", 0.01, 50.0)
    assert (optim.lr, optim.beta1, optim.beta2, optim.warmup, optim.clip) == (2e-4, 0.9, 0.999, 5000, 1.0)
    assert (optim.ema, optim.batch_size, optim.steps) == (0.999, 128, 750_000)
    assert (penalty.balancing_factor, penalty.probes, penalty.distribution) == (1e-4, 1, "rademacher")
    assert (config.objective.half, config.objective.t_min, config.data.flip) == (True, 1e-5, True)
    assert (config.sampling.steps, config.sampling.snr, config.sampling.corrector) == (1000, 0.16, "langevin")
    assert (model.network, model.init_scale, model.dropout) == ("ncsnpp", 0.0, 0.1)
    ours = NCSNppConfig(**{f.name: getattr(model, f.name) for f in shared_fields()})
    assert ours == NCSNppConfig()  # whose defaults are those of the paper


def shared_fields() -> list[dataclasses.Field]:
    """The network's options, but for those that data and noise give."""
    given = ("image_size", "num_channels", "sigma_min", "sigma_max")
    return [field for field in dataclasses.fields(NCSNppConfig) if field.name not in given]


def test_every_option_of_the_network_is_a_setting() -> None:
    settings = {field.name for field in dataclasses.fields(Model)}
    assert {field.name for field in shared_fields()} <= settings


def test_a_process_gets_its_own_parameters() -> None:
    assert Noise(name="vp").parameters() == {"beta_min": 0.1, "beta_max": 20.0}
    assert Noise(name="sub-vp", beta_max=5.0).parameters() == {"beta_min": 0.1, "beta_max": 5.0}
    assert Noise(name="ou", theta=2.0).parameters() == {"theta": 2.0, "stationary_std": 1.0}
