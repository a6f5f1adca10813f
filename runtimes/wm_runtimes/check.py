"""wm check: is a bundle whole, and does every runtime that runs here reproduce its golden logits? Dense models need no torch.

B rows, T tokens, V vocabulary.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError
from wm_graph.shapes import count_parameters, parameter_shapes, state_leaves
from wm_graph.tolerances import model_limit
from wm_runtimes import RUNTIMES, open_session
from wm_runtimes.bundle import Bundle, open_bundle
from wm_runtimes.choice_names import choice_names
from wm_runtimes.cuda_device import native_of, ops_without_kernels
from wm_runtimes.draws import Array, Draws, SessionRunner, Trace, run_draws
from wm_runtimes.file_checks import check_safetensors
from wm_runtimes.labels import WAYS, runs_graphs
from wm_runtimes.onnxruntime_session import GRAPHS
from wm_runtimes.readiness import unready
from wm_runtimes.selections import Verdict

# Two float64 runs of the same weights, on machines that sum in other orders, as a fraction of the logits' scale.
_SAME_ORACLE = 1e-9

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class CheckRow:
    """One thing that was checked.

    Attributes:
        what: `files`, a runtime, or a property of one.
        outputs: values compared.
        max_abs: largest error, or difference.
        limit: its limit.
        choice_rate: share of choices that differ from the oracle's, of the op with the largest.
        choice_excess: worst shortfall of a choice over its score budget; at most 1.
        passed: everything is within its limit.
        detail: in words, one line.
    """

    what: str
    outputs: int
    max_abs: float
    limit: float
    choice_rate: float
    choice_excess: float
    passed: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CheckReport:
    """Everything that was checked of a bundle.

    Attributes:
        bundle: name of the model.
        rows: what was checked.
        unavailable: runtime -> why it cannot run here.
    """

    bundle: str
    rows: tuple[CheckRow, ...]
    unavailable: dict[str, str]

    @property
    def passed(self) -> bool:
        """Every row passed; a runtime that cannot run here does not count."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {"bundle": self.bundle, "passed": self.passed, "rows": rows, "unavailable": dict(self.unavailable)}


@dataclass(frozen=True)
class _Golden:
    """Golden data as draws, the oracle's logits, and what eager's worst logit was off by at export."""

    draws: Draws
    logits_BTV: Array
    moved_max_abs: float


def check_bundle(path: str | os.PathLike[str], runtimes: Sequence[str] | None = None, progress: Progress | None = None) -> CheckReport:
    """Check a bundle's files by hash and its runtimes by the golden data.

    Args:
        path: the bundle's folder.
        runtimes: which runtimes; None means all that run here, and the report says why the others do not.
        progress: called with what is being done and the fraction done.

    Raises:
        BundleError: the bundle is missing or damaged, or has no usable golden data.
        InputError: a runtime is unknown.
        RuntimeUnavailableError: a runtime named in `runtimes` cannot run here, or cannot run this bundle.
    """
    tell = progress or (lambda text, fraction: None)
    tell("hashes", 0.0)
    bundle = open_bundle(path, verify=True)
    _check_description(bundle)
    golden = _read_golden(bundle)
    names, unavailable = _choose(bundle, runtimes)
    rows = [CheckRow("files", len(bundle.files), 0.0, 0.0, 0.0, 0.0, True, f"{len(bundle.files)} files match their SHA-256")]
    for index, name in enumerate(names):
        tell(name, (1 + index) / (1 + len(names)))
        rows += _check_runtime(bundle, golden, name)
    tell("done", 1.0)
    return CheckReport(bundle.name, tuple(rows), unavailable)


