"""Cases of attention: keep-window prefill and step beside dense and masked attention, and attention over caches.

B rows   T tokens   H query heads   K kv heads   G = H/K   P head dimension   W window   L cells of a cache
"""

import heapq
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import wm_kernels as ops
from kernel_cases import Case, Inputs, Space, grid
from kernel_cases._common import exactly, generator, normal, once, over_budget, split_alike, without_init
from wm_kernels.attention.definition import attention_reference

H, K, P, W = 16, 4, 128, 2048
G = H // K
DTYPE = "bfloat16"
KEEP = "keep_window_attention"
SLOTS = ("slot_k", "slot_v", "slot_score", "slot_position")
CACHES = ("cache_k", "cache_v")


def cases() -> list[Case]:
    """A1 and twice its length, A1 with empty slots and with equal scores, the step at several batches, attention over a cache."""
    made = [prefill("A1", 32768), prefill("A1 64k", 65536), prefill("A1 slots", 32768, used=0), prefill("A1 equal", 32768, "equal")]
    made += [prefill("T 4096", 4096), prefill("T 2048", 2048)]
    steps = [step("A2", 64), step("B 16", 16), step("B 1", 1), cached("32k step", 64, 1, 32768), cached("32k step B 1", 1, 1, 32768)]
    made += [*steps, cached("8k prefill", 1, 8192, 8192), cached("4k step B 1", 1, 1, 4096)]
    made += [exactly(case, case.name, 1) for case in steps if case.name != "B 16"]
    # A token of a prompt at most at twice the time of a step: over full slots, or over the cells that the prompt's tokens see on average.
    alike = partial(split_alike, tokens=("q", "k", "v", "score"), state=SLOTS, call=_call_in_place)
    made.append(exactly(prefill("T 4096", 4096, used=W), "B 1", 4096, alike))
    prompt = cached("8k prefill", 1, 8192, 8192)
    made.append(exactly(prompt, "4k step B 1", 8192, partial(split_alike, tokens=("q", "k", "v"), state=CACHES, call=prompt.ours)))
    return [*made, long_prompt_then_steps()]


