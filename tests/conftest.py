import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from hypothesis_profiles import COMPARED, KINDS

# "ci" is the default everywhere, so that a failure seen in one place is seen in all; HYPOTHESIS_PROFILE=deep searches on.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if find_spec("torch") is not None:
    import torch

    # Sums split by threads: the same number gives the same bits on every machine. `make test` runs a process per core.
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Kernels run in Triton's interpreter then. Triton asks when it is imported, and torch's compiler imports it: it must be said first.
        os.environ["TRITON_INTERPRET"] = "1"

POOL = "WM_POOL"  # a folder in which several runs share the bundles of the pool; see deep.py
COUNTS = "WM_COUNTS"  # a file to write the numbers of compared examples to
LEAST = "WM_LEAST_COMPARED"  # fail the run that compares fewer examples, or less than LEAST_SESSIONS of all on sessions
LEAST_SESSIONS = 0.3


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dozen small models, each exported once per session; see model_pool.py."""
    from model_pool import Pool

    shared = os.environ.get(POOL)
    return Pool(Path(shared) if shared else tmp_path_factory.mktemp("pool"))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a process of pytest-xdist has compared."""
    COMPARED.update(getattr(node, "workeroutput", {}).get(COUNTS, {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write how many examples compared implementations, and fail a run that was to compare more."""
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one sums them up
        session.config.workeroutput[COUNTS] = dict(COMPARED)
        return
    if path := os.environ.get(COUNTS):
        Path(path).write_text(json.dumps({kind: COMPARED[kind] for kind in KINDS}))
    if too_few():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line: how many hypothesis examples compared two or more implementations and agreed, and how many of them on sessions."""
    total, sessions = COMPARED.total(), COMPARED["session"]
    if total:
        terminalreporter.write_line(f"hypothesis: {total} comparisons, {sessions} on sessions ({sessions / total:.0%})")
    if reason := too_few():
        terminalreporter.write_line(reason)


def too_few() -> str:
    """Why this run compared too little, or nothing."""
    least = int(os.environ.get(LEAST, "0"))
    total = COMPARED.total()
    enough = not least or (total >= least and COMPARED["session"] >= LEAST_SESSIONS * total)
    return "" if enough else f"FAILED: {LEAST} expects {least} comparisons, {LEAST_SESSIONS:.0%} of them on sessions"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function: configuration, dtype -> (checkpoint, bundle) with `sharp_params`, made once."""
    from helpers import sharp_params
    from wm_export import export_bundle
    from wm_graph import save_checkpoint

    folders: dict[Any, tuple[Path, Path]] = {}

    def make(cfg: Any, dtype: str = "fp32") -> tuple[Path, Path]:
        if (cfg, dtype) not in folders:
            root = tmp_path_factory.mktemp("made")
            save_checkpoint(root / "checkpoint", cfg, sharp_params(cfg))
            export_bundle(root / "checkpoint", root / "bundle", dtype=dtype)
            folders[cfg, dtype] = root / "checkpoint", root / "bundle"
        return folders[cfg, dtype]

    return make
