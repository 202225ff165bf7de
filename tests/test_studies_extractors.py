"""Images compared by a network's features: whose network, which numbers, what they are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcsbm_fast.metrics import classifier_score, frechet_distance, kernel_distance
from qcsbm_fast.studies import extractors
from qcsbm_fast.train.errors import RunError

CPU = torch.device("cpu")
REAL, FAKE = (
    torch.rand(120, 1, 6, 6, generator=torch.Generator().manual_seed(i)) ** (i + 1) for i in range(2)
)
MODULE = """
import torch

def features(images):
    return images.flatten(1)[:, :5]

def both(images):
    return features(images), 9 * images.flatten(1)[:, 5:8]

def images_again(images):
    return images

class Layer(torch.nn.Dropout):
    def forward(self, images):
        return super().forward(images).flatten(1)

layer = Layer(0.5)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"networks_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def flat(images: Tensor) -> Tensor:
    return images.flatten(1).double()


def test_a_users_function_gives_distances_under_its_name(module: str) -> None:
    name = f"{module}:features"
    found = extractors.compare(name, extractors.find(name, CPU), REAL, FAKE)
    assert found.keys() == {f"Frechet distance ({name})", f"kernel distance ({name})"}
    a, b = flat(REAL)[:, :5], flat(FAKE)[:, :5]
    assert found[f"Frechet distance ({name})"] == (pytest.approx(frechet_distance(a, b)), None)
    assert found[f"kernel distance ({name})"] == pytest.approx(tuple(kernel_distance(a, b)))
    name = f"{module}:both"
    with_logits = extractors.compare(name, extractors.find(name, CPU), REAL, FAKE)
    score = with_logits[f"classifier score ({name})"][0]
    assert score == pytest.approx(classifier_score(9 * flat(FAKE)[:, 5:8]), rel=1e-6)
    assert with_logits[f"Frechet distance ({name})"] == found[f"Frechet distance ({module}:features)"]


def test_a_module_is_in_evaluation_mode(module: str) -> None:
    network = extractors.find(f"{module}:layer", CPU)
    assert torch.equal(network(REAL), REAL.flatten(1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("features", "--features should be inception or MODULE:FUNCTION, got features"),
        ("{}:absent", "has no attribute 'absent'"),
        ("absent_module:f", "No module named 'absent_module'; modules are looked for in"),
        ("{}:number", "expected a function or a torch module, got int"),
        ("{}:Layer", "expected a function or a torch module, got type"),
        ("{}:images_again", r"expected features \(100, F\).* got \(100, 1, 6, 6\)"),
    ],
)
def test_what_is_no_extractor_is_refused(module: str, name: str, message: str) -> None:
    name = name.format(module)
    with pytest.raises(RunError, match=message):
        extractors.compare(name, extractors.find(name, CPU), REAL, FAKE)


class Inception(torch.nn.Module):
    """In place of torchmetrics': looks at what it is given."""

    def __init__(self, name: str, features: list[str], weights: str) -> None:
        super().__init__()
        assert features == ["2048"]
        assert Path(weights).is_file()
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 6, 6)
        assert images.max() > 200
        return images[:, 2].flatten(1)[:, :4].float() / 255


def test_inceptions_distances_have_their_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Inception)
    with pytest.raises(RunError, match=r"weights are not at .*checkpoints.*\nNothing is downloaded"):
        extractors.find("inception", CPU)
    (tmp_path / "checkpoints").mkdir()
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    for name, content in ((f"weights-{'0' * 8}.pth", b"other"), (f"weights-{digest}.pth", b"weights")):
        monkeypatch.setattr(extractors, "_WEIGHTS", name)
        (tmp_path / "checkpoints" / name).write_bytes(content)
        if content == b"other":
            with pytest.raises(RunError, match="the checksum does not match"):
                extractors.find("inception", CPU)
    network = extractors.find("inception", CPU)
    found = extractors.compare("inception", network, REAL, FAKE)
    assert found.keys() == {"FID", "KID", "Inception score"}
    a, b = ((images * 255).round().double().flatten(1)[:, :4] / 255 for images in (REAL, FAKE))
    assert found["FID"][0] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert found["KID"] == pytest.approx(tuple(kernel_distance(a, b)), rel=1e-3, abs=1e-6)
    assert 1 <= found["Inception score"][0] <= 3