def spaces() -> list[Space]:
    """Tiles of the gathered attention and of the selection; shares and tiles of the step."""
    start = {"BLOCK_R": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "max_registers": 128, "listed": 128, "lists_of_chunk": 8}
    start |= {"BLOCK_C": 4096, "select_warps": 16, "BLOCK_L": 512, "list_warps": 4, "BLOCK_D": 32, "BLOCK_S": 32}
    tiles = grid(BLOCK_R=[128], BLOCK_N=[32, 64], num_stages=[3, 5], max_registers=[128]) + grid(
        BLOCK_R=[256], BLOCK_N=[64], num_warps=[16], num_stages=[3, 5]
    )
    select = grid(BLOCK_C=[2048, 4096], select_warps=[4, 8, 16])
    lists = grid(BLOCK_L=[512, 1024], list_warps=[4, 8], lists_of_chunk=[8, 16])
    made = [Space(prefill("A1", 32768), "listed", {}, start, [tiles, select, lists])]
    start = {"BLOCK_N": 64, "BLOCK_W": 1024, "programs": 256, "least_share": 128, "num_warps": 4, "num_stages": 3}
    made.append(Space(step("A2", 64), "step", {}, start, [grid(BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[2, 3, 4])]))
    start = {"chunk": 1024, "BLOCK_R": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    made.append(Space(cached("8k prefill", 1, 8192, 8192), "cells", {}, start, [grid(BLOCK_N=[64, 128], num_stages=[2, 3, 4])]))
    start = {"rows": 64, "BLOCK_N": 64, "programs": 528, "num_warps": 4, "num_stages": 3}
    shares = [grid(rows=[16, 64]), grid(BLOCK_N=[64, 128], programs=[264, 528, 1056])]
    made.append(Space(cached("32k step", 64, 1, 32768), "shares", {}, start, shares))
    return made


def _tokens(g: torch.Generator, B: int, T: int) -> Inputs:
    q, k, v = (normal(g, B, T, heads, P, dtype=DTYPE) for heads in (H, K, K))
    return {"q": q, "k": k, "v": v, "score": normal(g, B, T, K)}


def _slots(g: torch.Generator, B: int, used: int) -> Inputs:
    """Slots of which the first `used` hold keys of the positions 0 .. 2W - 1, in no order, and the position 2W."""
    slot_k, slot_v, score = normal(g, B, K, W, P, dtype=DTYPE), normal(g, B, K, W, P, dtype=DTYPE), normal(g, B, K, W)
    place = torch.rand(B, K, 2 * W, generator=g, device="cuda").argsort(-1)[:, :, :W].contiguous()
    slot_k[:, :, used:], slot_v[:, :, used:], score[:, :, used:], place[:, :, used:] = 0, 0, float("-inf"), -1
    slots = dict(zip(SLOTS, (slot_k, slot_v, score, place), strict=True))
    return {**slots, "position": torch.full((B,), 2 * W if used else 0, device="cuda")}


def _call_in_place(v: Inputs) -> Tensor:
    return ops.keep_window_attention_(v["q"], v["k"], v["v"], v["score"], *(v[name] for name in SLOTS), v["position"], None, W)


def _call(v: Inputs) -> Any:
    slots = (v.get(name) for name in SLOTS)
    return ops.keep_window_attention(v["q"], v["k"], v["v"], v["score"], *slots, v.get("position"), None, W)


def _best(score: Tensor, count: int) -> Tensor:
    """The W best of the first tokens, by larger score, then later position, from two sorts."""
    later = torch.arange(count - 1, -1, -1, device=score.device)
    return later[score[later].argsort(descending=True, stable=True)][:W]


def _rows(v: Inputs, rows: list[int]) -> Tensor:
    """Rows [b = 0, row, H, P] of the answer in float64, each from its own sort."""
    made = []
    for row in rows:
        for kv in range(K):
            kept = _best(v["score"][0, : row + 1, kv], row + 1)
            q_GP = v["q"][0, row, kv * G : (kv + 1) * G].double()
            logits = q_GP @ v["k"][0, kept, kv].double().T * P**-0.5 + v["score"][0, kept, kv].double()
            made.append(logits.softmax(-1) @ v["v"][0, kept, kv].double())
    return torch.stack(made).view(len(rows), H, P)


def _after_slots(v: Inputs) -> Inputs:
    """Keys, values and scores of one row: those that slots hold, in the order of their positions, then those of the tokens."""
    order_KW = v["slot_position"][0].argsort(-1)
    held = {name: torch.stack([v[f"slot_{name}"][0, kv, order_KW[kv]] for kv in range(K)], 1) for name in ("k", "v", "score")}
    return {name: torch.cat([held[name].unsqueeze(0), v[name]], 1) for name in held} | {"q": F.pad(v["q"], [0, 0, 0, 0, W, 0])}


def prefill(name: str, T: int, scores: str = "random", used: int | None = None) -> Case:
    """The prompt of one row, without slots or with W of which the first are used."""
    rows = sorted({row for row in (0, 50, 127, W - 1, W, W + 1, 3000, 5000, T // 2, T - 1) if row < T})

    def make() -> Inputs:
        g = generator()
        inputs = _tokens(g, 1, T)
        if scores == "equal":
            inputs["score"] = torch.zeros_like(inputs["score"])
        return inputs | (_slots(g, 1, used) if used is not None else {})

    def oracle(v: Inputs) -> float:
        out = _call(v)[0][0, rows]
        truth = once(v, lambda: _rows(_after_slots(v), [W + row for row in rows]) if used else _rows(v, rows))
        return over_budget(KEEP, DTYPE, [out], [truth])

    peers = {"SDPA flash": _dense(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": _dense(SDPBackend.CUDNN_ATTENTION)}
    bars: dict[str, float] = {}
    if name == "A1":
        peers |= {"flex mask": _flex_mask, "flex": _flex, "flash-sparse-attn": _sparse}
        bars = {"× SDPA flash": 3.0, "× SDPA cuDNN": 1.7, "× flex + flex mask": 5.0}
    if name == "A1 64k":
        bars = {"time ÷ A1": 2.1}
    pairs = T * (T + 1) // 2 if T <= W else T * W - W * (W - 1) // 2
    size = 2 * T * (H + K) * P * 2 + T * K * 4
    return Case(KEEP, name, DTYPE, make, _call, oracle, peers, size, 4 * P * H * pairs, bars)


def _dense(backend: SDPBackend) -> Callable[[Inputs], Callable[[], Any]]:
    """Causal attention to all keys, without their scores."""

    def make(v: Inputs) -> Callable[[], Any]:
        q, k, values = (v[name].transpose(1, 2) for name in "qkv")

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, values, is_causal=True, enable_gqa=True)

        return run

    return make


def evicted(score_TK: Tensor) -> Tensor:
    """[K, T]: the query from which on each key is out of the W best; T where it stays."""
    rows = score_TK.cpu().tolist()
    out = torch.full((score_TK.shape[1], len(rows)), len(rows), dtype=torch.int32)
    for kv in range(score_TK.shape[1]):
        kept: list[tuple[float, int]] = []
        for t, row in enumerate(rows):
            heapq.heappush(kept, (row[kv], t))
            if len(kept) > W:
                out[kv, heapq.heappop(kept)[1]] = t
    return out


def _mask(v: Inputs) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    end = once_more(v, "evicted", lambda: evicted(v["score"][0]).cuda())
    T = v["q"].shape[1]

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < end[h // G, kv])

    compiled = once_more(v, "create_block_mask", lambda: torch.compile(create_block_mask, dynamic=False))
    return compiled(seen, 1, H, T, T, device="cuda")


def once_more(v: Inputs, name: str, make: Callable[[], Any]) -> Any:
    """What peers of one case share, made by the first of them."""
    if name not in v:
        v[name] = make()
    return v[name]


def _flex_mask(v: Inputs) -> Callable[[], Any]:
    """The block mask of the exact intervals; where keys leave is given."""
    return lambda: _mask(v)


def _flex(v: Inputs) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    mask, score_KT = _mask(v), v["score"][0].T.contiguous()
    q, k, values = (v[name].transpose(1, 2).contiguous() for name in "qkv")

    def scored(x: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return x + score_KT[h // G, kv]

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, values, score_mod=scored, block_mask=mask, enable_gqa=True)


def _sparse(v: Inputs) -> Callable[[], Any]:
    """flash-sparse-attn's deprecated kernel; one mask for all heads, since one for each overflows its 32-bit offsets."""
    without_init("flash_sparse_attn")
    from flash_sparse_attn.deprecated.flash_sparse_attn_triton import triton_sparse_attn_func

    T, end = v["q"].shape[1], once_more(v, "evicted", lambda: evicted(v["score"][0]).cuda())[0]
    bias = torch.empty(1, 1, T, T, device="cuda", dtype=torch.bfloat16)
    key, score = torch.arange(T, device="cuda"), (v["score"][0, :, 0] - v["score"].min()).bfloat16()
    for start in range(0, T, 4096):
        query = torch.arange(start, min(T, start + 4096), device="cuda").unsqueeze(1)
        bias[0, 0, start : start + 4096] = torch.where((key <= query) & (query < end), score, float("-inf"))
    return lambda: triton_sparse_attn_func(v["q"], v["k"], v["v"], bias, True, P**-0.5)


def step(name: str, B: int) -> Case:
    """One token over W full slots, in place. Repeated, it takes one slot after another, which leaves the work the same."""

    def make() -> Inputs:
        g = generator()
        return _tokens(g, B, 1) | _slots(g, B, W)

    def oracle(v: Inputs) -> float:
        copy = {name: x.clone() for name, x in v.items() if isinstance(x, Tensor)}
        wide = [copy[name].double() if copy[name].is_floating_point() else copy[name] for name in ("q", "k", "v", "score", *SLOTS)]
        expected, *_, place = ops.keep_window_attention(*wide, copy["position"], None, W)
        worst = over_budget(KEEP, DTYPE, [_call_in_place(copy)], [expected])
        return worst if torch.equal(copy["slot_position"].sort(-1).values, place.sort(-1).values) else float("inf")

    def dense(v: Inputs) -> Callable[[], Any]:
        g = generator(1)
        k, values = (normal(g, B, K, 32768, P, dtype=DTYPE) for _ in range(2))
        return lambda: F.scaled_dot_product_attention(v["q"].transpose(1, 2), k, values, enable_gqa=True)

    bars = {"× SDPA 32k": 12.0, "copy rate": 0.8} if name == "A2" else {}
    size = B * K * W * (2 * P * 2 + 4)
    return Case(KEEP, name, DTYPE, make, _call_in_place, oracle, {"SDPA 32k": dense}, size, 4 * B * H * W * P, bars)


def long_prompt_then_steps(T: int = 131072, steps: int = 64) -> Case:
    """A prompt of 128k tokens, then 64 steps: every step's output and the last slots against sorts of all that was seen."""

    def make() -> Inputs:
        return _tokens(generator(), 1, T + steps) | _slots(generator(), 1, 0)

    def run(v: Inputs) -> tuple[Tensor, list[Tensor]]:
        slots, outs = [v[name].clone() for name in SLOTS], []
        for start, end in [(0, T), *((t, t + 1) for t in range(T, T + steps))]:
            token = (v[name][:, start:end] for name in ("q", "k", "v", "score"))
            outs.append(ops.keep_window_attention_(*token, *slots, v["position"] + start, None, W)[:, -1])
        return torch.cat(outs), slots

    def oracle(v: Inputs) -> float:
        out, slots = run(v)
        worst = over_budget(KEEP, DTYPE, [out], [once(v, lambda: _rows(v, list(range(T - 1, T + steps))))])
        for kv in range(K):
            kept = _best(v["score"][0, :, kv], T + steps).sort().values
            order = slots[3][0, kv].argsort()
            same = [torch.equal(slots[3][0, kv, order], kept), torch.equal(slots[2][0, kv, order], v["score"][0, kept, kv])]
            same += [torch.equal(slots[i][0, kv, order], v["kv"[i]][0, kept, kv]) for i in range(2)]
            worst = worst if all(same) else float("inf")
        return worst

    pairs = T * W - W * (W - 1) // 2 + steps * W
    size = 2 * T * (H + K) * P * 2 + steps * K * W * (2 * P * 2 + 4)
    return Case(KEEP, "128k and 64 steps", DTYPE, make, run, oracle, {}, size, 4 * P * H * pairs)


def cached(name: str, B: int, T: int, L: int) -> Case:
    """Plain attention of the last T tokens over a full cache of L cells, in place."""

    def make() -> Inputs:
        g = generator()
        caches = {name: normal(g, B, K, L, P, dtype=DTYPE) for name in CACHES}
        return _tokens(g, B, T) | caches | {"position": torch.full((B,), L - T, device="cuda")}

    def ours(v: Inputs) -> Tensor:
        return ops.attention_(v["q"], v["k"], v["v"], v["cache_k"], v["cache_v"], v["position"], None)

    def oracle(v: Inputs) -> float:
        few = slice(max(0, T - 64), T)  # the last queries: all keys are in the cache before them
        out = ours(v)[:1, few]
        wide = [v[name][:1, few].double() for name in ("q", "k", "v")] + [v[name][:1].double() for name in CACHES]
        truth = once(v, lambda: attention_reference(*wide, torch.full((1,), L - out.shape[1], device="cuda"), None)[0])
        return over_budget("attention", DTYPE, [out], [truth])

    def dense(v: Inputs) -> Callable[[], Any]:
        q = v["q"].transpose(1, 2)
        return lambda: F.scaled_dot_product_attention(q, v["cache_k"], v["cache_v"], is_causal=T == L, enable_gqa=True)

    pairs = T * (L - T) + T * (T + 1) // 2
    size = B * (K * L * P * 4 + 2 * T * (H + K) * P * 2)
    return Case("attention", name, DTYPE, make, ours, oracle, {"SDPA": dense}, size, 4 * B * H * P * pairs)
