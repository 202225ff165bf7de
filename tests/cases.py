"""The table of ops that tests and benches run over: how each is called, in which sizes, and what it promises.

A new op needs one entry in TABLE. `arguments(entry, variant, size, dtype)` gives the positional arguments of
`OPS[name]`, which is also how its reference and `Entry.public` are called.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from block_draws import attention_block, attention_block_public, res_block, res_block_public
from draws import (
    Draw,
    Size,
    activation,
    convolution,
    fill,
    fir,
    group_norm,
    norm,
    swish_mlp,
    swish_mlp_public,
)
from entry import BATCHES, BLOCKS, DTYPES, IMAGES, LENGTHS, MLPS, ROWS, Entry, allowance
from qcsbm_fast import ops
from qcsbm_fast.ops import backend
from qcsbm_fast.ops.registry import OPS

TABLE: dict[str, Entry] = {
    "philox_normal": Entry(
        {"normal": fill}, LENGTHS, public=ops.philox_normal, noise=True, bench=(64, 3, 128, 128)
    ),
    "philox_uniform": Entry({"uniform": fill}, LENGTHS, public=ops.philox_uniform, bench=(64, 3, 128, 128)),
    "rademacher": Entry({"signs": fill}, LENGTHS, public=ops.rademacher, bench=(64, 3, 128, 128)),
    "perturb": Entry(
        {
            "stored": lambda d, s: (d.normal(*s), d.vector(s[0]), d.vector(s[0]), d.state(), True),
            "dropped": lambda d, s: (d.normal(*s), d.vector(s[0]), d.vector(s[0]), d.state(), False),
        },
        BATCHES,
        public=lambda x, m, s, state, store: ops.perturb(x, m, s, state, store_noise=store),
        noise=True,
        bench=(64, 3, 128, 128),
    ),
    "sde_step": Entry(
        {"step": lambda d, s: (d.normal(*s), d.normal(*s), *(d.vector(s[0]) for _ in "abc"), d.state())},
        BATCHES,
        public=ops.sde_step,
        noise=True,
        bench=(64, 3, 128, 128),
    ),
    "langevin_step": Entry(
        {"step": lambda d, s: (d.normal(*s), d.normal(*s), 0.16, d.vector(s[0]), d.state())},
        BATCHES,
        public=ops.langevin_step,
        noise=True,
        bench=(64, 3, 128, 128),
    ),
    "denoising_residual": Entry(
        {
            "given": lambda d, s: (d.normal(*s), d.vector(s[0]), d.vector(s[0]), d.normal(*s), None),
            "drawn": lambda d, s: (d.normal(*s), d.vector(s[0]), d.vector(s[0]), None, d.state()),
        },
        BATCHES,
        public=lambda s, std, w, z, state: ops.denoising_residual(s, std, w, z=z, state=state),
        differentiable=(0,),
        order=1,
        noise=True,
        bench=(64, 3, 128, 128),
    ),
    "asymmetry": Entry(
        {
            "one-probe": lambda d, s: (d.normal(1, *s), d.normal(1, *s)),
            "probes": lambda d, s: (d.normal(3, *s), d.normal(3, *s)),
        },
        BATCHES,
        public=ops.asymmetry,
        # Its gradient holds r constant, so it is no derivative of the value: see test_penalty.py.
        bench=(64, 3, 128, 128),
    ),
    "bias_act": Entry(
        {
            "swish": activation("swish", 1.0),
            "silu": activation("swish", 1.0, learnt=False),
            "elu": activation("elu", 1.0, learnt=False),
            "leaky-relu": activation("leaky_relu", 0.1),
        },
        ROWS,
        public=lambda x, b, p, kind, c: ops.bias_act(x, b, p, kind=kind, constant=c),
        differentiable=(0, 1, 2),
        order=1,
        bench=(5000, 256),
    ),
    "bias_act_vjp": Entry(
        {
            "swish": activation("swish", 1.0, grads=1),
            "elu": activation("elu", 0.7, learnt=False, grads=1),
            "leaky-relu": activation("leaky_relu", 0.1, grads=1),
        },
        ROWS,
        bench=(5000, 256),
    ),
    "bias_act_jvp": Entry(
        {
            "swish": activation("swish", 1.0, lead=(2,)),
            "elu": activation("elu", 0.7, lead=(1,), learnt=False),
            "leaky-relu": activation("leaky_relu", 0.1, lead=(2,)),
            "no-probes": activation("swish", 1.0, lead=(0,)),
        },
        ROWS,
        public=lambda x, t, b, p, kind, c: ops.bias_act_jvp(x, t, b, p, kind=kind, constant=c),
        differentiable=(0, 1, 2, 3),
        order=1,
        tangent_of="bias_act",
        bench=(5000, 256),
    ),
    "bias_act_jvp_vjp": Entry(
        {
            "swish": activation("swish", 1.0, lead=(2,), grads=2),
            "elu": activation("elu", 0.7, lead=(1,), learnt=False, grads=2),
            "leaky-relu": activation("leaky_relu", 0.1, lead=(2,), grads=2),
            "tangents-only": activation("swish", 1.0, lead=(2,), grads=2, g=False),
        },
        ROWS,
        bench=(5000, 256),
    ),
    "softmax": Entry(
        {"softmax": lambda d, s: (d.normal(*s),)},
        ROWS,
        public=ops.softmax,
        differentiable=(0,),
        order=1,
        bench=(16, 256, 256),
    ),
    "softmax_vjp": Entry(
        {"softmax": lambda d, s: (d.normal(*s), d.normal(*s).softmax(-1))},
        ROWS,
        cancels=True,
        bench=(16, 256, 256),
    ),
    "softmax_jvp": Entry(
        {
            "probes": lambda d, s: (d.normal(*s), d.normal(2, *s)),
            "no-probes": lambda d, s: (d.normal(*s), d.normal(0, *s)),
        },
        ROWS,
        public=ops.softmax_jvp,
        differentiable=(0, 1),
        order=1,
        tangent_of="softmax",
        bench=(16, 256, 256),
    ),
    "softmax_jvp_vjp": Entry(
        {
            "both": lambda d, s: (d.normal(*s), d.normal(2, *s), d.normal(*s).softmax(-1), d.normal(2, *s)),
            "tangents-only": lambda d, s: (None, d.normal(2, *s), d.normal(*s).softmax(-1), d.normal(2, *s)),
        },
        ROWS,
        cancels=True,
        bench=(16, 256, 256),
    ),
    "scaled_add": Entry(
        {"add": lambda d, s: (d.images(*s), d.images(*s), 0.7)},
        IMAGES,
        public=ops.scaled_add,
        differentiable=(0, 1),
        order=2,
        bench=(64, 64, 32, 32),
    ),
    "fir": Entry(
        {
            "up": lambda d, s: (d.images(*s), [0.25, 0.75, 0.75, 0.25], 2, 1, 2, 2 * s[2], 2 * s[3]),
            "down": lambda d, s: (
                d.images(*s),
                [0.125, 0.375, 0.375, 0.125],
                1,
                2,
                1,
                (s[2] + 1) // 2,
                (s[3] + 1) // 2,
            ),
        },
        IMAGES,
        public=fir,
        differentiable=(0,),
        order=2,
        bench=(64, 64, 32, 32),
    ),
    "convolve": Entry(
        {"bias": convolution(), "no-bias": convolution(bias=False), "one-tap": convolution(taps=1)},
        IMAGES,
        public=lambda x, w, b, transposed: ops.convolve(x, w, b),
        differentiable=(0, 1, 2),
        order=2,
        sums=True,
        bench=(64, 64, 32, 32),
    ),
    "convolve_jvp": Entry(
        {
            "bias": convolution(lead=(2,)),
            "no-bias": convolution(lead=(1,), bias=False),
            "one-tap": convolution(lead=(1,), taps=1),
        },
        IMAGES,
        public=lambda x, t, w, b, transposed: ops.convolve_jvp(x, t, w, b),
        differentiable=(0, 1, 2, 3),
        order=2,
        tangent_of="convolve",
        sums=True,
        bench=(64, 64, 32, 32),
    ),
    "convolve_weight": Entry(
        {
            "primal": lambda d, s: (d.images(*s), d.images(s[0], 5, *s[2:]), None, None, 3),
            "one-tap": lambda d, s: (d.images(*s), d.images(s[0], 5, *s[2:]), None, None, 1),
            "both": lambda d, s: (
                d.images(*s),
                d.images(s[0], 5, *s[2:]),
                d.images(2, *s),
                d.images(2, s[0], 5, *s[2:]),
                3,
            ),
        },
        IMAGES,
        differentiable=(0, 1, 2, 3),
        sums=True,
        bench=(64, 64, 32, 32),
    ),
    "group_norm_silu": Entry(
        {"silu": group_norm(True), "plain": group_norm(False, bias=False)},
        IMAGES,
        public=norm(ops.group_norm_silu),
        differentiable=(0, 1, 2, 3),
        order=1,
        ulps=32,
        bench=(64, 64, 32, 32),
    ),
    "group_norm_silu_vjp": Entry(
        {"silu": group_norm(True, grads=1), "plain": group_norm(False, bias=False, grads=1)},
        IMAGES,
        ulps=32,
        bench=(64, 64, 32, 32),
    ),
    "group_norm_silu_jvp": Entry(
        {"silu": group_norm(True, lead=(2,)), "plain": group_norm(False, lead=(1,), bias=False)},
        IMAGES,
        public=norm(ops.group_norm_silu_jvp),
        differentiable=(0, 1, 2, 3, 4),
        order=1,
        tangent_of="group_norm_silu",
        ulps=32,
        bench=(64, 64, 32, 32),
    ),
    "group_norm_silu_jvp_vjp": Entry(
        {
            "silu": group_norm(True, lead=(2,), grads=2),
            "plain": group_norm(False, lead=(1,), bias=False, grads=2),
            "tangents-only": group_norm(True, lead=(2,), grads=2, g=False),
        },
        IMAGES,
        ulps=32,
        bench=(64, 64, 32, 32),
    ),
    "swish_mlp": Entry(
        {"values": swish_mlp(0), "one-probe": swish_mlp(1), "probes": swish_mlp(3)},
        MLPS,
        public=swish_mlp_public,
        differentiable=(0, 1, 2),
        order=1,
        ulps=16,
        bench=(5000, 2, 64, 128, 256, 2),
    ),
    "swish_mlp_vjp": Entry(
        {
            "values": swish_mlp(0, grads=1),
            "pull": swish_mlp(2, grads=1, weights=False),
            "joint": swish_mlp(1, grads=2, inputs=False),
            "all": swish_mlp(3, grads=2),
        },
        MLPS,
        ulps=16,
        bench=(5000, 2, 64, 128, 256, 2),
    ),
    "res_block": Entry(
        {
            "values": res_block(0),
            "one-probe": res_block(1, 8),
            "up": res_block(2, 8, "up"),
            "down": res_block(1, None, "down"),
        },
        BLOCKS,
        public=res_block_public,
        differentiable=tuple(range(11)),
        order=1,
        ulps=32,
        sums=True,
        cancels=True,
        chain=6,
        bench=(16, 64, 32, 32),
    ),
    "res_block_vjp": Entry(
        {
            "values": res_block(0, grads=1),
            "pull": res_block(2, 8, grads=1, weights=False),
            "up": res_block(1, 8, "up", grads=2),
            "down": res_block(3, None, "down", grads=2),
        },
        BLOCKS,
        ulps=32,
        sums=True,
        cancels=True,
        chain=6,
        bench=(16, 64, 32, 32),
    ),
    "attention_block": Entry(
        {"values": attention_block(0), "one-probe": attention_block(1), "probes": attention_block(3)},
        BLOCKS,
        public=attention_block_public,
        differentiable=tuple(range(8)),
        order=1,
        ulps=32,
        sums=True,
        cancels=True,
        chain=6,
        bench=(16, 64, 16, 16),
    ),
    "attention_block_vjp": Entry(
        {
            "values": attention_block(0, grads=1),
            "pull": attention_block(2, grads=1, weights=False),
            "joint": attention_block(2, grads=2),
        },
        BLOCKS,
        ulps=32,
        sums=True,
        cancels=True,
        chain=6,
        bench=(16, 64, 16, 16),
    ),
}


def arguments(entry: Entry, variant: str, size: Size, dtype: torch.dtype) -> tuple[Any, ...]:
    return entry.variants[variant](Draw(dtype), size)


def every_case() -> Iterator[tuple[str, str, str]]:
    """(op, variant, name of the size) of all cases."""
    for name, entry in TABLE.items():
        for variant in entry.variants:
            for size in entry.sizes:
                yield name, variant, size


def outputs(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if exact.numel() else 0.0


def assert_accurate(name: str, call: Sequence[Any], got: Sequence[Tensor]) -> None:
    """Against the float64 reference: at most twice the same-dtype reference's error, plus the entry's ulps."""
    entry, reference = TABLE[name], OPS[name].reference
    in_float64 = [
        a.double() if is_float(a) else torch.float64 if isinstance(a, torch.dtype) else a for a in call
    ]
    same, exact = outputs(reference(*call)), outputs(reference(*in_float64))
    for g, s, e in zip(got, same, exact, strict=True):
        assert (g.shape, g.dtype, g.is_contiguous()) == (s.shape, s.dtype, s.is_contiguous())
        scale = float(e.abs().max()) if e.numel() else 0.0
        images = next((a.dtype for a in call if is_float(a)), g.dtype)
        allowed = allowance(entry, g.dtype, images, scale)
        assert error(g, e) <= 2 * error(s, e) + allowed


def save_results(path: str) -> None:
    """Writes what the ops return in this process, for comparison with another backend or instruction set."""
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, variant, size in every_case():
        if backend.WANTED != "native" or backend.has_kernel(name, "cpu"):
            for dtype in DTYPES:
                call = arguments(TABLE[name], variant, TABLE[name].sizes[size], dtype)
                results[f"{name} {variant} {size} {dtype}"] = outputs(OPS[name](*call))
    torch.save(results, path)


def times(name: str) -> tuple[float, float]:
    """Seconds of an op's kernel and of its reference, in float32 and the bench's size: the best of three calls each."""
    entry = TABLE[name]
    call = arguments(entry, [*entry.variants][-1], entry.bench, torch.float32)
    best = [math.inf, math.inf]
    with torch.no_grad():
        for _ in range(3):
            for i, run in enumerate((OPS[name], OPS[name].reference)):
                start = time.perf_counter()
                run(*call)
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]
