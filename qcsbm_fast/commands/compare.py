"""`qcsbm compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qcsbm_fast.train.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """Lay evaluated runs side by side: settings that differ, values with standard errors, curves.

    - qcsbm compare runs/digits-unconstrained-1 runs/digits-quasi-conservative-1
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders that `qcsbm evaluate` has measured."""
    out: Path = Path("runs/comparison")
    """Folder for table.md, comparison.json and the pictures."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("compare needs a RUN at least")


def run(command: Command) -> None:
    from qcsbm_fast.studies import comparison

    print(comparison.compare(command.runs, command.out))
    print(f"Table, numbers and pictures: {command.out}")
