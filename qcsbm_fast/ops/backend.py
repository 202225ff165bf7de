"""Loads the compiled kernels and knows which are live.

`QCSBM_BACKEND=reference` runs every op in plain torch, `native` insists on compiled kernels; unset, an op runs its
kernel where there is one and the reference elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

BACKENDS = ("reference", "native")


def _load() -> tuple[str | None, str | None]:
    """The backend asked for, and why the compiled kernels are not loaded (None: they are)."""
    wanted = os.environ.get("QCSBM_BACKEND") or None
    if wanted not in (None, *BACKENDS):
        raise ValueError(f"QCSBM_BACKEND: expected one of {', '.join(BACKENDS)}, got {wanted!r}")
    if wanted == "reference":
        return wanted, "switched off by QCSBM_BACKEND=reference"
    found = sorted(Path(__file__).parents[1].glob("_ops*.so"))
    if not found:
        reason = "the extension was not built: reinstall with `pip install .` where a C++ compiler is"
    else:
        try:
            torch.ops.load_library(str(found[0]))
            return wanted, None
        except OSError as error:
            reason = f"{found[0].name} does not load: {error}"
    if wanted == "native":
        raise ImportError(f"QCSBM_BACKEND=native, but there are no compiled kernels: {reason}")
    return wanted, reason


WANTED, WHY_NOT_NATIVE = _load()
HAS_TRITON = WANTED != "reference" and importlib.util.find_spec("triton") is not None


def has_kernel(name: str, device: str) -> bool:
    """Whether op `name` has a compiled kernel of its own for `device` ("cpu" or "cuda")."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"qcsbm::{name}", device.upper())


def require_native(name: str, device: str) -> None:
    """Raises where the user insists on compiled kernels and op `name` has none for `device`."""
    if not has_kernel(name, device):
        raise NotImplementedError(
            f"{name}: QCSBM_BACKEND=native, but there is no compiled kernel for {device}; unset QCSBM_BACKEND"
        )
