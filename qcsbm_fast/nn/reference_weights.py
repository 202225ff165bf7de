"""The authors' NCSN++ weights into ours and back: the same numbers, named `all_modules.<number>.<layer>`."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Attention
from .embedding import FourierFeatures
from .image_layers import Conv, ConvResample, GroupNormSiLU
from .ncsnpp import NCSNpp, ToImage
from .res_block import ResBlock


def _layers(module: nn.Module, net: NCSNpp) -> Iterator[tuple[str, Any]]:
    """The layers of one of the authors' modules, and their names in it ("" for the module itself)."""
    if isinstance(module, ResBlock):
        yield "GroupNorm_0", module.norm_in
        yield "Conv_0", module.conv_in
        if module.embed is not None:
            yield "Dense_0", module.embed
        yield "GroupNorm_1", module.norm_out
        yield "Conv_1", module.conv_out
        if module.shortcut is not None:
            yield ("Conv_2" if net.config.resblock_type == "biggan" else "NIN_0"), module.shortcut
    elif isinstance(module, Attention):
        yield "GroupNorm_0", module.norm
        for index, layer in enumerate((module.query, module.key, module.value, module.out)):
            yield f"NIN_{index}", layer
    elif isinstance(module, ConvResample):
        yield ("Conv2d_0" if module.filtered else "Conv_0"), module.conv
    elif isinstance(module, Conv) and module.weight.shape[-1] == 1:  # the merge of "input_skip"
        yield "Conv_0", module
    else:
        yield "", module


def _modules(net: NCSNpp) -> Iterator[nn.Module | None]:
    """Our modules in the order of the authors' list; None for one of theirs that has no parameters."""
    c = net.config
    if c.embedding_type == "fourier":
        yield net.features
    if net.embed is not None:
        yield net.embed.hidden
        yield net.embed.out
    yield net.input
    pooling = c.resblock_type == "ddpm" and not c.resamp_with_conv
    for level in net.down:
        for index, block in enumerate(level.blocks):
            yield block
            if level.attention:
                yield level.attention[index]
        if level.resample is not None:
            yield None if pooling else level.resample
            if c.progressive_input == "input_skip":
                yield level.pyramid
            elif c.progressive_input == "residual":
                yield level.pyramid_resample
    yield from net.middle
    for level in net.up:
        yield from level.blocks
        yield from level.attention
        if isinstance(level.pyramid, ToImage):
            yield level.pyramid.norm
            yield level.pyramid.conv
        elif c.progressive == "residual":
            yield level.pyramid_resample
        if level.resample is not None:
            yield None if pooling else level.resample
    if net.output is not None:
        yield net.output.norm
        yield net.output.conv


def _names(net: NCSNpp) -> Iterator[tuple[str, Tensor, bool]]:
    """The authors' name of each of our tensors, and whether theirs is a transposed matrix."""
    for index, module in enumerate(_modules(net)):
        if module is None:
            continue
        for layer_name, layer in _layers(module, net):
            prefix = f"all_modules.{index}.{layer_name}".rstrip(".")
            if isinstance(layer, GroupNormSiLU):
                yield f"{prefix}.weight", layer.gamma, False
                yield f"{prefix}.bias", layer.beta, False
            elif isinstance(layer, FourierFeatures):
                yield f"{prefix}.W", layer.frequencies, False
            elif layer_name.startswith("NIN"):
                yield f"{prefix}.W", layer.weight, True
                yield f"{prefix}.b", layer.bias, False
            else:
                yield f"{prefix}.weight", layer.weight, False
                yield f"{prefix}.bias", layer.bias, False


def _noise_levels(net: NCSNpp) -> Tensor:
    """The authors' buffer `sigmas`: the noise levels from the largest to the smallest."""
    c = net.config
    logs = torch.linspace(
        torch.tensor(c.sigma_max, dtype=torch.float64).log().item(),
        torch.tensor(c.sigma_min, dtype=torch.float64).log().item(),
        c.num_scales,
        dtype=torch.float64,
    )
    return logs.exp().float()


