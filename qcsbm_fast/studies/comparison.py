"""Evaluated runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcsbm_fast.studies.evaluation import labelled, newest, samples_of
from qcsbm_fast.studies.table import write_json
from qcsbm_fast.train.errors import RunError
from qcsbm_fast.train.folder import open_run
from qcsbm_fast.train.stats import read as read_statistics


def compare(runs: Sequence[Path], out: Path) -> str:
    """The table of the runs' settings that differ and their values, a column per run, in Markdown.

    Writes it to `out` as table.md, with comparison.json, comparison.png and curves.png.

    Raises RunError where a run has not been evaluated, or one is named twice.
    """
    from qcsbm_fast.studies import evaluation_plots

    if len({run.resolve() for run in runs}) < len(runs):
        raise RunError("a run is named twice")
    results = [newest(open_run(run).path) for run in runs]
    names = _short_names(runs)
    settings = [_flatten(asdict(open_run(run).read_config())) for run in runs]
    table = _table(names, settings, results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table)
    write_json(out / "comparison.json", dict(zip(names, results, strict=True)))
    evaluation_plots.side_by_side(
        out / "comparison.png",
        {name: result["levels"] for name, result in zip(names, results, strict=True)},
        {name: samples_of(run, result) for name, run, result in zip(names, runs, results, strict=True)},
    )
    statistics = {name: read_statistics(run / "stats.jsonl") for name, run in zip(names, runs, strict=True)}
    evaluation_plots.training_curves(out / "curves.png", statistics)
    return table


def _short_names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, or the whole paths where two are the same."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table(names: list[str], settings: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines.append(f"| step | {' | '.join(str(result['step']) for result in results)} |")
    for key in settings[0]:
        values = [flat.get(key) for flat in settings]
        if len({str(value) for value in values}) > 1:
            lines.append(f"| {key} | {' | '.join(map(str, values))} |")
    columns = [labelled(result["values"]) for result in results]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [_cell(*column.get(label, (None, None))) for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(mean: float | None, error: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.1g}"
