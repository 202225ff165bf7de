"""The record of a run: `stats.jsonl`, one line per step that was logged, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, float]


class Statistics:
    """Rows of numbers by step, kept in `folder/stats.jsonl` and sent to `folder/tensorboard`.

    `start` is the step that the run stands at: rows beyond it, which an earlier process wrote after its last
    checkpoint, are dropped, so that no step appears twice.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._path = folder / "stats.jsonl"
        self.rows = [row for row in read(self._path) if row["step"] <= start]
        self._rewrite()
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Row) -> None:
        """Add `values` to the row of `step`, which is the last row or a new one."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(values)
            self._rewrite()
        else:
            self.rows.append({"step": step, **values})
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(_tag(name), value, step)

    def close(self) -> None:
        self._writer.close()

    def _rewrite(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(temporary, self._path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a `stats.jsonl` up to a line that is damaged, such as a last one that was cut short."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def _tag(name: str) -> str:
    return f"held-out/{name.removeprefix('test_')}" if name.startswith("test_") else f"train/{name}"
