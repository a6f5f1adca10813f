"""One oracle per op: tensors in, float64 tensors out, explicit loops over rows and tokens around the steps of this package.

B rows, T tokens, H heads, K kv heads, A score heads, P head dim, G groups, N state, F rotated pairs, R retrieval heads, k picks, M = B·T.
Arguments come in the op's order; the tensors of a state may come as one tuple. Outputs at padding (t >= valid) are left at zero: compare
valid tokens only. Attention ops give in place of their caches the live cells, as lists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from oracles.attending import Cell, best_ranked, mixture, visible
from oracles.choosing import best_pairs, expert_out, half_scores, neuron_sum, route
from oracles.functions import group_of, silu, softplus
from oracles.functions import rms_norm as normed
from oracles.rotation import Scaling, angles, rotate
from oracles.scanning import convolution_step, gated_norm, selective_step, ssd_step

Live = dict[tuple[int, int], tuple[list[np.ndarray], list[np.ndarray]]]


def arrays(*values: Tensor | None) -> Iterator[Any]:
    """Tensors as arrays: floats in float64, integers as they are; None stays."""
    for value in values:
        yield None if value is None else value.detach().double().numpy() if value.is_floating_point() else value.numpy()


def valid_tokens(valid: Tensor | None, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(row, how many of its tokens count)."""
    for b in range(shape[0]):
        yield b, shape[1] if valid is None else int(valid[b])


