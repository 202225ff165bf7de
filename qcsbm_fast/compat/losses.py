"""Losses and optimisation steps: `get_sde_loss_fn` and its neighbours.

The penalty takes one forward for all probes, one vector-Jacobian product a probe and one backward, in place of the
authors' nested gradients of a batch repeated once per probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcsbm_fast import ops
from qcsbm_fast.compat.models.utils import get_model_fn, get_score_fn
from qcsbm_fast.compat.sde_lib import as_process, family
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.random import as_stream
from qcsbm_fast.score import Score
from qcsbm_fast.sde import VE, VP

LossFn = Callable[[Any, Tensor], Any]


def get_optimizer(config: Any, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Adam with `config.optim.lr`, `beta1`, `eps` and `weight_decay`; beta2 is 0.999.

    Raises:
        NotImplementedError: for another `config.optim.optimizer`.
    """
    c = config.optim
    if c.optimizer != "Adam":
        raise NotImplementedError(f"config.optim.optimizer: expected 'Adam', got {c.optimizer!r}")
    return torch.optim.Adam(params, lr=c.lr, betas=(c.beta1, 0.999), eps=c.eps, weight_decay=c.weight_decay)


def optimization_manager(config: Any) -> Callable[..., None]:
    """A function that takes one optimiser step, with a linear warm-up and the gradient's norm clipped.

    `optimize_fn(optimizer, params, step, lr, warmup, grad_clip)`: the last three default to `config.optim`'s. No
    warm-up with `warmup <= 0`, no clipping with `grad_clip < 0`. A step whose gradient is not finite is refused with a
    RuntimeError before it touches the weights.
    """
    c = config.optim

    def optimize_fn(
        optimizer: torch.optim.Optimizer,
        params: Iterable[Tensor],
        step: int,
        lr: float = c.lr,
        warmup: int = c.warmup,
        grad_clip: float = c.grad_clip,
    ) -> None:
        if warmup > 0:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / warmup, 1.0)
        bound = grad_clip if grad_clip >= 0 else torch.inf
        nn.utils.clip_grad_norm_(params, max_norm=bound, error_if_nonfinite=True)
        optimizer.step()

    return optimize_fn


