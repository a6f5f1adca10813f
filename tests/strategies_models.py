"""Random small models and random uses of them, drawn as a few numbers, so that a failure shrinks and prints as a line to paste.

    drawn('ssd+mlp attention+none', seed=3, keep_window=2)   a model and its parameters
    Texts(seed=5, lengths=(3, 0, 17), distinct=2)            rows of tokens

T tokens, W window, V vocabulary.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from wm_graph.config import FEED_FORWARDS, FORMS, MIXERS, ModelConfig
from wm_graph.params import Params, cast_params, draw, map_tensors, params_from_flat
from wm_graph.shapes import parameter_shapes
from wm_runtimes.snapshot import Array

# Widths that no alignment hides behind: odd where the model allows it.
BASE: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 10,
    "d_ff": 7,
    "n_head": 2,
    "n_kv_head": 1,
    "head_dim": 4,
    "ssd_head": 2,
    "ssd_head_dim": 3,
    "ssd_state": 4,
    "conv_size": 3,
    "mamba1_width": 9,
    "mamba1_state": 3,
    "dt_rank": 3,
    "keep_window": 5,
    "ifa_value": 6,
    "ifa_head": 2,
    "ifa_pick": 2,
    "d_ifa": 5,
    "ifa_positions": 300,
    "n_expert": 9,
    "n_retrieval_head": 2,
    "n_pick": 2,
    "d_retrieval": 6,
    "norm_eps": 1e-5,
}
_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)} | BASE


@dataclass(frozen=True, repr=False)
class Drawn:
    """A model: its layers in words, the options that differ from `_DEFAULTS`, and the seed of its parameters."""

    layers: str
    seed: int
    options: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        return f"drawn({self.layers!r}, seed={self.seed}{''.join(f', {name}={value!r}' for name, value in self.options)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print the fields

    @property
    def cfg(self) -> ModelConfig:
        """The configuration."""
        layers = tuple(tuple(pair.split("+")) for pair in self.layers.split())
        return ModelConfig(name="drawn", layers=layers, **(BASE | dict(self.options)))  # type: ignore[arg-type]

    def params(self, dtype: torch.dtype = torch.float32) -> Params:
        """The parameters, the same for every dtype up to rounding."""
        params: Params = cast_params(_params(self), dtype)
        return params


def drawn(layers: str, seed: int = 0, **options: Any) -> Drawn:
    """What a `Drawn` prints as."""
    return Drawn(layers, seed, tuple(sorted((name, value) for name, value in options.items() if _DEFAULTS.get(name) != value)))


@cache
def _params(model: Drawn) -> Params:
    """Parameters whose every part matters: weights N(0, 1/fan-in), so that layers outweigh the embedding; logits of scale about 1."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(model.seed)
    shapes = parameter_shapes(cfg)
    params = params_from_flat(cfg, {name: draw(name.rsplit(".", 1)[-1], shape, generator) for name, shape in shapes.items()})

    def enliven(name: str, tensor: Tensor) -> Tensor:
        leaf, noise = name.rsplit(".", 1)[-1], torch.randn(tensor.shape, generator=generator)
        if leaf.endswith(("norm", "residual")) or leaf == "D":
            return 1 + 0.2 * noise
        if leaf == "A_log":
            return tensor - 1 + 0.5 * noise  # states that remember a few tokens, and others that remember many
        if leaf == "mask":
            # Where a static_ste mask hides every key, float32 forgets the logits below its -1e9; so the first stays.
            return (noise > -0.7).float().index_fill(1, torch.tensor([0]), 1.0)
        if leaf.endswith("bias"):
            return tensor + 0.2 * noise
        if leaf in ("conv_weight", "dt_proj"):
            return tensor
        if leaf in ("A", "keys", "value_keys", "value_embed"):
            return noise
        return noise / tensor.shape[-1] ** 0.5

    enlivened: Params = map_tensors(params, enliven)
    return enlivened


@dataclass(frozen=True)
class Texts:
    """Rows of token ids: `lengths` many of each, from `distinct` different ids (0: all of the vocabulary)."""

    seed: int
    lengths: tuple[int, ...]
    distinct: int = 0

    def rows(self, vocab_size: int) -> list[Array]:
        """The rows, int64."""
        rng = np.random.default_rng(self.seed)
        ids = rng.permutation(vocab_size)[: self.distinct or vocab_size]
        return [ids[rng.integers(0, len(ids), length)] for length in self.lengths]


