"""Networks whose features images are compared by, found by the name that the command line gives."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcsbm_fast.metrics import classifier_score, frechet_distance, kernel_distance
from qcsbm_fast.train.errors import RunError

INCEPTION = "inception"
_WEIGHTS = (
    "weights-inception-2015-12-05-6726825d.pth"  # as torch.hub stores it; ends with its digest's beginning
)

Network = Callable[[Tensor], Any]
"""Images `(b, C, H, W)` in [0, 1] to features `(b, F)`, or to the pair of them and logits `(b, classes)`."""


def find(name: str, device: torch.device) -> Network:
    """The network called `name`: "inception", or `module:name` of a function or module of the user's.

    Raises RunError where there is none, with what to do.
    """
    if name == INCEPTION:
        return _inception(device)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise RunError(f"--features should be {INCEPTION} or MODULE:FUNCTION, got {name}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        network = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RunError(f"--features {name}: {error}; modules are looked for in {here} first") from error
    finally:
        sys.path.remove(here)
    if isinstance(network, torch.nn.Module):
        return network.eval().to(device)
    if not callable(network) or isinstance(network, type):
        raise RunError(
            f"--features {name}: expected a function or a torch module, got {type(network).__name__}"
        )
    return network


def compare(name: str, network: Network, real: Tensor, fake: Tensor) -> dict[str, tuple[float, float | None]]:
    """Distances between `real` and `fake (N, C, H, W)` with their standard errors, called what they are.

    FID, KID and the Inception score are those of Inception; other networks have distances of their own. The score is
    there where the network gives logits.

    Raises RunError where it does not give features `(b, F)` of the images.
    """
    names = _NAMES if name == INCEPTION else {key: f"{text} ({name})" for key, text in _OTHERS.items()}
    (features, _), (drawn, logits) = (_outputs(name, network, images) for images in (real, fake))
    kernel = kernel_distance(features, drawn)
    found: dict[str, tuple[float, float | None]] = {
        names["frechet"]: (frechet_distance(features, drawn), None),
        names["kernel"]: (kernel.mean, kernel.error),
    }
    if logits is not None:
        found[names["score"]] = (classifier_score(logits), None)
    return found


_NAMES = {"frechet": "FID", "kernel": "KID", "score": "Inception score"}
_OTHERS = {"frechet": "Frechet distance", "kernel": "kernel distance", "score": "classifier score"}


@torch.no_grad()
def _outputs(
    name: str, network: Network, images: Tensor, batch_size: int = 100
) -> tuple[Tensor, Tensor | None]:
    parts = []
    for batch in images.split(batch_size):
        given = network(batch)
        columns = given if isinstance(given, tuple) else (given,)
        for column in columns:
            if not isinstance(column, Tensor) or column.dim() != 2 or len(column) != len(batch):
                got = tuple(column.shape) if isinstance(column, Tensor) else type(column).__name__
                raise RunError(
                    f"--features {name}: expected features ({len(batch)}, F), or the pair of them and logits, "
                    f"of images {tuple(batch.shape)}, got {got}"
                )
        parts.append(columns)
    features, *logits = (torch.cat(column).double().cpu() for column in zip(*parts, strict=True))
    return features, logits[0] if logits else None


def _inception(device: torch.device) -> Network:
    """torchmetrics' Inception network, its weights from torch.hub's folder: features and logits."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not weights.is_file():
        raise RunError(
            f"--features {INCEPTION}: its weights are not at {weights}\n"
            f"Nothing is downloaded; {_WEIGHTS} is published by torch-fidelity"
        )
    if not hashlib.sha256(weights.read_bytes()).hexdigest().startswith(weights.stem.rpartition("-")[2]):
        raise RunError(f"{weights}: not the published weights: the checksum does not match")
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception", ["2048"], str(weights)).to(device)
    except ImportError as error:
        raise RunError(
            f"--features {INCEPTION}: {error}\nInstall: pip install torchmetrics torch-fidelity"
        ) from error

    def features_and_logits(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        features = network(pixels)
        return features, features @ network.fc.weight.T  # without bias, as the Inception score is defined

    return features_and_logits
