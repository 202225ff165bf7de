"""NCSN++, the noise-conditional image network of Song et al. 2021 (appendix H), for tensors and duals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import dual
from ..dual import Dual, V
from .attention import Attention
from .embedding import FourierFeatures, NoiseEmbedding, PositionalFeatures
from .image_layers import Conv, ConvResample, Join, Resample, Sum, ToImage, channels_last
from .program import NetworkProgram
from .res_block import ResBlock, noise_biases

# Settings of the authors' configurations that the network has in one form only.
_FIXED = {
    "name": "ncsnpp",
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "attention_type": "ddpm",
    "conv_size": 3,
}


@dataclass(frozen=True)
class NCSNppConfig:
    """Settings of `NCSNpp`, under the names of the authors' configurations; the defaults are those of the
    paper's CIFAR-10.

    Attributes:
        image_size, num_channels: of the square images; the size must halve `len(ch_mult) - 1` times.
        centered: whether the images lie in [-1, 1]; otherwise they lie in [0, 1] and the network maps them
            there.
        nf: channels at the first level; level i has `nf * ch_mult[i]`.
        ch_mult: one multiplier per resolution.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attn_resolutions: image sizes at which attention follows the blocks.
        resblock_type: "biggan" blocks resample themselves, between "ddpm" blocks stand resampling layers.
        resamp_with_conv: whether these layers have a convolution.
        fir, fir_kernel: resampling by this filter in place of repetition and means.
        skip_rescale: residual sums are divided by sqrt 2.
        progressive: "output_skip" sums images from all levels, "residual" adds upsampled features.
        progressive_input: "input_skip" feeds the downsampled image to all levels, "residual" learnt ones.
        progressive_combine: how "input_skip" joins them: "sum" or "cat".
        embedding_type: "fourier" features of log sigma (`fourier_scale`), or "positional" ones of the
            nearest of `num_scales` steps from sigma_max down to sigma_min.
        conditional: whether the blocks see the noise level.
        scale_by_sigma: whether the authors divide the network's output by sigma, see `NCSNpp`.
        dropout: probability.
        init_scale: of the layers that start near zero.
    """

    image_size: int = 32
    num_channels: int = 3
    centered: bool = False
    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 8
    attn_resolutions: tuple[int, ...] = (16,)
    resblock_type: Literal["biggan", "ddpm"] = "biggan"
    resamp_with_conv: bool = True
    fir: bool = True
    fir_kernel: tuple[float, ...] = (1, 3, 3, 1)
    skip_rescale: bool = True
    progressive: Literal["none", "output_skip", "residual"] = "none"
    progressive_input: Literal["none", "input_skip", "residual"] = "residual"
    progressive_combine: Literal["sum", "cat"] = "sum"
    embedding_type: Literal["fourier", "positional"] = "fourier"
    fourier_scale: float = 16.0
    conditional: bool = True
    scale_by_sigma: bool = True
    dropout: float = 0.1
    init_scale: float = 0.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_scales: int = 1000

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif choices and all(isinstance(c, str) for c in choices) and value not in choices:
                raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
        if not self.ch_mult or self.num_res_blocks < 1:
            raise ValueError("ch_mult, num_res_blocks: expected at least one level of at least one block")
        if self.image_size % 2 ** (len(self.ch_mult) - 1):
            raise ValueError(
                f"image_size: expected a multiple of {2 ** (len(self.ch_mult) - 1)} for the "
                f"{len(self.ch_mult)} levels of ch_mult, got {self.image_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NCSNppConfig:
        """From the authors' `config.model` and `config.data`, merged; settings of other things than the
        network are ignored.

        Raises:
            ValueError: for a setting that the network does not have.
        """
        for name, value in _FIXED.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name}: expected {value!r}, got {settings[name]!r}")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(2) if self.skip_rescale else 1.0

    @property
    def taps(self) -> tuple[float, ...] | None:
        return self.fir_kernel if self.fir else None

    @property
    def sizes(self) -> list[int]:
        """Image size at each level."""
        return [self.image_size // 2**level for level in range(len(self.ch_mult))]


class Level(nn.Module):
    """The layers of one resolution on the way down or up; a part that the level does not have is None or
    empty.

    Attributes:
        blocks: residual blocks.
        attention: on the way down one after each block, on the way up one after all of them.
        resample: to the next level.
        pyramid_resample, pyramid: the progressive input or output.
    """

    resample: Any
    pyramid_resample: Any
    pyramid: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleList()
        self.resample = self.pyramid_resample = self.pyramid = None


class NCSNpp(nn.Module):
    """The field `f(x, sigma)`, `(B, C, H, W), (B,) -> (B, C, H, W)`, for tensors and duals; the score is `f /
    sigma`.

    `f / sigma` is the output of the authors' network, whatever `scale_by_sigma`: with it their network
    divides its last convolution `h` by sigma and `f = h`; without it their network returns `h`, and `f =
    sigma h`.
    """

    down: Any  # module lists of `Level`
    up: Any
    checkpoint_activations = False
    """Whether the backward pass computes each block again, in place of keeping its activations; the same gradients."""

    def __init__(self, config: NCSNppConfig):
        super().__init__()
        self.config = c = config
        if c.embedding_type == "fourier":
            self.features, inputs = FourierFeatures(c.nf, c.fourier_scale), 2 * c.nf
        else:
            self.features, inputs = PositionalFeatures(c.nf, c.sigma_min, c.sigma_max, c.num_scales), c.nf
        width = 4 * c.nf if c.conditional else None
        self.embed = None if width is None else NoiseEmbedding(inputs, width)

        def block(inputs: int, outputs: int, direction: Literal["up", "down"] | None = None) -> ResBlock:
            return ResBlock(
                inputs,
                outputs,
                width,
                dropout=c.dropout,
                resample=None if direction is None else Resample(direction, c.taps),
                scale=c.scale,
                init_scale=c.init_scale,
                shortcut_init_scale=1.0 if c.resblock_type == "biggan" else 0.1,
            )

        def resample(direction: Literal["up", "down"], channels: int) -> nn.Module:
            if c.resblock_type == "biggan":
                return block(channels, channels, direction)
            if c.resamp_with_conv:
                return ConvResample(direction, channels, channels, c.taps)
            return Resample(direction, c.taps)

        def attention(channels: int) -> Attention:
            return Attention(channels, c.scale, c.init_scale)

        last = len(c.ch_mult) - 1
        self.input = Conv(c.num_channels, c.nf)
        channels, pyramid_channels = c.nf, c.num_channels
        skips = [channels]
        self.down = nn.ModuleList()
        for index, size in enumerate(c.sizes):
            level = Level()
            for _ in range(c.num_res_blocks):
                level.blocks.append(block(channels, c.nf * c.ch_mult[index]))
                channels = c.nf * c.ch_mult[index]
                if size in c.attn_resolutions:
                    level.attention.append(attention(channels))
                skips.append(channels)
            if index < last:
                level.resample = resample("down", channels)
                if c.progressive_input == "input_skip":
                    level.pyramid_resample = Resample("down", c.taps)
                    level.pyramid = Conv(pyramid_channels, channels, size=1)
                    channels *= 2 if c.progressive_combine == "cat" else 1
                elif c.progressive_input == "residual":
                    level.pyramid_resample = ConvResample("down", pyramid_channels, channels, c.taps)
                    pyramid_channels = channels
                skips.append(channels)
            self.down.append(level)

        self.middle = nn.ModuleList(
            [block(channels, channels), attention(channels), block(channels, channels)]
        )

        pyramid_channels = channels
        levels: list[Level] = []
        for index, size in reversed(list(enumerate(c.sizes))):
            level = Level()
            for _ in range(c.num_res_blocks + 1):
                level.blocks.append(block(channels + skips.pop(), c.nf * c.ch_mult[index]))
                channels = c.nf * c.ch_mult[index]
            if size in c.attn_resolutions:
                level.attention.append(attention(channels))
            if c.progressive == "output_skip":
                level.pyramid_resample = None if index == last else Resample("up", c.taps)
                level.pyramid = ToImage(channels, c.num_channels, c.init_scale)
            elif c.progressive == "residual":
                if index == last:
                    level.pyramid = ToImage(channels, channels, 1.0)
                else:
                    level.pyramid_resample = ConvResample("up", pyramid_channels, channels, c.taps)
                pyramid_channels = channels
            level.resample = resample("up", channels) if index > 0 else None
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.output = (
            None if c.progressive == "output_skip" else ToImage(channels, c.num_channels, c.init_scale)
        )
        self._sum, self._join = Sum(c.scale), Join()
        self._blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        self._found: NetworkProgram | None = None

    def forward(self, x: V, sigma: Tensor) -> V:
        c = self.config
        x = channels_last(x)
        if not c.centered:
            x = x * 2.0 - 1.0
        x = dual.autocast(x)
        with torch.autocast("cpu", enabled=False):  # its casts would be more work than this is
            embedding = None if self.embed is None else self.embed(self.features(sigma))
        recomputes = self.checkpoint_activations and torch.is_grad_enabled()
        program = None if recomputes or torch.compiler.is_compiling() else self._program()
        if program is not None and program.fits(x):
            output: Any = program(x, embedding)
        else:
            output = self._layout(self._runner(embedding, len(sigma), recomputes), x)
        return output if c.scale_by_sigma else output * sigma[:, None, None, None].to(output.dtype)

    def _layout(self, run: Callable[..., Any], x: Any) -> Any:
        """The network: `run(part, *values)` is what a part makes of values, of which `x` is the first."""
        pyramid = x
        skips = [run(self.input, x)]
        for level in self.down:
            for index, block in enumerate(level.blocks):
                h = run(block, skips[-1])
                if level.attention:
                    h = run(level.attention[index], h)
                skips.append(h)
            if level.resample is not None:
                h = run(level.resample, skips[-1])
                h, pyramid = self._merge_input(run, level, h, pyramid)
                skips.append(h)

        h = skips[-1]
        for part in self.middle:
            h = run(part, h)

        output: Any = None
        for level in self.up:
            for block in level.blocks:
                h = run(block, run(self._join, h, skips.pop()))
            for attention in level.attention:
                h = run(attention, h)
            h, output = self._merge_output(run, level, h, output)
            if level.resample is not None:
                h = run(level.resample, h)
        return output if self.output is None else run(self.output, h)

    def _merge_input(self, run: Callable[..., Any], level: Level, h: Any, pyramid: Any) -> tuple[Any, Any]:
        """The features `h` with the downsampled input, and the input for the next level."""
        c = self.config
        if c.progressive_input == "none":
            return h, pyramid
        pyramid = run(level.pyramid_resample, pyramid)
        if c.progressive_input == "residual":
            h = run(self._sum, pyramid, h)
            return h, h
        features = run(level.pyramid, pyramid)
        return run(self._join if c.progressive_combine == "cat" else Sum(), features, h), pyramid

    def _merge_output(self, run: Callable[..., Any], level: Level, h: Any, output: Any) -> tuple[Any, Any]:
        """The features `h` and what the levels so far make of the output."""
        c = self.config
        if c.progressive == "none":
            return h, None
        if output is None:
            return h, run(level.pyramid, h)
        output = run(level.pyramid_resample, output)
        if c.progressive == "output_skip":
            return h, run(Sum(), output, run(level.pyramid, h))
        h = run(self._sum, output, h)
        return h, h

    def _program(self) -> NetworkProgram:
        """The layout as one call."""
        if self._found is None or not self._found.current():
            self._found = NetworkProgram(self, self._layout)
        return self._found

    def _runner(self, embedding: Tensor | None, batch: int, recomputes: bool) -> Callable[..., Any]:
        """Calls a part; blocks that are to be recomputed run again in the backward pass."""
        with torch.autocast("cpu", enabled=False):
            biases = noise_biases(self._blocks, embedding, batch)
        again = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=self.training and self.config.dropout > 0
        )

        def run(part: Any, *values: Any) -> Any:
            if part in biases:
                values += (biases[part],)
            if not recomputes or not isinstance(part, ResBlock | Attention):
                return part(*values)
            x, *bias = values
            if not isinstance(x, Dual):
                return again(part, x, *bias)

            # of tensors: checkpointing looks for the device among its arguments
            def push(primal: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
                pushed = part(Dual(primal, tangents), *bias)
                return pushed.primal, pushed.tangents

            return Dual(*again(push, x.primal, x.tangents))

        return run
