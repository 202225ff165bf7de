"""Tables of the studies."""

from __future__ import annotations

from collections.abc import Sequence


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean and, of several values, half their range as the spread."""
    mean = f"{sum(values) / len(values):.4g}"
    spread = float(f"{(max(values) - min(values)) / 2:.1g}")  # 10 and not 1e+01
    return mean if len(values) == 1 else f"{mean} ± {spread:g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