SEEDS = st.integers(0, 2**16)


def texts(batch: int, longest: int, shortest: int = 0) -> st.SearchStrategy[Texts]:
    """Rows of shortest..longest tokens; often few different ids, and lengths next to the window and the chunk of 64."""
    near = sorted({length for length in (1, 2, 3, 5, 6, 9, 63, 64, 65, longest) if shortest <= length <= longest})
    length = st.integers(shortest, min(longest, shortest + 12)) | st.sampled_from(near)
    return st.builds(Texts, SEEDS, st.tuples(*[length] * batch), st.sampled_from((0, 2, 5)))


def cuts(length: int, most: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Where to cut a text of `length` >= 2 tokens into pieces: at least once, 0 < cut < length, in order; often at the chunk's edge."""
    near = [cut for cut in (63, 64, 65) if cut < length]
    places = st.integers(1, length - 1) | st.sampled_from(near) if near else st.integers(1, length - 1)
    return st.sets(places, min_size=1, max_size=most).map(lambda edges: tuple(sorted(edges)))


Split = tuple[Texts, tuple[int, ...]]


@st.composite
def splits(draw: st.DrawFn, batch: int, longest: int, shortest: int = 0, long: bool = False) -> Split:
    """Rows of shortest..longest tokens, and cuts inside the longest row; `long`, or often where rows may: 64 or more in one."""
    text = draw(texts(batch, longest, shortest).filter(lambda text: max(text.lengths) > 1))
    if long or (longest >= 64 and draw(st.integers(0, 3)) == 3):
        length = draw(st.sampled_from([length for length in (64, 65, 66, longest) if length <= longest]))
        text = Texts(text.seed, (*text.lengths[1:], length), text.distinct)
    return text, draw(cuts(max(text.lengths)))


def subsets(batch: int) -> st.SearchStrategy[tuple[int, ...]]:
    """At least one row, in any order."""
    return st.integers(1, batch).flatmap(lambda count: st.permutations(range(batch)).map(lambda rows: tuple(rows[:count])))


def orders(batch: int) -> st.SearchStrategy[tuple[int, ...]]:
    """What `permute` takes: permutations, and choices with repeats; for two rows or more, never the order that they are in."""
    every = st.permutations(range(batch)).map(tuple) | st.tuples(*[st.integers(0, batch - 1)] * batch)
    return every.map(lambda order: order[::-1] if order == tuple(range(batch)) else order)


RELATIVE = ("ssd", "mamba1", "mamba2", "attention", "dynamic_mask_attention")  # mixers to which only distances between tokens matter


@st.composite
def models(
    draw: st.DrawFn,
    mixers: tuple[str, ...] = MIXERS,
    feed_forwards: tuple[str, ...] = FEED_FORWARDS,
    dynamic_rope: bool = False,
    **fixed: Any,
) -> Drawn:
    """Models of 1 to 3 layers, of any mixer, feed-forward and option; `fixed` options are not drawn."""
    count = draw(st.integers(1, 3))
    pairs = [(draw(st.sampled_from(mixers)), draw(st.sampled_from(feed_forwards))) for _ in range(count)]
    used = {mixer for mixer, _ in pairs}
    options = _sizes(draw) | _rotation(draw, used, dynamic_rope)
    options |= _dynamic_mask(draw, used) | _inner_function(draw, used, options) | _mambas(draw, used) | _experts(draw, pairs)
    options |= {name: draw(st.booleans()) for name in ("learned_residual", "tie_embeddings", "qk_norm", "attention_bias", "mlp_bias")}
    return drawn(" ".join("+".join(pair) for pair in pairs), draw(SEEDS), **(options | fixed))


def _sizes(draw: st.DrawFn) -> dict[str, Any]:
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "d_model": draw(st.integers(4, 13)),
        "d_ff": draw(st.sampled_from((7, 1, 8))),
        "n_kv_head": kv,
        "n_head": kv * draw(st.integers(1, 3)),
        "ssd_group": group,
        "ssd_head": group * draw(st.integers(1, 2)),
        "ssd_head_dim": draw(st.sampled_from((3, 1, 4))),
        "keep_window": draw(st.sampled_from((5, 1, 2, 9, 70))),
        "norm_eps": draw(st.sampled_from((1e-5, 1e-6))),
    }


