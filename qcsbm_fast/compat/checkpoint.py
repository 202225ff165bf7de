"""Checkpoints of NCSN++ runs in the authors' form and back: weights, averages, and Adam's moments."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.nn import NCSNpp, from_reference_state_dict, to_reference_state_dict
from qcsbm_fast.nn.reference_weights import read_reference_checkpoint
from qcsbm_fast.train import build, checkpoint
from qcsbm_fast.train.config import Config, to_mapping
from qcsbm_fast.train.errors import CheckpointError, ConfigError
from qcsbm_fast.train.folder import RunFolder
from qcsbm_fast.train.run import make_trainer
from qcsbm_fast.train.trainer import Trainer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def export_run(folder: RunFolder, out: Path, step: int | None = None) -> int:
    """Writes the checkpoint of `step` (None: the newest) of a run as the authors' file `out`; returns its step.

    Raises:
        ConfigError: for a network other than NCSN++, or missing data.
        CheckpointError: for a checkpoint that cannot be read.
    """
    trainer, net = _trainer(folder.read_config())
    trainer.load_state_dict(checkpoint.load(checkpoint.find(folder.checkpoints, step))["trainer"])
    averages = to_reference_state_dict(trainer.ema.module.network)  # pyright: ignore[reportArgumentType]
    names = _parameters(averages)
    moments = {key: to_reference_state_dict(_with_moments(net, trainer, key)) for key in _MOMENTS}
    trained = [name for name in names if name not in _frozen(net)]
    adam = {
        index: {"step": torch.tensor(float(trainer.steps_done)), **{k: moments[k][name] for k in _MOMENTS}}
        for index, name in enumerate(names)
        if trainer.steps_done and name in trained
    }
    group = {
        "lr": trainer.learning_rate(max(1, trainer.steps_done)),
        "betas": (trainer.optim.beta1, trainer.optim.beta2),
        "eps": trainer.optim.eps,
        "weight_decay": 0,
        "amsgrad": False,
        "params": list(range(len(names))),
    }
    saved = {
        "model": {f"module.{name}": value for name, value in to_reference_state_dict(net).items()},
        "ema": {
            "decay": trainer.ema.decay,
            "num_updates": trainer.ema.updates,
            "shadow_params": [averages[name] for name in trained],
        },
        "optimizer": {"state": adam, "param_groups": [group]},
        "step": trainer.steps_done,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(out, lambda file: torch.save(saved, file))
    return trainer.steps_done


def import_run(path: Path, config: Config, folder: RunFolder) -> int:
    """Writes the authors' file `path` as a checkpoint of the run in `folder`, with the settings `config`; its step.

    The data order and the noise begin anew.

    Raises:
        ConfigError: for a network other than NCSN++, or settings that the weights do not fit.
        CheckpointError: for a file that holds more than tensors, numbers and containers.
    """
    trainer, net = _trainer(config)
    try:
        saved = read_reference_checkpoint(path)
        model = {name.removeprefix("module."): value for name, value in saved["model"].items()}
        names = _parameters(model)
        trained = [name for name in names if name not in _frozen(net)]
        from_reference_state_dict(net, model)
        shadow = dict(zip(trained, saved["ema"]["shadow_params"], strict=True))
        from_reference_state_dict(trainer.ema.module.network, {**model, **shadow})  # pyright: ignore
        trainer.ema.updates = int(saved["ema"]["num_updates"] or 0)
        _load_moments(trainer, net, model, names, saved["optimizer"]["state"])
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of score_sde_pytorch: {error!r}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    steps = [entry["step"] for entry in saved["optimizer"]["state"].values()]
    trainer.steps_done = int(saved.get("step", max(map(float, steps), default=0)))
    trainer.images = trainer.steps_done * config.optim.batch_size
    state = {"config": to_mapping(config), "seconds": 0.0, "trainer": trainer.state_dict()}
    checkpoint.save(folder.checkpoints, trainer.steps_done, state, config.checkpoint.keep)
    return trainer.steps_done


def _trainer(config: Config) -> tuple[Trainer, NCSNpp]:
    trainer = make_trainer(config, build.build(config))
    net = trainer.objective.score.network
    if not isinstance(net, NCSNpp):
        raise ConfigError(f"model.network: expected ncsnpp, got {config.model.network}")
    return trainer, net


def _parameters(state: Mapping[str, Tensor]) -> list[str]:
    """The authors' parameters in their order: all entries but the buffer of noise levels."""
    return [name for name in state if name != "sigmas"]


def _frozen(net: NCSNpp) -> set[str]:
    return {"all_modules.0.W"} if net.config.embedding_type == "fourier" else set()


def _with_moments(net: NCSNpp, trainer: Trainer, key: str) -> NCSNpp:
    """A copy of `net` with Adam's moments in the place of its parameters."""
    moments, ours = copy.deepcopy(net), trainer.optimizer.state
    with torch.no_grad():
        for source, target in zip(net.parameters(), moments.parameters(), strict=True):
            target.copy_(ours[source][key]) if key in ours.get(source, {}) else target.zero_()
    return moments


def _load_moments(
    trainer: Trainer, net: NCSNpp, model: Mapping[str, Tensor], names: list[str], theirs: Mapping[int, Any]
) -> None:
    if not theirs:
        return
    by_name = {names[int(index)]: entry for index, entry in theirs.items()}
    for key in _MOMENTS:
        named = {name: entry[key] for name, entry in by_name.items() if key in entry}
        moments = from_reference_state_dict(copy.deepcopy(net), {**model, **named})
        for ours, value in zip(net.parameters(), moments.parameters(), strict=True):
            trainer.optimizer.state[ours][key] = value.detach().clone()
    step = max(float(entry["step"]) for entry in by_name.values())
    for ours in net.parameters():
        trainer.optimizer.state[ours]["step"] = torch.tensor(step)
