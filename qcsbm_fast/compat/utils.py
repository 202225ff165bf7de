"""Checkpoint files in the authors' form, and the asymmetry of a model at a noise level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast import ops
from qcsbm_fast.compat.models.utils import get_score_fn
from qcsbm_fast.nn.reference_weights import read_reference_checkpoint
from qcsbm_fast.penalty import asymmetry
from qcsbm_fast.random import as_stream
from qcsbm_fast.train.checkpoint import write_whole


def get_sym_function(
    sde: Any, continuous: bool, energy: bool, slices: int = 1, eps: float = 1e-5
) -> Callable[[Any, Tensor, float], tuple[Tensor, Tensor]]:
    """`evaluate_sym(model, batch (B, *), noise_level) -> (asym (B,), nasym (B,))` at `eps + (1 - eps) noise_level`.

    Asym is `1/2 ||J - J^T||_F^2` by `slices` probes, never negative; NAsym its share of the Jacobian's norm, in [0, 1].
    Arguments as `compat.losses.get_sde_loss_fn`.
    """

    def evaluate_sym(score_model: Any, batch: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        score = get_score_fn(sde, score_model, False, continuous, energy, dims=batch.dim())
        t = batch.new_full((batch.shape[0],), eps + noise_level * (1 - eps))
        stream = as_stream(None, batch.device)
        mean, std = score.sde.marginal(t)
        x, _ = ops.perturb(batch, mean, std, stream.draw(), store_noise=False)
        with torch.no_grad():
            result = asymmetry(lambda y: score(y, t), x, probes=slices, generator=stream)
        return result.penalty, result.nasym

    return evaluate_sym


def save_checkpoint(ckpt_dir: str | Path, state: dict[str, Any]) -> None:
    """Writes the state dicts of "optimizer", "model" and "ema", and "step", to the file `ckpt_dir`, or leaves it alone.

    Numbers of numpy become plain ones, so that the file is read back without running code from it.
    """
    saved = {name: _plain(state[name].state_dict()) for name in ("optimizer", "model", "ema")}
    if "step" in state:
        saved["step"] = _plain(state["step"])
    write_whole(Path(ckpt_dir), lambda file: torch.save(saved, file))


def restore_checkpoint(ckpt_dir: str | Path, state: dict[str, Any], device: Any) -> dict[str, Any]:
    """Loads what `save_checkpoint`, ours or the authors', wrote into the objects of `state`, and returns it.

    Nothing but tensors, numbers and containers is read: no code in the file is run.

    Raises:
        ValueError, RuntimeError: for a file that is no such checkpoint, or the checkpoint of another model.
    """
    loaded = read_reference_checkpoint(ckpt_dir, device)
    state["model"].load_state_dict(loaded["model"])
    state["optimizer"].load_state_dict(loaded["optimizer"])
    state["ema"].load_state_dict(loaded["ema"])
    if "step" in loaded:
        state["step"] = int(loaded["step"])
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
