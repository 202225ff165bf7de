"""A program: trains in the run folder `killed`, killed (SIGKILL) again and again, and undisturbed in `whole`.

`python kill_loop.py WHOLE KILLED KILLS` prints the number of kills that struck a living process. Children are forked
from a process that has everything imported, so that starting one takes a tenth of a second.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it at its first use
import torch.utils.tensorboard.writer

from qcsbm_fast.train import checkpoint, report, run
from qcsbm_fast.train.folder import RunFolder


def start(folder: RunFolder) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run.train(folder.read_config(), folder)
        status = 0
    finally:
        os._exit(status)


def finish(folder: RunFolder) -> float:
    """Trains to the end; the seconds that took."""
    begin = time.monotonic()
    _, status = os.waitpid(start(folder), 0)
    assert status == 0, f"training in {folder.path} failed"
    return time.monotonic() - begin


def kill(folder: RunFolder, delay: float) -> bool:
    """Starts a training, kills it `delay` seconds after its first new checkpoint; whether it was still alive."""
    before = checkpoint.steps(folder.checkpoints)
    child = start(folder)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and checkpoint.steps(folder.checkpoints) == before:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    report.draw_pictures = lambda *_: None
    whole, killed = (RunFolder(Path(path)) for path in sys.argv[1:3])
    kills = int(sys.argv[3])
    # Delays in units of the run's own pace: a fast machine must not finish before the last kill.
    delay = finish(whole) / (4 * kills)
    draw = random.Random(0)
    struck = sum(kill(killed, delay * draw.random()) for _ in range(kills))
    finish(killed)
    print("kills:", struck)


if __name__ == "__main__":
    main()
