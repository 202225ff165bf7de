"""Where the time of training and sampling goes, by `torch.profiler`, and how to ask NVIDIA's profilers."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import build
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.draw import draw
from qcsbm_fast.train.run import make_trainer

# The kernels of this package: those in CUDA C++ by their namespace, those in Triton by their functions.
KERNELS = "qcsbm::cuda|^(kernel|squares|coefficients|fill_normal|fill_uniform|fill_sign)$"
_WARMUP = 4  # steps, in which kernels are tuned and a CUDA graph is captured
_SHOWN = 15


@dataclass(frozen=True)
class Operation:
    """One row of the table: seconds of its own, share of all, calls, and bytes it allocated less those it freed."""

    name: str
    seconds: float
    share: float
    calls: int
    memory: int


def describe(device: torch.device) -> str:
    """What the figures were taken on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (its kernels' own time)"
    return f"the CPU, {torch.get_num_threads()} threads: no GPU kernel is in these figures"


def tasks(config: Config, steps: int) -> dict[str, Callable[[], None]]:
    """`steps` steps of training and of predictor-corrector sampling, warmed up, by name.

    Raises ConfigError as `build.build` does.
    """
    setup = build.build(config)
    trainer = make_trainer(config, setup)
    sampling = replace(config.sampling, sampler="pc", steps=steps, count=config.optim.batch_size)
    stream = NoiseStream(config.seed, setup.device)

    def train(count: int = steps) -> None:
        for _ in range(count):
            trainer.step()

    def sample() -> None:
        draw(trainer.ema.module, setup.shape, sampling, stream)

    train(_WARMUP)
    sample()
    return {"train": train, "sample": sample}


def seconds_per_step(task: Callable[[], None], steps: int) -> float:
    """Wall time, the device's work included."""
    _wait()
    start = time.perf_counter()
    task()
    _wait()
    return (time.perf_counter() - start) / steps


def operations(task: Callable[[], None], trace: Path, *, gpu: bool) -> list[Operation]:
    """Run `task` under the profiler, write its Chrome trace, and return the operations, the longest first, by the time
    of the host or, with `gpu`, of the kernels."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds, profile_memory=True) as profiler:
        task()
        _wait()
    profiler.export_chrome_trace(str(trace))
    rows: list[tuple[Any, float, int]] = []
    for event in profiler.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        rows.append(
            (event, own / 1e6, event.self_device_memory_usage if gpu else event.self_cpu_memory_usage)
        )
    total = sum(own for _, own, _ in rows) or 1.0
    found = [Operation(event.key, own, own / total, event.count, memory) for event, own, memory in rows]
    return sorted(found, key=lambda row: -row.seconds)


def table(rows: list[Operation], steps: int) -> str:
    """Of one step: milliseconds, share, calls, megabytes."""
    lines = [f"{'operation':<56}{'ms':>10}{'share':>8}{'calls':>8}{'MB':>10}"]
    for row in rows:
        name = row.name if len(row.name) < 56 else f"{row.name[:52]}..."
        milliseconds, megabytes = 1e3 * row.seconds / steps, row.memory / 1e6 / steps
        lines.append(
            f"{name:<56}{milliseconds:>10.3f}{row.share:>8.1%}{row.calls / steps:>8.1f}{megabytes:>10.2f}"
        )
    return "\n".join(lines)


def measure(config: Config, steps: int, out: Path) -> None:
    """Print the times of a step and the longest operations; write whole tables and traces into `out`."""
    device = build.find_device(config.device)
    out.mkdir(parents=True, exist_ok=True)
    print(f"On {describe(device)}; {config.data.name}, batch {config.optim.batch_size}, {config.precision}")
    gpu = device.type == "cuda"
    plain = replace(
        config,
        optim=replace(config.optim, cuda_graph="off"),
        sampling=replace(config.sampling, cuda_graph="off"),
    )
    as_set = (
        {name: seconds_per_step(task, steps) for name, task in tasks(config, steps).items()} if gpu else {}
    )
    for name, task in tasks(plain, steps).items():  # a graph's kernels carry no names of operations
        times = f"{1e3 * seconds_per_step(task, steps):.2f} ms a step"
        if gpu:
            times = f"{1e3 * as_set[name]:.2f} ms a step as set, {times} launched one by one"
        rows = operations(task, out / f"{name}.json", gpu=gpu)
        (out / f"{name}.txt").write_text(table(rows, steps) + "\n")
        print(f"\n{name}: {times}")
        print(table(rows[:_SHOWN], steps))
    print(f"\nWhole tables and traces (for chrome://tracing or ui.perfetto.dev): {out}")


def bare(config: Config, steps: int) -> None:
    """The same steps between the marks that `ncu` and `nsys` start and stop at, without torch's profiler."""
    for name, task in tasks(config, steps).items():
        cuda = torch.cuda.is_available()
        with torch.cuda.profiler.profile() if cuda else nullcontext():
            print(f"{name}: {1e3 * seconds_per_step(task, steps):.2f} ms a step")


def recipes(arguments: list[str], out: Path) -> list[str]:
    """The command lines of NVIDIA's profilers for the package's own kernels and for the whole timeline."""
    program = shlex.join(["python", "-m", "qcsbm_fast", "bench", "profile", *arguments, "--bare"])
    folder = shlex.quote(str(out))
    kernels = shlex.quote(f"regex:{KERNELS}")
    return [
        f"ncu --set full --profile-from-start off --kernel-name-base demangled --kernel-name {kernels} "
        f"--launch-count 100 --export {folder}/kernels {program} --steps 2",
        "nsys profile --trace cuda,nvtx,cudnn,cublas --capture-range cudaProfilerApi --capture-range-end repeat:2 "
        f"--cuda-graph-trace node --output {folder}/timeline {program}",
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
