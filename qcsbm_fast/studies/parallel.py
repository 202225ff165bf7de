"""Independent pieces of a study, several at a time: small models use cores better side by side than together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qcsbm_fast.memory import keep_freed_memory
from qcsbm_fast.ops import split_float32
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.interrupt import Interrupt

INTERRUPTED = "the study was interrupted; the same command goes on where it stopped"
_POLL = 1.0  # seconds between two looks at how far the pieces are


def run_all(
    work: Callable[..., object],
    pieces: Mapping[Path, tuple[Any, ...]],
    *,
    workers: int,
    total: int,
    done: Callable[[], int],
) -> None:
    """Call `work(*arguments)` for every piece, `workers` at a time, each in a process with its share of the threads.

    What a piece prints goes to a file beside its folder, the key: <folder>.log. A bar goes from 0 to `total` as
    `done` says. With one worker the pieces run here, one after another, and show their own bars.

    Raises RunError where one fails, or Ctrl-C or SIGTERM arrives: the processes are then told, and awaited.
    """
    if workers == 1:
        for arguments in pieces.values():
            work(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    waiting, running = deque(pieces.items()), dict[BaseProcess, Path]()
    failed: Path | None = None
    with Interrupt() as interrupt, _bar(total, done()) as bar:
        while (waiting or running) and not interrupt.received and not failed:
            while waiting and len(running) < workers:
                folder, arguments = waiting.popleft()
                process = context.Process(target=_quietly, args=(work, arguments, folder, threads))
                process.start()
                running[process] = folder
            wait([process.sentinel for process in running], timeout=_POLL)
            for process in [process for process in running if not process.is_alive()]:
                folder = running.pop(process)
                failed = folder if process.exitcode else failed
            bar.update(done() - bar.n)
        for process in running:
            process.terminate()  # as Ctrl-C: a training saves itself
        for process in running:
            process.join()
    if interrupt.received:
        raise RunError(INTERRUPTED)
    if failed:
        raise RunError(
            f"{failed.name} failed: see {_log(failed)}\nThe same command goes on with what is missing"
        )


def _bar(total: int, initial: int) -> tqdm:
    return tqdm(
        total=total, initial=initial, desc="all models", unit="step", smoothing=0.02, dynamic_ncols=True
    )


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _quietly(work: Callable[..., object], arguments: tuple[Any, ...], folder: Path, threads: int) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is the first process's, which then tells this one
    keep_freed_memory()
    torch.set_num_threads(threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(_log(folder), "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        split_float32(),
    ):
        try:
            work(*arguments)
        except RunError as error:
            print(error)
            sys.exit(1)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