def rope_angles(
    position: Tensor,
    pairs: int,
    theta: float,
    double: bool = True,
    length: Tensor | None = None,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 1,
    low: float = 1.0,
    high: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """Float64 whatever `double` says."""
    rule = Scaling(scaling, factor, original, low, high)
    cos, sin = (np.zeros((*position.shape, pairs)) for _ in range(2))
    for b, t in np.ndindex(*position.shape):
        text = 0 if length is None else int(length[b])
        cos[b, t], sin[b, t] = angles(int(position[b, t]), pairs, theta, rule, text)
    return from_numpy(cos), from_numpy(sin)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x_BTHP, cos_BTF, sin_BTF = arrays(x, cos, sin)
    out = np.zeros_like(x_BTHP)
    for b, t, h in np.ndindex(*out.shape[:3]):
        out[b, t, h] = rotate(x_BTHP[b, t, h], cos_BTF[b, t], sin_BTF[b, t])
    return from_numpy(out)


def residual_rms_norm(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_MD, residual_MD, scale_D, weight_D = arrays(x, residual, scale, weight)
    total, out = np.zeros_like(x_MD), np.zeros_like(x_MD)
    for m in range(len(x_MD)):
        total[m] = x_MD[m] + (residual_MD[m] if scale_D is None else scale_D * residual_MD[m])
        out[m] = normed(total[m], weight_D, eps)
    return from_numpy(out), from_numpy(total)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """With cos and sin, B and C are turned first."""
    if cos is not None and sin is not None:
        B, C = rope(B, cos, sin), rope(C, cos, sin)
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP = arrays(x, dt, A, B, C, state)
    rows, _, heads, width = x_BTHP.shape
    final = np.zeros((rows, heads, B_BTGN.shape[3], width)) if state is None else state_BHNP.copy()
    y = np.zeros_like(x_BTHP)
    for b, count in valid_tokens(valid, x.shape):
        for t in range(count):
            y[b, t], final[b] = ssd_step(final[b], x_BTHP[b, t], dt_BTH[b, t], A_H, B_BTGN[b, t], C_BTGN[b, t])
    return from_numpy(y), from_numpy(final)


def ssd_scan_rope(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cos: Tensor,
    sin: Tensor,
    state: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return ssd_scan(x, dt, A, B, C, state, valid, cos, sin)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, valid: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    x_BTC, weight_CL, bias_C, state_BYC = arrays(x, weight, bias, state)
    final = np.zeros((len(x_BTC), weight_CL.shape[1] - 1, x_BTC.shape[2])) if state is None else state_BYC.copy()
    y = np.zeros_like(x_BTC)
    for b, count in valid_tokens(valid, x.shape):
        for t in range(count):
            y[b, t], final[b] = convolution_step(final[b], x_BTC[b, t], weight_CL, bias_C, activation)
    return from_numpy(y), from_numpy(final)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    y_MC, z_MC, weight_C = arrays(y, z, weight)
    return from_numpy(np.array([gated_norm(y_C, z_C, weight_C, eps) for y_C, z_C in zip(y_MC, z_MC, strict=True)]).reshape(y_MC.shape))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, step_bias: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output after output: the n-th is a's while n < A, then b's, then c's, then a step size; gated, it is gate times its partner A on."""
    x_MK, weight_NK, bias_N, step_bias_H = arrays(x, weight, bias, step_bias)
    a, b, c, dt = (np.zeros((len(x_MK), width)) for width in (A, B, C, H))
    for m in range(len(x_MK)):
        y_N = [sum(w * v for w, v in zip(row, x_MK[m].tolist(), strict=True)) for row in weight_NK.tolist()]
        y_N = y_N if bias is None else [y + float(more) for y, more in zip(y_N, bias_N, strict=True)]
        if gated:
            a[m] = [silu(y_N[n]) * y_N[A + n] for n in range(A)]
            continue
        a[m], b[m], c[m] = y_N[:A], y_N[A : A + B], y_N[A + B : A + B + C]
        for h in range(H):
            dt[m, h] = softplus(y_N[A + B + C + h] + (0.0 if step_bias is None else float(step_bias_H[h])))
    return from_numpy(a), from_numpy(b), from_numpy(c), from_numpy(dt)


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN = arrays(x, dt, A, B, C, state)
    final = np.zeros((len(x_BTC), *A_CN.shape)) if state is None else state_BCN.copy()
    y = np.zeros_like(x_BTC)
    for b, count in valid_tokens(valid, x.shape):
        for t in range(count):
            y[b, t], final[b] = selective_step(final[b], x_BTC[b, t], dt_BTC[b, t], A_CN, B_BTN[b, t], C_BTN[b, t])
    return from_numpy(y), from_numpy(final)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Live]:
    """Output, and per row and kv head the (keys, values) of the live cells."""
    q_BTHP, k_BTKP, v_BTKP, past_k, past_v = arrays(q, k, v, cache_k, cache_v)
    heads, kv_heads = q.shape[2], k.shape[2]
    out, live = np.zeros_like(q_BTHP), {}
    for b, count in valid_tokens(valid, q.shape):
        for g in range(kv_heads):
            start = 0 if past_k is None or position is None else int(position[b])
            cells = [Cell(s, 0.0, past_k[b, g, s], past_v[b, g, s]) for s in range(start)]
            for t in range(count):
                cells.append(Cell(start + t, 0.0, k_BTKP[b, t, g], v_BTKP[b, t, g]))
                for h in range(heads):
                    if group_of(h, heads, kv_heads) == g:
                        out[b, t, h] = mixture(q_BTHP[b, t, h], cells)
            live[b, g] = [cell.key_P for cell in cells], [cell.value_P for cell in cells]
    return from_numpy(out), live


def attention_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    position: Tensor | None,
    valid: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> tuple[Tensor, Live]:
    """As `attention`, from q, k and v side by side; q and k are turned first. The output is flat over heads."""
    heads = qkv.detach().double().reshape(*qkv.shape[:2], n_head + 2 * n_kv_head, head_dim)
    q, k, v = heads[:, :, :n_head], heads[:, :, n_head:-n_kv_head], heads[:, :, -n_kv_head:]
    out, live = attention(rope(q, cos, sin), rope(k, cos, sin), v, cache_k, cache_v, position, valid)
    return out.reshape(*qkv.shape[:2], n_head * head_dim), live


def keep_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    slots: Sequence[Tensor] | None,
    position: Tensor | None,
    valid: Tensor | None,
    window: int,
) -> tuple[Tensor, dict[tuple[int, int], list[Cell]]]:
    """Output, and per row and kv head the kept cells sorted by position.

    Ranks every key ever seen at every step, so it would notice a key that ought to return.
    """
    q_BTHP, k_BTKP, v_BTKP, score_BTK = arrays(q, k, v, score)
    heads, kv_heads = q.shape[2], k.shape[2]
    out, kept = np.zeros_like(q_BTHP), {}
    for b, count in valid_tokens(valid, q.shape):
        start = 0 if position is None else int(position[b])
        for g in range(kv_heads):
            seen = [] if slots is None else [cell for cell in slot_cells(slots, b, g) if cell.position >= 0]
            best = best_ranked(seen, window)
            for t in range(count):
                seen.append(Cell(start + t, float(score_BTK[b, t, g]), k_BTKP[b, t, g], v_BTKP[b, t, g]))
                best = best_ranked(seen, window)
                for h in range(heads):
                    if group_of(h, heads, kv_heads) == g:
                        out[b, t, h] = mixture(q_BTHP[b, t, h], best)
            kept[b, g] = best
    return from_numpy(out), kept


def slot_cells(slots: Sequence[Tensor], b: int, g: int) -> Iterator[Cell]:
    """The slots of one row and kv head, in whatever order they lie; an empty one has position -1."""
    for key, value, score, position in zip(*(slot[b, g] for slot in arrays(*slots)), strict=True):
        yield Cell(int(position), float(score), key, value)


def scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    caches: Sequence[Tensor] | None,
    position: Tensor | None,
    valid: Tensor | None,
    scoring: str,
    ratio: float,
) -> tuple[Tensor, list[tuple[list[list[Any]], list[list[Any]], list[list[Any]]]]]:
    """Output, and per row the lists of live keys and values of each kv head and of live scores of each score head."""
    q_BTHP, *new = arrays(q, k, v, score)
    past = None if caches is None else list(arrays(*caches))
    heads = q.shape[2]
    out, live = np.zeros_like(q_BTHP), []
    for b, count in valid_tokens(valid, q.shape):
        start = 0 if position is None or past is None else int(position[b])
        keys, values, scores = (
            [([] if past is None else list(past[i][b, head, :start])) + list(part[b, :count, head]) for head in range(part.shape[2])]
            for i, part in enumerate(new)
        )
        live.append((keys, values, scores))
        for t, h in np.ndindex(count, heads):
            kv, own = group_of(h, heads, len(keys)), group_of(h, heads, len(scores))
            seen = [Cell(s, float(scores[own][s]), keys[kv][s], values[kv][s]) for s in range(start + t + 1)]
            out[b, t, h] = mixture(q_BTHP[b, t, h], visible(seen, scoring, ratio))
    return from_numpy(out), live


