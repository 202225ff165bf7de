"""Training with one process and with several: time of a step, images per second, memory of a process.

"the same batch" shares one batch among the processes (strong scaling), "a batch each" gives every process as many
images as one alone has (weak scaling). Each process has `--threads` threads; they are connected by gloo on this
machine. Speed-ups are of images per second against one process. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import multiprocessing

import harness
from qcsbm_fast.memory import peak_memory
from qcsbm_fast.train import build
from qcsbm_fast.train.config import Config
from qcsbm_fast.train.distributed import processes
from qcsbm_fast.train.presets import PRESETS
from qcsbm_fast.train.run import make_trainer


def settings(nf: int, batch: int) -> Config:
    """The digits preset's objective on a network of width `nf`."""
    base = PRESETS["digits"]
    return replace(
        base,
        device="cpu",
        model=replace(base.model, nf=nf),
        optim=replace(base.optim, batch_size=batch),
    )


def work(rank: int, world: int, port: int, config: Config, repeats: int, threads: int, out: Path) -> None:
    torch.set_num_threads(threads)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with processes("cpu", config.fsdp) as group:
        setup = build.build(config)
        trainer = make_trainer(config, setup, group)
        memory = peak_memory(trainer.step) or 0
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            trainer.step()
            times.append(time.perf_counter() - start)
        largest = int(group.sum(torch.tensor(float(memory))) / world)
        if group.first:
            torch.save({"times": times, "memory": largest}, out)


def measure(world: int, config: Config, repeats: int, threads: int, out: Path) -> harness.Row:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (world, port, config, repeats, threads, out)
    multiprocessing.spawn(work, args=arguments, nprocs=world)  # pyright: ignore[reportPrivateImportUsage]
    found = torch.load(out)
    low, median, high = statistics.quantiles(found["times"], n=4)
    return harness.Row("", median, low, high, config.optim.batch_size / median, memory=found["memory"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nf", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    harness.RESULTS.mkdir(exist_ok=True)
    out = harness.RESULTS / "scaling.tmp"
    rows: list[harness.Row] = []
    for fsdp, each in ((False, False), (True, False), (False, True)):
        for world in a.processes:
            if world == 1 and (fsdp or each):
                continue
            config = replace(settings(a.nf, a.batch * (world if each else 1)), fsdp=fsdp)
            row = measure(world, config, a.repeats, a.threads, out)
            kind = "one" if world == 1 else f"{world}, {'FSDP2' if fsdp else 'DDP'}"
            name = kind + ("" if world == 1 else ", a batch each" if each else ", the same batch")
            rows.append(replace(row, name=name))
    out.unlink()
    rate = rows[0].speedup
    rows = [replace(row, speedup=row.speedup / rate) for row in rows]
    harness.report(
        f"scaling nf {a.nf} batch {a.batch}: processes of {a.threads} threads, {os.cpu_count()} cores", rows
    )


if __name__ == "__main__":
    main()
