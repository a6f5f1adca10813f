"""Dense to sparse: gated MLPs become cross-domain mixtures of experts that, until they are trained, compute the same."""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from wm_graph.checkpoints import load_checkpoint, read_text, save_checkpoint
from wm_graph.config import ModelConfig
from wm_graph.errors import ConfigError
from wm_graph.params import Params, draw, params_from_flat, params_to_flat
from wm_graph.shapes import parameter_shapes

CARRIED = ("tokenizer.json", "generation.json")
_MAX_SIZE = 2**48  # more than any memory holds; the square roots and products of what is below are exact


def upcycle(
    cfg: ModelConfig, params: Params, *, n_expert: int, n_retrieval_head: int, n_pick: int, d_retrieval: int, seed: int = 0
) -> tuple[ModelConfig, Params]:
    """Make every gated MLP a cross-domain mixture of experts, form c2, whose shared MLP it is.

    Queries, keys and the experts' inputs are N(0, 0.02^2) from the seed; the experts' outputs are zeros, so that logits stay as they are.

    Args:
        cfg: a model whose feed-forwards are MLPs without biases, or none.
        params: its parameters; they are shared with the result, not copied.
        n_expert: experts, a perfect square (E).
        n_retrieval_head: product-key heads (R).
        n_pick: experts per retrieval head and token (k).
        d_retrieval: width of one head's query (r).
        seed: of the new parameters.

    Returns:
        (configuration, parameters) of the sparse model.

    Raises:
        ConfigError: the model has no MLP, has biases or experts already, or a size is out of range or needs more memory than there is.

    Source:
        arXiv:2412.11834, whose sparse models go on from dense ones; the zeros are ours.
    """
    sizes = {"n_expert": n_expert, "n_retrieval_head": n_retrieval_head, "n_pick": n_pick, "d_retrieval": d_retrieval}
    sparse = upcycled_config(cfg, sizes)
    tensors, generator = params_to_flat(cfg, params), torch.Generator().manual_seed(seed)
    missing = {name: shape for name, shape in parameter_shapes(sparse).items() if name not in tensors}
    _check_memory(sum(math.prod(shape) for shape in missing.values()) * params.embedding.element_size(), n_expert)
    for name, shape in missing.items():
        like = tensors[name.rsplit(".", 1)[0] + ".down"]
        fresh = torch.zeros(shape) if name.endswith(".expert_up") else draw(name.rsplit(".", 1)[-1], shape, generator)
        tensors[name] = fresh.to(like)
    return sparse, params_from_flat(sparse, tensors)


def _check_memory(needed: int, n_expert: int) -> None:
    """Refuse tables that cannot be held, before the system ends a process that tries.

    Raises:
        ConfigError: more bytes are needed than are available.
    """
    available = _available_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"upcycle: the tables of {n_expert} experts need {needed / 1e9:,.1f} GB of memory, {available / 1e9:,.1f} GB are available; "
            "take fewer experts"
        )


def _available_memory() -> int | None:
    """Bytes that this machine can still give; all that it has where the system does not say more, None where it says nothing."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such function, or no such name
        return None


def upcycled_config(cfg: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    """The configuration that `upcycle` gives.

    Raises:
        ConfigError: see `upcycle`.
    """
    kinds = {feed_forward for _, feed_forward in cfg.layers}
    if "mlp" not in kinds or kinds - {"mlp", "none"}:
        raise ConfigError(f"upcycle: the feed-forwards of {cfg.name!r} are {', '.join(sorted(kinds))}, expected mlp; take a dense model")
    if cfg.mlp_bias:
        raise ConfigError(f"upcycle: the mlp layers of {cfg.name!r} have biases, a mixture's shared MLP has none; take a model without")
    if huge := [name for name, size in sizes.items() if size > _MAX_SIZE]:
        raise ConfigError(f"upcycle: {huge[0]} is above {_MAX_SIZE}, more than any memory holds; take a smaller number")
    layers = tuple((mixer, "cdmoe" if feed_forward == "mlp" else feed_forward) for mixer, feed_forward in cfg.layers)
    return replace(cfg, name=f"{cfg.name}-moe", layers=layers, cdmoe_form="c2", **sizes)  # type: ignore[arg-type]


def upcycle_checkpoint(checkpoint: Path, output: Path, *, seed: int = 0, **sizes: int) -> ModelConfig:
    """`upcycle` from a checkpoint folder to a new one; the tokenizer and what is known of its tokens come along.

    Args:
        checkpoint: a checkpoint folder.
        output: the new folder.
        seed: of the new parameters.
        sizes: the sizes of `upcycle`.

    Returns:
        The new configuration.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the folder is taken.
        ConfigError: see `upcycle`.
    """
    cfg, params = load_checkpoint(checkpoint)
    sparse, sparse_params = upcycle(cfg, params, seed=seed, **sizes)
    files = {name: read_text(checkpoint / name, "it belongs to the checkpoint") for name in CARRIED if (checkpoint / name).exists()}
    save_checkpoint(output, sparse, sparse_params, files)
    return sparse
