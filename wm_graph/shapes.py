"""Names and shapes of every parameter and every state leaf of a configuration. Needs no torch.

One table each, from which parameters are initialised, checkpoints checked, states made and manifests written.
"""

import math
from dataclasses import dataclass, replace

from wm_graph.config import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Flat parameter name -> shape, in model order. Linear weights are [out, in]; merged siblings are stacked along out."""
    shapes: dict[str, Shape] = {"embedding": (cfg.vocab_size, cfg.d_model)}
    for index, (mixer, feed_forward) in enumerate(cfg.layers):
        layer = f"layers.{index}"
        shapes[f"{layer}.mixer_norm"] = (cfg.d_model,)
        shapes |= {f"{layer}.mixer.{name}": shape for name, shape in _mixer_shapes(cfg, mixer).items()}
        if cfg.learned_residual:
            shapes[f"{layer}.mixer_residual"] = (cfg.d_model,)
        if feed_forward == "none":
            continue
        shapes[f"{layer}.feed_forward_norm"] = (cfg.d_model,)
        shapes |= {f"{layer}.feed_forward.{name}": shape for name, shape in _feed_forward_shapes(cfg, feed_forward).items()}
        if cfg.learned_residual:
            shapes[f"{layer}.feed_forward_residual"] = (cfg.d_model,)
    shapes["norm"] = (cfg.d_model,)
    if not cfg.tie_embeddings:
        shapes["head"] = (cfg.vocab_size, cfg.d_model)
    return shapes


def _mixer_shapes(cfg: ModelConfig, mixer: str) -> dict[str, Shape]:
    if mixer == "ssd":
        width = cfg.ssd_head * cfg.ssd_head_dim
        rows = 2 * cfg.ssd_group * cfg.ssd_state + width + cfg.ssd_head  # C | B | x | dt
        return {"in_proj": (rows, cfg.d_model), "A_log": (cfg.ssd_head,), "out_proj": (cfg.d_model, width)}
    if mixer == "mamba2":
        return _mamba2_shapes(cfg)
    if mixer == "mamba1":
        return _mamba1_shapes(cfg)
    if mixer == "inner_function_attention":
        return _inner_function_shapes(cfg)
    return _attention_shapes(cfg, mixer)


def conv_width(cfg: ModelConfig, mixer: str) -> int:
    """Channels of a layer's convolution: x, and of mamba2 B and C too."""
    if mixer == "mamba1":
        return cfg.mamba1_width
    return cfg.ssd_head * cfg.ssd_head_dim + 2 * cfg.ssd_group * cfg.ssd_state


def _mamba2_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    width, channels = cfg.ssd_head * cfg.ssd_head_dim, conv_width(cfg, "mamba2")
    rows = width + channels + cfg.ssd_head  # z | x | B | C | dt
    shapes: dict[str, Shape] = {"in_proj": (rows, cfg.d_model), "conv_weight": (channels, cfg.conv_size), "dt_bias": (cfg.ssd_head,)}
    shapes |= {"A_log": (cfg.ssd_head,), "D": (cfg.ssd_head,), "norm": (width,), "out_proj": (cfg.d_model, width)}
    return shapes | _mamba_biases(cfg, rows, channels)


def _mamba1_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    C, N = cfg.mamba1_width, cfg.mamba1_state
    shapes: dict[str, Shape] = {"in_proj": (2 * C, cfg.d_model), "conv_weight": (C, cfg.conv_size)}  # x | z
    shapes |= {"x_proj": (cfg.dt_rank + 2 * N, C), "dt_proj": (C, cfg.dt_rank), "dt_bias": (C,)}  # dt | B | C
    shapes |= {"A_log": (C, N), "D": (C,), "out_proj": (cfg.d_model, C)}
    if cfg.mamba1_norm:
        shapes |= {"dt_norm": (cfg.dt_rank,), "B_norm": (N,), "C_norm": (N,)}
    return shapes | _mamba_biases(cfg, 2 * C, C)


def _mamba_biases(cfg: ModelConfig, rows: int, channels: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"conv_bias": (channels,)} if cfg.conv_bias else {}
    return shapes | ({"in_proj_bias": (rows,), "out_proj_bias": (cfg.d_model,)} if cfg.mamba_bias else {})


def _attention_shapes(cfg: ModelConfig, mixer: str) -> dict[str, Shape]:
    width, kv_width = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    rows = width + 2 * kv_width
    shapes: dict[str, Shape] = {"qkv": (rows, cfg.d_model), "out": (cfg.d_model, width)}
    if mixer == "dynamic_mask_attention":
        shapes |= {"dt": (cfg.n_score_head, kv_width), "A": (cfg.n_score_head,)}
    if cfg.attention_bias:
        shapes |= {"qkv_bias": (rows,), "out_bias": (cfg.d_model,)}
    if cfg.qk_norm:
        shapes |= {"q_norm": (cfg.head_dim,), "k_norm": (cfg.head_dim,)}
    return shapes


