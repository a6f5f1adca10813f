"""Small models of all combinations of the options that a kind of layer reads, beside the models of helpers: what the oracle is run on."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from helpers import FAMILIES, MODELS, OPTIONS
from wm_graph.config import FORMS, ModelConfig

_small: dict[str, Any] = {"vocab_size": 80, "d_model": 32, "d_ff": 24, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "keep_window": 6}
_small |= {"ssd_head": 4, "ssd_head_dim": 8, "ssd_state": 6, "mamba1_width": 24, "mamba1_state": 4, "dt_rank": 3, "conv_size": 3}
_small |= {"ifa_value": 5, "ifa_positions": 80, "n_expert": 16, "n_retrieval_head": 1, "n_pick": 3, "d_retrieval": 8}
_two, _yes_no = {"ifa_head": 2, "ifa_pick": 2}, (False, True)
_mlp = ("attention", "mlp")
# Layers, and the values of options that go together; all combinations are models.
GRIDS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[dict[str, Any], ...], ...]]] = {
    "attention": (
        (_mlp, ("dynamic_mask_attention", "none")),
        (
            tuple({"attention_bias": on} for on in _yes_no),
            tuple({"qk_norm": on} for on in _yes_no),
            ({"attention_rope": False}, {}, {"rotary_dim": 4}),
        ),
    ),
    "ends": (
        (_mlp, ("ssd", "none"), ("ssd", "mlp")),
        tuple(tuple({name: on} for on in _yes_no) for name in ("learned_residual", "tie_embeddings", "mlp_bias")),
    ),
    "scaling": (
        (_mlp, ("mamba2", "none"), ("dynamic_mask_attention", "none"), ("inner_function_attention", "none")),
        (
            (
                {"rope_scaling": "linear", "rope_factor": 2.5},
                {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low": 1.5, "rope_high": 5.0},
                {"rope_scaling": "dynamic", "rope_factor": 4.0, "rope_dynamic_cache": True},
            ),
            ({"rope_theta": 100.0, "rope_original": 30},),
            ({}, {"ssd_state": 2}),  # one pair: dynamic scaling has nothing to stretch
        ),
    ),
    "scans": (
        (("ssd", "none"), ("mamba2", "none")),
        (
            ({"ssd_group": 1}, {"ssd_group": 2}, {"ssd_group": 4}),
            tuple({"ssd_rope": on} for on in _yes_no),
            ({}, {"dt_min": 0.03}, {"dt_max": 0.02}, {"dt_min": 0.01, "dt_max": 0.05}),
        ),
    ),
    "mamba": (
        (("mamba1", "none"), ("mamba2", "none")),
        (
            *(tuple({name: on} for on in _yes_no) for name in ("conv_bias", "mamba_bias", "mamba1_norm")),
            ({"conv_size": 2}, {"conv_size": 5}),
        ),
    ),
    "window": (
        (("dynamic_mask_attention", "none"),) * 2,
        (({"dma_mask": "keep_window"}, {"dma_mask": "log"}), ({"keep_window": 1}, {"keep_window": 6}, {"keep_window": 200})),
    ),
    "scores": (
        (("dynamic_mask_attention", "none"),) * 2,
        (
            ({"dma_mask": "additive"}, {"dma_mask": "binary"}, {"dma_mask": "ratio", "dma_ratio": 0.37}),
            ({"dma_heads": "kv"}, {"dma_heads": "query"}),
        ),
    ),
    "inner function": (
        (("inner_function_attention", "none"),) * 2,
        (
            ({"ifa_form": "top1", "ifa_head": 1, "ifa_pick": 1}, {"ifa_form": "topk_sum"} | _two, {"ifa_form": "softmax"} | _two),
            tuple({"ifa_mask": form} for form in FORMS["ifa_mask"]),
        ),
    ),
    "cdmoe": (
        (("ssd", "cdmoe"),) * 2,
        (
            tuple({"cdmoe_form": form} for form in FORMS["cdmoe_form"]),
            ({}, {"n_expert": 49, "n_pick": 7}),
        ),
    ),
    "retrieval heads": (
        (("ssd", "cdmoe"),) * 2,
        (tuple({"cdmoe_form": form} for form in FORMS["cdmoe_form"] if form != "single_head"), ({"n_retrieval_head": 3},)),
    ),
    "moe": (
        (("ssd", "moe"), ("inner_function_attention", "moe")),  # a layer with two routers
        (tuple({"moe_form": form} for form in FORMS["moe_form"]), tuple({"moe_normalize": on} for on in _yes_no), ({}, {"n_pick": 1})),
    ),
}


def _grid() -> Iterator[ModelConfig]:
    for grid, (layers, axes) in GRIDS.items():
        for options in product(*axes):
            changes = {name: value for option in options for name, value in option.items()}
            name = ", ".join([grid, *(f"{key} {value}" for key, value in changes.items())])
            yield ModelConfig(name=name, layers=layers, **(_small | changes))


GRID = {cfg.name: cfg for cfg in _grid()}
ALL = GRID | {
    f"{group}: {name}": cfg
    for group, models in (("models", MODELS), ("families", FAMILIES), ("options", OPTIONS))
    for name, cfg in models.items()
}
STATIC = [name for name, cfg in ALL.items() if cfg.rope_scaling != "dynamic"]  # a prompt in pieces is the whole
