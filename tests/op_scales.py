"""How large the terms are that an op adds up for each output: what its rounding errors are a fraction of.

An output may be small because its terms cancel; its error is then not. exp(s) rounded at relative u |s| is wrong by u |s| exp(s), less than
u exp(s / 2): scans are measured with half their decay.
"""

from dataclasses import replace

import torch
from torch import Tensor

from op_calls import OUTPUTS, Call

_LINEAR = {"x", "B", "C", "state", "weight", "bias", "in", "in_bias", "out", "out_bias", "down", "up"}


def scales(call: Call) -> dict[str, float]:
    """The scale of every floating output of the call."""
    call = call.double()
    found = _OF_OP[call.op](call)
    names = OUTPUTS[call.op] if call.op != "product_key_topk" else ("weight_BTRk", "score_BTRk")
    return dict(zip(names, found, strict=False))


def rounded(call: Call, dtype: torch.dtype) -> Call:
    """The call in a model's dtype; in bfloat16 where float16 would overflow, in the padding too."""
    values = [value for value in call.tensors.values() if value is not None and value.is_floating_point()]
    fits = max(largest(*values), *scales(call).values()) < torch.finfo(dtype).max / 4
    return call.to(dtype if fits else torch.bfloat16)


def largest(*values: Tensor) -> float:
    """The largest |value|; infinities, which mark empty slots, apart."""
    return max((float(value[value.isfinite()].abs().max()) for value in values if value.numel() and value.isfinite().any()), default=0.0)


def _absolute(call: Call) -> Call:
    return call.mapped(lambda name, value: value.abs() if name.rsplit("_", 1)[0] in _LINEAR and value.is_floating_point() else value)


def _scan(call: Call) -> tuple[float, ...]:
    terms = _absolute(call)
    A = "A_H" if "A_H" in call.tensors else "A_CN"
    terms = terms.changed({A: terms.given(A) / 2})
    if call.op == "ssd_scan_rope":
        pairs = terms.given("cos_BTF").shape[-1]
        turned = {name: _pair_sum(terms.given(name), pairs) for name in ("B_BTGN", "C_BTGN")}
        kept = {name: value for name, value in terms.changed(turned).tensors.items() if name not in ("cos_BTF", "sin_BTF")}
        terms = replace(terms, op="ssd_scan", tensors=kept)
    return tuple(largest(value) for value in terms.run().values())


def _pair_sum(value: Tensor, pairs: int) -> Tensor:
    low, high = value[..., :pairs], value[..., pairs : 2 * pairs]
    return torch.cat([low + high, low + high, value[..., 2 * pairs :]], -1)


def _conv(call: Call) -> tuple[float, ...]:
    terms = replace(_absolute(call), plain={"activation": "none"}).run()
    return tuple(largest(value) for value in terms.values())


def norm(value: Tensor) -> float:
    """The largest Euclidean norm along the last axis."""
    return float(value.norm(dim=-1).max()) if value.numel() else 0.0


def _attention(call: Call) -> tuple[float, ...]:
    """max |v| (1 + largest logit): a logit wrong by u |logit| makes the weights wrong by that fraction."""
    q, k, v = _heads(call)
    k_all, v_all = ([new, *(call.given(name) for name in old if call.has(name))] for new, old in ((k, _OLD_K), (v, _OLD_V)))
    scores = [call.given(name) for name in _SCORES if call.has(name)]
    logit = norm(q) * max(map(norm, k_all)) / q.shape[-1] ** 0.5 + largest(*scores)
    out = largest(*v_all) * (1 + logit)
    if not (call.has("cache_k_BKSP") or call.has("slot_k_BKWP")):
        return (out,)
    return (out, max(2 * norm(value) for value in k_all), largest(*v_all), *([largest(*scores)] if scores else []))


_OLD_K, _OLD_V = ("cache_k_BKSP", "slot_k_BKWP"), ("cache_v_BKSP", "slot_v_BKWP")
_SCORES = ("score_BTK", "slot_score_BKW", "score_BTA", "cache_score_BAS")


