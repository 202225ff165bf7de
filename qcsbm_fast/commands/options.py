"""What the commands share in declaring and reading their options."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import tyro

FLAT = tyro.conf.arg(name="")
"""Annotation of a nested dataclass whose options carry no prefix."""


def option(metavar: str, default: str) -> object:
    """Annotation of an option with its placeholder and what the help says of its default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default)


def last_value(arguments: Sequence[str], name: str) -> str | None:
    """The value of option `name` in `--name value` or `--name=value`, the last one given."""
    value = None
    for argument, following in pairwise((*arguments, "")):
        if argument == name and following:
            value = following
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value
