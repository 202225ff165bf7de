"""Every op's compiled kernel against its plain-torch reference, over the same table of cases as the tests.

    python bench/ops.py [--device cpu|cuda] [NAME ...]

Each row: the kernel, the reference beside it in the same run, and the share of the machine's copy rate that it
reaches on the bytes of its arguments and results, each moved once; on a GPU also the reference under torch.compile and
a copy within the device that moves as many bytes. A kernel that disagrees with its reference is refused. Without NAMEs
also a sampler's step in plain torch, and the average of an image network's weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import harness
from qcsbm_fast import NoiseStream, ops
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.ops import backend
from qcsbm_fast.ops.registry import OPS
from qcsbm_fast.train.ema import EMA

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import TABLE, arguments, outputs


def tensor_bytes(values: tuple[object, ...]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def agrees(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        torch.allclose(
            a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item() if b.numel() else 0
        )
        for a, b in zip(got, expected, strict=True)
    )


def bench_op(name: str, rate: float, repeats: int, device: str) -> None:
    entry = TABLE[name]
    variant = next(iter(entry.variants))
    call = tuple(
        a.to(device) if isinstance(a, Tensor) else a
        for a in arguments(entry, variant, entry.bench, torch.float32)
    )
    op = OPS[name]
    got = outputs(op(*call))
    if not agrees(got, outputs(op.reference(*call))):
        sys.exit(f"{name}: the kernel disagrees with its reference; see the tests before timing it")
    moved = tensor_bytes(call) + tensor_bytes(got)
    functions: dict[str, Callable[[], object]] = {
        "reference": lambda: op.reference(*call),
        "kernel": lambda: op(*call),
    }
    timed = ["kernel"]
    if device == "cuda":
        compiled = torch.compile(op.reference)
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        functions |= {"compiled reference": lambda: compiled(*call), "copy": lambda: target.copy_(source)}
        timed += ["compiled reference", "copy"]
    floors = dict.fromkeys(timed, moved / rate)
    rows = harness.interleaved(functions, repeats=repeats, floors=floors, device=device)
    harness.report(f"op {name}", rows, device, size="x".join(map(str, entry.bench)))


def bench_sampler_step(rate: float, repeats: int, device: str, numel: int = 4 * 2**20) -> None:
    """x' = a x + b s + c z on 4M floats against the three eager operations and `randn_like`."""
    x, s = torch.randn(2, 64, numel // 64, device=device)
    a, b, c = torch.rand(3, 64, device=device)
    stream = NoiseStream(0, device)

    def eager() -> tuple[Tensor, Tensor]:
        mean = a[:, None] * x + b[:, None] * s
        return mean + c[:, None] * torch.randn_like(x), mean

    functions: dict[str, Callable[[], object]] = {
        "eager, three operations": eager,
        "sde_step": lambda: ops.sde_step(x, s, a, b, c, stream.draw()),
    }
    floors = {"sde_step": 16 * numel / rate}
    rows = harness.interleaved(functions, repeats=repeats, floors=floors, device=device)
    harness.report("sampler step", rows, device, floats=numel, copy_gb_per_s=round(rate / 1e9))


def bench_average(rate: float, repeats: int, device: str) -> None:
    """The average of an image network's weights, one tensor at a time and by both ways of `train.ema`, against the 12
    bytes per weight that must move."""
    net = NCSNpp(NCSNppConfig(nf=64, num_res_blocks=2)).to(device)
    of_host, of_device = EMA(net, 0.999), EMA(net, 0.999, capturable=True)
    pairs = list(zip(of_host.module.parameters(), net.parameters(), strict=True))

    @torch.no_grad()
    def one_by_one() -> None:
        for average, weight in pairs:
            average.lerp_(weight, 1e-3)

    functions: dict[str, Callable[[], object]] = {
        "one tensor at a time": one_by_one,
        "decay from the host": of_host.update,
        "decay from the device": of_device.update,
    }
    weights = sum(p.numel() for p in net.parameters())
    floors = dict.fromkeys(functions, 12 * weights / rate)
    rows = harness.interleaved(functions, repeats=repeats, floors=floors, device=device)
    harness.report("average of weights", rows, device, weights=weights, tensors=len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"ops (default: all): {', '.join(TABLE)}")
    default = harness.default_device()
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rate = harness.copy_rate(device=options.device)
    for name in options.names or TABLE:
        if TABLE[name].bench and backend.has_kernel(name, options.device):
            bench_op(name, rate, options.repeats, options.device)
    if not options.names:
        bench_sampler_step(rate, options.repeats, options.device)
        bench_average(rate, options.repeats, options.device)


if __name__ == "__main__":
    main()
