"""Progress of the probability-flow ODE: the log-noise that the slowest sample has covered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def log_noise_bar(
    start: float, end: float, *, name: str, shown: bool
) -> Iterator[Callable[[float], None] | None]:
    """A bar over the log-noise from `start` to `end`; what it gives moves the bar to a log-noise, None where not shown.

    An adaptive solver's number of steps is not known beforehand, but how much of the way is left is.
    """
    if not shown:
        yield None
        return
    form = "{l_bar}{bar}| log-noise {n:.1f}/{total:.1f} [{elapsed}<{remaining}]"
    with tqdm(total=abs(end - start), desc=name, bar_format=form) as bar:
        yield lambda at: _move(bar, abs(at - start))


def _move(bar: tqdm, covered: float) -> None:
    bar.update(covered - bar.n)
