"""`qcsbm info`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Print versions, how the package was built, and which backends are live."""


def run(_: Command) -> None:
    from qcsbm_fast import info

    print(info.report())
