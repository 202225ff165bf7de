"""A training run from its settings to its folder: the loop, what it writes on the way, and how it ends."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tqdm import tqdm

from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import build, checkpoint, report
from qcsbm_fast.train.config import Config, to_mapping
from qcsbm_fast.train.evaluate import evaluate
from qcsbm_fast.train.folder import RunFolder
from qcsbm_fast.train.interrupt import Interrupt
from qcsbm_fast.train.stats import Statistics
from qcsbm_fast.train.trainer import Trainer

# Evaluation and sampling draw from streams of their own, so that they leave the training's noise alone; a
# configured seed is smaller than these.
_EVALUATION_SEED = 1 << 40
_SAMPLING_SEED = 2 << 40


def train(config: Config, folder: RunFolder, setup: build.Setup | None = None) -> bool:
    """Train until `config.optim.steps`, from the folder's newest checkpoint where it has one.

    `setup` is what `build.build(config)` gave, where that was called before to see that the data are there.
    Returns True when training reached its end, with the pictures drawn and the report printed, and False
    when Ctrl-C or SIGTERM ended it early, which leaves a checkpoint to resume from. Raises NonFiniteError,
    with the earlier checkpoints as they were, when the loss or a gradient is no longer finite, and
    CheckpointError for a checkpoint that cannot be read.
    """
    run = _Run(config, folder, setup or build.build(config))
    with closing(run.statistics):
        received = run.loop()
        if received:
            print(f"Stopped by {received} after step {run.trainer.steps_done}; all is saved. To go on:")
            print(f"  qcsbm train --resume {shlex.quote(str(folder.path))}")
            return False
        run.finish()
    return True


def make_trainer(config: Config, setup: build.Setup) -> Trainer:
    """The trainer of a run at its first step."""
    stream = NoiseStream(config.seed, device=setup.device)
    objective = build.objective(config, setup.score, stream)
    return Trainer(
        objective, setup.train, config.optim, stream=stream, seed=config.seed, flip=config.data.flip
    )


class _Run:
    """What the loop carries from step to step."""

    def __init__(self, config: Config, folder: RunFolder, setup: build.Setup) -> None:
        self.config = config
        self.folder = folder
        self.setup = setup
        self.trainer = make_trainer(config, setup)
        self.seconds = 0.0
        if checkpoint.steps(folder.checkpoints):
            state = checkpoint.load(checkpoint.find(folder.checkpoints))
            self.trainer.load_state_dict(state["trainer"])
            self.seconds = state["seconds"]
        self.statistics = Statistics(folder.path, self.trainer.steps_done)

    def loop(self) -> str | None:
        """Take the remaining steps. Returns the name of the signal that ended them early, if one did."""
        config, trainer = self.config, self.trainer
        with Interrupt() as interrupt, self._progress_bar() as bar:
            self._begin_interval()
            while trainer.steps_done < config.optim.steps and not interrupt.received:
                trainer.step()
                bar.update()
                step, last = trainer.steps_done, trainer.steps_done == config.optim.steps
                if last or step % config.log_every == 0:
                    self._log(bar)
                if last or step % config.checkpoint.every == 0:
                    self._save()
                if last or (config.evaluation.every and step % config.evaluation.every == 0):
                    self._evaluate()
            if interrupt.received:
                self._save()
        return interrupt.received.name if interrupt.received else None

    def finish(self) -> None:
        """Draw the pictures and say what was learned."""
        if "test_dsm" not in (self.statistics.rows or [{}])[-1]:
            self._evaluate()
        stream = NoiseStream(self.config.seed + _SAMPLING_SEED, device=self.setup.device)
        report.draw_pictures(
            self.config, self.folder, self.setup, self.trainer.ema.module, self.statistics.rows, stream
        )
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
        self.statistics.write(step, {**progress, "lr": self.trainer.learning_rate(step), **statistics})
        bar.set_postfix_str(f"loss {statistics['loss']:.4g}", refresh=False)

    def _save(self) -> None:
        self.trainer.check_finite()
        with self._outside_interval():
            state = {
                "config": to_mapping(self.config),
                "seconds": self.seconds,
                "trainer": self.trainer.state_dict(),
            }
            checkpoint.save(
                self.folder.checkpoints, self.trainer.steps_done, state, self.config.checkpoint.keep
            )

    def _evaluate(self) -> None:
        self.trainer.check_finite()
        settings = self.config.evaluation
        with self._outside_interval():
            values = evaluate(
                build.full_precision(self.trainer.ema.module),
                self.setup.test[: settings.points],
                NoiseStream(self.config.seed + _EVALUATION_SEED, device=self.setup.device),
                levels=settings.levels,
                probes=settings.probes,
                exact=settings.exact,
                half=self.config.objective.half,
            )
        self.statistics.write(self.trainer.steps_done, values)
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
        )
