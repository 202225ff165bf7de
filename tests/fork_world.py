"""A program: trains runs with several processes, as torchrun starts them, without importing torch for each.

`python fork_world.py PORT FOLDER PROCESSES STEPS ...`, the last three as often as wanted, one training after another.
"""

from __future__ import annotations

import os
import sys

import torch._dynamo  # torch.optim imports it at its first use
import torch.utils.tensorboard.writer

from qcsbm_fast import cli
from qcsbm_fast.train import report


def start(rank: int, world: int, port: int, folder: str, steps: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        status = cli.main(["train", "--resume", folder, "--steps", steps])
        sys.stdout.flush()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    report.draw_pictures = lambda *_: None
    port, jobs = int(sys.argv[1]), sys.argv[2:]
    for number, (folder, world, steps) in enumerate(zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True)):
        children = [start(rank, int(world), port + number, folder, steps) for rank in range(int(world))]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert not any(statuses), f"{folder} with {world} processes to step {steps}: {statuses}"


if __name__ == "__main__":
    main()
