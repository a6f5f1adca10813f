"""Named configurations. Sizes follow the papers where published; see docs/design.md. Needs no torch."""

import re

from wm_graph.config import ModelConfig
from wm_graph.errors import ConfigError

# d_model, d_ff, layers, heads, vocabulary, tied; CDMoE: experts, retrieval heads, picks, retrieval width
_SIZES: dict[str, tuple[tuple[int, int, int, int, int, bool], tuple[int, int, int, int]]] = {
    "tiny": ((64, 128, 8, 4, 512, True), (64, 2, 4, 16)),
    "demo": ((256, 512, 8, 4, 8192, True), (1024, 2, 8, 64)),
    "20m": ((256, 768, 16, 4, 32768, True), (4096, 2, 8, 64)),
    "320m": ((1024, 4096, 16, 8, 32768, False), (4096, 4, 8, 256)),
    "1.3b": ((2048, 8192, 16, 16, 32768, False), (4096, 4, 8, 256)),
}


def _cheems(size: str, cdmoe: bool) -> ModelConfig:
    """Cheems of arXiv 2412.11834: seven SSD layers with RoPE, then one dynamic-mask attention layer, repeated; learned residuals."""
    (d_model, d_ff, n_layer, heads, vocab, tied), (n_expert, n_retrieval, n_pick, d_retrieval) = _SIZES[size]
    feed_forward = "cdmoe" if cdmoe else "mlp"
    mixers = ["dynamic_mask_attention" if index % 8 == 7 else "ssd" for index in range(n_layer)]
    return ModelConfig(
        name=f"cheems-{size}" + ("-moe" if cdmoe and size != "demo" else ""),
        vocab_size=vocab,
        d_model=d_model,
        d_ff=d_ff,
        layers=tuple((mixer, feed_forward) for mixer in mixers),
        n_head=heads,
        n_kv_head=heads,
        head_dim=d_model // heads,
        ssd_head=heads,
        ssd_head_dim=d_model // heads,
        ssd_state=d_model // heads,
        ssd_group=heads,
        learned_residual=True,
        tie_embeddings=tied,
        n_expert=n_expert if cdmoe else 0,
        n_retrieval_head=n_retrieval if cdmoe else 0,
        n_pick=n_pick if cdmoe else 0,
        d_retrieval=d_retrieval if cdmoe else 0,
    )


def _llama(size: str) -> ModelConfig:
    """Llama at the same budget: attention and a gated MLP in every layer, plain residuals."""
    (d_model, d_ff, n_layer, heads, vocab, tied), _ = _SIZES[size]
    return ModelConfig(
        name=f"llama-{size}",
        vocab_size=vocab,
        d_model=d_model,
        d_ff=d_ff,
        layers=(("attention", "mlp"),) * n_layer,
        n_head=heads,
        n_kv_head=heads,
        head_dim=d_model // heads,
        tie_embeddings=tied,
    )


def _presets() -> dict[str, ModelConfig]:
    configs = [_cheems("tiny", False), _cheems("tiny", True), _cheems("demo", True)]
    for size in ("20m", "320m", "1.3b"):
        configs += [_cheems(size, False), _cheems(size, True)]
    configs += [_llama(size) for size in ("tiny", "20m", "320m", "1.3b")]
    return {config.name: config for config in configs}


PRESETS: dict[str, ModelConfig] = _presets()


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        ConfigError: there is none; the message lists the nearest names.
    """
    if name not in PRESETS:
        family = re.split(r"[-_]", name)[0]
        near = [known for known in PRESETS if known.startswith(family)] or list(PRESETS)
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(near)}")
    return PRESETS[name]
