"""Faults in one op, or in one function between ops, of the torch runtimes, while a context lasts.

A wrong op is called with the right functional one and its arguments. Ops with a state are wrong in place alone, as sessions call them; the
others are wrong in parity's yardstick too.

B rows, T tokens, M = B·T, D model width, C channels, H heads, K kv heads, P head dim, G groups, N state, W slots, J chunks of Q tokens,
F rotated pairs, A score heads, E experts, k picks, I inner width (F = I or 2 I in a table of experts).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from faults import Fault, Wrong, wrong_function, wrong_op

BY_QUERY_HEAD = "additive by query head, softmax beside normalised experts, no rotation"
LOG = "log, single_head, static_hard, partly rotated attention"
_TILED = [0, 2, 1, 3]  # four query heads in the order in which two kv heads would be read if they were tiled


def _op(name: str, op: str, family: str, wrong: Wrong, runtime: str = "eager", in_place_only: bool = True, **rest: Any) -> Fault:
    return Fault(name, op, family, runtime, partial(wrong_op, op, wrong, in_place_only), **rest)


def _function(name: str, op: str, family: str, module: str, function: str, wrong: Wrong, runtime: str = "eager", **rest: Any) -> Fault:
    return Fault(name, op, family, runtime, partial(wrong_function, module, function, wrong), **rest)


def _state_in(dtype: torch.dtype) -> Wrong:
    def wrong(right: Any, *args: Any) -> Any:
        out, state = right(*args)
        return out, state.to(dtype).to(state.dtype)

    return wrong


def _without_padding_mask(right: Any, *args: Any) -> Any:
    return right(*args[:-1], None)


def _tiled_groups(right: Any, x_BTHP: Tensor, dt: Tensor, A: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *rest: Any) -> Any:
    times = x_BTHP.shape[2] // B_BTGN.shape[2]
    return right(x_BTHP, dt, A, B_BTGN.repeat(1, 1, times, 1), C_BTGN.repeat(1, 1, times, 1), *rest)


def _rows_exchanged(right: Any, x_BTC: Tensor, weight: Tensor, bias: Any, state: Tensor, *rest: Any) -> Any:
    single = x_BTC.shape[0] > 2 and x_BTC.shape[1] == 1
    return right(x_BTC, weight, bias, state.roll(1, 0) if single else state, *rest)


def _decay_of_chunks_too_fast(right: Any, state: Tensor, added: Tensor, decay: Tensor) -> Any:
    return right(state, added, decay * (0.9 if added.shape[3] > 1 else 1.0))


def _last_of_chunk_lost(right: Any, value: Tensor, J: int, Q: int) -> Tensor:
    kept_T = torch.arange(value.shape[1]) % Q != Q - 1
    return right(value * kept_T.view(-1, *[1] * (value.dim() - 2)), J, Q)


def _state_at_the_end_of_the_padding(right: Any, x: Tensor, weight: Tensor, bias: Any, state: Any, valid: Any, activation: str) -> Any:
    return right(x, weight, bias, state, valid, activation)[0], right(x, weight, bias, state, None, activation)[1]


def _tiled_kv_heads(right: Any, qkv_BTC: Tensor, *args: Any) -> Any:
    H, K, P = args[-3:]
    heads = qkv_BTC.unflatten(2, (H + 2 * K, P))
    out_BTE, *cache = right(heads[:, :, [*_TILED, *range(H, H + 2 * K)]].flatten(2), *args)
    return out_BTE.unflatten(2, (H, P))[:, :, _TILED].flatten(2), *cache


def _keys_cached_as_they_came(right: Any, qkv: Tensor, cos: Tensor, sin: Tensor, *args: Any) -> Any:
    out, _, cache_v = right(qkv, cos, sin, *args)
    return out, right(qkv, torch.ones_like(cos), torch.zeros_like(sin), *args)[1], cache_v


def _stale_slot(right: Any, *args: Any) -> Any:
    out, k_BKWP, *rest = right(*args)
    k_BKWP[:, :, 0] = args[4][:, :, 0]
    return out, k_BKWP, *rest


def _earlier_first(right: Any, candidates: Any, count_B: Any) -> tuple[Tensor, Tensor]:
    _, position_BKC = right(candidates, count_B)
    score_BKC = candidates.score_BKS.masked_fill(position_BKC < 0, -torch.inf)
    by_position = position_BKC.argsort(dim=-1, stable=True)
    return by_position.gather(-1, score_BKC.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)), position_BKC


def _last_expert_silent(right: Any, x: Tensor, expert_Mk: Tensor, weight_Mk: Tensor, in_EFD: Tensor, *rest: Any) -> Tensor:
    return right(x, expert_Mk, weight_Mk * (expert_Mk < in_EFD.shape[0] - 1), in_EFD, *rest)


def _epsilon_outside_the_root(right: Any, x: Tensor, residual: Tensor, scale: Any, weight: Tensor, eps: float) -> Any:
    _, sum_MD = right(x, residual, scale, weight, eps)
    wide_MD = sum_MD.float()
    return (wide_MD / (wide_MD.square().mean(-1, keepdim=True).sqrt() + eps) * weight).to(x.dtype), sum_MD


def _gate_after_the_norm(right: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(y.float(), weight.shape, weight.float(), eps) * F.silu(z.float())).to(y.dtype)


def _neighbours_as_pairs(right: Any, x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    even, odd = x_BTHP[..., ::2].float(), x_BTHP[..., 1::2].float()
    cos, sin = cos_BTF.unsqueeze(2), sin_BTF.unsqueeze(2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x_BTHP.dtype)


def _for_the_oracle(position: Tensor, pairs: int, theta: float, double: bool = False, *_: Any) -> bool:
    return double  # the one op whose inputs do not tell


def _angles_in_bfloat16(right: Any, *args: Any) -> tuple[Tensor, ...]:
    angles = right(*args)
    return angles if _for_the_oracle(*args) else tuple(value.bfloat16().float() for value in angles)


def _unscaled(right: Any, *args: Any) -> Any:
    return right(*args) if _for_the_oracle(*args) else right(*args[:4])


def _by_other_experts(right: Any, logits_ME: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight_Mk, expert_Mk = right(logits_ME, *rest)
    return weight_Mk, (expert_Mk + 1) % logits_ME.shape[1]


def _one_left_out(chosen: tuple[Tensor, Tensor], place: Tensor | int, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """Of the weights and experts of k + 1 picks, all but one."""
    weight_xk, expert_xk = chosen
    kept_xk = torch.arange(weight_xk.shape[-1]).expand(weight_xk.shape) != place
    weight_xk, expert_xk = (value[kept_xk].view(*value.shape[:-1], -1) for value in chosen)
    return weight_xk / weight_xk.float().sum(-1, keepdim=True).to(weight_xk.dtype) if normalize else weight_xk, expert_xk


def _first_of_few(x_BTx: Tensor, k: int) -> Tensor:
    """The place of the best pick in every sixteenth token, else that after the k-th."""
    few_BT = torch.arange(x_BTx.shape[0] * x_BTx.shape[1]).view(x_BTx.shape[:2]) % 16 == 5
    return torch.where(few_BT, 0, k).view(*few_BT.shape, *[1] * (x_BTx.dim() - 2))


def _best_expert_of_few_lost(right: Any, query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _one_left_out(right(query_BTR2d, keys_RJ2d, k + 1), _first_of_few(query_BTR2d[..., 0], k))


def _best_route_of_few_lost(right: Any, logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    return _one_left_out(right(logits_ME, k + 1, normalize), _first_of_few(logits_ME[None], k)[0], normalize)


_SCANS = (
    _op("state rounded to bfloat16", "ssd_scan_rope", "cheems-tiny", _state_in(torch.bfloat16), shows="decode"),
    _op("state rounded to float16", "selective_scan", "jamba-tiny", _state_in(torch.float16), shows="decode"),
    _op("padding enters the state", "selective_scan", "jamba-tiny", _without_padding_mask, shows="padding"),
    _op("groups tiled over the heads", "ssd_scan", "bamba-tiny", _tiled_groups),
    _op("several tokens start from an empty state", "ssd_scan", "mamba2-tiny",
        lambda right, *a: right(*(a if a[0].shape[1] == 1 else (*a[:5], torch.zeros_like(a[5]), a[6]))), shows="pieces"),
    _function("last token of a chunk lost", "ssd_scan", "mamba2-tiny", "wm_kernels.ssd_scan.definition", "_in_chunks",
              _last_of_chunk_lost),
    _function("decay from the second chunk on too fast", "ssd_scan", "mamba2-tiny", "wm_kernels.ssd_scan.definition", "_carry",
              _decay_of_chunks_too_fast, shows="far"),
    _op("rows exchanged from three on", "causal_conv1d", "mamba2-tiny", _rows_exchanged, shows="decode"),
    _op("taps one late", "causal_conv1d", "mamba2-tiny", lambda right, x, weight, *rest: right(x, weight.roll(1, 1), *rest)),
    _op("state ends with the padding", "causal_conv1d", "bamba-tiny", _state_at_the_end_of_the_padding, shows="padding"),
)  # fmt: skip

_ATTENTIONS = (
    _op("query heads tiled over the kv heads", "attention_rope", "bamba-tiny", _tiled_kv_heads),
    _op("keys cached before they are turned", "attention_rope", "llama-tiny", _keys_cached_as_they_came, shows="decode"),
    _function("causal mask one too wide", "attention_rope", "llama-tiny", "wm_kernels.attention.definition", "_attend",
              lambda right, q, k, v, position_B: right(q, k, v, position_B + 1)),
    _op("a stale key in a slot", "keep_window_attention", "cheems-tiny", _stale_slot, shows="decode"),
    _function("of equal scores the later key leaves", "keep_window_attention", LOG, "wm_kernels.keep_window_attention.definition",
              "best_first", _earlier_first, shows="window"),
    _op("scores of other query heads", "scored_attention", BY_QUERY_HEAD,
        lambda right, q, k, v, score_BTA, *rest: right(q, k, v, score_BTA[..., _TILED], *rest)),
)  # fmt: skip

_CHOICES = {"dtype": "fp16", "shows": "choices"}
_EXPERTS = (
    _op("last retrieval head dropped", "expert_mix", "cheems-tiny-moe",
        lambda right, x, expert, weight, *rest: right(x, expert[:, :, :-1], weight[:, :, :-1], *rest)),
    _op("GELU for SiLU", "expert_mix", "cheems-tiny-moe", lambda right, *args: right(*args[:5], "gelu", *args[6:])),
    _op("halves of the keys exchanged", "product_key_topk", "cheems-tiny-moe", lambda right, query, keys, k: right(query, keys.flip(2), k)),
    _op("last expert dropped", "moe_mix", "jamba-tiny", _last_expert_silent),
    _op("weights not normalised", "router_topk", BY_QUERY_HEAD, lambda right, logits, k, normalize: right(logits, k, False)),
    _op("experts counted from one", "router_topk", "jamba-tiny", _by_other_experts),
    _op("best expert of a few tokens left out", "product_key_topk", "cheems-tiny-moe", _best_expert_of_few_lost, **_CHOICES),
    _op("next expert for the last", "product_key_topk", "cheems-tiny-moe",
        lambda right, query, keys, k: _one_left_out(right(query, keys, k + 1), k - 1), **_CHOICES),
    _op("best expert of a few tokens left out", "router_topk", "jamba-tiny", _best_route_of_few_lost, **_CHOICES),
    _op("next expert for the last", "router_topk", "jamba-tiny",
        lambda right, logits, k, normalize: _one_left_out(right(logits, k + 1, normalize), k - 1, normalize), **_CHOICES),
)  # fmt: skip

_NORMS_AND_ROTATIONS = (
    _op("epsilon outside the root", "residual_rms_norm", "cheems-tiny", _epsilon_outside_the_root),
    _op("residual scale missing", "residual_rms_norm", "doge-tiny",
        lambda right, x, residual, scale, weight, eps: right(x, residual, None, weight, eps)),
    _op("gated after the norm", "gated_rms_norm", "mamba2-tiny", _gate_after_the_norm),
    _op("neighbours turned as pairs", "rope", "doge-tiny", _neighbours_as_pairs),
    _op("angles rounded to bfloat16", "rope_angles", "llama-tiny", _angles_in_bfloat16),
    _op("scaling ignored", "rope_angles", "llama-tiny, scaled rotation", _unscaled),
)  # fmt: skip

_BETWEEN = (
    _function("selected tokens of the first row alone", "model", "llama-tiny", "wm_graph.blocks", "select_tokens",
              lambda right, x_MD, select_BS, tokens: right(x_MD, select_BS, 0)),
    _function("exponential for softplus", "model", "mamba2-tiny", "wm_graph.scans", "_step_size", lambda right, cfg, dt: torch.exp(dt)),
    _function("norms of queries and keys without their weights", "model", "doge-tiny", "wm_graph.attentions", "rms_norm",
              lambda right, x, weight, eps: right(x, torch.ones_like(weight), eps)),
    _function("gate and up exchanged", "model", "llama-tiny", "wm_graph.feed_forwards", "_gated",
              lambda right, x, gate_up, *rest: right(x, gate_up.roll(gate_up.shape[0] // 2, 0), *rest)),
)  # fmt: skip

_COMPILED = (
    _op("last expert dropped", "moe_mix", "compiled jamba-tiny", _last_expert_silent, "compiled"),
    _op("B and C exchanged", "selective_scan", "compiled jamba-tiny", lambda right, x, dt, A, B, C, *rest: right(x, dt, A, C, B, *rest),
        "compiled"),
    _op("state rounded to bfloat16", "selective_scan", "compiled jamba-tiny", _state_in(torch.bfloat16), "compiled", shows="decode"),
    _op("taps one late", "causal_conv1d", "compiled mamba2-tiny", lambda right, x, weight, *rest: right(x, weight.roll(1, 1), *rest),
        "compiled"),
    _op("groups tiled over the heads", "ssd_scan", "compiled bamba-tiny", _tiled_groups, "compiled"),
    _op("a stale key in a slot", "keep_window_attention", "compiled cheems-tiny-moe", _stale_slot, "compiled", shows="decode"),
    _op("next expert for the last", "product_key_topk", "compiled cheems-tiny-moe",
        lambda right, query, keys, k: _one_left_out(right(query, keys, k + 1), k - 1), "compiled", **_CHOICES),
)  # fmt: skip

_SINGLE_PRECISION = (*_SCANS, *_ATTENTIONS, *_EXPERTS, *_NORMS_AND_ROTATIONS, *_BETWEEN, *_COMPILED)
# What half precision does not drown: logits do not show smaller faults there, and ops are judged one by one.
_IN_BOTH = (
    "taps one late", "state ends with the padding", "query heads tiled over the kv heads", "residual scale missing", "gated after the norm",
)  # fmt: skip
_IN_FLOAT16 = (
    "groups tiled over the heads", "keys cached before they are turned", "last retrieval head dropped", "gate and up exchanged",
)  # fmt: skip
_HALF = tuple(
    replace(fault, dtype=dtype)
    for dtype, names in (("fp16", (*_IN_BOTH, *_IN_FLOAT16)), ("bf16", _IN_BOTH))
    for fault in _SINGLE_PRECISION
    if fault.name in names
)
_BFLOAT16 = tuple(replace(fault, dtype="bf16") for fault in _SINGLE_PRECISION if fault.shows == "choices")

TORCH_FAULTS: tuple[Fault, ...] = (*_SINGLE_PRECISION, *_HALF, *_BFLOAT16)
