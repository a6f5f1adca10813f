"""Checks that several commands make before any work starts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from wm_graph.errors import CheckpointError, ConfigError, RuntimeUnavailableError

if TYPE_CHECKING:
    from wm_runtimes.bundle import Bundle


def refuse_existing(folder: Path) -> None:
    """Refuse an output folder that holds something, before minutes are spent on filling it.

    Raises:
        CheckpointError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already exists and is not an empty folder; name a new folder")


def refuse_hugging_face(folder: Path) -> None:
    """Refuse a Hugging Face folder where a checkpoint is wanted: both have a config.json, of different fields.

    Raises:
        CheckpointError: it is one.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the checkpoint says what is wrong with it
    if isinstance(values, dict) and "model_type" in values and "layers" not in values:
        raise CheckpointError(
            f"{folder}: is a Hugging Face folder, expected a checkpoint; make one first: wm import {folder} -o CHECKPOINT"
        )


def split_names(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """A comma-separated list of distinct known names.

    Raises:
        ConfigError: a name is unknown or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"no {what} named; choose from {', '.join(known)}")
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"unknown {what} {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def available_runtimes(bundle: "Bundle | None" = None) -> list[str]:
    """Every runtime that runs here, and if a bundle is given, can run that.

    Raises:
        RuntimeUnavailableError: none does.
    """
    from wm_runtimes import RUNTIMES, availability
    from wm_runtimes.readiness import unready

    names = [name for name in RUNTIMES if (availability(name) if bundle is None else unready(bundle, name)) is None]
    if not names:
        raise RuntimeUnavailableError("no runtime runs here; `wm doctor` says what to install")
    return names


def require_runtimes(names: list[str]) -> None:
    """Refuse runtimes that cannot run here, before anything is measured.

    Raises:
        RuntimeUnavailableError: with the reason of the first.
    """
    from wm_runtimes import availability

    for name in names:
        if reason := availability(name):
            raise RuntimeUnavailableError(f"{name}: {reason}")