def product_key_topk(query: Tensor, keys: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """Exhaustive search over all J² experts."""
    query_BTR2d, keys_RJ2d = arrays(query, keys)
    weight = np.zeros((*query.shape[:3], picks))
    expert = np.zeros(weight.shape, dtype=np.int64)
    for b, t, r in np.ndindex(*weight.shape[:3]):
        weight[b, t, r], expert[b, t, r] = best_pairs(*half_scores(query_BTR2d[b, t, r], keys_RJ2d[r]), picks)
    return from_numpy(weight), from_numpy(expert)


def expert_mix(x: Tensor, expert: Tensor, weight: Tensor, down: Tensor, up: Tensor, activation: str, weight_inside: bool) -> Tensor:
    x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED = arrays(x, expert, weight, down, up)
    y = np.zeros_like(x_BTD)
    for b, t in np.ndindex(*y.shape[:2]):
        y[b, t] = neuron_sum(x_BTD[b, t], (weight_BTRk[b, t], expert_BTRk[b, t]), down_ED, up_ED, activation, weight_inside)
    return from_numpy(y)


def router_topk(logits: Tensor, picks: int, normalize: bool) -> tuple[Tensor, Tensor]:
    (logits_ME,) = arrays(logits)
    weight, expert = np.zeros((len(logits_ME), picks)), np.zeros((len(logits_ME), picks), dtype=np.int64)
    for m, row in enumerate(logits_ME.tolist()):
        weight[m], expert[m] = route(row, picks, normalize)
    return from_numpy(weight), from_numpy(expert)


def moe_mix(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    inner: Tensor,
    inner_bias: Tensor | None,
    outer: Tensor,
    outer_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED = arrays(x, expert, weight, inner, inner_bias, outer, outer_bias)
    y = np.zeros_like(x_MD)
    for m, i in np.ndindex(*expert_Mk.shape):
        e = expert_Mk[m, i]
        first = in_EFD[e], None if in_bias_EF is None else in_bias_EF[e]
        second = out_EDI[e], None if out_bias_ED is None else out_bias_ED[e]
        y[m] += weight_Mk[m, i] * expert_out(x_MD[m], first, second, activation, gated)
    return from_numpy(y)
