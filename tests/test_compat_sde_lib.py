"""The authors' processes: golden values, and processes read off a script's own objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcsbm_fast import sde
from qcsbm_fast.compat import sde_lib
from qcsbm_fast.compat.models.utils import get_score_fn
from script_objects import VESDE, Renamed, column

GOLDEN = np.load(Path(__file__).parent / "data" / "sde.npz")


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
