"""The authors' names and signatures: against plain nested gradients, float64 autograd and golden values."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oracles import jacobians, parameter_gradient
from qcsbm_fast import Score, ops, sde
from qcsbm_fast.compat import losses, sde_lib, utils
from qcsbm_fast.compat.models.ema import ExponentialMovingAverage
from qcsbm_fast.compat.models.utils import get_score_fn
from qcsbm_fast.nn import ToyMLP
from qcsbm_fast.random import NoiseStream

GOLDEN = np.load(Path(__file__).parent / "data" / "sde.npz")


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class VESDE:
    """A variance-exploding SDE as a script may define it: nothing of ours in it."""

    T = 1

    def __init__(self, sigma_min: float = 0.3, sigma_max: float = 3.0, N: int = 50) -> None:
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, N
        self.discrete_sigmas = torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), self.marginal_prob(x, t)[1] * math.sqrt(2 * math.log(10.0))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (t * (self.N - 1)).long()
        below = torch.where(index == 0, torch.zeros_like(t), self.discrete_sigmas[index - 1].to(t))
        return torch.zeros_like(x), (self.discrete_sigmas[index].to(t) ** 2 - below**2).sqrt()

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z: Tensor) -> Tensor:
        n = z[0].numel()
        return -n / 2 * math.log(2 * math.pi * self.sigma_max**2) - (z**2).sum((1, 2, 3)) / (
            2 * self.sigma_max**2
        )


class Network(nn.Module):
    """Convolutions, group norm, attention over pixels and a noise embedding; output divided by sigma as in NCSN++."""

    def __init__(self, channels: int = 2, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.embed = nn.Linear(1, width)
        self.norm = nn.GroupNorm(4, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.register_buffer("sigmas", torch.ones(3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.first(x) + self.embed(labels.to(x.dtype).log()[:, None])[:, :, None, None]
        h = nn.functional.silu(self.norm(h))
        q, k, v = self.qkv(h).flatten(2).chunk(3, 1)
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 3, -1)
        h = h + torch.einsum("bnm,bcm->bcn", weights, v).view_as(h)
        return self.last(h) / column(labels.to(x.dtype))


def network(seed: int = 0, scale: float = 1.0) -> Network:
    torch.manual_seed(seed)
    model = Network()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def nested_loss(model: nn.Module, process: VESDE, batch: Tensor, factor: float, likelihood: bool) -> tuple:
    """The published loss, plainly: nested vector-Jacobian products and full second-order gradients."""
    t = torch.rand(len(batch), dtype=batch.dtype) * (1 - 1e-5) + 1e-5
    z, v = torch.randn_like(batch), torch.randn_like(batch).sign()
    std = process.marginal_prob(batch, t)[1]
    x = (batch + column(std) * z).requires_grad_()
    score = model(x, std)
    loss = 0.5 * (column(std) * score + z).square().flatten(1).sum(1)
    if likelihood:
        loss = loss * (process.sde(batch, t)[1] / std) ** 2
    (once,) = torch.autograd.grad(score, x, v, create_graph=True)
    (twice,) = torch.autograd.grad(score, x, once, create_graph=True)
    reg = std**2 * (once.square() - twice * v).flatten(1).sum(1)
    (loss + factor * reg).mean().backward()
    return loss.mean().detach(), reg.mean().detach()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # pyright: ignore


@pytest.mark.parametrize("likelihood", [False, True])
def test_loss_penalty_and_gradient_agree_in_expectation(likelihood: bool) -> None:
    """Means over 40 draws of 32 samples; 4.5 standard errors of the difference: below 1e-4 of false alarms."""
    process, draws = VESDE(), 40
    batch = torch.rand(32, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours = losses.get_sde_loss_fn(process, True, False, True, likelihood, 1e-5, 0.5, 2, False)
    rows: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    directions = torch.randn(6, sum(p.numel() for p in network().parameters()))
    for name in rows:
        model = network(scale=2.0)
        torch.manual_seed(5)
        for _ in range(draws):
            model.zero_grad()
            loss, reg = (
                ours(model, batch) if name == "ours" else nested_loss(model, process, batch, 0.5, likelihood)
            )
            rows[name].append(torch.cat([torch.stack([loss, reg]), directions @ gradient(model)]))
    a, b = (torch.stack(rows[name]).double() for name in ("ours", "theirs"))
    assert (a[:, 1] >= 0).all()
    assert a[:, 1].mean() > 0.05  # there is a penalty to agree on
    error = ((a.var(0) + b.var(0)) / draws).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all()
    assert (error[:2] < 0.1 * b.mean(0)[:2].abs()).all()


@pytest.mark.parametrize("energy", [False, True])
def test_gradients_are_float64_autograds_for_the_same_draws(
    energy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times, noise and probes fixed: the loss's gradient, and the penalty's by all unit vectors."""
    torch.manual_seed(0)
    process, model = VESDE(), network().double()
    batch = torch.rand(3, 2, 2, 2, dtype=torch.float64)
    factor = 0.0 if energy else 0.7
    monkeypatch.setattr(losses, "as_stream", lambda *_: NoiseStream(3))
    if not energy:
        inner = losses.DenoisingObjective
        monkeypatch.setattr(losses, "DenoisingObjective", lambda *a, **k: inner(*a, **k, exact=True))
    loss, reg = losses.get_sde_loss_fn(process, True, balancing_fac=factor, energy=energy)(model, batch)
    ours = gradient(model)

    stream = NoiseStream(3)
    t = 1e-5 + (1 - 1e-5) * stream.uniform((3,), dtype=torch.float64)
    std = process.marginal_prob(batch, t)[1]
    x, z = ops.perturb(batch, 1.0, std, stream.draw())

    def score(y: Tensor) -> Tensor:
        if not energy:
            return model(y, std)
        y = y if y.requires_grad else y.detach().requires_grad_()
        value = (model(y, std).square().flatten(1).sum(1) / (2 * std)).sum()
        return -torch.autograd.grad(value, y, create_graph=True)[0]

    weight = (process.sde(batch, t)[1] / std) ** 2
    expected = (0.5 * weight * (column(std) * score(x) + z).square().flatten(1).sum(1)).mean()
    penalty = torch.zeros((), dtype=torch.float64)
    if not energy:
        j = jacobians(score, x)
        penalty = (std**2 * 0.5 * (j - j.transpose(1, 2)).square().sum((1, 2))).mean()
    theirs = parameter_gradient(expected + factor * penalty, model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert reg.item() == pytest.approx(penalty.item(), rel=1e-12)
    assert (ours - theirs).norm() < 1e-11 * theirs.norm()
    assert not loss.requires_grad
    assert not reg.requires_grad


def test_gradients_accumulate_and_evaluation_takes_none() -> None:
    process, model, batch = VESDE(), network(), torch.rand(4, 2, 4, 4)
    train, evaluate = (losses.get_sde_loss_fn(process, mode, slices=1) for mode in (True, False))
    torch.manual_seed(2)
    values = train(model, batch)
    once = gradient(model)
    torch.manual_seed(2)
    again = train(model, batch)
    torch.testing.assert_close(gradient(model), 2 * once)
    assert model.training
    torch.manual_seed(2)
    assert values == again == evaluate(model, batch)
    assert not model.training
    torch.testing.assert_close(gradient(model), 2 * once)


def test_our_objects_take_the_same_place() -> None:
    """A Score is its own answer; one of our networks, which returns sigma times the score, is taken as such."""
    torch.manual_seed(0)
    net, batch = ToyMLP("identity"), torch.randn(6, 2)
    values = []
    for process in (sde.VE(0.1, 3.0), sde_lib.VESDE(0.1, 3.0, 10)):
        for model in (net, Score(net, sde.VE(0.1, 3.0), "quasi-conservative")):
            torch.manual_seed(1)
            values.append(losses.get_sde_loss_fn(process, True, slices=2)(model, batch))
    assert all(value == values[0] for value in values)
    with pytest.raises(ValueError, match="energy: expected False for a quasi-conservative Score, got True"):
        losses.get_sde_loss_fn(process, True, energy=True)(model, batch)


def test_what_is_not_an_sde_is_named() -> None:
    with pytest.raises(
        TypeError, match="sde: expected marginal_prob, sde, discretize and N, got Linear without"
    ):
        sde_lib.as_process(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="expected a class named VESDE"):
        get_score_fn(Renamed(), network())


class Renamed:
    """The methods of an SDE under a name that says nothing of the model's conventions."""

    def __init__(self) -> None:
        inner = VESDE()
        self.N, self.marginal_prob, self.sde = inner.N, inner.marginal_prob, inner.sde
        self.discretize, self.prior_logp = inner.discretize, inner.prior_logp


def test_a_process_is_read_off_any_object() -> None:
    foreign, ours = sde_lib.as_process(Renamed()), sde.VE(0.3, 3.0)
    assert isinstance(sde_lib.as_process(VESDE()), sde.VE)
    assert not isinstance(foreign, sde.VE)
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    for name in ("marginal", "drift", "diffusion", "reverse"):
        torch.testing.assert_close(getattr(foreign, name)(t), getattr(ours, name)(t), rtol=1e-9, atol=0)
    torch.testing.assert_close(foreign.time_of_ratio(ours.marginal(t)[1]), t, rtol=1e-12, atol=1e-12)
    middle = (torch.arange(50, dtype=torch.float64) + 0.3) / 49
    for a, b in zip(foreign.discretize(middle[:49], 50), ours.discretize(middle[:49], 50), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    assert foreign.prior_std == pytest.approx(3.0, rel=1e-6)

    class Changed(VESDE):
        def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return x, 2 * super().marginal_prob(x, t)[1]

    torch.testing.assert_close(sde_lib.as_process(Changed()).marginal(t)[1], 2 * ours.marginal(t)[1])


@pytest.mark.parametrize("case", ["ve", "vp", "subvp"])
def test_golden_sde_values(case: str) -> None:
    make: dict[str, Any] = {"ve": sde_lib.VESDE, "vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE}
    process = make[case]()
    x, t = (torch.from_numpy(GOLDEN[name]).double() for name in ("x", "t"))
    mean, std = process.marginal_prob(x, t)
    drift, diffusion = process.sde(x, t)
    f, noise = process.discretize(x, t)
    values = {"mean": mean, "std": std, "drift": drift, "diffusion": diffusion, "disc_f": f, "disc_G": noise}
    values["prior_logp"] = process.prior_logp(x)
    for key, flow in (("rev0", False), ("rev1", True)):
        reverse = process.reverse(lambda y, s: -y / (1 + column(process.marginal_prob(y, s)[1] ** 2)), flow)
        assert (reverse.N, reverse.T) == (1000, 1)
        values[f"{key}_drift"] = reverse.sde(x, t)[0]
        values[f"{key}_disc_f"], values[f"{key}_disc_G"] = reverse.discretize(x, t)
    for name, value in values.items():
        golden = torch.from_numpy(GOLDEN[f"{case}/{name}"]).double()
        # the reference computed in float32, with differences of close squares
        assert (value - golden).abs().max() <= 2e-3 * golden.abs().max(), name


def test_chain_constants() -> None:
    ve, vp = sde_lib.VESDE(0.01, 50, 1000), sde_lib.VPSDE()
    torch.testing.assert_close(ve.discrete_sigmas[[0, -1]], torch.tensor([0.01, 50.0]))
    torch.testing.assert_close(vp.alphas_cumprod, vp.alphas.double().cumprod(0).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(vp.sqrt_alphas_cumprod**2 + vp.sqrt_1m_alphas_cumprod**2, torch.ones(1000))
    x = sde_lib.VESDE(0.01, 50).prior_sampling((4000, 2))
    assert x.std().item() == pytest.approx(50, rel=0.05)  # 6 standard errors


def test_conventions_of_the_second_argument() -> None:
    """What a model is given, and how its output becomes the score."""
    x, t = torch.randn(5, 1, 2, 2), torch.tensor([0.1, 0.25, 0.5, 0.75, 1.0])

    def model(y: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return torch.ones_like(y)

    for process, continuous, labels, score in (
        (sde_lib.VESDE(0.1, 10, 5), True, 0.1 * 100**t, torch.ones(5)),
        (sde_lib.VESDE(0.1, 10, 5), False, torch.tensor([4, 3, 2, 1, 0]), torch.ones(5)),
        (sde_lib.VPSDE(N=100), True, t * 999, -1 / sde.VP().marginal(t)[1]),
        (sde_lib.subVPSDE(N=100), False, t * 999, -1 / sde.SubVP().marginal(t)[1]),
    ):
        seen: list[Tensor] = []
        torch.testing.assert_close(
            get_score_fn(process, model, continuous=continuous)(x, t)[:, 0, 0, 0], score
        )
        torch.testing.assert_close(seen[0], labels)
    seen = []
    vp = sde_lib.VPSDE(N=101)
    score = get_score_fn(vp, model)(x, t + 1e-3)[:, 0, 0, 0]
    torch.testing.assert_close(seen[0], (t + 1e-3) * 100)
    torch.testing.assert_close(score[:4], -1 / vp.sqrt_1m_alphas_cumprod[[10, 25, 50, 75]])


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


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


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
