"""Launches of keep-window attention.

B batch   T tokens   H query heads   K kv heads   G = H/K   P head dimension   W window   S slots given, W or 0   C = S + T candidates
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from wm_kernels.attention.plan import Layout, Strides, block_of, fitted, scores_of_tokens, shares_of
from wm_kernels.attention.plan import plan as plan_cells
from wm_kernels.keep_window_attention import triton_exact as in_order
from wm_kernels.keep_window_attention import triton_kernel as kernels
from wm_kernels.keep_window_attention import triton_select as select
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch, architecture, strides_of
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

SLOTS = ("slot_k", "slot_v", "slot_score", "slot_position")
NEW_SLOTS = ("new_k", "new_v", "new_score", "new_position")


@dataclass(frozen=True)
class Call:
    """What a plan depends on.

    Attributes:
        B: rows.
        T: tokens.
        H: query heads.
        K: kv heads, a divisor of H.
        P: head dimension.
        W: window, and the number of slots if there are any.
        slots: whether slots are given.
        valid: whether valid_B is given.
        in_place: whether the slots given are written; otherwise those after the call go to new ones.
        dtype: of q, k and v.
        arch: see `triton_launch.architecture`.
        strides: of every tensor by its name in the plan, in elements; those along P are 1.
        exact: whether the bits may not depend on how tokens are split into calls; the slots given are then written.
    """

    B: int
    T: int
    H: int
    K: int
    P: int
    W: int
    slots: bool
    valid: bool
    in_place: bool
    dtype: torch.dtype
    arch: str
    strides: Strides
    exact: bool = False

    @property
    def S(self) -> int:
        """Slots given."""
        return self.W if self.slots else 0


def regime(T: int, W: int, slots: bool, exact: bool = False) -> str:
    """`step`: one token and slots. `causal`: no key can leave. `listed`: each block of queries has a list of live keys. `exact`: any T."""
    if exact:
        return "exact"
    if slots:
        return "step" if T == 1 else "listed"
    return "causal" if T <= W else "listed"


@lru_cache(maxsize=1024)
def plan(call: Call) -> Plan:
    """The launches of one call: tensors are named as in `Call.strides`, outputs `out` and, unless in place, `new_k` and so on."""
    chosen = regime(call.T, call.W, call.slots, call.exact)
    if chosen == "causal":
        return _causal(call)
    dims = (("P", call.P), ("G", call.H // call.K))
    values = fitted(config("keep_window_attention", call.arch, dtype_name(call.dtype), chosen, dims), call.P)
    return {"step": _step, "listed": _listed, "exact": _exact}[chosen](call, values)


@lru_cache(maxsize=1024)
def planned(layout: Layout, window: int, in_place: bool, exact: bool, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of a call by its tensors' layout: a step looks up what one before it has made."""
    shapes = {name: shape for name, shape, _ in layout}
    (B, T, H, P), K = shapes["q"], shapes["k"][2]
    W = shapes["slot_k"][2] if "slot_k" in shapes else window
    outer = tuple((name, strides_of(shape, stride)) for name, shape, stride in layout)
    given = "slot_k" in shapes, "valid" in shapes
    return plan(Call(B, T, H, K, P, W, *given, in_place, dtype, architecture(device), outer, exact))


def _causal(call: Call) -> Plan:
    strides = dict(call.strides)
    b, t, k = strides["score"]
    of_cells = (*((name, strides[name]) for name in "qkv"), ("score", scores_of_tokens(b, k, t)))
    dims = (call.B, call.T, call.H, call.K, call.K, call.P, call.T)
    return plan_cells(*dims, "additive", False, call.dtype, call.arch, of_cells)