def _check_description(bundle: Bundle) -> None:
    """Compare what the manifest says of the model with the weights and with itself."""
    config, manifest = bundle.config, bundle.path / "manifest.json"
    found = check_safetensors(bundle.file("model.safetensors"), "model.safetensors")
    expected = parameter_shapes(config)
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise BundleError(
                f"{manifest}: its config expects tensor {name!r} of shape {expected.get(name)}, model.safetensors has {found.get(name)}; "
                "export the bundle again"
            )
    if bundle.parameters != count_parameters(config):
        raise BundleError(f"{manifest}: says {bundle.parameters} parameters, its config has {count_parameters(config)}; export it again")
    leaves = [(leaf.name, leaf.kind, leaf.shape) for leaf in bundle.state]
    if leaves != [(spec.name, spec.kind, spec.shape) for spec in state_leaves(config)]:
        raise BundleError(f"{manifest}: its state leaves are not those of its config; export the bundle again")


def _choose(bundle: Bundle, runtimes: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Runtimes to check, and why others cannot be; a runtime asked for by name must run."""
    if runtimes is not None:
        if not runtimes:
            raise InputError("check: no runtime named; name at least one, or leave it to the bundle")
        for name in runtimes:
            _require(bundle, name)
        return list(dict.fromkeys(runtimes)), {}
    reasons = {name: unready(bundle, name) for name in RUNTIMES}
    return [name for name, reason in reasons.items() if reason is None], {name: reason for name, reason in reasons.items() if reason}


def _require(bundle: Bundle, name: str) -> None:
    if reason := unready(bundle, name):
        raise RuntimeUnavailableError(f"{name}: {reason}")


def _read_golden(bundle: Bundle) -> _Golden:
    """Golden data, checked.

    Raises:
        BundleError: it is missing or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = bundle.file("golden.safetensors")
    try:
        arrays = load_file(file)
        tokens_BT, prefill, logits_BTV = arrays["tokens"], int(arrays["prefill"]), arrays["logits"]
        moved_max_abs = float(arrays["moved_max_abs"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{file}: not readable golden data ({type(error).__name__}: {error}); export the bundle again") from error
    vocab = bundle.limits.vocab_size
    fits = tokens_BT.ndim == 2 and logits_BTV.shape == (*tokens_BT.shape, vocab) and tokens_BT.size > 0
    if not fits or tokens_BT.dtype != np.int64 or not 1 <= prefill <= tokens_BT.shape[1]:
        raise BundleError(
            f"{file}: tokens {list(tokens_BT.shape)}, logits {list(logits_BTV.shape)}, prefill {prefill} do not fit; export again"
        )
    if not np.isfinite(logits_BTV).all():
        raise BundleError(f"{file}: golden logits are not finite; repair the checkpoint and export again")
    return _Golden(Draws(tokens_BT, np.full(len(tokens_BT), prefill), tokens_BT.shape[1] - prefill), logits_BTV, moved_max_abs)


def _check_runtime(bundle: Bundle, golden: _Golden, name: str) -> list[CheckRow]:
    """Golden logits through a runtime; for ONNX Runtime each way to run, and the state in place against the state copied.

    On a GPU, steps in place are replayed as CUDA graphs and copying ones are not, so that these two are compared as well.
    """
    if not runs_graphs(name):
        return [_compare(bundle, golden, name, name, _run(bundle, golden, name))]
    rows = []
    for what, options in _ways(bundle, name):
        in_place, copying = (_run(bundle, golden, name, alias=alias, **options) for alias in (True, False))
        rows.append(_compare(bundle, golden, what, name, in_place, **options))
        rows.append(_same(f"{what} in place", in_place.logits_BTV, copying.logits_BTV))
    return rows


def _ways(bundle: Bundle, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is checked of a runtime of graphs, and the options of its sessions."""
    if name == "onnxruntime-cpu":
        yield from ((f"{name} {graph}", {"graph": graph}) for graph in GRAPHS[:2] if graph in bundle.files)
        return
    if native_of(bundle.manifest) is not None:
        yield (name, {}) if ops_without_kernels(bundle.manifest) else (f"{name}:kernels", WAYS[name]["kernels"])
    yield f"{name}:bodies", WAYS[name]["bodies"]


def _run(bundle: Bundle, golden: _Golden, name: str, **options: Any) -> Trace:
    batch, capacity = golden.draws.tokens_BT.shape
    with open_session(bundle, name, batch, capacity, **options) as session:
        return run_draws(SessionRunner(session), golden.draws)


def _compare(bundle: Bundle, golden: _Golden, what: str, name: str, trace: Trace, **options: Any) -> CheckRow:
    limits = model_limit(bundle.dtype, name)
    limit = limits.max_abs_at(float(np.sqrt(np.square(golden.logits_BTV).mean())), golden.moved_max_abs)
    expected_BTV, verdict = golden.logits_BTV, Verdict()
    max_abs = _max_abs(trace.logits_BTV, expected_BTV)
    if np.isfinite(max_abs) and not max_abs <= limit and _chooses(bundle, golden):
        # Another choice than the oracle's may explain it; following that choice takes torch.
        followed = _follow(bundle, golden, name, options)
        if followed is None:
            detail = f"golden logits: max abs {max_abs:.3g}, limit {limit:.3g}; they are not those of the bundle's own weights and config"
            return CheckRow(what, trace.logits_BTV.size, max_abs, limit, 0.0, 0.0, False, detail)
        expected_BTV, verdict = followed
        max_abs = _max_abs(trace.logits_BTV, expected_BTV)
    passed = max_abs <= limit and verdict.passed and _few_differ(verdict, limits.choice_rate)
    detail = f"golden logits: max abs {max_abs:.3g}, limit {limit:.3g}"
    if verdict.differing:
        detail += f"; {verdict.differing} of {verdict.chosen} choices differ, at {verdict.excess:.3g} of their budget"
    return CheckRow(what, trace.logits_BTV.size, max_abs, limit, verdict.rate, verdict.excess, passed, detail)


def _few_differ(verdict: Verdict, rate: float) -> bool:
    """Golden data is short: a single differing choice of an op, inside its budget, is never over the rate."""
    return all(judgement.differing <= max(1.0, rate * judgement.chosen) for judgement in verdict.ops.values())


def _chooses(bundle: Bundle, golden: _Golden) -> bool:
    """Whether the model selects anything on the golden rows."""
    return bool(choice_names(bundle.config, golden.draws.tokens_BT.shape[1]))


def _follow(bundle: Bundle, golden: _Golden, name: str, options: dict[str, Any]) -> tuple[Array, Verdict] | None:
    """The logits of an oracle that makes the runtime's choices, and the verdict on them.

    None where the oracle of the bundle's weights does not give the golden logits: then no choice explains the difference.
    """
    from wm_graph.checkpoints import load_tensors
    from wm_graph.params import params_from_flat
    from wm_runtimes.choices import TellingSession
    from wm_runtimes.parity import Oracle

    params = params_from_flat(bundle.config, load_tensors(bundle.path))
    batch, capacity = golden.draws.tokens_BT.shape
    oracle = Oracle(bundle.config, params, bundle.dtype)
    own = oracle.run(golden.draws)
    if not _max_abs(own.logits_BTV, golden.logits_BTV) <= _SAME_ORACLE * max(1.0, float(np.abs(golden.logits_BTV).max())):
        return None
    with open_session(bundle, name, batch, capacity, **options) as session:
        told = TellingSession(session, choice_names(bundle.config, capacity), options).run(golden.draws)
    return oracle.follow(golden.draws, own, told.choices)


def _same(what: str, first: Array, second: Array) -> CheckRow:
    """Two results that must be equal bit by bit."""
    difference = _max_abs(first, second)
    equal = bool(np.array_equal(first, second))
    detail = (
        "state in place and state copied give equal logits" if equal else f"state in place differs from state copied by {difference:.3g}"
    )
    return CheckRow(what, first.size, difference, 0.0, 0.0, 0.0, equal, detail)


def _max_abs(values: Array, expected: Array) -> float:
    """Largest difference; NaN if there is any."""
    return float(np.abs(values.astype(np.float64) - expected).max())
