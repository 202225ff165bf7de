"""Weights in the precision of autocast, made once for all steps of a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_casts() -> Iterator[None]:
    """What autocast makes of weights that take gradients is kept from one call of a network to the next.

    Autocast forgets it at the end of the outermost region, which for a score is one call: a sampler of n steps would
    cast every weight n times. Under this, which changes no precision itself, the weights must stay as they are.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
