"""Timing that can be trusted on a noisy machine: interleaved runs in one process, medians with their spread.

On a GPU by CUDA events, the work queued behind a pause, so that the host's launches show only where they take longer
than the device's work.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# Many variants in one process would push each other's compiled convolutions out of oneDNN's cache of 1024.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import torch

from qcsbm_fast.memory import keep_freed_memory, peak_memory

keep_freed_memory()  # as the command line does: no row pays for page faults
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: seconds as median and quartiles, the ratio to the first row, the share of the floor, and
    the peak of the bytes that one run holds."""

    name: str
    median: float
    low: float
    high: float
    speedup: float
    floor: float | None = None
    share: float | None = None
    memory: int | None = None


_PAUSE = 1_000_000  # cycles of a GPU, about half a millisecond


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _seconds(run: Callable[[], object], device: str) -> float:
    """One run."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_PAUSE)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 15,
    warmup: int = 3,
    floors: Mapping[str, float] | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Runs all functions in turn, `repeats` times; the first is the baseline of the speed-ups.

    Args:
        functions: what to time, by name.
        floors: counted lower bounds in seconds; a row's share of it is floor / median.
        device: "cpu" or "cuda", where they run.
    """
    for _ in range(warmup):
        for run in functions.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, run in functions.items():
            samples[name].append(_seconds(run, device))
    rows: list[Row] = []
    base = samples[next(iter(functions))]
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times * 2 if len(times) == 1 else times, n=4)
        # Each ratio is taken within one round: the machine's drift cancels.
        speedup = statistics.median(b / t for b, t in zip(base, times, strict=True))
        floor = (floors or {}).get(name)
        rows.append(Row(name, median, low, high, speedup, floor, floor / median if floor else None))
    return rows


def with_memory(
    rows: Sequence[Row], functions: Mapping[str, Callable[[], object]], device: str = "cpu"
) -> list[Row]:
    """The rows with the peak memory of their functions."""
    return [replace(row, memory=peak_memory(functions[row.name], torch.device(device))) for row in rows]


def copy_rate(numel: int = 2**24, device: str = "cpu") -> float:
    """Bytes per second that a copy of a large float32 tensor reads and writes."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    row = interleaved({"copy": lambda: target.copy_(source)}, repeats=9, device=device)[0]
    return 8 * numel / row.median


def matmul_rate(rows: int, inner: int, columns: int) -> float:
    """FLOP per second of `(rows, inner) @ (inner, columns)` in float32."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    row = interleaved({"matmul": lambda: a @ b}, repeats=15)[0]
    return 2 * rows * inner * columns / row.median


def report(title: str, rows: list[Row], device: str = "cpu", **facts: object) -> None:
    """Prints the table, with what it was taken on, and writes it as JSON under bench/results, a GPU's beside the
    CPU's."""
    machine: dict[str, object] = {"torch": torch.__version__, "device": device}
    if device == "cpu":
        machine |= {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    else:
        machine["gpu"] = torch.cuda.get_device_name()
    print(f"\n{title}   ({', '.join(f'{k} {v}' for k, v in {**machine, **facts}.items())})")
    print(f"{'':<34}{'median ms':>11}{'quartiles ms':>24}{'speed-up':>10}{'of floor':>10}{'memory MB':>11}")
    for row in rows:
        spread = f"{row.low * 1e3:.3f} .. {row.high * 1e3:.3f}"
        share = f"{100 * row.share:.0f} %" if row.share else ""
        memory = f"{row.memory / 1e6:.0f}" if row.memory else ""
        print(
            f"{row.name:<34}{row.median * 1e3:>11.3f}{spread:>24}{row.speedup:>10.2f}{share:>10}{memory:>11}"
        )
    RESULTS.mkdir(exist_ok=True)
    name = title.split(":")[0].replace(" ", "_")
    path = RESULTS / f"{name}{'' if device == 'cpu' else '_gpu'}.json"
    result = {"machine": machine, **facts, "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(result, indent=1, default=str))
