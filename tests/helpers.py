"""Models and runs that several tests share. B rows, T tokens, V vocabulary."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.model import forward
from wm_graph.params import Params, init_params, map_tensors
from wm_graph.presets import PRESETS
from wm_graph.state import zero_state
from wm_graph.taps import Taps
from wm_runtimes.choice_names import choice_names
from wm_runtimes.draws import Draws, by_token
from wm_runtimes.parity import Oracle

LIMIT = 1e-4  # max abs on float32 logits of scale about 1


def _cut(name: str, layers: slice, /, **changes: Any) -> ModelConfig:
    cfg = ModelConfig.preset(name)
    return replace(cfg, **({"layers": cfg.layers[layers]} | changes))


MODELS: dict[str, ModelConfig] = {
    "cheems-tiny": ModelConfig.preset("cheems-tiny"),
    "cheems-tiny-moe": ModelConfig.preset("cheems-tiny-moe"),
    "llama-tiny": ModelConfig.preset("llama-tiny"),
    "window": _cut("cheems-tiny-moe", slice(5, 8), keep_window=8, qk_norm=True),
    "cheems-20m widths": _cut("cheems-20m", slice(6, 8), vocab_size=1024),
    "cheems-20m-moe widths": _cut("cheems-20m-moe", slice(6, 8), vocab_size=1024),
    "llama-20m widths": _cut("llama-20m", slice(0, 2), vocab_size=1024, n_kv_head=2),
}

# The tiny model of every family, with a window that long inputs overflow; Doge has no tiny preset, Bamba has no preset.
_doge = _cut("doge-20m", slice(0, 3), name="doge-tiny", vocab_size=512, d_model=64, d_ff=128, n_head=4, n_kv_head=2, head_dim=16)
_bamba = _cut("mamba2-tiny", slice(0, 2), name="bamba-tiny", layers=(("mamba2", "mlp"), ("attention", "mlp")), d_ff=128, ssd_group=2)
FAMILIES: dict[str, ModelConfig] = {
    **{name: replace(cfg, keep_window=24) for name, cfg in PRESETS.items() if "-tiny" in name},
    "doge-tiny": replace(_doge, keep_window=24),
    "bamba-tiny": replace(_bamba, n_head=4, n_kv_head=2, head_dim=16, rotary_dim=8, dt_min=0.001),
}
DTYPES = ("fp32", "fp16")  # of the bundles of all families
# What the compiled runtime is compared on: a layer of each kind, because compiling takes its time.
COMPILED_FAMILIES: dict[str, ModelConfig] = {
    name: replace(FAMILIES[name], layers=layers, vocab_size=64)
    for name, layers in (
        ("cheems-tiny-moe", (("ssd", "mlp"), ("dynamic_mask_attention", "cdmoe"))),
        ("cheems-2407-tiny", (("inner_function_attention", "cdmoe"),)),
        ("jamba-tiny", (("mamba1", "moe"), ("attention", "mlp"))),
        ("llama-tiny", (("attention", "mlp"),)),
        ("doge-tiny", (("dynamic_mask_attention", "mlp"),)),
        ("mamba2-tiny", (("mamba2", "none"),)),
        ("bamba-tiny", (("mamba2", "mlp"), ("attention", "mlp"))),
    )
}
# What test_model.py, test_export.py and test_sessions_model.py ran before these came.
NEW_FAMILIES = ("cheems-2407-tiny", "mamba2-tiny", "jamba-tiny", "doge-tiny", "bamba-tiny")

_small: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_ff": 48,
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 8,
    "keep_window": 6,
    "norm_eps": 1e-5,
}
_small |= {"ssd_head": 2, "ssd_head_dim": 16, "ssd_state": 8, "mamba1_width": 48, "mamba1_state": 4, "dt_rank": 3, "conv_size": 3}
_small |= {"ifa_value": 5, "ifa_head": 2, "ifa_pick": 2, "d_ifa": 8, "ifa_positions": 300}
_small |= {"n_expert": 16, "n_retrieval_head": 2, "n_pick": 2, "d_retrieval": 8}
# Every option that no tiny preset uses, a few to a model.
_OPTIONS: tuple[tuple[str, tuple[tuple[str, str], ...], dict[str, Any]], ...] = (
    (
        "binary, c1_parallel, grouped mamba2",
        (("dynamic_mask_attention", "none"), ("mamba2", "cdmoe"), ("ssd", "mlp")),
        {"dma_mask": "binary", "cdmoe_form": "c1_parallel", "ssd_group": 2, "mlp_bias": True, "dt_min": 0.002, "dt_max": 0.05},
    ),
    (
        "ratio, shared_expert_isolated, mamba1 as published",
        (("mamba1", "none"), ("dynamic_mask_attention", "moe")),  # a first layer gives equal tokens equal scores
        {"dma_mask": "ratio", "dma_ratio": 0.4, "moe_form": "shared_expert_isolated", "mamba_bias": True, "conv_bias": False},
    ),
    (
        "log, single_head, static_hard, partly rotated attention",
        (("dynamic_mask_attention", "cdmoe"), ("inner_function_attention", "none"), ("attention", "mlp")),
        {"dma_mask": "log", "cdmoe_form": "single_head", "n_retrieval_head": 1, "d_retrieval": 0, "ifa_mask": "static_hard"}
        | {"attention_bias": True, "rotary_dim": 4, "qk_norm": True, "learned_residual": True},
    ),
    (
        "additive by query head, softmax beside normalised experts, no rotation",
        (("dynamic_mask_attention", "mlp"), ("inner_function_attention", "moe"), ("mamba2", "none")),
        {"dma_mask": "additive", "dma_heads": "query", "ifa_form": "softmax", "moe_normalize": True, "ssd_rope": False}
        | {"attention_rope": False, "mamba_bias": True, "tie_embeddings": False},
    ),
    (
        "top1, static_ste",
        (("inner_function_attention", "mlp"), ("ssd", "none")),
        {"ifa_form": "top1", "ifa_head": 1, "ifa_pick": 1, "ifa_mask": "static_ste", "ssd_rope": False},
    ),
)
OPTIONS: dict[str, ModelConfig] = {name: ModelConfig(name=name, layers=layers, **(_small | options)) for name, layers, options in _OPTIONS}


def lively_params(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters whose scores differ from key to key, norms, scales and biases from their start; logits of scale about 1."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        leaf = name.rsplit(".", 1)[-1]
        noise = torch.randn(tensor.shape, generator=generator)
        if leaf == "A":
            return noise
        if leaf.endswith(("norm", "residual")):
            return (1 + 0.2 * noise).to(dtype)
        if leaf == "mask":
            return (noise > -0.7).to(dtype)
        if leaf == "D" or leaf.endswith("bias"):
            return tensor + (0.2 * noise).to(dtype)
        return tensor * 5 if name in ("embedding", "head") else tensor

    return map_tensors(init_params(cfg, seed, dtype), change)  # type: ignore[no-any-return]


# With these seeds no choice of experts or keys changes under relative noise of 2e-6 in all weights: every runtime chooses alike.
SEEDS = {"cheems-20m-moe": 4}
SEED = 1


@cache
def sharp_params(cfg: ModelConfig) -> Params:
    """Lively parameters whose window scores lie so far apart that rounding does not reorder them."""
    params = lively_params(cfg, SEEDS.get(cfg.name, SEED))
    if not cfg.keeps_window:
        return params
    return map_tensors(params, lambda name, tensor: tensor * 20 if name.endswith("mixer.dt") else tensor)  # type: ignore[no-any-return]


def random_tokens(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


class Judge:
    """The oracle's opinion of float32 logits over fixed tokens, when it makes the choices of the run."""

    def __init__(self, cfg: ModelConfig, params: Params, tokens_BT: Tensor) -> None:
        rows, length = tokens_BT.shape
        self.cfg, self.params = cfg, params
        self.names = choice_names(cfg, length)
        self.oracle = Oracle(cfg, params, "float32")
        self.draws = Draws(tokens_BT.numpy(), np.full(rows, length), 0)
        self.own = self.oracle.run(self.draws)

    def max_abs(self, logits_BTV: Tensor, taps: dict[str, Tensor]) -> float:
        """Largest error; a choice outside its score budget is an error of inf."""
        choices = {name: taps[name].numpy() for name in self.names}
        expected_BTV, verdict = self.oracle.follow(self.draws, self.own, choices)
        assert logits_BTV.shape == expected_BTV.shape
        return float((logits_BTV.double() - torch.from_numpy(expected_BTV)).abs().max()) if verdict.passed else float("inf")

    def run(self, pieces: Sequence[int] | None, in_place: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens through `forward` in pieces of the given lengths; None is the training path. Logits and taps, joined along T."""
        tokens_BT = torch.from_numpy(self.draws.tokens_BT)
        state = None if pieces is None else zero_state(self.cfg, *tokens_BT.shape)
        parts, taps_of_parts, start = [], [], 0
        for length in pieces or (tokens_BT.shape[1],):
            taps = Taps(only=frozenset(self.names).__contains__)
            with torch.no_grad():
                part_BTV, state = forward(self.cfg, self.params, tokens_BT[:, start : start + length], state, in_place=in_place, taps=taps)
            parts.append(part_BTV)
            taps_of_parts.append(by_token(taps.values, (len(tokens_BT), length)))
            start += length
        return torch.cat(parts, 1), {name: torch.cat([values[name] for values in taps_of_parts], 1) for name in self.names}
