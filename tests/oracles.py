"""Naive float64 oracles of every op: explicit loops over rows, tokens and heads in numpy, written from the formulas alone.

They share no code with wm_kernels. Outputs at padding (t >= valid) are left at zero; tests compare valid tokens only.
"""

import math

import numpy as np
import torch


def _array(value):
    return None if value is None else value.detach().double().numpy() if value.is_floating_point() else value.numpy()


def _valid(valid, rows, tokens):
    return [tokens] * rows if valid is None else [int(v) for v in valid]


def rope_angles(position, pairs, theta):
    angle = np.array([[[int(p) * theta ** (-j / pairs) for j in range(pairs)] for p in row] for row in position])
    return torch.from_numpy(np.cos(angle)), torch.from_numpy(np.sin(angle))


def _rotated(vector, cos, sin):
    out, pairs = vector.copy(), len(cos)
    for j in range(pairs):
        turned = complex(vector[j], vector[pairs + j]) * complex(cos[j], sin[j])
        out[j], out[pairs + j] = turned.real, turned.imag
    return out


def rope(x, cos, sin):
    x, cos, sin = _array(x), _array(cos), _array(sin)
    out = np.zeros_like(x)
    for b, t, h in np.ndindex(*x.shape[:3]):
        out[b, t, h] = _rotated(x[b, t, h], cos[b, t], sin[b, t])
    return torch.from_numpy(out)


def residual_rms_norm(x, residual, scale, weight, eps):
    x, residual, weight = _array(x), _array(residual), _array(weight)
    scale = np.ones(x.shape[1]) if scale is None else _array(scale)
    total, normed = np.zeros_like(x), np.zeros_like(x)
    for m in range(x.shape[0]):
        total[m] = [x[m, d] + scale[d] * residual[m, d] for d in range(x.shape[1])]
        root = math.sqrt(sum(value * value for value in total[m]) / x.shape[1] + eps)
        normed[m] = [weight[d] * total[m, d] / root for d in range(x.shape[1])]
    return torch.from_numpy(normed), torch.from_numpy(total)


