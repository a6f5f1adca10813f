"""Names and shapes of every parameter and every state leaf of a configuration. Needs no torch.

One table each, from which parameters are initialised, checkpoints checked, states made and manifests written.
"""

import math
from dataclasses import dataclass

from wm_graph.config import ModelConfig

Shape = tuple[int, ...]


def parameter_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Flat parameter name -> shape, in model order. Linear weights are [out, in]; merged siblings are stacked along out."""
    shapes: dict[str, Shape] = {"embedding": (cfg.vocab_size, cfg.d_model)}
    for index, (mixer, feed_forward) in enumerate(cfg.layers):
        layer = f"layers.{index}"
        shapes[f"{layer}.mixer_norm"] = (cfg.d_model,)
        shapes |= {f"{layer}.mixer.{name}": shape for name, shape in _mixer_shapes(cfg, mixer).items()}
        shapes[f"{layer}.feed_forward_norm"] = (cfg.d_model,)
        shapes |= {f"{layer}.feed_forward.{name}": shape for name, shape in _feed_forward_shapes(cfg, feed_forward).items()}
        if cfg.learned_residual:
            shapes[f"{layer}.mixer_residual"] = (cfg.d_model,)
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
    width = cfg.n_head * cfg.head_dim
    kv_width = cfg.n_kv_head * cfg.head_dim
    shapes: dict[str, Shape] = {"qkv": (width + 2 * kv_width, cfg.d_model), "out": (cfg.d_model, width)}
    if mixer == "dynamic_mask_attention":
        shapes |= {"dt": (cfg.n_kv_head, kv_width), "A": (cfg.n_kv_head,)}
    if cfg.qk_norm:
        shapes |= {"q_norm": (cfg.head_dim,), "k_norm": (cfg.head_dim,)}
    return shapes


def _feed_forward_shapes(cfg: ModelConfig, feed_forward: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"gate_up": (2 * cfg.d_ff, cfg.d_model), "down": (cfg.d_model, cfg.d_ff)}
    if feed_forward == "cdmoe":
        shapes |= {
            "query": (cfg.n_retrieval_head * cfg.d_retrieval, cfg.d_model),
            "keys": (cfg.n_retrieval_head, cfg.n_subkey, 2, cfg.d_retrieval // 2),
            "expert_down": (cfg.n_expert, cfg.d_model),
            "expert_up": (cfg.n_expert, cfg.d_model),
        }
    return shapes


def count_parameters(cfg: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


@dataclass(frozen=True)
class LeafSpec:
    """One tensor of the decode state.

    Attributes:
        name: flat name, such as `layers.7.k`.
        kind: `position`, `ssm`, `kv`, `slot` (keys and values of a window), `score` or `slot_position`.
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
    kv_shape = ("batch", cfg.n_kv_head, "capacity", cfg.head_dim)
    slot_shape = ("batch", cfg.n_kv_head, "window", cfg.head_dim)
    for index, (mixer, _) in enumerate(cfg.layers):
        layer = f"layers.{index}"
        if mixer == "ssd":
            leaves.append(LeafSpec(f"{layer}.ssd", "ssm", ("batch", cfg.ssd_head, cfg.ssd_head_dim, cfg.ssd_state), 0.0))
        elif mixer == "attention":
            leaves += [LeafSpec(f"{layer}.{name}", "kv", kv_shape, 0.0) for name in ("k", "v")]
        else:
            leaves += [LeafSpec(f"{layer}.{name}", "slot", slot_shape, 0.0) for name in ("k", "v")]
            leaves.append(LeafSpec(f"{layer}.score", "score", slot_shape[:3], -math.inf))
            leaves.append(LeafSpec(f"{layer}.slot_position", "slot_position", slot_shape[:3], -1))
    return leaves
