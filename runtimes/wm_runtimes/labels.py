"""Runtimes as people name them: `eager`, `onnxruntime-cpu`, `onnxruntime-cpu:model.onnx`. Needs no torch."""

from collections.abc import Sequence
from typing import Any

from wm_graph.errors import ConfigError
from wm_runtimes import RUNTIMES, open_session
from wm_runtimes.bundle import Bundle
from wm_runtimes.onnxruntime_cpu import GRAPHS
from wm_runtimes.session import Session


def split_label(label: str, further: Sequence[str] = ()) -> tuple[str, str]:
    """(runtime, graph) of a label; the graph is empty where the label names none.

    Args:
        label: a runtime, for one that runs graphs with a graph of the bundle behind a colon.
        further: names that are no runtimes and allowed too.

    Raises:
        ConfigError: there is no such runtime or graph.
    """
    runtime, colon, graph = label.partition(":")
    known = (*RUNTIMES, *further)
    if runtime not in known:
        raise ConfigError(f"unknown runtime {runtime!r}; choose from {', '.join(known)}")
    if colon and runtime != "onnxruntime-cpu":
        raise ConfigError(f"{label}: {runtime} runs no graph; write {runtime}")
    if colon and graph not in GRAPHS:
        raise ConfigError(f"{label}: no graph {graph!r}; choose from {', '.join(GRAPHS)}")
    return runtime, graph


def runtime_of(label: str) -> str:
    """The runtime of a label."""
    return split_label(label)[0]


def graph_option(label: str) -> dict[str, Any]:
    """The option of sessions that the label's graph is."""
    graph = split_label(label)[1]
    return {"graph": graph} if graph else {}


def open_labelled(bundle: Bundle, label: str, batch: int, capacity: int, **options: Any) -> Session:
    """`open_session` on a label."""
    return open_session(bundle, runtime_of(label), batch, capacity, **graph_option(label), **options)
