"""A dozen small models of every kind of layer and form, exported once, from whose sessions the laws draw. T tokens, V vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from choice_margins import as_tokens, oracle_with_margins
from cuda_bundles import missing as cuda_missing
from hypothesis_profiles import AT_END, note_compared
from strategies_models import Drawn, drawn
from wm_export import export_bundle
from wm_graph import forward, save_checkpoint
from wm_graph.checkpoints import load_tensors
from wm_graph.params import Params, cast_params, params_from_flat
from wm_graph.tolerances import model_limit
from wm_runtimes import Session, Snapshot, availability, open_bundle, open_session
from wm_runtimes.bundle import Bundle
from wm_runtimes.cuda_device import cuda_device
from wm_runtimes.snapshot import Array
from wm_runtimes.state_buffers import reset_value

_ROTATED = {"rotary_dim": 2, "rope_scaling": "linear", "rope_factor": 2.0}
_LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original": 32, "n_head": 6, "n_kv_head": 3}
POOL: dict[str, Drawn] = {
    "ssd": drawn("ssd+mlp", seed=1, tie_embeddings=False, ssd_state=2),
    "cheems": drawn("attention+none ssd+cdmoe dynamic_mask_attention+mlp", seed=2, head_dim=16, qk_norm=True, learned_residual=True),
    "bamba": drawn(
        "mamba2+mlp attention+moe", seed=3, n_head=4, n_kv_head=2, head_dim=8, ssd_group=2, ssd_head=4, dt_min=0.002, dt_max=0.2, **_ROTATED
    ),
    "jamba": drawn("mamba1+moe attention+mlp", seed=4, attention_rope=False, head_dim=8, mamba1_norm=True, moe_normalize=True, conv_size=2),
    "log": drawn("ssd+none dynamic_mask_attention+cdmoe", seed=5, dma_mask="log", cdmoe_form="c1_parallel", keep_window=2, mlp_bias=True),
    "narrow": drawn(
        "attention+mlp dynamic_mask_attention+none", seed=6, keep_window=1, attention_bias=True, n_kv_head=2, head_dim=3,
        attention_rope=False,
    ),
    "additive": drawn("mamba2+none dynamic_mask_attention+mlp", seed=7, dma_mask="additive", dma_heads="query", mamba_bias=True, d_ff=1),
    "binary": drawn("ssd+mlp dynamic_mask_attention+none", seed=8, dma_mask="binary", attention_rope=False, head_dim=5, mlp_bias=True),
    "ratio": drawn(
        "mamba1+none dynamic_mask_attention+moe", seed=9, dma_mask="ratio", dma_ratio=0.4, moe_form="shared_expert_isolated",
        conv_bias=False,
    ),
    "cheems-2407": drawn("inner_function_attention+cdmoe", seed=10, d_model=8, cdmoe_form="c1_serial"),
    "top1": drawn(
        "inner_function_attention+mlp ssd+none", seed=11, d_model=8, ifa_form="top1", ifa_head=1, ifa_pick=1, ifa_mask="static_ste",
        ssd_rope=False, ssd_state=5,
    ),
    "softmax": drawn(
        "inner_function_attention+none attention+cdmoe", seed=12, d_model=8, ifa_form="softmax", ifa_mask="static_hard",
        cdmoe_form="single_head", n_retrieval_head=1, d_retrieval=0, **_LLAMA3 | {"n_head": 2, "n_kv_head": 2},
    ),
    "half": drawn("mamba2+mlp attention+none ssd+mlp", seed=13, head_dim=8, **_LLAMA3),
}  # fmt: skip
HALF = ("half",)  # exported in float16: no choices, whose margins half precision does not keep
RUNTIMES: dict[str, dict[str, Any]] = {
    "eager": {"runtime": "eager"},
    "model.ort.onnx": {"runtime": "onnxruntime-cpu", "graph": "model.ort.onnx", "threads": 1},
    "model.onnx": {"runtime": "onnxruntime-cpu", "graph": "model.onnx", "threads": 1},
}
COMPILED: dict[str, dict[str, Any]] = {"compiled": {"runtime": "compiled"}}
CUDA: dict[str, dict[str, Any]] = {
    "cuda kernels": {"runtime": "onnxruntime-cuda", "kernels": True},
    "cuda bodies": {"runtime": "onnxruntime-cuda", "kernels": False},
}
_ALL = {name: given for name, given in (RUNTIMES | COMPILED | CUDA).items() if not given.get("kernels") or cuda_missing() is None}
# The runtimes of the pool that run here, by name. Every model costs the compiler seconds for each of four graphs: it is given two. A GPU's
# steps take as long as ONNX Runtime takes to launch some hundred nodes: it is given four, with kernels of every kind.
RUNNING = [name for name, options in _ALL.items() if availability(options["runtime"]) is None]
_CUDA_MODELS = ("bamba", "cheems", "jamba", "log")
_COMPILED_MODELS = ("log", "narrow")  # a scan, a window and experts; a cache, the narrowest window and no rotation
_TIMES_EAGER = 4  # half precision: the largest error of one run over that of another, twice the limit of R, which is of pooled runs
# (batch, capacity): a row of a few tokens, ragged rows, rows longer than a chunk
SIZES = ((3, 26), (1, 9), (2, 70))


def options_of(runtime: str) -> dict[str, Any]:
    """Arguments of `open_session` for a runtime of the pool."""
    return (RUNTIMES | COMPILED | CUDA)[runtime]


def models_in(runtime: str) -> Sequence[str]:
    """The models that the laws run in a runtime of the pool."""
    if runtime in CUDA:
        return _CUDA_MODELS
    return _COMPILED_MODELS if runtime in COMPILED else sorted(POOL)


@dataclass(frozen=True)
class Expected:
    """The oracle's answer to one row: logits after each of its tokens, and where a correct run may have chosen otherwise before.

    `slack_T` is how far a correct run of half precision may be off: some times what eager is, up to each token.
    """

    logits_TV: Array
    tied_T: Array
    slack_T: Array


_IN_USE: dict[tuple["Member", Any], None] = {}  # sessions that this example was given


def _let_go(failed: bool) -> None:
    """Empty the sessions of an example where it ends: what `reset` leaves fails the example that it is from, whichever came before."""
    used, complaint = list(_IN_USE), None
    _IN_USE.clear()
    for member, key in used:
        try:
            member.empty(key)
        except AssertionError as error:
            complaint = complaint or error
    if complaint is not None and not failed:
        raise complaint


AT_END.append(_let_go)


def _kernels(model: str) -> dict[str, Any]:
    """What is asked of the exporter beside ONNX files: native kernels where sessions of this run have them."""
    if model not in _CUDA_MODELS or "cuda kernels" not in RUNNING:
        return {}
    device = cuda_device()
    return {"targets": ("onnx", "native"), "architectures": (10 * device.major + device.minor,)}


class Member:
    """One exported model: its oracle and its sessions."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.bundle: Bundle = open_bundle(folder)
        self.cfg = self.bundle.config
        # What the bundle really holds, float16 rounding included.
        self._params: Params = cast_params(params_from_flat(self.cfg, load_tensors(folder)), torch.float64)
        self._sessions: dict[Any, tuple[Session, Snapshot]] = {}
        self.expected = lru_cache(4096)(self._expected)

    def _expected(self, row: tuple[int, ...]) -> Expected:
        tokens_1T, slack_T = as_tokens([np.array(row)]), np.zeros(len(row))
        logits_1TV, margin_1T = oracle_with_margins(self.cfg, self._params, tokens_1T, self.bundle.dtype)
        if self.bundle.dtype != "float32":
            with torch.no_grad():
                eager_1TV, _ = forward(self.cfg, params_from_flat(self.cfg, load_tensors(self.bundle.path)), tokens_1T)
            slack_T = _TIMES_EAGER * np.maximum.accumulate(np.abs(eager_1TV[0].double().numpy() - logits_1TV[0]).max(-1))
        return Expected(logits_1TV[0], margin_1T[0] < 1, slack_T)

    def session(self, runtime: str, batch: int, capacity: int, use: str = "", **options: Any) -> Session:
        """An empty session; the same one for the same arguments, so that what its earlier use left behind would show."""
        key = (runtime, batch, capacity, use)
        if key not in self._sessions:
            session = open_session(self.bundle, batch=batch, capacity=capacity, **options_of(runtime), **options)
            self._sessions[key] = session, session.snapshot()
        _IN_USE[self, key] = None
        self.empty(key)
        return self._sessions[key][0]

    def empty(self, key: Any) -> None:
        """Reset a session, and assert that each leaf is what the manifest says; one that is not is made as it was when it was new."""
        session, new = self._sessions[key]
        session.reset()
        saved = session.snapshot()
        leaves = {leaf.name: reset_value(leaf) for leaf in session.bundle.state if leaf.name in saved.leaves}
        wrong = [name for name, value in leaves.items() if (saved.leaves[name] != value).any()]
        if wrong or saved.position_B.any():
            session.restore(new)
            raise AssertionError(f"{self.name} in {key[0]}: reset leaves what was in {', '.join(wrong) or 'position'}")

    def close(self) -> None:
        """Close the sessions and forget them."""
        for key, (session, _) in self._sessions.items():
            session.close()
            _IN_USE.pop((self, key), None)
        self._sessions = {}

    def limit(self, runtime: str, logits: Array) -> float:
        """Largest error of a logit, at the scale of the oracle's `logits`."""
        max_abs = model_limit(self.bundle.dtype, options_of(runtime)["runtime"]).max_abs
        return max_abs * max(1.0, float(np.sqrt(np.mean(np.square(logits))))) if logits.size else max_abs

    def check(self, runtime: str, row: Array, places: Array, got_SV: Array) -> int:
        """Assert that the logits after the tokens at `places` of a row are the oracle's; returns how many could be compared.

        Where two scores tie by the oracle, the runtime may have chosen the other, and a difference proves nothing.
        """
        if not len(places):
            return 0
        expected = self.expected(tuple(row.tolist()))
        want_SV, tied_S = expected.logits_TV[places], expected.tied_T[places]
        assert got_SV.shape == want_SV.shape
        error_S = np.abs(got_SV - want_SV).max(-1, initial=0.0)
        limit_S = np.maximum(self.limit(runtime, want_SV), expected.slack_T[places])
        wrong = np.flatnonzero(~(error_S <= limit_S) & ~tied_S)
        assert not len(wrong), (
            f"{self.name} in {runtime}: logits after token {places[wrong[0]]} of {row.tolist()} are off by {error_S[wrong[0]]:.3g}, "
            f"limit {limit_S[wrong[0]]:.3g}"
        )
        note_compared(int((~tied_S).sum()))
        return int((~tied_S).sum())


class Pool:
    """The members by name; bundles are exported when first asked for, into `root`, and taken from there where they are."""

    def __init__(self, root: Path, models: Mapping[str, Drawn] = POOL) -> None:
        self._root, self._models = root, models
        self._members: dict[str, Member] = {}

    def __getitem__(self, name: str) -> Member:
        if name not in self._members:
            folder = self._root / name
            if not (folder / "manifest.json").exists():
                checkpoint = self._root / f"{name}.checkpoint"
                if not checkpoint.exists():
                    save_checkpoint(checkpoint, self._models[name].cfg, self._models[name].params())
                export_bundle(checkpoint, folder, dtype="fp16" if name in HALF else "fp32", **_kernels(name))
            self._members[name] = Member(name, folder)
        return self._members[name]
