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


# d_model, layers, head dim, state, vocabulary, tied: the attention-free budget is all layers, so there are more of them
_MAMBA2: dict[str, tuple[int, int, int, int, int, bool]] = {
    "tiny": (64, 8, 32, 16, 512, True),
    "20m": (256, 28, 64, 128, 32768, True),
    "320m": (1024, 40, 64, 128, 32768, False),
    "1.3b": (2048, 40, 64, 128, 32768, False),
}


def _mamba2(size: str) -> ModelConfig:
    """Mamba-2: every layer a mamba2 mixer of twice the width, no feed-forward (arXiv:2405.21060)."""
    d_model, n_layer, head_dim, state, vocab, tied = _MAMBA2[size]
    return ModelConfig(
        name=f"mamba2-{size}",
        vocab_size=vocab,
        d_model=d_model,
        d_ff=1,
        layers=(("mamba2", "none"),) * n_layer,
        n_head=1,
        n_kv_head=1,
        head_dim=2,
        ssd_head=2 * d_model // head_dim,
        ssd_head_dim=head_dim,
        ssd_state=state,
        ssd_rope=False,
        tie_embeddings=tied,
        norm_eps=1e-5,
    )


# d_model, d_ff, heads, key/value heads, vocabulary, tied
_JAMBA: dict[str, tuple[int, int, int, int, int, bool]] = {
    "tiny": (64, 128, 4, 2, 512, True),
    "20m": (256, 512, 4, 4, 32768, True),
    "320m": (1024, 2048, 8, 8, 32768, False),
    "1.3b": (2048, 4096, 16, 16, 32768, False),
}


def _jamba(size: str) -> ModelConfig:
    """Jamba (arXiv:2403.19887): of eight layers the fifth attends, without RoPE; every second feed-forward picks one of four experts."""
    d_model, d_ff, heads, kv_heads, vocab, tied = _JAMBA[size]
    n_layer = 8 if size in ("tiny", "20m") else 16
    return ModelConfig(
        name=f"jamba-{size}",
        vocab_size=vocab,
        d_model=d_model,
        d_ff=d_ff,
        layers=tuple(("attention" if i % 8 == 4 else "mamba1", "moe" if i % 2 else "mlp") for i in range(n_layer)),
        n_head=heads,
        n_kv_head=kv_heads,
        head_dim=d_model // heads,
        attention_rope=False,
        mamba1_width=2 * d_model,
        mamba1_state=16,
        dt_rank=-(-d_model // 16),
        mamba1_norm=True,
        tie_embeddings=tied,
        n_expert=4,
        n_pick=1,
    )


# d_model, d_ff, layers, heads, key/value heads
_DOGE = {"20m": (256, 512, 8, 2, 1), "60m": (512, 1024, 16, 4, 2), "160m": (768, 1536, 24, 6, 3), "320m": (1024, 2048, 32, 8, 4)}


def _doge(size: str) -> ModelConfig:
    """Doge, the descendant of Cheems (arXiv:2508.02124): dynamic-mask attention in every layer, learned residuals, normed q and k."""
    d_model, d_ff, n_layer, heads, kv_heads = _DOGE[size]
    return ModelConfig(
        name=f"doge-{size}",
        vocab_size=32768,
        d_model=d_model,
        d_ff=d_ff,
        layers=(("dynamic_mask_attention", "mlp"),) * n_layer,
        n_head=heads,
        n_kv_head=kv_heads,
        head_dim=d_model // heads,
        qk_norm=True,
        learned_residual=True,
    )


def _cheems_2407(size: str) -> ModelConfig:
    """Cheems of arXiv 2407.16958: inner function attention after seven SSD layers, serial CDMoE, plain residuals."""
    (d_model, d_ff, n_layer, heads, vocab, tied), (n_expert, n_retrieval, n_pick, d_retrieval) = _SIZES[size]
    value, value_head, width = (8, 4, 128) if size == "320m" else (4, 2, 8)
    return ModelConfig(
        name=f"cheems-2407-{size}",
        vocab_size=vocab,
        d_model=d_model,
        d_ff=d_ff,
        layers=tuple(("inner_function_attention" if i % 8 == 7 else "ssd", "cdmoe") for i in range(n_layer)),
        n_head=heads,
        n_kv_head=heads,
        head_dim=d_model // heads,
        ssd_head=heads,
        ssd_head_dim=d_model // heads,
        ssd_state=d_model // heads,
        ssd_group=heads,
        ifa_value=value,
        ifa_head=value_head,
        ifa_pick=value_head,
        d_ifa=width,
        tie_embeddings=tied,
        n_expert=n_expert,
        n_retrieval_head=n_retrieval,
        n_pick=n_pick,
        d_retrieval=d_retrieval,
        cdmoe_form="c1_serial",
    )


def _presets() -> dict[str, ModelConfig]:
    configs = [_cheems("tiny", False), _cheems("tiny", True), _cheems("demo", True)]
    for size in ("20m", "320m", "1.3b"):
        configs += [_cheems(size, False), _cheems(size, True)]
    configs += [_cheems_2407(size) for size in ("tiny", "320m")]
    for family in (_llama, _mamba2, _jamba):
        configs += [family(size) for size in ("tiny", "20m", "320m", "1.3b")]
    configs += [_doge(size) for size in _DOGE]
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
