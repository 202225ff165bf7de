"""`qcsbm convert`: a run of ours, the authors' file, and back, with nothing lost on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from qcsbm_fast import cli
from qcsbm_fast.compat.models.ema import ExponentialMovingAverage
from qcsbm_fast.compat.utils import restore_checkpoint
from qcsbm_fast.train import build, checkpoint, config_file
from qcsbm_fast.train.config import Config, Model, Optim, to_mapping
from qcsbm_fast.train.folder import RunFolder, create
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.run import make_trainer


def tiny() -> Config:
    base = PRESETS["digits"]
    model = Model(
        network="ncsnpp", nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0
    )
    optim = Optim(steps=4, batch_size=4, lr=1e-3)
    return dataclasses.replace(base, model=model, optim=optim, precision="float32", device="cpu")


def trained(path: Path) -> RunFolder:
    config = tiny()
    folder = create(config, path)
    trainer = make_trainer(config, build.build(config))
    for _ in range(2):
        trainer.step()
    state = {"config": to_mapping(config), "seconds": 1.0, "trainer": trainer.state_dict()}
    checkpoint.save(folder.checkpoints, 2, state, 1)
    return folder


def newest(folder: RunFolder) -> dict:
    return checkpoint.load(checkpoint.find(folder.checkpoints))["trainer"]


def test_a_run_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path / "ours")
    theirs = tmp_path / "checkpoint_1.pth"
    assert cli.main(["convert", str(folder.path), "--out", str(theirs)]) == 0
    saved = torch.load(theirs, weights_only=True)
    names = list(saved["model"])
    assert names[:3] == ["module.sigmas", "module.all_modules.0.W", "module.all_modules.1.weight"]
    assert len(saved["ema"]["shadow_params"]) == len(names) - 2
    moments = saved["optimizer"]["state"]
    assert sorted(moments) == list(range(1, len(names) - 1))  # none for the frozen frequencies, number 0
    for number, entry in moments.items():
        assert entry["exp_avg"].shape == saved["model"][names[number + 1]].shape

    settings = str(folder.path / "config.yaml")
    assert cli.main(["convert", str(theirs), "--config", settings, "--out", str(tmp_path / "back")]) == 0
    assert f"qcsbm sample {tmp_path / 'back'}" in capsys.readouterr().out
    before, after = newest(folder), newest(RunFolder(tmp_path / "back"))
    for part in ("score", "ema"):
        a, b = (torch.cat(tensors(state[part])) for state in (before, after))
        assert torch.equal(a, b), part
    a, b = (torch.cat(tensors(state["optimizer"]["state"])) for state in (before, after))
    assert torch.equal(a, b)
    assert (after["steps_done"], after["images"], after["ema"]["updates"]) == (2, 8, 2)

    # and it can be trained on: the next step is finite and moves the weights
    config = config_file.read(folder.path / "config.yaml")
    trainer = make_trainer(config, build.build(config))
    trainer.load_state_dict(after)
    trainer.step()
    assert trainer.steps_done == 3


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.float().flatten()]
    items = (
        [value[key] for key in sorted(value, key=str)]
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return [tensor for item in items for tensor in tensors(item)]


def test_their_own_code_restores_the_file(tmp_path: Path) -> None:
    """Parameters in the authors' order, one frozen among them, as their model and optimiser hold them."""
    theirs = tmp_path / "checkpoint_1.pth"
    assert cli.main(["convert", str(trained(tmp_path / "ours").path), "--out", str(theirs)]) == 0
    saved = torch.load(theirs, weights_only=True)["model"]

    model = nn.Module()
    model.module = nn.Module()
    for name, value in saved.items():
        if name == "module.sigmas":
            model.module.register_buffer("sigmas", torch.zeros_like(value))
            continue
        *path, last = name.removeprefix("module.").split(".")
        owner = model.module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(
            last, nn.Parameter(torch.zeros_like(value), requires_grad=name != "module.all_modules.0.W")
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    ema = ExponentialMovingAverage(model.parameters(), 0.5)
    restore_checkpoint(theirs, {"model": model, "optimizer": optimizer, "ema": ema, "step": 0}, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    for p in model.parameters():
        state = optimizer.state[p]
        assert not p.requires_grad or (state["step"] == 2 and state["exp_avg"].shape == p.shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: there is no such file or run folder"),
        (["file.pth", "--preset", "cats"], "--preset: expected one of"),
        (["file.pth", "--preset", "checkerboard"], "model.network: expected ncsnpp, got toy-mlp"),
        (["file.pth", "--preset", "digits"], "does not fit the configuration"),
        (["junk.pth", "--preset", "digits"], "junk.pth: "),
    ],
)
def test_what_cannot_be_converted_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"model": {"a": torch.ones(1)}, "ema": {"shadow_params": []}, "optimizer": {"state": {}}}, "file.pth"
    )
    Path("junk.pth").write_bytes(b"junk" * 100)
    assert cli.main(["convert", *arguments]) in (1, 2)
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
