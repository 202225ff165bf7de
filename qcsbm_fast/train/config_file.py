"""Settings as YAML files, by the safe loader and dumper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qcsbm_fast.train.checkpoint import write_whole
from qcsbm_fast.train.config import Config, from_mapping, to_mapping
from qcsbm_fast.train.errors import ConfigError
from qcsbm_fast.train.presets import PRESETS


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which as YAML 1.2 does reads `1e-3` as a number and not as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def read(path: Path, preset: str | None = None) -> Config:
    """The settings in a YAML file, which may be few: the others come from `preset`.

    `preset` defaults to the one that the file names, and that to "digits". Raises ConfigError naming the file
    and what is wrong with it.
    """
    mapping = _load(path)
    name = preset or mapping.get("preset", "digits")
    if name not in list(PRESETS):  # a list, since what YAML gives may have no hash
        raise ConfigError(f"{path}: preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    try:
        return from_mapping({**mapping, "preset": name}, PRESETS[name])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write(path: Path, config: Config) -> None:
    """Write every setting, or leave the file as it is. Raises CheckpointError where it cannot be written."""
    text = yaml.safe_dump(to_mapping(config), sort_keys=False)
    write_whole(path, lambda file: file.write(text.encode()))


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected settings such as `seed: 1`, got {type(loaded).__name__}")
    return loaded
