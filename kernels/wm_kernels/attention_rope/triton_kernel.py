"""Rotating queries and keys out of a packed projection, and keys and values into their cells. T tokens, P head dimension, F pairs."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "L"])
def rotate_into_cells(
    qkv, cos, sin, position, q, k, v,
    qkv_b, qkv_t, cos_b, cos_t, sin_b, sin_t, q_b, q_t, k_b, k_n, k_k, v_b, v_n, v_k, T, L,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one head: rotated queries into q; rotated keys, and values as they are, into cell position + t, where there is one.

    Grid: (ceil(T / BLOCK_T), H + 2K, B).
    """
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t64_T = t_T.to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    ok_T = t_T < T
    cell_T = tl.load(position + b) + t_T
    in_cell_T = ok_T & (cell_T >= 0) & (cell_T < L)
    from_TP = (qkv + b * qkv_b + head * P + t64_T * qkv_t)[:, None]
    if head >= H + K:
        p = tl.arange(0, BLOCK_P)[None, :]
        v_TP = tl.load(from_TP + p, mask=ok_T[:, None] & (p < P), other=0.0)
        tl.store(v + b * v_b + (head - H - K) * v_k + cell_T[:, None] * v_n + p, v_TP, mask=in_cell_T[:, None] & (p < P))
    else:
        to_T = q + b * q_b + head * P + t64_T * q_t
        if head >= H:
            to_T = k + b * k_b + (head - H) * k_k + cell_T * k_n
            ok_T = in_cell_T
        f = tl.arange(0, BLOCK_F)[None, :]
        inside = ok_T[:, None] & (f < F)
        cos_TF = tl.load(cos + b * cos_b + t64_T[:, None] * cos_t + f, mask=inside, other=0).to(tl.float32)
        sin_TF = tl.load(sin + b * sin_b + t64_T[:, None] * sin_t + f, mask=inside, other=0).to(tl.float32)
        low_TF = tl.load(from_TP + f, mask=inside, other=0.0).to(tl.float32)
        high_TF = tl.load(from_TP + F + f, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_T[:, None] + f, (low_TF * cos_TF - high_TF * sin_TF).to(dtype), mask=inside)
        tl.store(to_T[:, None] + F + f, (high_TF * cos_TF + low_TF * sin_TF).to(dtype), mask=inside)
        if 2 * F < P:
            rest = 2 * F + tl.arange(0, BLOCK_REST)[None, :]
            inside = ok_T[:, None] & (rest < P)
            tl.store(to_T[:, None] + rest, tl.load(from_TP + rest, mask=inside, other=0.0), mask=inside)