def _step(call: Call, values: Mapping[str, Any]) -> Plan:
    B, H, K, P, W = call.B, call.H, call.K, call.P, call.W
    strides, R = dict(call.strides), block_of(H // K)
    shares = shares_of(B * K, values["programs"], max(1, W // values["least_share"]))
    token = tuple(strides[name][axis] for name in ("k", "v", "score") for axis in (0, 2))
    slots = (*strides["slot_k"][:3], *strides["slot_v"][:3], *strides["slot_score"], *strides["slot_position"])
    tensors = ("k", "v", "score", *SLOTS, "position")
    dims = {"H": H, "K": K, "P": P, "BLOCK_P": block_of(P), "SHARES": shares, "BLOCK_R": R}
    dims["DEPENDENT"] = can_wait(call.arch)
    of_step = {
        "W": W, "HAS_VALID": call.valid, "BLOCK_N": values["BLOCK_N"], "BLOCK_W": min(values["BLOCK_W"], power_of_two(W)), "SCALE": P**-0.5,
        "STAGES": values["num_stages"],
    }  # fmt: skip
    partial = ("acc", "tops", "choice") if shares > 1 else ("out", "out", "out")
    attend = Launch(
        kernels.attend_slots,
        (shares, K, B),
        ("q", *tensors, "valid" if call.valid else "position", "out", *partial, strides["q"][0], strides["q"][2], *token, *slots),
        {**dims, **of_step},
        values["num_warps"],
        values["num_stages"],
    )
    if shares == 1:
        return Plan((attend,))
    combine = Launch(kernels.combine_and_replace, (H, B), (*tensors, *partial, "out", *token, *slots), dims, 4, 1)
    scratch = {
        "acc": Scratch((B, K, shares, R, P), torch.float32),
        "tops": Scratch((B, K, shares, 2, R), torch.float32),
        "choice": Scratch((B, K), torch.int32),
    }
    return Plan((attend, combine), scratch)


@dataclass(frozen=True)
class _Blocks:
    """How queries are grouped: `queries` to a program, `listed` to a list, `chunk` from one set of live keys to the next."""

    heads: int
    queries: int
    listed: int
    chunk: int
    blocks: int
    chunks: int


def _blocks(call: Call, values: Mapping[str, Any]) -> _Blocks:
    heads = min(call.H // call.K, values["BLOCK_R"])
    queries = min(values["BLOCK_R"] // heads, values["listed"])
    listed = values["listed"] // queries * queries
    chunk = listed * values["lists_of_chunk"]
    return _Blocks(heads, queries, listed, chunk, blocks(call.T, listed), blocks(call.T, chunk))


def _listed(call: Call, values: Mapping[str, Any]) -> Plan:
    B, K, W, C, of = call.B, call.K, call.W, call.S + call.T, _blocks(call, values)
    entries = 2 * of.listed + blocks(W, values["BLOCK_N"]) * values["BLOCK_N"]
    launches = [_rank(call, values), *_select(call, of, values), _attend(call, of, values)]
    if call.slots:
        launches.append(_refill(call, of, values))
    scratch = {
        "rank": Scratch((B, K, C), torch.int64),
        "live": Scratch((B, K, of.chunks + 1, W), torch.int32),
        "live_count": Scratch((B, K, of.chunks + 1), torch.int32),
        "threshold": Scratch((B, K, of.chunks + 1), torch.int64),
        "entry": Scratch((B, K, of.blocks, entries), torch.int32),
        "bias": Scratch((B, K, of.blocks, entries), torch.float32),
        "leaves": Scratch((B, K, of.blocks, 2 * of.listed), torch.int32),
        "count": Scratch((B, K, of.blocks, 2), torch.int32),
        "open_rank": Scratch((B, K, of.blocks, of.chunk), torch.int64),
        "open_index": Scratch((B, K, of.blocks, of.chunk), torch.int32),
    }
    return Plan(tuple(launches), scratch)


def _rank(call: Call, values: Mapping[str, Any]) -> Launch:
    strides, C, block = dict(call.strides), call.S + call.T, min(1024, values["BLOCK_C"])
    slots = ("slot_score", "slot_position", "position") if call.slots else ("score", "rank", "rank")
    slot_strides = (*strides["slot_score"], *strides["slot_position"]) if call.slots else (0,) * 6
    return Launch(
        select.rank_candidates,
        (blocks(C, block), call.K, call.B),
        ("score", *slots, "valid" if call.valid else "rank", "rank", *strides["score"], *slot_strides, call.T),
        {"K": call.K, "S": call.S, "HAS_VALID": call.valid, "BLOCK": block},
    )


def _select(call: Call, of: _Blocks, values: Mapping[str, Any]) -> tuple[Launch, Launch]:
    C, dims = call.S + call.T, {"K": call.K, "W": call.W, "S": call.S, "CHUNK": of.chunk}
    chunks = Launch(
        select.live_at_chunks,
        (of.chunks + 1, call.K, call.B),
        ("rank", "live", "live_count", "threshold", C, of.chunks),
        {**dims, "BLOCK": values["BLOCK_C"]},
        values["select_warps"],
        1,
    )
    lists = Launch(
        select.list_live_keys,
        (of.blocks, call.K, call.B),
        ("rank", "live", "live_count", "threshold", "entry", "bias", "leaves", "count", "open_rank", "open_index", C, of.chunks),
        {
            **dims,
            "LISTED": of.listed,
            "BLOCK_Q": power_of_two(of.listed),
            "BLOCK": values["BLOCK_L"],
            "BLOCK_D": values["BLOCK_D"],
            "BLOCK_N": values["BLOCK_N"],
        },
        values["list_warps"],
        1,
    )
    return chunks, lists


def _attend(call: Call, of: _Blocks, values: Mapping[str, Any]) -> Launch:
    strides, K, P = dict(call.strides), call.K, call.P
    slot_strides = (*strides["slot_k"][:3], *strides["slot_v"][:3]) if call.slots else (0,) * 6
    constants = {
        "H": call.H, "K": K, "P": P, "BLOCK_P": block_of(P), "W": call.W, "S": call.S, "HEADS": of.heads, "QUERIES": of.queries,
        "LISTED": of.listed, "BLOCK_R": values["BLOCK_R"], "BLOCK_N": values["BLOCK_N"], "SCALE": P**-0.5, "STAGES": values["num_stages"],
    }  # fmt: skip
    tensors = ("q", "k", "v", *(SLOTS[:2] if call.slots else "kv"), "entry", "bias", "leaves", "count", "out")
    outer = (*strides["q"][:3], *strides["k"][:3], *strides["v"][:3], *slot_strides)
    grid = (blocks(call.T, of.queries), K * blocks(call.H // K, of.heads), call.B)
    return Launch(
        kernels.attend_listed,
        grid,
        (*tensors, *outer, call.T, of.blocks),
        constants,
        values["num_warps"],
        values["num_stages"],
        values.get("max_registers"),
    )


def _refill(call: Call, of: _Blocks, values: Mapping[str, Any]) -> Launch:
    strides = dict(call.strides)
    new = SLOTS if call.in_place else NEW_SLOTS
    outer = tuple(stride for name in ("k", "v", "score", *SLOTS, *new) for stride in strides[name][:3])
    tensors = ("k", "v", "score", *SLOTS, "position", "rank", "live", "live_count", "threshold", *new)
    constants = {"K": call.K, "P": call.P, "BLOCK_P": block_of(call.P), "W": call.W, "IN_PLACE": call.in_place, "BLOCK": values["BLOCK_S"]}
    grid = (blocks(call.W, values["BLOCK_S"]), call.K, call.B)
    return Launch(kernels.refill_slots, grid, (*tensors, *outer, call.S + call.T, of.chunks), constants)


def _exact(call: Call, values: Mapping[str, Any]) -> Plan:
    B, T, K, P, W, CHUNK = call.B, call.T, call.K, call.P, call.W, values["CHUNK"]
    strides, chunks = dict(call.strides), blocks(T, CHUNK)
    token = tuple(stride for name in ("k", "v", "score") for stride in strides[name][:3])
    cache: tuple[int, ...] = (0,) * 12
    # Slots that are not there are named after other tensors; no kernel reads them.
    tensors: tuple[str, ...] = ("k", "v", "score", "score")
    position, valid = "score", "valid" if call.valid else "score"
    if call.slots:
        tensors, position = SLOTS, "position"
        cache = tuple(stride for name in SLOTS for stride in strides[name][:3])
    choose = Launch(
        in_order.choose_slots,
        (K, B),
        ("score", *tensors[2:], position, valid, "place", "holder", *token[6:], *cache[6:], T, chunks),
        {"K": K, "W": W, "BLOCK_W": power_of_two(W), "CHUNK": CHUNK, "HAS_SLOTS": call.slots, "HAS_VALID": call.valid},
        min(32, max(values["choose_warps"], power_of_two(W) // 1024)),
        1,
    )
    apart, spans = T == 1, blocks(W, values["SPAN"])
    constants = {
        "H": call.H, "K": K, "P": P, "BLOCK_P": block_of(P), "W": W, "BLOCK_R": block_of(call.H // K), "BLOCK_N": values["BLOCK_N"],
        "SPAN": values["SPAN"], "CHUNK": CHUNK, "HAS_SLOTS": call.slots, "SCALE": P**-0.5, "APART": apart,
    }  # fmt: skip
    partial = ("acc", "tops") if apart else ("place", "place")
    attend = Launch(
        in_order.attend_in_slot_order,
        (spans if apart else T, K, B),
        ("q", "k", "v", "score", *tensors[:3], "place", "holder", *partial, "out", *strides["q"][:3], *token, *cache[:9], T, chunks),
        constants,
        values["num_warps"],
        values["num_stages"],
    )
    scratch = {"place": Scratch((B, K, T), torch.int32), "holder": Scratch((B, K, chunks + 1, W), torch.int32)}
    if apart:
        scratch |= {"acc": Scratch((B, call.H, spans, P), torch.float32), "tops": Scratch((B, call.H, spans, 2), torch.float32)}
        join = Launch(
            in_order.join_spans_and_take_slot,
            (call.H, B),
            ("k", "v", "score", *tensors, position, "place", "acc", "tops", "out", *(token[i] for i in (0, 2, 3, 5, 6, 8)), *cache),
            {"H": call.H, "K": K, "P": P, "BLOCK_P": block_of(P), "SPANS": spans, "HAS_SLOTS": call.slots},
            1,
        )
        return Plan((choose, attend, join), scratch)
    if not call.slots:
        return Plan((choose, attend), scratch)
    take = Launch(
        in_order.take_slots,
        (blocks(W, values["BLOCK_S"]), K, B),
        ("k", "v", "score", *SLOTS, "position", "holder", *token, *cache, chunks),
        {"K": K, "P": P, "BLOCK_P": block_of(P), "W": W, "BLOCK": values["BLOCK_S"]},
    )
    return Plan((choose, attend, take), scratch)
