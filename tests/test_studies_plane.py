"""The studies of trajectories and of the autoencoder: formulas against definitions, and the paper's findings."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from qcsbm_fast.nn import Autoencoder
from qcsbm_fast.penalty import asymmetry
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.studies import autoencoder, trajectories
from qcsbm_fast.studies.table import mean_and_spread
from qcsbm_fast.studies.trajectories import Field

EYE = torch.eye(2, dtype=torch.float64)


def test_the_two_errors_are_of_one_size_and_one_is_a_gradient() -> None:
    x = 2.0 * NoiseStream(0).normal((60, 2)).double()
    rotational, radial = Field("rotational", 1e-3), Field("radial", 1e-3)
    turn, push = rotational.error(x), radial.error(x)
    torch.testing.assert_close(turn.norm(dim=1), push.norm(dim=1))
    assert (turn * x).sum(1).abs().max() < 1e-9
    # their size by the formula, with PyTorch's own densities
    log_p = MultivariateNormal(torch.zeros(2).double(), 0.01 * EYE).log_prob(x)
    p = log_p.exp()
    angles = torch.arange(10).double() * (2 * math.pi / 10)
    centres = 3.0 * torch.stack((angles.cos(), angles.sin()), 1)
    mu = torch.stack([MultivariateNormal(c, EYE).log_prob(x).exp() for c in centres]).mean(0)
    size = 1e-3 + 1e-6
    c = (2 * size * mu / (p * (x.square().sum(1) + size) + 1e-8)).sqrt()
    torch.testing.assert_close(turn, torch.stack((-x[:, 1], x[:, 0]), 1) * c[:, None])
    torch.testing.assert_close(rotational(x), -x / 0.01 + turn)
    torch.testing.assert_close(trajectories.density(x), p)
    torch.testing.assert_close(trajectories.negative_log_density(x), -log_p)
    # Asym of the field is 1/2 ||J - J^T||^2 by autograd; c is nearly radial, so that x c nearly is a gradient
    for field in (rotational, radial):
        jacobian = torch.autograd.functional.jacobian(lambda y, field=field: field(y[None])[0], x[0])
        antisymmetric = jacobian - jacobian.T
        found = asymmetry(field, x[:1], exact=True)
        assert found.penalty.item() == pytest.approx(0.5 * antisymmetric.square().sum().item(), rel=1e-6)
    asym = [trajectories.weighted_asymmetry(field)[0] for field in (rotational, radial)]
    assert asym[1] < 1e-10 * asym[0]


def test_steps_to_converge_counts() -> None:
    path = torch.full((6, 3, 2), 2.0)
    path[3:, 0] = 0.0
    path[0, 1] = 0.0
    assert trajectories.steps_to_converge(path).tolist() == [3, 0, 5]


def test_rotational_errors_cost_steps_and_radial_ones_do_not(tmp_path) -> None:
    """At the paper's largest size: many times the steps of the exact score, and of the radial error of that size."""
    rows = trajectories.reproduce(tmp_path, errors=(0.0, 2.25e-3), seeds=(0, 1), steps=300, count=5, points=2)

    def steps(direction: str, e: float) -> float:
        found = [row["steps"] for row in rows if (row["direction"], row["e"]) == (direction, e)]
        assert len(found) == 2
        return sum(found) / 2

    assert steps("rotational", 0.0) == steps("radial", 0.0) == 1.0  # x - 0.01 x / 0.01 = 0
    assert steps("rotational", 2.25e-3) > 100
    assert steps("radial", 2.25e-3) < 30
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert "| rotational | 0.00225 |" in (tmp_path / "table.md").read_text()
    for picture in ("fields.png", "steps.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_autoencoder_loses_its_asymmetry_without_tying(tmp_path, monkeypatch) -> None:
    """Few iterations: the penalty falls, the weights stay apart; a finished seed is not trained again."""
    rows = autoencoder.reproduce(tmp_path, seeds=(8, 9), iterations=300)
    for row in rows:
        assert row["curve"][0]["penalty"] > row["curve"][-1]["penalty"] > 0
        r, w = torch.tensor(row["R"]), torch.tensor(row["W"])
        assert row["distance"] == pytest.approx((r - w).norm().item(), rel=1e-5)
        assert row["symmetry"] == pytest.approx((r[0] @ w[1] - r[1] @ w[0]).abs().item(), abs=1e-6)
        assert row["distance"] > 0.1
    monkeypatch.setattr(autoencoder, "train", None)
    assert autoencoder.reproduce(tmp_path, seeds=(8, 9), iterations=300) == rows
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "| all |" in (tmp_path / "table.md").read_text()


def test_symmetric_weights_without_tying_have_no_penalty() -> None:
    """R D W^T is symmetric for every diagonal D where each r_k is a multiple of w_k: R differs from W and yet
    Asym is 0."""
    torch.manual_seed(0)
    model = Autoencoder(2).double()
    with torch.no_grad():
        model.R.copy_(model.W * torch.tensor([2.0, -0.5]))
    points = 3.0 * NoiseStream(1).normal((50, 2)).double()
    assert asymmetry(model, points, exact=True).penalty.max() < 1e-28


def test_spread_is_half_the_range() -> None:
    assert mean_and_spread([4.0, 5.0]) == "4.5 ± 0.5"
    assert mean_and_spread([0.123456]) == "0.1235"
    assert mean_and_spread([90.0, 114.0]) == "102 ± 10"
