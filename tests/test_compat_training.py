"""The authors' training steps, optimiser, discrete losses, averages and checkpoints."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from malicious import Malicious
from oracles import jacobians
from qcsbm_fast.compat import losses, sde_lib, utils
from qcsbm_fast.compat.models.ema import ExponentialMovingAverage
from script_objects import VESDE, column, network


def config(**optim: Any) -> SimpleNamespace:
    settings = {"optimizer": "Adam", "lr": 1e-2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0}
    return SimpleNamespace(optim=SimpleNamespace(**{**settings, "warmup": 4, "grad_clip": 1.0, **optim}))


def training(seed: int = 0) -> dict[str, Any]:
    model = network(seed)
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    return {
        "model": model,
        "optimizer": losses.get_optimizer(config(), model.parameters()),
        "ema": ema,
        "step": 0,
    }


@pytest.mark.parametrize("energy", [False, True])
def test_steps_learn_and_evaluation_leaves_the_state_alone(energy: bool) -> None:
    process, state = VESDE(), training()
    batch = torch.rand(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    step = losses.get_step_fn(process, True, losses.optimization_manager(config()), slices=1, energy=energy)
    evaluate = losses.get_step_fn(process, False, slices=1, energy=energy)
    torch.manual_seed(0)
    before = evaluate(state, batch)
    for _ in range(15):
        _, reg = step(state, batch)
    assert state["step"] == 15
    assert (reg == 0) == energy
    weights = [p.clone() for p in state["model"].parameters()]
    torch.manual_seed(0)
    after = evaluate(state, batch)
    assert after[0] < before[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, state["model"].parameters(), strict=True))
    average = ExponentialMovingAverage(state["model"].parameters(), 0.9)
    average.load_state_dict(state["ema"].state_dict())
    average.copy_to(state["model"].parameters())
    torch.manual_seed(0)
    assert (
        losses.get_sde_loss_fn(process, False, likelihood_weighting=False, slices=1, energy=energy)(
            state["model"], batch
        )
        == after
    )


def test_optimiser_steps_are_adams_with_warmup_and_clipping() -> None:
    ours, plain = network(), network()
    optimizer = losses.get_optimizer(config(), ours.parameters())
    adam = torch.optim.Adam(plain.parameters(), lr=1.0)
    optimize = losses.optimization_manager(config())
    for step in range(6):
        for model in (ours, plain):
            model.zero_grad()
            (100 * sum(p.square().sum() for p in model.parameters())).backward()  # pyright: ignore
        adam.param_groups[0]["lr"] = 1e-2 * min(step / 4, 1)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
        optimize(optimizer, ours.parameters(), step=step)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    before = [p.clone() for p in ours.parameters()]
    next(ours.parameters()).grad[0] = torch.nan  # pyright: ignore
    with pytest.raises(RuntimeError, match="non-finite"):
        optimize(optimizer, ours.parameters(), step=6)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    with pytest.raises(NotImplementedError, match="expected 'Adam', got 'SGD'"):
        losses.get_optimizer(config(optimizer="SGD"), [])


def test_discrete_losses_vanish_at_the_right_answer() -> None:
    """For data at 0 the noise is known from x: the score is -x / sigma^2, the predicted noise x / std."""
    batch = torch.zeros(32, 2, 4, 4)
    ve, vp = VESDE(), sde_lib.VPSDE(N=100)
    levels = torch.flip(ve.discrete_sigmas, (0,))

    def score(x: Tensor, labels: Tensor) -> Tensor:
        return -x / column(levels[labels] ** 2)

    def noise(x: Tensor, labels: Tensor) -> Tensor:
        return x / column(vp.sqrt_1m_alphas_cumprod[labels])

    assert losses.get_smld_loss_fn(ve, True)(score, batch) < 1e-8
    assert losses.get_ddpm_loss_fn(vp, True)(noise, batch) < 1e-8
    # at an output of 0 the loss is half the expected square of the noise, or its mean: 5 standard errors
    zero = lambda x, labels: 0 * x  # noqa: E731
    assert losses.get_smld_loss_fn(ve, True)(zero, batch).item() == pytest.approx(16, abs=3.6)
    assert losses.get_ddpm_loss_fn(vp, True)(zero, batch).item() == pytest.approx(1, abs=0.23)
    with pytest.raises(ValueError, match="vesde: expected a variance-exploding SDE, got VPSDE"):
        losses.get_smld_loss_fn(vp, True)
    with pytest.raises(ValueError, match="likelihood_weighting: expected False"):
        losses.get_step_fn(
            ve, True, losses.optimization_manager(config()), continuous=False, likelihood_weighting=True
        )


def test_asymmetry_at_a_level_is_that_of_the_jacobian() -> None:
    """Unbiased: the mean over 400 draws of one sample at one point, within 5 standard errors."""
    process, model = VESDE(sigma_min=1e-6, sigma_max=1e-5), network().double()
    batch = torch.rand(1, 2, 2, 2, dtype=torch.float64).expand(400, -1, -1, -1)
    with torch.no_grad():
        model.first.weight.mul_(3)
    asym, nasym = utils.get_sym_function(process, True, False, slices=4)(model, batch, 0.0)
    std = torch.full((1,), process.sigma_min, dtype=torch.float64)
    j = jacobians(lambda y: model(y, std), batch[:1])
    exact = (0.5 * (j - j.transpose(1, 2)).square().sum()).item()
    assert asym.mean().item() == pytest.approx(exact, abs=5 * asym.std().item() / 20)
    assert (asym >= 0).all()
    assert ((nasym >= 0) & (nasym <= 1)).all()


def test_ema_is_its_closed_form_and_skips_frozen_parameters() -> None:
    a, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    ema = ExponentialMovingAverage([a, frozen], 0.5)
    with torch.no_grad():
        a.fill_(2.0)
    ema.update([a, frozen])
    torch.testing.assert_close(ema.shadow_params, [torch.full((3,), 2 - 2 / 11)])
    constant = ExponentialMovingAverage([a], 0.5, use_num_updates=False)
    ema.store([a, frozen])
    ema.copy_to([a, frozen])
    constant.update([a])
    torch.testing.assert_close(constant.shadow_params[0], torch.full((3,), 2 - 1 / 11))
    ema.restore([a, frozen])
    assert (a == 2).all()
    with pytest.raises(ValueError, match="expected 1 tensors of the model's shapes, got 2"):
        ema.load_state_dict({"shadow_params": [a, a], "decay": 0.5, "num_updates": 1})


def test_checkpoints_come_back_and_run_no_code(tmp_path: Path) -> None:
    state, path = training(), tmp_path / "checkpoint_1.pth"
    step = losses.get_step_fn(VESDE(), True, losses.optimization_manager(config()), slices=1)
    step(state, torch.rand(4, 2, 4, 4))
    for group in state["optimizer"].param_groups:
        group["lr"] = np.float64(0.25)  # as the authors' warm-up leaves it
    utils.save_checkpoint(path, state)
    restored = utils.restore_checkpoint(path, training(seed=1), "cpu")
    assert restored["step"] == 1
    assert restored["optimizer"].param_groups[0]["lr"] == 0.25
    for a, b in zip(state["model"].parameters(), restored["model"].parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(restored["ema"].shadow_params, state["ema"].shadow_params)

    # the authors' own file: numbers of numpy in it, and no step
    torch.save({name: state[name].state_dict() for name in ("model", "optimizer", "ema")}, path)
    restored = utils.restore_checkpoint(path, training(seed=1), "cpu")
    assert restored["optimizer"].param_groups[0]["lr"] == 0.25

    trace = tmp_path / "trace"
    torch.save({"model": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="refused, it holds more than tensors and numbers"):
        utils.restore_checkpoint(path, training(), "cpu")
    path.write_bytes(pickle.dumps({"model": Malicious(trace)}))
    with pytest.raises(ValueError, match="refused"):
        utils.restore_checkpoint(path, training(), "cpu")
    assert not trace.exists()
