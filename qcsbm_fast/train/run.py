"""A training run from its settings to its folder: the loop, what it writes on the way, and how it ends."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import build, checkpoint, fit, report
from qcsbm_fast.train.config import Config, to_mapping
from qcsbm_fast.train.distributed import Processes
from qcsbm_fast.train.errors import ConfigError, RunError
from qcsbm_fast.train.evaluate import evaluate
from qcsbm_fast.train.folder import RunFolder
from qcsbm_fast.train.interrupt import Interrupt
from qcsbm_fast.train.precision import policy
from qcsbm_fast.train.stats import Statistics
from qcsbm_fast.train.trainer import Trainer

# Evaluation and sampling draw from streams of their own, so that they leave the training's noise alone; a
# configured seed is smaller than these.
_EVALUATION_SEED = 1 << 40
_SAMPLING_SEED = 2 << 40
# Steps between two questions whether any of several processes was told to stop.
_AGREE_EVERY = 5


def train(
    config: Config,
    folder: RunFolder,
    setup: build.Setup | None = None,
    processes: Processes = Processes(),  # noqa: B008  it does not change
) -> bool:
    """Train until `config.optim.steps`, from the folder's newest checkpoint that can be read, if it has any.

    `setup` is what `build.build(config)` gave, where that was called before to see that the data are there.
    Of several `processes`, which all call this, the first one writes. Returns True when training reached its
    end, with the pictures drawn and the report printed, and False when Ctrl-C or SIGTERM ended it early, which
    leaves a checkpoint to resume from.

    Raises:
        NonFiniteError: when the loss or a gradient is no longer finite; the checkpoints stay as they were.
        CheckpointError: where none of the checkpoints can be read, or a new one cannot be written.
        RunError: where another process trains in this folder, it cannot be written, or memory runs out.
        ConfigError: for data that are not finite, or a batch smaller than the number of processes.
    """
    with folder.lock() if processes.first else nullcontext():
        try:
            setup = setup or build.build(config)
            if config.optim.accumulate == 0:
                config = _with_parts(config, setup, processes)
            return _train(config, folder, setup, processes)
        except OSError as error:
            raise RunError(
                f"{folder.path}: {error.strerror or error}: what was saved before is whole"
            ) from error
        except RuntimeError as error:
            if isinstance(error, RunError) or not _is_out_of_memory(error):
                raise
            raise RunError(_more_memory(config, error)) from error


def _train(config: Config, folder: RunFolder, setup: build.Setup, processes: Processes) -> bool:
    run = _Run(config, folder, setup, processes)
    with closing(run.statistics) if run.statistics else nullcontext():
        received = run.loop()
        if not received:
            run.finish()
        elif processes.first:
            print(f"Stopped by {received} after step {run.trainer.steps_done}; all is saved. To go on:")
            print(f"  qcsbm train --resume {shlex.quote(str(folder.path))}")
    return not received


def make_trainer(
    config: Config,
    setup: build.Setup,
    processes: Processes = Processes(),  # noqa: B008  it does not change
) -> Trainer:
    """The trainer of a run at its first step.

    Raises ConfigError for data that are not finite, a batch smaller than the number of processes, or a CUDA graph that
    is asked for and cannot be.
    """
    if setup.train.is_floating_point():
        finite = setup.train.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten()
            raise ConfigError(
                f"data: {len(bad)} of {len(finite)} training samples have an infinite value or one that is not a "
                f"number, the first is number {int(bad[0])}; leave them out"
            )
    part = config.optim.batch_size // max(1, config.optim.accumulate)
    if part < processes.world:
        raise ConfigError(
            f"optim.batch_size / optim.accumulate: expected at least one sample for each of the "
            f"{processes.world} processes, got {part}"
        )
    stream = NoiseStream(config.seed, device=setup.device)
    return Trainer(
        build.objective(config, setup.score, stream),
        setup.train,
        config.optim,
        stream=stream,
        seed=config.seed,
        flip=config.data.flip,
        processes=processes,
        scaled=policy(config.precision, setup.device).scaled,
        graph=build.captures_step(config, setup.device, several=processes.several),
    )


def _with_parts(config: Config, setup: build.Setup, processes: Processes) -> Config:
    """The settings with the number of parts that fit in memory, the same for all processes."""
    found = fit.parts(config, setup, processes, lambda config: make_trainer(config, setup.copy()))
    parts = processes.share(found if processes.first else None)
    if processes.first:
        print(f"optim.accumulate: {parts}, parts of {config.optim.batch_size // parts} samples fit in memory")
    return replace(config, optim=replace(config.optim, accumulate=parts))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def _more_memory(config: Config, error: RuntimeError) -> str:
    """What the system said, and the settings that would need less."""
    optim, penalty = config.optim, config.penalty
    remedies = [f"raise --optim.accumulate (now {optim.accumulate}), which changes no result"]
    if config.model.kind == "quasi-conservative":
        if penalty.probes > 1:
            if penalty.probe_chunk != 1 and not penalty.exact:
                remedies.append("use --penalty.probe-chunk 1, which changes no result and takes longer")
            remedies.append(f"lower --penalty.probes (now {penalty.probes})")
        if penalty.fraction > 0.125:
            remedies.append(f"lower --penalty.fraction (now {penalty.fraction:g})")
    if config.model.network == "ncsnpp" and not optim.checkpoint_activations:
        remedies.append("use --optim.checkpoint-activations, which changes no result and takes longer")
    remedies.append(f"lower --optim.batch-size (now {optim.batch_size})")
    if config.precision == "float32":
        remedies.append("use --precision bfloat16")
    return f"out of memory: {str(error).splitlines()[0]}\nTo need less: {'; or '.join(remedies)}"


class _Run:
    """What the loop carries from step to step."""

    def __init__(self, config: Config, folder: RunFolder, setup: build.Setup, processes: Processes) -> None:
        self.config = config
        self.folder = folder
        self.setup = setup
        self.processes = processes
        self.trainer = make_trainer(config, setup, processes)
        self.seconds = 0.0
        state = processes.share(self._newest() if processes.first else None)
        if state is not None:
            self.trainer.load_state_dict(state["trainer"])
            self.seconds = state["seconds"]
        self.trainer.part_ways()
        self.statistics = None
        if processes.first:
            folder.write_config(config)
            self.statistics = Statistics(folder.path, self.trainer.steps_done)
        rows = self.statistics.rows if self.statistics else []
        best = min((row.get("test_dsm", math.inf) for row in rows), default=math.inf)
        self.best = processes.share(best if processes.first else None)

    def _newest(self) -> dict[str, Any] | None:
        """The newest state that can be read, with a word on those that cannot; None for a new run."""
        folder = self.folder.checkpoints
        checkpoint.remove_halves(folder)
        if not checkpoint.steps(folder):
            return None
        state, problems = checkpoint.load_newest(folder, rename=True)
        for problem in problems:
            print(f"{problem}\nIt is set aside; going on from step {state['trainer']['steps_done']}")
        return state

    def loop(self) -> str | None:
        """Take the remaining steps. Returns the name of the signal that ended them early, if one did."""
        config, trainer, processes = self.config, self.trainer, self.processes
        stop = False
        with Interrupt(patient=processes.several) as interrupt, self._progress_bar() as bar:
            self._begin_interval()
            while trainer.steps_done < config.optim.steps and not stop:
                trainer.step()
                bar.update()
                step, last = trainer.steps_done, trainer.steps_done == config.optim.steps
                if not processes.several or step % _AGREE_EVERY == 0:
                    stop = processes.any(interrupt.received is not None, self.setup.device)
                if last or step % config.log_every == 0:
                    self._log(bar)
                if last or (config.evaluation.every and step % config.evaluation.every == 0):
                    self._evaluate()
                # after the evaluation: a run that goes on from here has its numbers
                if last or step % config.checkpoint.every == 0:
                    self._save()
            if stop:
                self._save()
        return (interrupt.received.name if interrupt.received else "another process") if stop else None

    def finish(self) -> None:
        """Draw the pictures and say what was learned."""
        rows = self.statistics.rows if self.statistics else []
        if self.processes.share("test_dsm" not in (rows or [{}])[-1] if self.processes.first else None):
            self._evaluate()
        score = self.trainer.ema.whole()
        if self.statistics is None:
            return
        stream = NoiseStream(self.config.seed + _SAMPLING_SEED, device=self.setup.device)
        report.draw_pictures(self.config, self.folder, self.setup, score, self.statistics.rows, stream)
        report.print_summary(
            self.config,
            self.folder,
            self.statistics.rows[-1],
            image=self.setup.image,
            seen=self.trainer.images,
            seconds=self.seconds,
        )

    def _log(self, bar: tqdm) -> None:
        statistics = self.trainer.read_statistics()
        elapsed = time.perf_counter() - self._interval_start
        self.seconds += elapsed
        rate = (self.trainer.images - self._interval_images) / elapsed
        self._begin_interval()
        step = self.trainer.steps_done
        progress = {"images": self.trainer.images, "seconds": self.seconds, "images_per_second": rate}
        if self.config.optim.nonfinite == "skip" or self.config.precision == "float16":
            progress["skipped"] = self.trainer.skipped
        if self.statistics is not None:
            self.statistics.write(step, {**progress, "lr": self.trainer.learning_rate(step), **statistics})
        bar.set_postfix_str(f"loss {statistics['loss']:.4g}", refresh=False)

    def _save(self) -> None:
        self.trainer.check_finite()
        self.trainer.part_ways()
        with self._outside_interval():
            state = self._state()
            if self.processes.first:
                keep = self.config.checkpoint.keep
                checkpoint.save(self.folder.checkpoints, self.trainer.steps_done, state, keep)

    def _state(self) -> dict[str, Any]:
        return {
            "config": to_mapping(self.config),
            "seconds": self.seconds,
            "trainer": self.trainer.state_dict(),
        }

    def _evaluate(self) -> None:
        self.trainer.check_finite()
        settings = self.config.evaluation
        with self._outside_interval():
            values = evaluate(
                build.full_precision(self.trainer.ema.whole()),
                self.setup.test[: settings.points],
                NoiseStream(self.config.seed + _EVALUATION_SEED, device=self.setup.device),
                levels=settings.levels,
                probes=settings.probes,
                exact=settings.exact,
                half=self.config.objective.half,
                processes=self.processes,
            )
        improved = values["test_dsm"] < self.best
        self.best = min(self.best, values["test_dsm"])
        state = self._state() if improved else None
        if self.statistics is None:
            return
        self.statistics.write(self.trainer.steps_done, values)
        if state is not None:
            checkpoint.save_best(self.folder.checkpoints, state)
        tqdm.write(f"step {self.trainer.steps_done}: held-out {report.one_line(values)}")

    def _begin_interval(self) -> None:
        self._interval_start, self._interval_images = time.perf_counter(), self.trainer.images

    @contextmanager
    def _outside_interval(self) -> Iterator[None]:
        """Time spent here does not count as training."""
        start = time.perf_counter()
        yield
        self._interval_start += time.perf_counter() - start

    def _progress_bar(self) -> tqdm:
        return tqdm(
            desc=f"{self.config.preset}, {self.config.model.kind}",
            total=self.config.optim.steps,
            initial=self.trainer.steps_done,
            unit="step",
            # a log file gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            disable=not self.processes.first,
        )
