"""Runtimes as people name them: `eager`, `onnxruntime-cpu`, `onnxruntime-cpu:model.onnx`, `onnxruntime-cuda:bodies`. Needs no torch."""

from collections.abc import Sequence
from typing import Any

from wm_graph.errors import ConfigError
from wm_runtimes import RUNTIMES, open_session
from wm_runtimes.bundle import Bundle
from wm_runtimes.onnxruntime_session import GRAPHS
from wm_runtimes.session import Session

# What may follow a runtime's name behind a colon, and the options of sessions that it stands for.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "onnxruntime-cpu": {graph: {"graph": graph} for graph in GRAPHS},
    "onnxruntime-cuda": {"kernels": {"kernels": True}, "bodies": {"kernels": False}},
}


def split_label(label: str, further: Sequence[str] = ()) -> tuple[str, str]:
    """(runtime, way) of a label; the way is empty where the label names none.

    Args:
        label: a runtime, for one that has several ways to run a bundle with one of them behind a colon: a graph of the bundle, or native
            kernels or bodies.
        further: names that are no runtimes and allowed too.

    Raises:
        ConfigError: there is no such runtime or way.
    """
    runtime, colon, way = label.partition(":")
    known = (*RUNTIMES, *further)
    if runtime not in known:
        raise ConfigError(f"unknown runtime {runtime!r}; choose from {', '.join(known)}")
    if colon and runtime not in WAYS:
        raise ConfigError(f"{label}: {runtime} runs no graph; write {runtime}")
    if colon and way not in WAYS[runtime]:
        what = "graph" if runtime == "onnxruntime-cpu" else "way to run"
        raise ConfigError(f"{label}: no {what} {way!r}; choose from {', '.join(WAYS[runtime])}")
    return runtime, way


def runtime_of(label: str) -> str:
    """The runtime of a label."""
    return split_label(label)[0]


def runs_graphs(label: str) -> bool:
    """Whether a label's runtime runs an ONNX graph, whose values are told by promoting them to outputs."""
    return label.partition(":")[0] in WAYS


def way_options(label: str) -> dict[str, Any]:
    """The options of sessions that the label's way stands for."""
    runtime, way = split_label(label)
    return dict(WAYS[runtime][way]) if way else {}


def open_labelled(bundle: Bundle, label: str, batch: int, capacity: int, **options: Any) -> Session:
    """`open_session` on a label."""
    return open_session(bundle, runtime_of(label), batch, capacity, **way_options(label), **options)