def _rotation(draw: st.DrawFn, used: set[str], dynamic: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"attention_rope": draw(st.booleans()), "ssd_rope": draw(st.booleans())}
    options["head_dim"] = draw(st.sampled_from((4, 2, 6) if options["attention_rope"] else (4, 3, 5)))
    options["ssd_state"] = draw(st.sampled_from((4, 2, 6) if options["ssd_rope"] else (4, 1, 5)))
    if options["attention_rope"] and draw(st.booleans()):
        options |= {"head_dim": 5, "rotary_dim": draw(st.sampled_from((2, 4)))}
    options["rope_theta"] = draw(st.sampled_from((10000.0, 100.0)))
    scaling = draw(st.sampled_from(tuple(form for form in FORMS["rope_scaling"] if dynamic or form != "dynamic")))
    if scaling != "none":
        options |= {
            "rope_scaling": scaling,
            "rope_factor": draw(st.sampled_from((2.0, 8.0))),
            "rope_original": draw(st.sampled_from((8, 32))),
        }
    return options


def _dynamic_mask(draw: st.DrawFn, used: set[str]) -> dict[str, Any]:
    if "dynamic_mask_attention" not in used:
        return {}
    mask = draw(st.sampled_from(FORMS["dma_mask"]))
    options: dict[str, Any] = {"dma_mask": mask}
    if mask == "ratio":
        options["dma_ratio"] = draw(st.sampled_from((0.4, 0.1, 0.9)))
    if mask not in ("keep_window", "log"):
        options["dma_heads"] = draw(st.sampled_from(FORMS["dma_heads"]))
    return options


def _inner_function(draw: st.DrawFn, used: set[str], sizes: dict[str, Any]) -> dict[str, Any]:
    if "inner_function_attention" not in used:
        return {}
    form = draw(st.sampled_from(FORMS["ifa_form"]))
    picks = {"ifa_head": 1, "ifa_pick": 1} if form == "top1" else {"ifa_head": draw(st.integers(1, 3)), "ifa_pick": draw(st.integers(1, 3))}
    width = sizes["n_head"] * sizes["head_dim"]  # its values gate the input
    return {"ifa_form": form, "ifa_mask": draw(st.sampled_from(FORMS["ifa_mask"])), "d_model": width, "ifa_value": 6, **picks}


def _mambas(draw: st.DrawFn, used: set[str]) -> dict[str, Any]:
    if not used & {"mamba1", "mamba2"}:
        return {}
    options: dict[str, Any] = {name: draw(st.booleans()) for name in ("conv_bias", "mamba_bias", "mamba1_norm")}
    options |= {
        "conv_size": draw(st.sampled_from((3, 2, 5))),
        "mamba1_width": draw(st.sampled_from((9, 4))),
        "dt_rank": draw(st.integers(2, 3)),
    }
    options["mamba1_state"] = draw(st.sampled_from((3, 4)))
    if draw(st.booleans()):
        options |= {"dt_min": 0.002, "dt_max": draw(st.sampled_from((0.0, 0.05)))}
    return options


def _experts(draw: st.DrawFn, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    feed_forwards = {feed_forward for _, feed_forward in pairs}
    options: dict[str, Any] = {}
    if "cdmoe" in feed_forwards:
        options["cdmoe_form"] = form = draw(st.sampled_from(FORMS["cdmoe_form"]))
        options |= {"n_retrieval_head": 1, "d_retrieval": 0} if form == "single_head" else {"n_retrieval_head": draw(st.integers(1, 3))}
    if "moe" in feed_forwards:
        options |= {"moe_form": draw(st.sampled_from(FORMS["moe_form"])), "moe_normalize": draw(st.booleans())}
    if options:
        options["n_expert"] = draw(st.sampled_from((9, 4, 16)))
        options["n_pick"] = draw(st.integers(1, 2))
    return options