def _inner_function_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    width = cfg.n_head * cfg.head_dim
    shapes: dict[str, Shape] = {"qk": (2 * width, cfg.d_model), "out": (cfg.d_model, width)}
    shapes |= {"value_query": (cfg.ifa_head * cfg.d_ifa, cfg.d_model), "value_keys": (cfg.ifa_head, cfg.ifa_value, cfg.d_ifa)}
    shapes["value_embed"] = (cfg.ifa_value, cfg.d_model)
    if cfg.ifa_mask != "none":
        shapes["mask"] = (cfg.n_head, cfg.ifa_positions)
    return shapes


def _feed_forward_shapes(cfg: ModelConfig, feed_forward: str) -> dict[str, Shape]:
    if feed_forward == "moe":
        return _moe_shapes(cfg)
    gate_up, up, down = (2 * cfg.d_ff, cfg.d_model), (cfg.d_ff, cfg.d_model), (cfg.d_model, cfg.d_ff)
    shapes: dict[str, Shape] = {"gate_up": gate_up, "down": down}
    if feed_forward == "mlp":
        return shapes | ({"gate_up_bias": gate_up[:1], "down_bias": down[:1]} if cfg.mlp_bias else {})
    if cfg.cdmoe_form.startswith("c1"):
        shapes = {"up": up, "down": down}
    if cfg.cdmoe_form == "single_head":
        shapes["router"] = (2 * cfg.n_subkey, cfg.d_model)
    else:
        shapes["query"] = (cfg.n_retrieval_head * cfg.d_retrieval, cfg.d_model)
        shapes["keys"] = (cfg.n_retrieval_head, cfg.n_subkey, 2, cfg.d_retrieval // 2)
    return shapes | {"expert_down": (cfg.n_expert, cfg.d_model), "expert_up": (cfg.n_expert, cfg.d_model)}


def _moe_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    E, D, hidden = cfg.n_expert, cfg.d_model, cfg.d_ff
    if cfg.moe_form == "gated":
        return {"router": (E, D), "expert_in": (E, 2 * hidden, D), "expert_out": (E, D, hidden)}
    return {
        "router": (E, D),
        "expert_in": (E, hidden, D),
        "expert_in_bias": (E, hidden),
        "expert_out": (E, D, hidden),
        "expert_out_bias": (E, D),
        "shared_in": (hidden, D),
        "shared_in_bias": (hidden,),
        "shared_out": (D, hidden),
        "shared_out_bias": (D,),
        "shared_gate": (1, D),
    }


def count_parameters(cfg: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


@dataclass(frozen=True)
class LeafSpec:
    """One tensor of the decode state.

    Attributes:
        name: flat name, such as `layers.7.k`.
        kind: `position`, `ssm`, `conv`, `kv`, `slot` (keys and values of a window), `score` or `slot_position`.
        shape: numbers, or `batch`, `capacity` and `window` (= min(keep_window, capacity)).
        reset: value that an empty state holds.
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    reset: float

    def concrete_shape(self, batch: int, capacity: int, keep_window: int) -> Shape:
        """The shape with its symbols replaced."""
        sizes = {"batch": batch, "capacity": capacity, "window": min(keep_window, capacity)}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


def state_leaves(cfg: ModelConfig) -> list[LeafSpec]:
    """Every leaf of the decode state, in flat order; batch is axis 0 of each."""
    leaves = [LeafSpec("position", "position", ("batch",), 0)]
    for index, (mixer, _) in enumerate(cfg.layers):
        leaves += [replace(leaf, name=f"layers.{index}.{leaf.name}") for leaf in _mixer_leaves(cfg, mixer)]
    return leaves


def _mixer_leaves(cfg: ModelConfig, mixer: str) -> list[LeafSpec]:
    """A mixer's leaves, named as in its state."""
    ssd = LeafSpec("ssd", "ssm", ("batch", cfg.ssd_head, cfg.ssd_state, cfg.ssd_head_dim), 0.0)
    if mixer == "ssd":
        return [ssd]
    if mixer in ("mamba1", "mamba2"):
        conv = LeafSpec("conv", "conv", ("batch", cfg.conv_size - 1, conv_width(cfg, mixer)), 0.0)
        return [conv, ssd if mixer == "mamba2" else LeafSpec("scan", "ssm", ("batch", cfg.mamba1_width, cfg.mamba1_state), 0.0)]
    if mixer == "dynamic_mask_attention" and cfg.keeps_window:
        slot: tuple[int | str, ...] = ("batch", cfg.n_kv_head, "window", cfg.head_dim)
        window = [LeafSpec(name, "slot", slot, 0.0) for name in ("k", "v")]
        return [*window, LeafSpec("score", "score", slot[:3], -math.inf), LeafSpec("slot_position", "slot_position", slot[:3], -1)]
    inner = mixer == "inner_function_attention"
    cache = [LeafSpec(name, "kv", ("batch", cfg.n_head if inner else cfg.n_kv_head, "capacity", cfg.head_dim), 0.0) for name in ("k", "v")]
    score_head = {"dynamic_mask_attention": cfg.n_score_head, "inner_function_attention": cfg.n_head if cfg.ifa_mask != "none" else 0}
    if heads := score_head.get(mixer):
        cache.append(LeafSpec("score", "score", ("batch", heads, "capacity"), 0.0))
    return cache
