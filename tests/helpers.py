"""Models and runs that several tests share. B rows, T tokens, V vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.model import forward
from wm_graph.params import Params, init_params, map_tensors
from wm_graph.state import zero_state
from wm_graph.taps import Taps
from wm_runtimes.choices import choice_names
from wm_runtimes.draws import Draws
from wm_runtimes.parity import Oracle

LIMIT = 1e-4  # max abs on float32 logits of scale about 1


def _cut(name: str, layers: slice, **changes: object) -> ModelConfig:
    cfg = ModelConfig.preset(name)
    return replace(cfg, layers=cfg.layers[layers], **changes)  # type: ignore[arg-type]


MODELS: dict[str, ModelConfig] = {
    "cheems-tiny": ModelConfig.preset("cheems-tiny"),
    "cheems-tiny-moe": ModelConfig.preset("cheems-tiny-moe"),
    "llama-tiny": ModelConfig.preset("llama-tiny"),
    "window": _cut("cheems-tiny-moe", slice(5, 8), keep_window=8, qk_norm=True),
    "cheems-20m widths": _cut("cheems-20m", slice(6, 8), vocab_size=1024),
    "cheems-20m-moe widths": _cut("cheems-20m-moe", slice(6, 8), vocab_size=1024),
    "llama-20m widths": _cut("llama-20m", slice(0, 2), vocab_size=1024, n_kv_head=2),
}


def lively_params(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters whose scores differ from key to key, norms and residual scales from 1, logits of scale about 1."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        leaf = name.rsplit(".", 1)[-1]
        noise = torch.randn(tensor.shape, generator=generator)
        if leaf == "A":
            return noise
        if leaf.endswith(("norm", "residual")):
            return (1 + 0.2 * noise).to(dtype)
        return tensor * 5 if name == "embedding" else tensor

    return map_tensors(init_params(cfg, seed, dtype), change)  # type: ignore[no-any-return]


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
            taps_of_parts.append(taps.values)
            start += length
        return torch.cat(parts, 1), {name: torch.cat([values[name] for values in taps_of_parts], 1) for name in self.names}
