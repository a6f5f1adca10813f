import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# "ci" is the default everywhere, so that a failure seen in one place is seen in all; HYPOTHESIS_PROFILE=deep searches on.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if find_spec("torch") is not None:
    import torch

    torch.set_num_threads(2)  # sums split by threads: the same number gives the same bits on every machine


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A function: configuration -> (checkpoint, bundle) of it with `sharp_params`, each exported once per session and dtype."""
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
