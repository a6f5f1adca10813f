"""The import contract of pyproject.toml holds on this tree, and notices each kind of violation when one is planted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"wm_graph": ".", "wm_kernels": "kernels", "wm_export": "export", "wm_runtimes": "runtimes"}
LAYERS = "wm_kernels <- wm_graph (without cli) <- (wm_export | wm_runtimes)"
ROOF = "nothing imports wm_graph.cli"
CORE = "the core imports no exporter or runtime library"


def lint_imports(tree):
    """Run import-linter over `tree` alone, with nothing of an installed wm-graph in sight."""
    path = os.pathsep.join(str(tree / folder) for folder in FOLDERS.values())
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", "--config", tree / "pyproject.toml"]
    return subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}, capture_output=True, text=True)


def plant(tree, module, statement):
    """Append `statement` to `module`, given by its path in the tree."""
    with (tree / module).open("a") as file:
        file.write(f"\n{statement}\n")


@pytest.fixture
def tree(tmp_path):
    """A copy of the Python sources, free to spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, folder in FOLDERS.items():
        shutil.copytree(ROOT / folder / package, tmp_path / folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_this_tree_keeps_the_contract(tree):
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("runtimes/wm_runtimes/__init__.py", "import wm_export", LAYERS),
        ("export/wm_export/__init__.py", "import wm_runtimes", LAYERS),
        ("wm_graph/model.py", "import wm_runtimes", LAYERS),
        ("wm_graph/model.py", "def later():\n    from wm_export import anything", LAYERS),
        ("kernels/wm_kernels/__init__.py", "import wm_graph.errors", LAYERS),
        ("wm_graph/model.py", "import wm_graph.cli", ROOF),
        ("runtimes/wm_runtimes/__init__.py", "import wm_graph.cli", ROOF),
        ("wm_graph/config.py", "import onnxruntime", CORE),
        ("kernels/wm_kernels/rope/definition.py", "import onnxscript", CORE),
    ],
)
def test_a_planted_violation_is_noticed(tree, module, statement, broken):
    plant(tree, module, statement)
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert broken in [line.split(" BROKEN")[0] for line in result.stdout.splitlines()], result.stdout
