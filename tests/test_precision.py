"""The scale of the loss: its rule, and what training does with it. float16 itself is for GPUs (`test_gpu`)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qcsbm_fast import NoiseStream
from qcsbm_fast.train.build import build
from qcsbm_fast.train.config import Optim
from qcsbm_fast.train.errors import ConfigError, NonFiniteError
from qcsbm_fast.train.precision import LossScale, policy
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.trainer import Trainer
from test_cuda_graph import QUARTER, make_trainer, run
from test_trainer import LeastSquares, Result, weights


def test_policies() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for device in (cpu, gpu):
        assert policy("float32", device).autocast is None
        assert policy("bfloat16", device).autocast is torch.bfloat16
        assert not policy("bfloat16", device).scaled
    assert (policy("float16", gpu).autocast, policy("float16", gpu).scaled) == (torch.float16, True)
    with pytest.raises(ConfigError, match="precision: float16 needs a GPU; use bfloat16"):
        build(PRESETS["digits"].__class__(preset="digits", device="cpu", precision="float16"))


def test_scale_follows_grad_scalers_rule() -> None:
    """The same sequence of scales as `torch.amp.GradScaler` over random overflows, growth and backoff included."""
    interval = 3
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=interval)
    ours = LossScale(torch.device("cpu"), start=2.0**10)
    ours.INTERVAL = interval
    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.0)
    theirs.scale(torch.zeros(()))
    place = ours.value.data_ptr()
    for overflow in torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.2:
        p.grad = torch.full((2,), torch.inf if overflow else 1.0)
        theirs.unscale_(optimizer)
        theirs.update()
        ours.update(overflow.float())
        assert ours.value.item() == theirs.get_scale()
    assert ours.value.item() != 2.0**10
    assert ours.value.data_ptr() == place
    for _ in range(40):  # unlike theirs, it stops at 1
        ours.update(torch.ones(()))
    assert ours.value.item() == 1.0
    assert not ours.may_be_too_large()
    restored = LossScale(torch.device("cpu"))
    restored.load_state_dict(ours.state_dict())
    assert restored.value.item() == 1.0


def test_a_power_of_two_changes_no_step() -> None:
    """Scaling by a power of two and back is exact: the very weights, norms and losses of the unscaled training."""
    scaled, plain = (
        make_trainer(objective=QUARTER, graph=False, trainer={"scaled": flag}) for flag in (True, False)
    )
    for trainer in (scaled, plain):
        run(trainer, 8)
    for a, b in zip(weights(scaled.objective), weights(plain.objective), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    ours, theirs = scaled.read_statistics(), plain.read_statistics()
    assert ours.pop("loss_scale") == 2.0**16
    assert ours == pytest.approx(theirs, rel=1e-6)


class Overflows(LeastSquares):
    """Its gradient is not finite where the loss it is multiplied to reaches `limit`, as float16's would be."""

    def __init__(self, limit: float, spoil: dict[int, str] | None = None) -> None:
        super().__init__(spoil)
        self.limit = limit

    def forward(self, x0: Tensor) -> Result:
        result = super().forward(x0)

        def overflow(gradient: Tensor) -> Tensor:
            return torch.where(gradient.abs() > self.limit, torch.inf, gradient)

        result.loss.register_hook(overflow)
        return result


def overflowing(limit: float, spoil: dict[int, str] | None = None, **settings: float) -> Trainer:
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    optim = Optim(**{"batch_size": 16, "lr": 0.05, **settings})  # pyright: ignore[reportArgumentType]
    objective = Overflows(limit, spoil)
    return Trainer(objective, data, optim, stream=NoiseStream(0), seed=0, scaled=True)  # pyright: ignore


def test_an_overflow_halves_the_scale_and_costs_the_step_only() -> None:
    trainer = overflowing(2.0**13)
    before = weights(trainer.objective)
    run(trainer, 3)  # 2^16, 2^15, 2^14: all too large
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.objective), strict=True))
    empty = trainer.read_statistics()
    assert (empty["loss_scale"], trainer.skipped) == (2.0**13, 3)
    assert torch.tensor(empty["loss"]).isnan()
    run(trainer, 4)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer.objective), strict=True))
    assert trainer.read_statistics()["loss"] > 0
    assert trainer.skipped == 3
    resumed = overflowing(2.0**13)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert resumed.read_statistics()["loss_scale"] == 2.0**13
    for each in (trainer, resumed):
        run(each, 2)
    for a, b in zip(weights(trainer.objective), weights(resumed.objective), strict=True):
        assert torch.equal(a, b)


def test_what_the_scale_does_not_explain_is_an_error() -> None:
    """A loss that is not finite itself, at once; a gradient that is not, once the scale has come down to 1."""
    with pytest.raises(NonFiniteError, match="step 2: the loss is inf"):
        run(overflowing(2.0**20, {2: "loss"}), 2)
    trainer = overflowing(0.5)
    run(trainer, 16)
    with pytest.raises(NonFiniteError, match="step 17"):
        trainer.step()
    skipping = overflowing(0.5, nonfinite="skip")  # pyright: ignore[reportArgumentType]
    run(skipping, 20)
    with pytest.raises(NonFiniteError, match="step 17"):
        skipping.read_statistics()
