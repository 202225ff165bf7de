"""One optimiser step after another, with everything that must survive a restart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.cuda_graph import Replayed
from qcsbm_fast.objectives import DenoisingObjective
from qcsbm_fast.random import NoiseStream
from qcsbm_fast.train import shares
from qcsbm_fast.train.batches import Batches
from qcsbm_fast.train.config import Optim
from qcsbm_fast.train.distributed import Processes
from qcsbm_fast.train.ema import EMA
from qcsbm_fast.train.errors import NonFiniteError
from qcsbm_fast.train.precision import LossScale


class Trainer:
    """Adam on a denoising objective over data held in memory.

    `objective(x0 (B, *))` gives a loss and its statistics and holds the score model as `objective.score`;
    `data (N, *)` lies on the device of the model, and with `flip` its images are mirrored at random; `stream`
    is the objective's source of noise, and is saved with the rest. `steps_done` counts steps, `images` the
    samples seen; `ema` averages the weights, which `optimizer` moves. Two trainers made alike take bitwise the
    same steps on one machine, and so does one that is restored from `state_dict`.

    A step whose loss or gradient is not finite leaves the weights as they are. It raises NonFiniteError on
    the CPU at once, on a GPU at the next `read_statistics` or `check_finite`: asking in every step would make
    the host wait for the GPU. With `optim.nonfinite` "skip" it is left out of the statistics and counted in
    `skipped`, and only `read_statistics` raises, when no step since the last call was finite.

    With `scaled`, for float16, the loss is scaled before `backward` (see `precision.LossScale`): a gradient that is
    not finite, of a loss that is, is then the scale's fault while it is above 1. Such a step is left out and counted
    in `skipped` too, the scale halved, and no error raised.

    With `graph` the steps are one CUDA graph, captured at the third step after the start or `load_state_dict`, and
    the same bit for bit as those without.

    Of several `processes` each works off its share of every batch, and all take the same steps.
    """

    def __init__(
        self,
        objective: DenoisingObjective,
        data: Tensor,
        optim: Optim,
        *,
        stream: NoiseStream,
        seed: int,
        flip: bool = False,
        processes: Processes = Processes(),  # noqa: B008  it does not change
        scaled: bool = False,
        graph: bool = False,
    ) -> None:
        self.objective = objective
        self.optim = optim
        self.steps_done = 0
        self.images = 0
        self.skipped = 0
        self._device = data.device
        self._capturable = graph or (data.device.type == "cuda" and not processes.several)
        self.ema = EMA(objective.score, optim.ema, capturable=self._capturable)
        self._seed = seed
        self._stream = stream
        self._processes = processes
        if processes.several:
            objective.shard = (processes.rank, processes.world)
        self._replicated = processes.replicate(objective)
        if processes.sharded:
            self.ema.share()
        self._batches = Batches(data, optim.batch_size, seed, flip=flip)
        self._parameters = dict(objective.score.named_parameters())
        betas = (optim.beta1, optim.beta2)
        self.optimizer = torch.optim.Adam(
            self._parameters.values(), lr=optim.lr, betas=betas, eps=optim.eps, fused=True
        )
        # Numbers that change from step to step lie on the device, where a captured step reads them. The CPU's Adam
        # takes the rate in float64, the GPU's in float32 only.
        rate = torch.float64 if self._device.type == "cpu" else torch.float32
        self._rate = torch.zeros((), dtype=rate, device=self._device)
        self._number = torch.zeros(1, dtype=torch.float64, device=self._device)
        self._keep_rate_on_device()
        self._scale = LossScale(self._device) if scaled else None
        self._graph = graph
        self._take = self._captured()
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._finite = torch.zeros((), device=self._device)
        self._failure = torch.zeros(2 + len(self._parameters), dtype=torch.float64, device=self._device)

    def step(self) -> None:
        """Take one optimiser step."""
        self.steps_done += 1
        self.images += self.optim.batch_size
        self._summed += 1
        self._number.fill_(self.steps_done)
        self._rate.fill_(self.learning_rate(self.steps_done))
        self.ema.advance()
        self._take(next(self._batches))
        if self._device.type == "cpu":
            self.check_finite()

    def _update(self, x0: Tensor) -> None:
        """What a step does on the device: nothing here waits for a value or hands one in but through tensors, and all
        that stays is changed in place, as `cuda_graph.Replayed` needs it."""
        statistics = self._accumulate_gradients(x0)
        # a parameter that the loss does not reach has no gradient: a zero keeps its place
        gradients = [p.new_zeros(()) if p.grad is None else p.grad for p in self._parameters.values()]
        norms = shares.whole(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]
        if self._scale:
            norms = norms / self._scale.value
        norm = torch.linalg.vector_norm(norms)
        finite = torch.isfinite(statistics["loss"]) & torch.isfinite(norm)
        self._remember_failure(finite, statistics["loss"], norms)
        factor = (self.optim.clip / (norm + 1e-6)).clamp(max=1.0) if self.optim.clip else None
        if self._scale:
            factor = (1.0 if factor is None else factor) / self._scale.value
        if factor is not None:
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        # fused Adam reads this flag on the device and then leaves weights and moments alone
        found_inf = (~finite).float()
        self.optimizer.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.follow()
        self._add({**statistics, "grad_norm": norm}, finite)
        if self._scale:
            self._scale.update(found_inf)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 1, 2, ...: rises linearly over `optim.warmup` steps, then stays."""
        return self.optim.lr * min(1.0, step / self.optim.warmup) if self.optim.warmup else self.optim.lr

    def read_statistics(self) -> dict[str, float]:
        """Means over the steps since the last call of the objective's statistics and the gradient's norm."""
        self.check_finite()
        names = list(self._sums)
        finite, *sums = torch.stack([self._finite, *(self._sums[name] for name in names)]).tolist()
        self.skipped += self._summed - round(finite)
        if self._summed and not finite and self._failure[0]:
            raise self._first_failure()
        self._summed = 0
        for value in (self._finite, *self._sums.values()):
            value.zero_()
        means = (value / finite if finite else math.nan for value in sums)
        scale = {"loss_scale": self._scale.value.item()} if self._scale else {}
        return dict(zip(names, means, strict=True)) | scale

    def check_finite(self) -> None:
        """Raise NonFiniteError if a step so far was not finite, unless such steps are skipped."""
        if self.optim.nonfinite == "stop" and self._failure[0]:
            raise self._first_failure()

    def _first_failure(self) -> NonFiniteError:
        step, loss, *norms = self._failure.tolist()
        named = zip(self._parameters, norms, strict=True)
        first = next((name for name, norm in named if not math.isfinite(norm)), None)
        return NonFiniteError(int(step), loss, first)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and containers; of processes that share the weights all must call."""
        cuda = self._device.type == "cuda"
        state = {
            "steps_done": self.steps_done,
            "images": self.images,
            "score": self.objective.score.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "stream": self._stream.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self._device) if cuda else None,
            "sums": self._sums,
            "summed": self._summed,
            "finite": self._finite,
            "skipped": self.skipped,
            "loss_scale": self._scale.state_dict() if self._scale else None,
        }
        return shares.whole(state) if self._processes.sharded else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises RuntimeError where the model's shape is another."""
        shares.load(self.objective.score, state["score"])
        self.ema.load_state_dict(state["ema"])
        shares.load_optimizer(self.optimizer, state["optimizer"])
        self._keep_rate_on_device()
        self._batches.load_state_dict(state["batches"])
        self._stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self._device)
        self._sums = {name: value.to(self._device, copy=True) for name, value in state["sums"].items()}
        self._summed = state["summed"]
        self._finite = state["finite"].to(self._device, copy=True)
        self.skipped = state["skipped"]
        if self._scale and state.get("loss_scale"):
            self._scale.load_state_dict(state["loss_scale"])
        self.steps_done = state["steps_done"]
        self.images = state["images"]
        self._take = self._captured()  # Adam's moments are other tensors now

    def part_ways(self) -> None:
        """Give the processes other than the first random numbers of their own, for dropout.

        A function of seed, rank and step: called where a checkpoint is written or read, it makes a resumed run of as
        many processes go on as the undisturbed one does.
        """
        if not self._processes.first:
            key = f"{self._seed} {self._processes.rank} {self.steps_done}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"))

    def _accumulate_gradients(self, x0: Tensor) -> dict[str, Tensor]:
        parts = x0.chunk(self.optim.accumulate)
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts, 1):
            with self._processes.apart(self._replicated, number < len(parts)):
                result = self._replicated(part)
                loss = result.loss * self._scale.value if self._scale else result.loss
                (loss / len(parts)).backward()
            for name, value in result.stats.items():
                totals[name] = totals.get(name, 0) + value / len(parts)
        summed = self._processes.sum(torch.stack(list(totals.values())))
        return dict(zip(totals, summed, strict=True))

    def _remember_failure(self, finite: Tensor, loss: Tensor, norms: Tensor) -> None:
        """Keep (step, loss, norm of each gradient) of the first step that is not finite, but for those that the scale
        of the loss explains."""
        record = torch.cat([self._number, loss[None], norms])
        first = ~finite & (self._failure[0] == 0)
        if self._scale:
            first &= ~(torch.isfinite(loss) & self._scale.may_be_too_large())
        self._failure.copy_(torch.where(first, record, self._failure))

    def _add(self, statistics: dict[str, Tensor], finite: Tensor) -> None:
        self._finite.add_(finite)
        for name, value in statistics.items():
            kept = torch.where(finite, value, 0.0)
            if name in self._sums:
                self._sums[name].add_(kept)
            else:
                self._sums[name] = kept

    def _keep_rate_on_device(self) -> None:
        for group in self.optimizer.param_groups:
            group.update(lr=self._rate, capturable=self._capturable)

    def _captured(self) -> Callable[[Tensor], None]:
        return Replayed(self._update, self._device) if self._graph else self._update
