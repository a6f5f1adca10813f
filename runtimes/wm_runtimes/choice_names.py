"""Which calls of a model choose, by the tap names of what they chose or chose by. Needs no torch."""

from collections.abc import Iterator

from wm_graph.config import ModelConfig


def selecting_calls(cfg: ModelConfig) -> tuple[str, ...]:
    """Every call of an op that may choose, in the order in which they run: its experts, or the scores by which keys are kept or hidden."""
    return tuple(
        f"layers.{index}.{call}" for index, (mixer, feed_forward) in enumerate(cfg.layers) for call in _layer(cfg, mixer, feed_forward)
    )


def choice_names(cfg: ModelConfig, length: int) -> tuple[str, ...]:
    """The calls that choose on rows of `length` tokens.

    A window that holds the whole row chooses nothing, nor does a score that is only added, or a mask that is a parameter.
    """
    chosen = {"keep_window_attention": length > cfg.keep_window, "scored_attention": cfg.dma_mask in ("binary", "ratio")}
    return tuple(name for name in selecting_calls(cfg) if chosen.get(op_of(name), True) and not _is_static(cfg, name))


def op_of(name: str) -> str:
    """`layers.3.router_topk.1.expert` -> `router_topk`."""
    return name.split(".")[2]


def options_of(cfg: ModelConfig, name: str) -> int:
    """Among how many experts, or value vectors, a `*.expert` name chooses."""
    return cfg.ifa_value if _mixer(cfg, name) == "inner_function_attention" and name.endswith(".router_topk.expert") else cfg.n_expert


def _layer(cfg: ModelConfig, mixer: str, feed_forward: str) -> Iterator[str]:
    retrieves = mixer == "inner_function_attention"
    if retrieves:
        yield "router_topk.expert"
    if mixer == "dynamic_mask_attention":
        yield f"{'keep_window_attention' if cfg.keeps_window else 'scored_attention'}.score_in"
    elif retrieves and cfg.ifa_mask != "none":
        yield "scored_attention.score_in"
    if feed_forward == "cdmoe":
        yield "product_key_topk.expert"
    elif feed_forward == "moe":
        yield f"router_topk.{'1.' if retrieves else ''}expert"


def _is_static(cfg: ModelConfig, name: str) -> bool:
    return op_of(name) == "scored_attention" and _mixer(cfg, name) != "dynamic_mask_attention"


def _mixer(cfg: ModelConfig, name: str) -> str:
    return cfg.layers[int(name.split(".")[1])][0]