def get_sde_loss_fn(
    sde: Any,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
    balancing_fac: float = 0.1,
    slices: int = 16,
    energy: bool = False,
    *,
    fraction: float = 1.0,
) -> LossFn:
    """`loss_fn(model, batch (B, *)) -> (loss, reg)`: denoising loss and penalty, two scalars without a graph.

    With `train`, the gradients of `loss + balancing_fac * reg` are added to the parameters' `grad` before it returns:
    call no `backward`. Without, none are taken. Times are uniform on [eps, 1].

        loss = mean of 1/2 ||std s(x_t, t) + z||^2,   reg = mean of std^2 1/2 ||J - J^T||_F^2.

    Noise and probes come from torch's default generator: `torch.manual_seed` governs them.

    Args:
        sde: a script's own SDE object, one of `compat.sde_lib`, or one of `qcsbm_fast.sde`.
        train: whether gradients are taken, and the model's mode.
        reduce_mean: changes nothing: as in the authors' function, the loss is half the sum over dimensions.
        continuous: whether the model takes continuous times.
        likelihood_weighting: weighs the loss by `g^2 / std^2`.
        eps: smallest time.
        balancing_fac: weight of the penalty; 0 leaves it out.
        slices: probes per sample.
        energy: the model is the field of an energy (see `get_score_fn`), which has no penalty.
        fraction: share of the batch that the penalty sees, drawn mostly at low noise and weighted so that the expected
            gradient stays the same.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """

    def loss_fn(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        score = get_score_fn(sde, model, train, continuous, energy, dims=batch.dim())
        objective = DenoisingObjective(
            cast(Score, score),  # a ModelScore has the same call, process and kind
            stream=as_stream(None, batch.device),
            balancing_factor=0.0 if score.kind == "conservative" else balancing_fac,
            probes=slices,
            fraction=fraction,
            time_density="inverse-sigma",
            likelihood_weighting=likelihood_weighting,
            t_min=eps,
        )
        with torch.set_grad_enabled(train):
            result = objective(batch)
        if train:
            result.loss.backward()
        stats = result.stats
        return stats["dsm"], stats.get("penalty", torch.zeros_like(stats["dsm"]))

    return loss_fn


def get_smld_loss_fn(vesde: Any, train: bool, reduce_mean: bool = False) -> LossFn:
    """`loss_fn(model, batch) -> loss`, with its graph: discrete noise levels, numbered from the largest down.

    Per sample half the sum (`reduce_mean`: the mean) of `(sigma s + z)^2`, `s` the model's output (Song & Ermon 2019).

    Raises:
        ValueError: for another SDE than a variance-exploding one.
    """
    if not (isinstance(as_process(vesde), VE) or family(vesde) == "ve"):
        raise ValueError(f"vesde: expected a variance-exploding SDE, got {type(vesde).__name__}")

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        labels = torch.randint(0, vesde.N, (batch.shape[0],), device=batch.device)
        sigma = torch.flip(vesde.discrete_sigmas, (0,)).to(batch.device)[labels]
        x, z = ops.perturb(batch, 1.0, sigma, as_stream(None, batch.device).draw())
        return _residual(get_model_fn(model, train)(x, labels), sigma, z, reduce_mean)

    return loss_fn


def get_ddpm_loss_fn(vpsde: Any, train: bool, reduce_mean: bool = True) -> LossFn:
    """`loss_fn(model, batch) -> loss`, with its graph: the model predicts the noise of each step (Ho et al. 2020).

    Per sample the mean (without `reduce_mean` half the sum) of `(output - z)^2`.

    Raises:
        ValueError: for another SDE than a variance-preserving one.
    """
    if not (isinstance(as_process(vpsde), VP) or family(vpsde) == "vp"):
        raise ValueError(f"vpsde: expected a variance-preserving SDE, got {type(vpsde).__name__}")

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        labels = torch.randint(0, vpsde.N, (batch.shape[0],), device=batch.device)
        mean = vpsde.sqrt_alphas_cumprod.to(batch.device)[labels]
        std = vpsde.sqrt_1m_alphas_cumprod.to(batch.device)[labels]
        x, z = ops.perturb(batch, mean, std, as_stream(None, batch.device).draw())
        output = get_model_fn(model, train)(x, labels)
        return _residual(-output, torch.ones_like(std), z, reduce_mean)

    return loss_fn


def _residual(score: Tensor, std: Tensor, z: Tensor, reduce_mean: bool) -> Tensor:
    coefficient = 1 / z[0].numel() if reduce_mean else 0.5
    weight = torch.full_like(std, coefficient / z.shape[0])
    return ops.denoising_residual(score, std, weight, z=z).sum()


def get_step_fn(
    sde: Any,
    train: bool,
    optimize_fn: Callable[..., None] | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    balancing_fac: float = 0.1,
    slices: int = 5,
    energy: bool = False,
    *,
    fraction: float = 1.0,
) -> Callable[[dict[str, Any], Tensor], tuple[Tensor, Tensor]]:
    """`step_fn(state, batch) -> (loss, reg)`, `state` having "model", "optimizer", "ema" and "step".

    With `train`, one optimiser step by `optimize_fn`, then of the averages, and `state["step"]` moves on. Without, the
    loss of the averaged weights: the state is left as it was.

    Other arguments as `get_sde_loss_fn`; with `continuous=False` the loss is `get_smld_loss_fn`'s or
    `get_ddpm_loss_fn`'s, and there is no penalty.

    Raises:
        ValueError: for likelihood weighting, or a sub-VP SDE, with discrete times; a training step without
            `optimize_fn`.
    """
    if train and optimize_fn is None:
        raise ValueError("optimize_fn: expected a function for training, got None; see optimization_manager")
    if continuous:
        loss_fn = get_sde_loss_fn(
            sde, train, reduce_mean, True, likelihood_weighting, balancing_fac=balancing_fac, slices=slices,
            energy=energy, fraction=fraction,
        )  # fmt: skip
    else:
        loss_fn = _discrete_loss_fn(sde, train, reduce_mean, likelihood_weighting)

    def step_fn(state: dict[str, Any], batch: Tensor) -> tuple[Tensor, Tensor]:
        model, ema = state["model"], state["ema"]
        if not train:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            try:
                return loss_fn(model, batch)
            finally:
                ema.restore(model.parameters())
        state["optimizer"].zero_grad()
        loss, reg = loss_fn(model, batch)
        assert optimize_fn is not None
        optimize_fn(state["optimizer"], model.parameters(), step=state["step"])
        state["step"] += 1
        ema.update(model.parameters())
        return loss, reg

    return step_fn


def _discrete_loss_fn(sde: Any, train: bool, reduce_mean: bool, likelihood_weighting: bool) -> LossFn:
    if likelihood_weighting:
        raise ValueError("likelihood_weighting: expected False with discrete times (continuous=False)")
    kind = family(sde)
    if kind not in ("ve", "vp"):
        raise ValueError(f"sde: expected VESDE or VPSDE with discrete times, got {type(sde).__name__}")
    loss_fn = (get_smld_loss_fn if kind == "ve" else get_ddpm_loss_fn)(sde, train, reduce_mean)

    def with_gradients(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(train):
            loss = loss_fn(model, batch)
        if train:
            loss.backward()
        return loss.detach(), torch.zeros_like(loss)

    return with_gradients
