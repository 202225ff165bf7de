"""What is installed, how it was built, and which backends are live."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib import metadata

import torch

from .ops import backend
from .ops.registry import OPS


def build_record() -> dict[str, str]:
    """How the binary modules were built; empty if they were not."""
    if importlib.util.find_spec("qcsbm_fast._host") is None:
        return {}
    from . import _host

    return json.loads(_host.build_record())


def _instruction_set() -> str:
    from . import _host

    active, best = _host.active_isa(), _host.best_isa()
    return active if active == best else f"{active} (QCSBM_CPU_CAPABILITY; the processor has {best})"


def backends() -> dict[str, str]:
    """For each backend "live", or why it is not."""
    count = sum(backend.has_kernel(name, "cpu") for name in OPS)
    cuda = sum(backend.has_kernel(name, "cuda") and op.triton is None for name, op in OPS.items())
    record = build_record()
    if backend.WHY_NOT_NATIVE is not None:
        native = f"off: {backend.WHY_NOT_NATIVE}"
    else:
        native = f"live: {count} of {len(OPS)} ops, {_instruction_set()}, {torch.get_num_threads()} threads"
    if cuda and torch.cuda.is_available():
        gpu = f"live: {cuda} of {len(OPS)} ops on {torch.cuda.get_device_name()}"
    elif not torch.cuda.is_available():
        gpu = "off: torch sees no GPU (torch.cuda.is_available() is False)"
    elif record.get("cuda") == "built":
        gpu = "off: this version has no CUDA kernels yet; GPU tensors run the reference"
    else:
        gpu = f"off: {record.get('cuda') or 'the extension was not built'}"
    if not importlib.util.find_spec("triton"):
        triton = "off: the package triton is not installed"
    elif not torch.cuda.is_available():
        triton = "off: torch sees no GPU"
    elif not backend.HAS_TRITON:
        triton = "off: switched off by QCSBM_BACKEND=reference"
    else:
        triton = f"live: {sum(op.triton is not None for op in OPS.values())} of {len(OPS)} ops"
    return {
        "reference": "live (plain torch, any device)",
        "CPU kernels": native,
        "CUDA kernels": gpu,
        "Triton kernels": triton,
    }


def report() -> str:
    """The text of `qcsbm info`."""
    packages = [
        f"  {name:<14}{metadata.version(name)}"
        for name in ("qcsbm-fast", "torch", "numpy")
        if _installed(name)
    ]
    record = [f"  {key.replace('_', ' '):<20}{value}" for key, value in build_record().items() if value]
    lines = ["Versions", f"  {'python':<14}{platform.python_version()} on {platform.machine()}", *packages]
    lines += ["Built with", *(record or ["  the extension was not built"])]
    lines += ["Backends", *(f"  {name:<16}{state}" for name, state in backends().items())]
    return "\n".join(lines)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
