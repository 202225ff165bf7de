"""`qcsbm sample`, `evaluate` and `compare` on two small runs: shared and resumed jobs, tables, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from command_line import call
from qcsbm_fast import cli
from qcsbm_fast.train import checkpoint, sample

TINY = """
    --steps 4 --optim.batch-size 32 --log-every 2 --device cpu --evaluation.points 20 --evaluation.levels 2
    --evaluation.every 2 --sampling.count 20 --sampling.steps 5 --optim.ema 0
"""
POINTS = f"--preset checkerboard --data.points 300 {TINY}"
IMAGES = f"--preset digits --model.network image-mlp --model.width 16 --model.depth 1 {TINY}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *POINTS.split(), "--out", str(folder / "points")]) == 0
    assert cli.main(["train", *IMAGES.split(), "--out", str(folder / "images")]) == 0
    other = ["--kind", "unconstrained", "--out", str(folder / "other")]
    assert cli.main(["train", *IMAGES.split(), *other]) == 0
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def samples(path: str) -> np.ndarray:
    return np.load(path)["samples"]


def test_shards_and_batches_give_the_samples_of_one_job(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*options: object) -> tuple[int, str, str]:
        return call(capsys, "sample", "points", "--count", 23, "--device", "cpu", *options)

    assert draw("--out", "whole.png")[0] == 0
    assert draw("--out", "batched.png", "--batch-size", 5)[0] == 0
    np.testing.assert_allclose(samples("batched.npz"), samples("whole.npz"), rtol=1e-4, atol=1e-4)

    shared = ("--out", "shared.png", "--batch-size", 5, "--shard")
    _, output, _ = draw(*shared, "1/2")
    assert "Shard 1/2 is done; the samples are written when the other shards are" in output
    assert not Path("shared.npz").exists()
    _, output, _ = draw(*shared, "0/2")
    assert "23 samples: shared.png and shared.npz" in output
    assert np.array_equal(samples("shared.npz"), samples("batched.npz"))
    assert not Path("shared.parts").exists()


def test_an_interrupted_job_draws_only_what_is_missing(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ("sample", "images", "--count", 10, "--batch-size", 4, "--device", "cpu", "--out", "job.png")
    draw, counts = sample.draw, []

    def stop_at_third(*args: object, count: int, **options: object) -> torch.Tensor:
        counts.append(count)
        if len(counts) == 3:
            raise KeyboardInterrupt
        return draw(*args, count=count, **options)  # pyright: ignore

    monkeypatch.setattr(sample, "draw", stop_at_third)
    assert call(capsys, *job)[0] == 130
    status, _, errors = call(capsys, *job, "--seed", 1)
    assert status == 1
    assert "samples of another job are unfinished here (seed was 0, now 1)" in errors
    assert call(capsys, *job)[0] == 0
    assert counts == [4, 4, 2, 2]  # the two whole batches were not drawn again
    monkeypatch.undo()
    monkeypatch.chdir(runs)
    call(capsys, *job[:-1], "straight.png")
    assert np.array_equal(samples("job.npz"), samples("straight.npz"))
    assert samples("job.npz").shape == (10, 1, 8, 8)


def test_the_best_checkpoint_by_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*options: object) -> tuple[int, str, str]:
        return call(capsys, "sample", "images", "--count", 3, "--device", "cpu", *options)

    folder = runs / "images" / "checkpoints"
    state = checkpoint.load(checkpoint.find(folder, 4))
    state["trainer"]["steps_done"] = 3
    for name, value in state["trainer"]["ema"]["module"].items():
        state["trainer"]["ema"]["module"][name] = value * 0.5
    checkpoint.save_best(folder, state)
    assert draw("--checkpoint", "best", "--out", "best.png")[0] == 0
    assert draw("--out", "newest.png")[0] == 0
    assert np.abs(samples("best.npz") - samples("newest.npz")).max() > 1e-3
    (folder / checkpoint.BEST).unlink()
    status, _, errors = draw("--checkpoint", "best")
    assert status == 1
    assert "no best.pt here: nothing was evaluated yet" in errors
    assert draw("--checkpoint", "worst")[0] == 2


def test_a_gif_shows_the_samples_coming(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, options, frames in (
        ("images", ["--steps", 12], 12),
        ("points", ["--sampler", "heun", "--steps", 6], 6),
    ):
        arguments = (run, "--count", 9, "--gif", "--device", "cpu", "--out", "film.png", *options)
        status, _, errors = call(capsys, "sample", *arguments)
        assert status == 0, errors
        with Image.open("film.gif") as film:
            assert film.n_frames == frames
            first = np.asarray(film.convert("L"))
            film.seek(frames - 1)
            assert not np.array_equal(np.asarray(film.convert("L")), first)
        Path("film.gif").unlink()


def test_evaluate_and_compare(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--points", 30, "--levels", 2, "--oracle-points", 10, "--nll-points", 4, "--samples", 20)
    for run, pictures, names in (
        ("points", ("asymmetry", "samples", "field"), {"nll"}),
        ("images", ("asymmetry", "samples", "neighbours"), {"bits_per_dim"}),
    ):
        status, output, errors = call(capsys, "evaluate", run, *few, "--repeats", 2, "--device", "cpu")
        assert status == 0, errors
        out = Path(run) / "evaluation" / "4"
        result = json.loads((out / "evaluation.json").read_text())
        shared = {"dsm", "asym", "nasym", "score_error", "precision", "recall", "density", "coverage"}
        assert shared | names <= result["values"].keys()
        assert all(np.isfinite(mean) for mean, _ in result["values"].values())
        for name in ("dsm", "asym", "nasym"):
            assert result["values"][name][0] == pytest.approx(np.mean(result["levels"][name]))
        assert (out / "table.md").read_text() in output
        for picture in pictures:
            assert imread(out / f"{picture}.png")[..., :3].std() > 0.01, picture
        # the last step's own evaluation, of other points, is of the same size
        row = json.loads((Path(run) / "stats.jsonl").read_text().splitlines()[-1])
        assert result["values"]["dsm"][0] == pytest.approx(row["test_dsm"], rel=0.5)

    Path("by_mean.py").write_text("def mean(images): return images.flatten(1)[:, 20:30]")
    by_mean = ("--features", "by_mean:mean")
    status, output, errors = call(
        capsys, "evaluate", "images", *few, "--repeats", 1, "--device", "cpu", *by_mean
    )
    assert status == 0, errors
    assert "| Frechet distance (by_mean:mean) | " in output
    assert "Frechet distance (by_mean:mean)" in json.loads((out / "evaluation.json").read_text())["values"]
    status, _, errors = call(capsys, "evaluate", "points", *few, "--device", "cpu", *by_mean)
    assert (status, "--features is for images" in errors) == (1, True)

    status, _, errors = call(capsys, "compare", "images", "other")
    assert status == 1
    assert "other: not evaluated yet\nRun: qcsbm evaluate other" in errors
    assert call(capsys, "evaluate", "other", *few, "--repeats", 1, "--device", "cpu")[0] == 0
    status, output, errors = call(capsys, "compare", "images", "other", "--out", "both")
    assert status == 0, errors
    assert "| | images | other |" in output
    assert "| model.kind | quasi-conservative | unconstrained |" in output
    assert "| model.width |" not in output  # only what differs
    assert json.loads(Path("both/comparison.json").read_text()).keys() == {"images", "other"}
    for picture in ("comparison", "curves"):
        assert imread(f"both/{picture}.png")[..., :3].std() > 0.01


def test_reproduce_has_a_subcommand_per_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        "trajectories --errors 0 0.001 --seeds 0 --steps 3 --points 2",
        "autoencoder --iterations 3",
    ):
        status, output, errors = call(capsys, "reproduce", *arguments.split(), "--fast", "--out", "study")
        assert status == 0, errors
        assert Path("study/table.md").read_text() in output
        assert "Table, numbers and pictures in study" in output
    for name in ("toy2d", "trajectories", "autoencoder", "images"):
        _, output, _ = call(capsys, "reproduce", name, "--help")
        assert "--fast" in output
        assert f"qcsbm reproduce {name}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reproduce", "toy2d, trajectories, autoencoder, images"),
        ("sample points --shard 3/2", "--shard should be I/N with 0 <= I < N, such as 0/4, got 3/2"),
        ("sample points --shard two", "--shard should be I/N"),
        ("sample points --batch-size 0", "--batch-size should be 1 or more, got 0"),
        ("sample points --sampler pc --predictor exponential", "not for VE"),
        ("evaluate points --levels 0", "--levels should be 1 or more, got 0"),
        ("evaluate absent", "absent: not a run folder"),
        ("compare images images", "a run is named twice"),
        ("compare", "RUN"),
    ],
)
def test_refusals(runs: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    status, output, errors = call(capsys, *arguments.split())
    assert status in (1, 2)
    assert message in errors
    assert errors.startswith("qcsbm: ")
    assert "Traceback" not in errors + output
