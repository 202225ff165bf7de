"""What holds for the project as a whole: linter, formatter, types, import directions, start-up time."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which modules of the package each layer may import: its own and the lower ones.
LAYERS = [
    {"kernels"},
    {"ops"},
    {"dual", "foreign", "rules", "fused_rules", "linearize", "random", "sde", "nn", "cuda_graph"},
    {"penalty", "divergence", "score", "objectives", "sampling", "likelihood", "metrics", "data", "info"},
    {"train"},
    {"studies", "compat"},
    {"commands"},
    {"cli", "__main__"},
]


def run(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_linter_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", ".")


def test_code_is_formatted():
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types_hold():
    run(sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable)


def imports_of(path: Path) -> set[str]:
    """Top-level modules of the package that a file of it imports, and foreign `tests` and `bench`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]
        else:
            continue
        for name in names:
            if name[0] == "qcsbm_fast" and len(name) > 1:
                found.add(name[1])
            elif name[0] in ("tests", "bench"):
                found.add(name[0])
    return found


def test_imports_go_one_way():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in sorted((ROOT / "qcsbm_fast").rglob("*.py")):
        own = path.relative_to(ROOT / "qcsbm_fast").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for imported in imports_of(path):
            assert imported not in ("tests", "bench"), f"{path}: the package imports {imported}"
            if imported in level:
                assert level[imported] <= level[own], f"{path}: {own} imports {imported}, which is above it"


def test_double_backward_stands_in_one_file():
    calls = {
        path.name
        for path in (ROOT / "qcsbm_fast").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "create_graph"
    }
    assert calls == {"foreign.py"}


def test_source_archive_holds_the_kernels(monkeypatch):
    filelist = pytest.importorskip("setuptools._distutils.filelist")
    monkeypatch.chdir(ROOT)
    files = filelist.FileList()
    files.findall()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= set(files.files)


@pytest.mark.parametrize("heavy", ["matplotlib", "scipy", "sklearn", "tensorboard", "tyro", "pydantic"])
def test_import_leaves_heavy_packages_alone(heavy):
    program = f"import qcsbm_fast, sys; assert not any(m.split('.')[0] == {heavy!r} for m in sys.modules)"
    run(sys.executable, "-c", program)


def test_import_takes_less_than_0_3_seconds_beyond_torch():
    program = "import time, torch; start = time.perf_counter(); import qcsbm_fast; print(time.perf_counter() - start)"
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        )
        for _ in range(5)
    ]
    assert min(seconds) < 0.3