def _heads(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    if call.op != "attention_rope":
        return call.given("q_BTHP"), call.given("k_BTKP"), call.given("v_BTKP")
    H, K, P = (call.plain[name] for name in ("n_head", "n_kv_head", "head_dim"))
    q, k, v = call.given("qkv_BTC").unflatten(2, (H + 2 * K, P)).split([H, K, K], 2)
    return q, k, v


def _residual(call: Call) -> tuple[float, ...]:
    x, residual, weight = (call.given(name) for name in ("x_MD", "residual_MD", "weight_D"))
    scale = call.given("scale_D") if call.has("scale_D") else torch.ones_like(weight)
    terms, total = x.abs() + (scale * residual).abs(), x + scale * residual
    root_M = (total.square().mean(-1) + call.plain["eps"]).sqrt()
    return float((terms.amax(-1) / root_M).max()) * largest(weight), largest(terms)


def _product_key(call: Call) -> tuple[float, ...]:
    query, keys = call.given("query_BTR2d"), call.given("keys_RJ2d")
    return (1 + 2 * norm(query) * norm(keys),) * 2


def _expert_mix(call: Call) -> tuple[float, ...]:
    t = _absolute(call).tensors
    x, expert, weight, down, up = (value for value in t.values() if value is not None)
    inner = torch.einsum("btrkd,btd->btrk", down[expert], x)
    return (largest(torch.einsum("btrk,btrkd->btd", inner * weight, up[expert])),)


def _moe_mix(call: Call) -> tuple[float, ...]:
    t = {name.rsplit("_", 1)[0]: value for name, value in _absolute(call).tensors.items()}
    x, expert, inner, outer = (call.given("x_MD").abs(), call.given("expert_Mk"), t["in"], t["out"])
    assert inner is not None
    assert outer is not None
    z = torch.einsum("mkfd,md->mkf", inner[expert], x) + (0 if t["in_bias"] is None else t["in_bias"][expert])
    hidden = torch.prod(torch.stack(z.chunk(2, -1)), 0) if call.plain["gated"] else z
    out = torch.einsum("mkdi,mki->mkd", outer[expert], hidden) + (0 if t["out_bias"] is None else t["out_bias"][expert])
    return (largest((call.given("weight_Mk").abs().unsqueeze(-1) * out).sum(1)),)


def _gated(call: Call) -> tuple[float, ...]:
    # The gate's exponent is rounded at u |z|.
    return (largest(*call.run().values()) * (1 + largest(call.given("z_MC")) / 8),)


def _linear(call: Call) -> tuple[float, ...]:
    """Of the parts before any function of them: the slopes of softplus and, nearly, of SiLU are 1 at most."""
    terms = _absolute(call)
    y_MN = terms.given("x_MK") @ terms.given("weight_NK").mT + (terms.given("bias_N") if terms.has("bias_N") else 0)
    if call.plain["gated"]:
        return largest(torch.prod(torch.stack(y_MN.chunk(2, -1)), 0)), 0.0, 0.0, 0.0
    *parts, dt_MH = y_MN.split([call.plain[name] for name in "ABCH"], -1)
    return (*(largest(part) for part in parts), 1 + largest(dt_MH + (call.given("step_bias_H").abs() if call.has("step_bias_H") else 0)))


_OF_OP = {
    "rope": lambda call: (2 * largest(call.given("x_BTHP")),),
    "residual_rms_norm": _residual,
    "ssd_scan": _scan,
    "ssd_scan_rope": _scan,
    "attention": _attention,
    "attention_rope": _attention,
    "keep_window_attention": _attention,
    "product_key_topk": _product_key,
    "expert_mix": _expert_mix,
    "scored_attention": _attention,
    "router_topk": lambda call: (1 + 2 * largest(call.given("logits_ME")),),
    "moe_mix": _moe_mix,
    "causal_conv1d": _conv,
    "gated_rms_norm": _gated,
    "selective_scan": _scan,
    "linear": _linear,
    # Angles are rounded at u of themselves in float64, which float32 does not show.
    "rope_angles": lambda call: (1 + call.plain["double"] * largest(call.given("position_BT").double()) / 1000,) * 2,
}
