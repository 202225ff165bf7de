"""Tables and numbers of the studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcsbm_fast.train.checkpoint import write_whole


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean and, of several values, half their range as the spread."""
    mean = f"{sum(values) / len(values):.4g}"
    spread = float(f"{(max(values) - min(values)) / 2:.1g}")  # 10 and not 1e+01
    return mean if len(values) == 1 else f"{mean} ± {spread:g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_json(path: Path, value: Any) -> None:
    """Write `value`, whole or not at all: what an interrupted study finds there it takes as it is."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))
