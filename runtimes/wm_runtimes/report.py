"""What the parity page shows: whole models, every op, error growth, placement, and what was not run, for bundles of one model."""

import math
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wm_graph.checkpoints import load_tensors
from wm_graph.errors import InputError, RuntimeUnavailableError
from wm_graph.params import params_from_flat
from wm_graph.taps import ONLY_IN_GRAPHS, OP_OUTPUTS
from wm_graph.tolerances import RUNTIME_DTYPES, UNIT_ROUNDOFF
from wm_runtimes import RUNTIMES, availability
from wm_runtimes.bundle import Bundle
from wm_runtimes.error_growth import PROMPT, STEPS, GrowthRow, measure_growth
from wm_runtimes.json_values import json_values
from wm_runtimes.labels import open_labelled, runtime_of
from wm_runtimes.op_parity import OpRow, TapRow, measure_ops
from wm_runtimes.parity import FARTHEST, ParityReport, Progress, measure_parity

PACKAGES = ("wm-graph", "torch", "onnxruntime", "onnx", "numpy")
OTHER = "between ops"
_PARTS = ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))  # of the work on a bundle: whole models, ops, growth
_INLINED = re.compile(r"^_inlfunc_Wm(?P<op>\w+?)_(?:token_\d+_)?(?P<kernel>[A-Za-z]+)_\d+$")
_NUMBERED = re.compile(r"^(?:.*/)?(?P<kernel>[A-Za-z]+?)(?:_(?:token_)?\d+)*$")


