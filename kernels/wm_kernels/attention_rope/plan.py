"""Launches of attention_rope over a cache.

B batch   T tokens   H query heads   K kv heads   P head dimension   F rotated pairs   L cells   C = (H + 2K)·P packed width
"""

import torch

from wm_kernels.attention.plan import Strides, block_of
from wm_kernels.attention.plan import plan as plan_attention
from wm_kernels.attention_rope.triton_kernel import rotate_into_cells
from wm_kernels.native import uncached
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, power_of_two

BLOCK = 8  # tokens of a program


def plan(
    B: int, T: int, H: int, K: int, P: int, F: int, L: int, dtype: torch.dtype, arch: str, strides: Strides, exact: bool = False
) -> Plan:
    """Rotation and writing in one launch, then those of attention; tensors qkv, cos, sin, position, k, v, out.

    Args:
        B: rows.
        T: tokens.
        H: query heads.
        K: kv heads, a divisor of H.
        P: head dimension.
        F: rotated pairs, 2F <= P.
        L: cells.
        dtype: of qkv, k and v.
        arch: see `triton_launch.architecture`.
        strides: in elements, of qkv_BTC, cos_BTF, sin_BTF, k_BLKP and v_BLKP, axes in the order of these names; the last is 1.
        exact: whether the bits may not depend on how tokens are split into calls.
    """
    outer, q = dict(strides), (T * H * P, H * P, P, 1)
    constants = {
        "H": H, "K": K, "P": P, "F": F, "BLOCK_T": BLOCK, "BLOCK_F": power_of_two(F), "BLOCK_REST": power_of_two(max(1, P - 2 * F)),
        "BLOCK_P": block_of(P),
    }  # fmt: skip
    tensors = ("qkv", "cos", "sin", "position", "q", "k", "v")
    packed = (*outer["qkv"][:2], *outer["cos"][:2], *outer["sin"][:2], *q[:2], *outer["k"][:3], *outer["v"][:3])
    rotate = Launch(rotate_into_cells, (blocks(T, BLOCK), H + 2 * K, B), (*tensors, *packed, T, L), constants, 4, 1)
    cells: Strides = (("q", q), ("k", outer["k"]), ("v", outer["v"]))
    made = uncached(plan_attention)(B, T, H, K, 1, P, L, "none", True, dtype, arch, cells, exact)
    return Plan((rotate, *made.launches), {"q": Scratch((B, T, H, P), dtype), **made.scratch})