def to_reference_state_dict(net: NCSNpp) -> dict[str, Tensor]:
    """Copies of the parameters under the authors' names, with their buffer `sigmas`."""
    state = {"sigmas": _noise_levels(net)}
    for name, tensor, transposed in _names(net):
        value = tensor.detach()
        state[name] = (value.flatten(1).T if transposed else value).clone(
            memory_format=torch.contiguous_format
        )
    return state


def from_reference_state_dict(net: NCSNpp, state: Mapping[str, Tensor]) -> NCSNpp:
    """Copies the authors' parameters, with or without the prefix `module.`, into `net` and returns it.

    Raises:
        ValueError: naming the parameters that are missing, unknown or of another shape, which a wrong
            `NCSNppConfig` causes, or if the noise levels are other ones.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    levels, expected = state.pop("sigmas", None), _noise_levels(net)
    if levels is not None and (
        levels.shape != expected.shape or not torch.allclose(levels.float().cpu(), expected, rtol=1e-5)
    ):
        raise ValueError(
            f"sigmas: expected {net.config.num_scales} levels from {net.config.sigma_max} to "
            f"{net.config.sigma_min}, "
            f"got {levels.numel()} from {levels[0].item():g} to {levels[-1].item():g}; "
            "set num_scales, sigma_max, sigma_min"
        )
    ours = {name: (tensor, transposed) for name, tensor, transposed in _names(net)}
    problems = [f"{name}: missing" for name in ours.keys() - state.keys()]
    problems += [f"{name}: not in this network" for name in state.keys() - ours.keys()]
    for name in ours.keys() & state.keys():
        tensor, transposed = ours[name]
        value = state[name].T if transposed else state[name]
        if value.numel() != tensor.numel() or value.shape != tensor.shape[: value.dim()]:
            problems.append(f"{name}: expected {tuple(tensor.shape)}, got {tuple(value.shape)}")
    if problems:
        raise ValueError(f"state dict does not fit the configuration: {'; '.join(sorted(problems)[:6])}")
    with torch.no_grad():
        for name, (tensor, transposed) in ours.items():
            value = state[name].T if transposed else state[name]
            tensor.copy_(value.reshape(tensor.shape))
    return net


def read_reference_checkpoint(path: str | Path, device: Any = "cpu") -> dict[str, Any]:
    """The dictionary in one of the authors' checkpoint files; no code in the file is run.

    Their learning rates are numbers of numpy, which are let through beside tensors and containers.

    Raises:
        ValueError: if the file holds anything else, or no state dict called "model".
    """
    scalar = np.float64(0).__reduce__()[0]
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed: list[Any] = [
        *numbers,
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.int64)),
        codecs.encode,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("Check the documentation")[0].strip()
        raise ValueError(
            f"{path}: refused, it holds more than tensors and numbers: {reason[-200:]}"
        ) from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"{path}: expected a dictionary with the key 'model'")
    return checkpoint


def load_reference_checkpoint(net: NCSNpp, path: str | Path, *, ema: bool = True) -> NCSNpp:
    """Reads one of the authors' checkpoint files into `net` and returns it; no code in the file is run.

    The file is a dictionary with `model`, the state dict; `ema`, whose `shadow_params` are the averages of
    the parameters that require a gradient, in the model's order; `optimizer` and `step`, which are not read.

    Args:
        net: a network of the checkpoint's configuration.
        path: of the file.
        ema: the averaged parameters in place of the raw ones.

    Raises:
        ValueError: if the file is not such a dictionary, or does not fit the network.
    """
    checkpoint = read_reference_checkpoint(path)
    state = dict(checkpoint["model"])
    if ema:
        shadow = (checkpoint.get("ema") or {}).get("shadow_params")
        frozen = {"sigmas"}
        if net.config.embedding_type == "fourier":
            frozen.add("all_modules.0.W")
        averaged = [name for name in state if name.removeprefix("module.") not in frozen]
        if shadow is None or len(shadow) != len(averaged):
            raise ValueError(
                f"{path}: expected ema.shadow_params with {len(averaged)} tensors, "
                f"got {'none' if shadow is None else len(shadow)}; pass ema=False for the raw parameters"
            )
        state.update(zip(averaged, shadow, strict=True))
    return from_reference_state_dict(net, state)
