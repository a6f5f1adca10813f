"""Cases of attention by scores of keys, in the scorings that kernels serve: `ratio` has none.

B rows   T tokens   H query heads   K kv heads, and score heads   G = H/K   P head dimension   L cells
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from kernel_cases import Case, Inputs
from kernel_cases._common import compiled, exactly, generator, normal, once, over_budget, split_alike
from wm_kernels.scored_attention import scored_attention_reference

H, K, P = 16, 4, 128
G = H // K
OP, DTYPE = "scored_attention", "bfloat16"
CACHES = ("cache_k", "cache_v", "cache_score")


def cases() -> list[Case]:
    """A prompt and steps in each scoring; with exact numerics a token of the prompt beside a step over half of its cells."""
    made = [scored(scoring, "8k prefill", 1, 8192, 8192) for scoring in ("additive", "binary")]
    made += [scored(scoring, "32k step", 64, 1, 32768) for scoring in ("additive", "binary")]
    prompt, step = made[0], scored("additive", "32k step B 1", 1, 1, 32768)
    made += [step, scored("additive", "4k step B 1", 1, 1, 4096)]
    alike = partial(split_alike, tokens=("q", "k", "v", "score"), state=CACHES, call=prompt.ours)
    return [*made, exactly(prompt, "additive 4k step B 1", 8192, alike), exactly(step, step.name, 1)]


def scored(scoring: str, name: str, B: int, T: int, L: int) -> Case:
    """The last T tokens over a full cache of L cells, in place; half of the keys are hidden where scores hide any."""

    def make() -> Inputs:
        g = generator()
        q, k, v = (normal(g, B, T, heads, P, dtype=DTYPE) for heads in (H, K, K))
        caches = {name: normal(g, B, K, L, P, dtype=DTYPE) for name in CACHES[:2]}
        caches["cache_score"] = normal(g, B, K, L) + 1
        return {"q": q, "k": k, "v": v, "score": normal(g, B, T, K) + 1, "position": torch.full((B,), L - T, device="cuda")} | caches

    def call(v: Inputs, function: Callable[..., Any]) -> Any:
        caches = (v[name] for name in CACHES)
        return function(v["q"], v["k"], v["v"], v["score"], *caches, v["position"], None, scoring, 0.0)

    def ours(v: Inputs) -> Tensor:
        return call(v, ops.scored_attention_)

    def oracle(v: Inputs) -> float:
        """The first row's last queries: all keys are in the cache before them."""
        few = slice(max(0, T - 64), T)
        out = ours(v)[:1, few]
        some = {name: v[name][:1, few].double() for name in ("q", "k", "v", "score")} | {name: v[name][:1].double() for name in CACHES}
        some["position"] = torch.full((1,), L - out.shape[1], device="cuda")
        return over_budget(OP, DTYPE, [out], [once(v, lambda: call(some, scored_attention_reference)[0])])

    def formula(q: Tensor, k: Tensor, v: Tensor, score: Tensor) -> Tensor:
        return _attend(_rows(q), k, v, _mask(score, T, L, scoring))

    def dense(v: Inputs) -> Callable[[], Any]:
        """The mask is made beforehand."""
        return partial(_attend, _rows(v["q"]), v["cache_k"], v["cache_v"], _mask(v["cache_score"], T, L, scoring))

    peers = {
        "reference": lambda v: lambda: call(v, scored_attention_reference),
        "torch.compile": compiled(formula, "q", *CACHES),
        "SDPA dense mask": dense,
    }
    pairs = T * (L - T) + T * (T + 1) // 2
    size = B * (K * L * (P * 4 + 4) + 2 * T * (H + K) * P * 2)
    bars = {"× torch.compile": 1.0, "× SDPA dense mask": 1.0}
    return Case(OP, f"{scoring} {name}", DTYPE, make, ours, oracle, peers, size, 4 * B * H * P * pairs, bars)


def _rows(q_BTHP: Tensor) -> Tensor:
    """[B, K, G·T, P]: the query heads of a kv head as rows of one product, as torch's masked kernels know no shared keys."""
    B, T = q_BTHP.shape[:2]
    return q_BTHP.view(B, T, K, G, P).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, P)


def _mask(score_BKL: Tensor, T: int, L: int, scoring: str) -> Tensor:
    """[B, K, G·T, L], what is added to the logits of the last T tokens."""
    cell_L = torch.arange(L, device=score_BKL.device)
    visible_BKTL = (cell_L <= cell_L[L - T :, None]).expand(*score_BKL.shape[:2], T, L)
    bias_BKTL = score_BKL.unsqueeze(2).expand_as(visible_BKTL)
    if scoring == "binary":
        visible_BKTL, bias_BKTL = visible_BKTL & (bias_BKTL >= 1), torch.zeros_like(bias_BKTL)
    return bias_BKTL.to(torch.bfloat16).masked_fill(~visible_BKTL, float("-inf")).repeat(1, 1, G, 1)


def _attend(q_BKRP: Tensor, k_BKLP: Tensor, v_BKLP: Tensor, mask_BKRL: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BKRP, k_BKLP, v_BKLP, attn_mask=mask_BKRL)
