"""Cases of attention from a packed projection: rotation, writing into the cache and attention in one op.

B rows   T tokens   H query heads   K kv heads   P head dimension   F rotated pairs   L cells   C = (H + 2K)·P packed width
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
from wm_kernels.attention_rope import attention_rope_reference
from wm_kernels.rope import rope_reference

H, K, P = 16, 4, 128
OP, DTYPE = "attention_rope", "bfloat16"
CACHES = ("cache_k", "cache_v")


def cases() -> list[Case]:
    """A prompt and steps, the sizes of `attention`; with exact numerics a token of the prompt beside a step over half of its cells."""
    steps = [packed("32k step", 64, 1, 32768), packed("32k step B 1", 1, 1, 32768), packed("4k step B 1", 1, 1, 4096)]
    prompt = packed("8k prefill", 1, 8192, 8192)
    alike = partial(split_alike, tokens=("qkv", "cos", "sin"), state=CACHES, call=prompt.ours)
    return [prompt, *steps, exactly(prompt, "4k step B 1", 8192, alike), exactly(steps[1], "32k step B 1", 1)]


def packed(name: str, B: int, T: int, L: int) -> Case:
    """The last T tokens over a full cache of L cells, in place."""

    def make() -> Inputs:
        g = generator()
        position = torch.full((B,), L - T, device="cuda")
        cos, sin = ops.rope_angles(position.unsqueeze(1) + torch.arange(T, device="cuda"), P // 2, 1e4)
        caches = {name: normal(g, B, K, L, P, dtype=DTYPE) for name in CACHES}
        return {"qkv": normal(g, B, T, (H + 2 * K) * P, dtype=DTYPE), "cos": cos, "sin": sin, "position": position} | caches

    def ours(v: Inputs) -> Tensor:
        return ops.attention_rope_(v["qkv"], v["cos"], v["sin"], v["cache_k"], v["cache_v"], v["position"], None, H, K, P)

    def oracle(v: Inputs) -> float:
        """Of the first row: the keys of all tokens in their cells, and the last queries, over the cells that are before them."""
        few = slice(max(0, T - 64), T)
        out = ours(v)[:1, few]
        last = torch.full((1,), L - out.shape[1], device="cuda")
        wide = [v[name][:1, few].double() for name in ("qkv", "cos", "sin")] + [v[name][:1].double() for name in CACHES]
        truth = once(v, lambda: attention_rope_reference(*wide, last, None, H, K, P)[0])
        keys = rope_reference(*(x.double() for x in (_heads(v)[1][:1], v["cos"][:1], v["sin"][:1])))
        cells = v["cache_k"][:1, :, L - T :].transpose(1, 2)
        return max(over_budget(OP, DTYPE, [out], [truth]), over_budget("rope", DTYPE, [cells], [keys]))

    def rotation(v: Inputs) -> Callable[[], Any]:
        q, k, _ = _heads(v)
        return compiled(_rotate, "q", "k", "cos", "sin")(v | {"q": q, "k": k})

    def dense(v: Inputs) -> Callable[[], Any]:
        q = _heads(v)[0].transpose(1, 2)
        return lambda: F.scaled_dot_product_attention(q, v["cache_k"], v["cache_v"], is_causal=T == L, enable_gqa=True)

    pairs = T * (L - T) + T * (T + 1) // 2
    size = B * (K * L * P * 4 + T * (2 * H + 2 * K) * P * 2 + T * P * 4)
    return Case(OP, name, DTYPE, make, ours, oracle, {"rope": rotation, "SDPA": dense}, size, 4 * B * H * P * pairs)


def _heads(v: Inputs) -> list[Tensor]:
    """q_BTHP, k_BTKP, v_BTKP, not rotated."""
    return list(v["qkv"].unflatten(2, (-1, P)).split([H, K, K], 2))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope_reference(q, cos, sin), rope_reference(k, cos, sin)
