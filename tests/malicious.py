"""A pickle that runs code where it is read: it touches a file."""

from __future__ import annotations

from pathlib import Path


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