def ssd_scan(x, dt, A, B, C, state, valid, cos=None, sin=None):
    x, dt, A, B, C, cos, sin = (_array(value) for value in (x, dt, A, B, C, cos, sin))
    rows, tokens, heads, width = x.shape
    per_group = heads // B.shape[2]
    final = np.zeros((rows, heads, B.shape[3], width)) if state is None else _array(state).copy()
    y = np.zeros_like(x)
    for b, count in enumerate(_valid(valid, rows, tokens)):
        for t in range(count):
            for h in range(heads):
                b_t, c_t = B[b, t, h // per_group], C[b, t, h // per_group]
                if cos is not None:
                    b_t, c_t = _rotated(b_t, cos[b, t], sin[b, t]), _rotated(c_t, cos[b, t], sin[b, t])
                step = dt[b, t, h]
                final[b, h] = math.exp(step * A[h]) * final[b, h] + step * np.outer(b_t, x[b, t, h])
                y[b, t, h] = c_t @ final[b, h]
    return torch.from_numpy(y), torch.from_numpy(final)


def causal_conv1d(x, weight, bias, state, valid, activation):
    """Output and, per row and channel, the last taps - 1 inputs, from lists that hold every input ever seen."""
    x, weight, bias, state = (_array(value) for value in (x, weight, bias, state))
    rows, tokens, channels = x.shape
    kept = weight.shape[1] - 1
    y, final = np.zeros_like(x), np.zeros((rows, kept, channels))
    for b, count in enumerate(_valid(valid, rows, tokens)):
        for c in range(channels):
            seen = [0.0] * kept if state is None else list(state[b, :, c])
            for t in range(count):
                seen.append(x[b, t, c])
                total = sum(weight[c, kept - age] * seen[-1 - age] for age in range(kept + 1))
                total += 0.0 if bias is None else bias[c]
                y[b, t, c] = total / (1 + math.exp(-total)) if activation == "silu" else total
            final[b, :, c] = seen[len(seen) - kept :]
    return torch.from_numpy(y), torch.from_numpy(final)


def gated_rms_norm(y, z, weight, eps):
    y, z, weight = _array(y), _array(z), _array(weight)
    out = np.zeros_like(y)
    for m in range(y.shape[0]):
        gated = [value * gate / (1 + math.exp(-gate)) for value, gate in zip(y[m], z[m], strict=True)]
        root = math.sqrt(sum(value * value for value in gated) / len(gated) + eps)
        out[m] = [scale * value / root for scale, value in zip(weight, gated, strict=True)]
    return torch.from_numpy(out)


def selective_scan(x, dt, A, B, C, state, valid):
    x, dt, A, B, C = (_array(value) for value in (x, dt, A, B, C))
    rows, tokens, channels = x.shape
    final = np.zeros((rows, *A.shape)) if state is None else _array(state).copy()
    y = np.zeros_like(x)
    for b, count in enumerate(_valid(valid, rows, tokens)):
        for t in range(count):
            for c in range(channels):
                step = dt[b, t, c]
                for n in range(A.shape[1]):
                    final[b, c, n] = math.exp(step * A[c, n]) * final[b, c, n] + step * x[b, t, c] * B[b, t, n]
                y[b, t, c] = sum(final[b, c, n] * C[b, t, n] for n in range(A.shape[1]))
    return torch.from_numpy(y), torch.from_numpy(final)


def _softmax_mix(query, keys, values, bias):
    logits = [float(query @ key) / math.sqrt(len(query)) + add for key, add in zip(keys, bias, strict=True)]
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def attention(q, k, v, cache_k, cache_v, position, valid):
    """Output, and per row and head the (key, value) lists of the live cells."""
    q, k, v, cache_k, cache_v = (_array(value) for value in (q, k, v, cache_k, cache_v))
    rows, tokens, heads, _ = q.shape
    out, live = np.zeros_like(q), {}
    for b, count in enumerate(_valid(valid, rows, tokens)):
        for g in range(k.shape[2]):
            start = 0 if cache_k is None else int(position[b])
            keys = [] if cache_k is None else list(cache_k[b, g, :start])
            values = [] if cache_k is None else list(cache_v[b, g, :start])
            for t in range(count):
                keys.append(k[b, t, g])
                values.append(v[b, t, g])
                for h in range(heads):
                    if h // (heads // k.shape[2]) == g:
                        out[b, t, h] = _softmax_mix(q[b, t, h], keys, values, [0.0] * len(keys))
            live[b, g] = (keys, values)
    return torch.from_numpy(out), live


def keep_window_attention(q, k, v, score, slots, position, valid, window):
    """Output, and per row and head the kept (position, score, key, value) records sorted by position.

    Ranks every key ever seen at every step, so it would notice a key that ought to return.
    """
    q, k, v, score = (_array(value) for value in (q, k, v, score))
    rows, tokens, heads, _ = q.shape
    out, kept = np.zeros_like(q), {}
    for b, count in enumerate(_valid(valid, rows, tokens)):
        for g in range(k.shape[2]):
            seen = []
            if slots is not None:
                slot_k, slot_v, slot_score, slot_position = (_array(value)[b, g] for value in slots)
                used = [w for w in range(len(slot_position)) if slot_position[w] >= 0]
                seen = [(int(slot_position[w]), float(slot_score[w]), slot_k[w], slot_v[w]) for w in used]
            start = 0 if position is None else int(position[b])
            best = sorted(seen, key=lambda record: (-record[1], -record[0]))[:window]
            for t in range(count):
                seen.append((start + t, float(score[b, t, g]), k[b, t, g], v[b, t, g]))
                best = sorted(seen, key=lambda record: (-record[1], -record[0]))[:window]
                for h in range(heads):
                    if h // (heads // k.shape[2]) == g:
                        out[b, t, h] = _softmax_mix(q[b, t, h], [r[2] for r in best], [r[3] for r in best], [r[1] for r in best])
            kept[b, g] = sorted(best, key=lambda record: record[0])
    return torch.from_numpy(out), kept


def scored_attention(q, k, v, score, caches, position, valid, scoring, ratio):
    """Output, and per row the lists of live (key, value) of each kv head and of live scores of each score head."""
    q, k, v, score = (_array(value) for value in (q, k, v, score))
    rows, tokens, heads, _ = q.shape
    out, live = np.zeros_like(q), []
    for b, count in enumerate(_valid(valid, rows, tokens)):
        start = 0 if caches is None else int(position[b])
        past = [[[]] * 16] * 3 if caches is None else [[list(cells[:start]) for cells in _array(cache)[b]] for cache in caches]
        total = start + count
        keys, values, scores = (
            [past[i][head] + list(new[b, :count, head]) for head in range(new.shape[2])] for i, new in enumerate((k, v, score))
        )
        live.append((keys, values, scores))
        for t, h in np.ndindex(count, heads):
            own = scores[h // (heads // score.shape[2])]
            seen = list(range(start + t + 1))
            assert len(seen) <= total
            bias = own
            if scoring == "binary":
                seen, bias = [s for s in seen if own[s] >= 1], [0.0] * total
            if scoring == "ratio" and (m := math.floor(ratio * len(seen))) >= 1:
                least = sorted(own[s] for s in seen)[m - 1]
                seen = [s for s in seen if own[s] >= least]
            group = h // (heads // k.shape[2])
            if seen:
                out[b, t, h] = _softmax_mix(q[b, t, h], *([cells[s] for s in seen] for cells in (keys[group], values[group], bias)))
    return torch.from_numpy(out), live


def product_key_topk(query, keys, picks):
    """Exhaustive search over all J*J experts."""
    query, keys = _array(query), _array(keys)
    rows, tokens, heads = query.shape[:3]
    count = keys.shape[1]
    weight, expert = np.zeros((rows, tokens, heads, picks)), np.zeros((rows, tokens, heads, picks), dtype=np.int64)
    for b, t, r in np.ndindex(rows, tokens, heads):
        x = [float(query[b, t, r, 0] @ keys[r, i, 0]) for i in range(count)]
        y = [float(query[b, t, r, 1] @ keys[r, j, 1]) for j in range(count)]
        best = sorted(range(count * count), key=lambda e: (-(x[e // count] + y[e % count]), e))[:picks]
        scores = [x[e // count] + y[e % count] for e in best]
        powers = [math.exp(s - scores[0]) for s in scores]
        expert[b, t, r], weight[b, t, r] = best, [p / sum(powers) for p in powers]
    return torch.from_numpy(weight), torch.from_numpy(expert)


def expert_mix(x, expert, weight, down, up, activation, weight_inside):
    x, expert, weight, down, up = (_array(value) for value in (x, expert, weight, down, up))
    act = {"silu": lambda z: z / (1 + math.exp(-z)), "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2}[activation]
    y = np.zeros_like(x)
    for b, t, r, i in np.ndindex(*expert.shape):
        e, w = expert[b, t, r, i], weight[b, t, r, i]
        inner = float(x[b, t] @ down[e])
        y[b, t] += (act(w * inner) if weight_inside else act(inner) * w) * up[e]
    return torch.from_numpy(y)


def router_topk(logits, picks, normalize):
    logits = _array(logits)
    weight, expert = np.zeros((len(logits), picks)), np.zeros((len(logits), picks), dtype=np.int64)
    for m, row in enumerate(logits):
        powers = [math.exp(value - max(row)) for value in row]
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:picks]
        total = sum(powers[e] for e in best) if normalize else sum(powers)
        expert[m], weight[m] = best, [powers[e] / total for e in best]
    return torch.from_numpy(weight), torch.from_numpy(expert)


def moe_mix(x, expert, weight, inner, inner_bias, outer, outer_bias, activation, gated):
    x, expert, weight, inner, inner_bias, outer, outer_bias = (
        _array(value) for value in (x, expert, weight, inner, inner_bias, outer, outer_bias)
    )
    act = {"silu": lambda z: z / (1 + math.exp(-z)), "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2}[activation]
    y, width = np.zeros_like(x), outer.shape[2]
    for m, i in np.ndindex(*expert.shape):
        e = expert[m, i]
        z = inner[e] @ x[m] + (0 if inner_bias is None else inner_bias[e])
        hidden = [act(z[j]) * (z[width + j] if gated else 1) for j in range(width)]
        y[m] += weight[m, i] * (outer[e] @ hidden + (0 if outer_bias is None else outer_bias[e]))
    return torch.from_numpy(y)
