"""From a model in the authors' conventions to a score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcsbm_fast.compat.sde_lib import Family, as_process, family
from qcsbm_fast.dual import V
from qcsbm_fast.nn import Autoencoder, ImageMLP, NCSNpp, ToyMLP
from qcsbm_fast.score import Kind, Score
from qcsbm_fast.sde import SDE

# Our networks return the field f(x, sigma), the score times sigma, where the authors' return the score.
_FIELDS = (Autoencoder, ImageMLP, NCSNpp, ToyMLP)


class ModelScore(nn.Module):
    """The score of a model that follows score_sde's conventions for its second argument and its output.

    Variance exploding: the model is given the noise level (with `continuous=False`, the number of the level, 0 the
    largest) and returns the score. Variance preserving and sub-VP: it is given 999 t (the step's number) and returns
    `-std` times the score.
    """

    kind: Kind = "quasi-conservative"

    def __init__(self, model: Any, kind: Family, sde: SDE, steps: int, continuous: bool) -> None:
        super().__init__()
        self.model = model
        self.sde = sde
        self._family: Family = kind
        self._steps = steps
        self._continuous = continuous

    def forward(self, x: V, t: Tensor) -> V:
        if self._family == "ve":
            return self.model(x, self.sde.marginal(t)[1] if self._continuous else self._level(t))
        steps_known = not self._continuous and self._family == "vp"
        output = self.model(x, t * (self._steps - 1 if steps_known else 999))
        std = self._chain_std(t) if steps_known else self.sde.marginal(t)[1]
        return -output / std.reshape(-1, *(1,) * (len(x.shape) - 1)).to(output.dtype)

    def _level(self, t: Tensor) -> Tensor:
        return torch.round((1 - t) * (self._steps - 1)).long()

    def _chain_std(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise after step floor(t (N - 1)) of the variance-preserving chain."""
        steps = torch.arange(self._steps, device=t.device, dtype=torch.float64) / (self._steps - 1)
        f, _ = self.sde.discretize(steps, self._steps)
        std = (-torch.expm1(2 * torch.log1p(f).cumsum(0))).sqrt()
        return std[(t * (self._steps - 1)).long()].to(t.dtype)


def get_model_fn(model: Any, train: bool = False) -> Callable[..., Any]:
    """`model` as a function that puts it into training or evaluation mode before each call."""

    def model_fn(x: Any, labels: Tensor) -> Any:
        if isinstance(model, nn.Module) and model.training != train:
            model.train(train)
        return model(x, labels)

    return model_fn


def get_score_fn(
    sde: Any,
    model: Any,
    train: bool = False,
    continuous: bool = False,
    energy: bool = False,
    create_graph: bool = True,
    inference: bool = False,
    *,
    dims: int = 4,
) -> Score | ModelScore:
    """The score `(x (B, *), t (B,)) -> (B, *)` of `model`, which it puts into training or evaluation mode.

    Args:
        sde: a script's own SDE object, one of `sde_lib`, or one of `qcsbm_fast.sde`.
        model: a `qcsbm_fast.Score`, which is its own answer; one of our networks, which return `sigma` times the score;
            or any module in the conventions of `ModelScore`.
        train: whether the model is in training mode when it is called.
        continuous: whether the model was trained at continuous times.
        energy: the score is `-grad ||model(x, sigma)||^2 / (2 sigma)`, for variance exploding.
        create_graph, inference: take the authors' values and change nothing: no second graph is ever built.
        dims: dimensions of a batch, 4 for images.

    Raises:
        TypeError: for an SDE object without the methods of one.
        ValueError: for an energy where there is none, or an SDE class that no convention is known for.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) <= 1:
        model = model.module  # one device: nothing is spread, and duals pass
    if isinstance(model, Score):
        if energy != (model.kind == "conservative"):
            raise ValueError(f"energy: expected {not energy} for a {model.kind} Score, got {energy}")
        model.train(train)
        return model
    process = as_process(sde, dims)
    known = "ve" if isinstance(model, _FIELDS) else family(sde) or _known(process)
    if known is None:
        raise ValueError(
            f"sde: expected a class named VESDE, VPSDE or subVPSDE, or one derived from it, got "
            f"{type(sde).__name__}; give a qcsbm_fast.Score as the model instead"
        )
    if energy and known != "ve":
        raise ValueError("energy: expected a variance-exploding SDE; give a qcsbm_fast.Score as the model")
    if isinstance(model, nn.Module):
        model.train(train)
    if energy or isinstance(model, _FIELDS):
        return Score(model, process, "conservative" if energy else "quasi-conservative")
    return ModelScore(model, cast(Family, known), process, getattr(sde, "N", 1000), continuous)


def _known(process: SDE) -> Family | None:
    names: dict[str, Family] = {"VE": "ve", "VP": "vp", "SubVP": "sub-vp"}
    return names.get(type(process).__name__)
