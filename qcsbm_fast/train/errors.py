"""What can go wrong in a run through no fault of the program; the messages are for the user."""

from __future__ import annotations


class ConfigError(ValueError):
    """Settings that cannot be used; the message names each field, what was expected and what was given."""


class RunError(RuntimeError):
    """A run that cannot be made, continued or sampled as asked; the message says why and what to do."""


class CheckpointError(RunError):
    """A checkpoint that is missing, damaged, or not made of plain tensors and containers."""


class NonFiniteError(RunError):
    """The loss or a gradient became infinite or not a number; the weights are those from before that step.

    `step` is the first such step, `loss` its loss, `parameter` the first parameter with a non-finite
    gradient, None where every gradient is finite and the loss alone is not.
    """

    def __init__(self, step: int, loss: float, parameter: str | None) -> None:
        self.step = step
        self.loss = loss
        self.parameter = parameter
        where = f"the gradient of {parameter} is not finite" if parameter else "every gradient is finite"
        super().__init__(f"step {step}: the loss is {loss:g} and {where}")