@dataclass(frozen=True)
class Placement:
    """Where one runtime runs one bundle.

    Attributes:
        dtype: of the bundle.
        runtime: which runtime.
        device: device or execution provider.
        nodes: how many nodes run there.
        kernels: op, or `OTHER` -> kernel -> number of nodes, as the nodes are named.
    """

    dtype: str
    runtime: str
    device: str
    nodes: int
    kernels: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class NotRun:
    """Something that the page does not show, and why.

    Attributes:
        what: a runtime, a dtype, or a measurement.
        reason: in words.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that was measured of one model.

    Attributes:
        name: of the model.
        models: whole models, one per dtype.
        ops: per dtype, runtime and op.
        growth: per dtype, the yardstick's and then each runtime's.
        placements: per dtype and runtime.
        not_run: what is missing.
        settings: what decided the draws.
        versions: of packages and the platform.
    """

    name: str
    models: tuple[ParityReport, ...]
    ops: tuple[OpRow, ...]
    growth: tuple[GrowthRow, ...]
    placements: tuple[Placement, ...]
    not_run: tuple[NotRun, ...]
    settings: Mapping[str, int]
    versions: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Something was measured, and everything is within its limit."""
        return bool(self.models) and not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """What is over its limit, a line each; of the ops, one line per runtime and dtype."""
        models = [
            f"{row.runtime}, {row.dtype}: {', '.join(row.failures) or 'nothing was compared'}"
            for model in self.models
            for row in model.rows
            if not row.passed
        ]
        pairs = dict.fromkeys((row.runtime, row.dtype) for row in self.ops)
        ops = [line for pair in pairs if (line := self._op_failure(*pair))]
        growth = [f"{row.runtime}, {row.dtype}, long decode: {', '.join(row.failures)}" for row in self.growth if not row.passed]
        return (*models, *ops, *growth)

    def rows_of(self, runtime: str, dtype: str) -> list[OpRow]:
        """The ops of one runtime at one dtype."""
        return [row for row in self.ops if (row.runtime, row.dtype) == (runtime, dtype)]

    def culprit(self, runtime: str, dtype: str) -> TapRow | None:
        """The first value over its limit, in the order in which they are computed: errors spread from there."""
        over = [tap for row in self.rows_of(runtime, dtype) for tap in row.over]
        return min(over, key=lambda tap: tap.place, default=None)

    def worst(self, runtime: str, dtype: str) -> OpRow:
        """The op of the largest R; NaN is larger than any."""
        return max(self.rows_of(runtime, dtype), key=lambda row: math.inf if math.isnan(row.R) else row.R)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        found: dict[str, Any] = json_values(asdict(self))
        found["models"] = [model.to_dict() for model in self.models]
        verdicts = {"ops": [row.passed for row in self.ops], "growth": [row.passed for row in self.growth]}
        for kind, passed in verdicts.items():
            for entry, verdict in zip(found[kind], passed, strict=True):
                entry["passed"] = verdict
        return {"passed": self.passed, "failures": list(self.failures), **found}

    def _op_failure(self, runtime: str, dtype: str) -> str:
        if all(row.passed for row in self.rows_of(runtime, dtype)):
            return ""
        first, worst = self.culprit(runtime, dtype), self.worst(runtime, dtype)
        where = "" if first is None else f"first value over its limit {first.name} (R {first.R:.3g} > {worst.R_limit:.3g}), "
        return f"{runtime}, {dtype}: {where}worst op {worst.op} (R {worst.R:.3g}, limit {worst.R_limit:.3g})"


def measure_report(
    bundles: Sequence[Bundle],
    runtimes: Sequence[str],
    draws: int = 64,
    seed: int = 0,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Report:
    """Measure everything that the page shows.

    Args:
        bundles: open bundles of one model, each of another dtype.
        runtimes: names of runtimes. One that cannot run a bundle's dtype is listed as not run there.
        draws: random rows of the whole-model comparison.
        seed: of all draws.
        steps: decode steps of the error growth.
        progress: called with what is being done and the fraction done.

    Raises:
        InputError: no bundle or runtime, bundles of different models or of one dtype, or a count out of range.
        RuntimeUnavailableError: a runtime cannot run here, or none of the bundles.
    """
    _check(bundles, runtimes)
    tell = progress or (lambda text, fraction: None)
    placements, refused = _place(bundles, runtimes)
    models, ops, growth = [], [], []
    for index, bundle in enumerate(bundles):
        whole, every_op, long = (_within(tell, bundle.dtype, (index + a) / len(bundles), (index + b) / len(bundles)) for a, b in _PARTS)
        running = [name for name in dict.fromkeys(runtimes) if (name, bundle.dtype) not in refused]
        if not running:
            continue
        params = params_from_flat(bundle.config, load_tensors(bundle.path))
        models.append(measure_parity(bundle, running, draws, seed, whole, farthest_prompt=FARTHEST))
        ops += measure_ops(bundle, params, running, seed=seed, progress=every_op)
        if bundle.limits.max_position > PROMPT:
            growth += measure_growth(bundle, params, running, steps, seed, long)
    return Report(
        name=bundles[0].name,
        models=tuple(models),
        ops=tuple(ops),
        growth=tuple(growth),
        placements=tuple(placements),
        not_run=tuple(_not_run(bundles, runtimes, refused, {row.op for row in ops}, steps)),
        settings={"draws": draws, "seed": seed, "steps": growth[0].steps[-1] if growth else 0},
        versions=_versions(),
    )


def _check(bundles: Sequence[Bundle], runtimes: Sequence[str]) -> None:
    if not bundles or not runtimes:
        raise InputError(f"parity: no {'runtime' if bundles else 'bundle'} named; name at least one")
    for index, bundle in enumerate(bundles):
        if bundle.config != bundles[0].config:
            raise InputError(f"{bundle.path}: another model than {bundles[0].path}; a page shows one model, name bundles of one checkpoint")
        if (twin := next((one for one in bundles[:index] if one.dtype == bundle.dtype), None)) is not None:
            raise InputError(f"{bundle.path}: {bundle.dtype}, as {twin.path} is; name one bundle of each dtype")
    for name in runtimes:
        if reason := availability(runtime_of(name)):
            raise RuntimeUnavailableError(f"{name}: {reason}")


def _within(progress: Progress, dtype: str, start: float, end: float) -> Progress:
    """Progress of a part of the work."""
    return lambda text, fraction: progress(f"{dtype}: {text}", start + fraction * (end - start))


def _place(bundles: Sequence[Bundle], runtimes: Sequence[str]) -> tuple[list[Placement], dict[tuple[str, str], str]]:
    """Where each runtime runs each bundle; and (runtime, dtype) -> why it does not."""
    placements, refused = [], {}
    for bundle in bundles:
        for name in dict.fromkeys(runtimes):
            try:
                with open_labelled(bundle, name, 1, min(64, bundle.limits.max_position)) as session:
                    placed = session.placement()
            except RuntimeUnavailableError as error:
                refused[name, bundle.dtype] = str(error)
                continue
            placements += [Placement(bundle.dtype, name, device, len(nodes), _kernels(nodes)) for device, nodes in placed.items()]
    for name in runtimes:
        reasons = [refused.get((name, bundle.dtype)) for bundle in bundles]
        if all(reasons):
            raise RuntimeUnavailableError(str(reasons[0]))
    return placements, refused


def _kernels(nodes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Op -> kernel -> nodes, from the names that ONNX Runtime gives the nodes of an inlined function."""
    counts: dict[str, Counter[str]] = {}
    for name in nodes:
        if inlined := _INLINED.match(name):
            op, kernel = re.sub(r"(?<!^)(?=[A-Z])", "_", inlined["op"]).lower(), inlined["kernel"]
        else:
            named = _NUMBERED.match(name)
            op, kernel = OTHER, named["kernel"] if named else name or "unnamed"
        counts.setdefault(op, Counter())[kernel] += 1
    return {op: dict(counts[op].most_common()) for op in sorted(counts, key=lambda op: (op == OTHER, op))}


def _not_run(
    bundles: Sequence[Bundle], runtimes: Sequence[str], refused: Mapping[tuple[str, str], str], measured: set[str], steps: int
) -> Iterator[NotRun]:
    for name in RUNTIMES:
        if reason := availability(name):
            yield NotRun(name, reason)
        elif name not in map(runtime_of, runtimes):
            yield NotRun(name, "not asked for; name it in --runtimes")
    yield from (NotRun(f"{name}, {dtype}", reason) for (name, dtype), reason in refused.items())
    given = [bundle.dtype for bundle in bundles]
    for dtype in UNIT_ROUNDOFF:
        if dtype not in given:
            able = [name for name, dtypes in RUNTIME_DTYPES.items() if dtype in dtypes]
            yield NotRun(dtype, f"no bundle of this dtype was given; the runtimes that have it: {', '.join(able)}")
    room = max(0, bundles[0].limits.max_position - PROMPT)
    if room < steps:
        what = f"decode steps {room + 1} to {steps} of the error growth"
        yield NotRun(what, f"the model has {bundles[0].limits.max_position} positions, of which the prompt takes {PROMPT}")
    if absent := [op for op in OP_OUTPUTS if op not in (*measured, *ONLY_IN_GRAPHS)]:
        yield NotRun(", ".join(absent), "no part of this model")
    yield NotRun("caches of keys, values and scores", "compared through the outputs that read them, not cell by cell")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
