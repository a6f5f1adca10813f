"""Launches of selective_scan. B batch, T tokens, C channels, N state, K chunks of tokens."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from wm_kernels.selective_scan.triton_kernel import selective_scan_carry_kernel, selective_scan_kernel, selective_step_kernel
from wm_kernels.symbolic import least, most
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, dtype_name, power_of_two

SWEEP_TOKENS = 64
SWEEP_CHANNELS = 2**17  # of all rows: enough to hide the memory's delay without chunks


def regime(T: int, channels: int, exact: bool = False) -> str:
    """`step` is one token; `sweep` walks all tokens in one launch; `chunks` does them side by side, in three, the states computed twice.

    Only the sweep gives the same bits for every split of the tokens, so it is the only one with `exact`.
    """
    if exact:
        return "sweep"
    if T == 1:
        return "step"
    return "sweep" if T <= SWEEP_TOKENS or channels >= SWEEP_CHANNELS else "chunks"


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    C: int,
    N: int,
    dtype: torch.dtype,
    given: tuple[bool, bool],
    token_strides: tuple[int, ...],
    state_strides: tuple[int, ...],
    arch: str,
    exact: bool = False,
    **override: Any,
) -> Plan:
    """One launch, or three; tensors x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, valid_B, before, y_BTC, after.

    Args:
        B: rows.
        T: tokens.
        C: channels.
        N: state.
        dtype: of x.
        given: whether there are valid lengths and a state; stand-ins serve for those that are absent.
        token_strides: of x, dt by row and token, of A by channel, of B and C by row and token.
        state_strides: of `before` and `after` by row and channel.
        arch: see `triton_launch.architecture`.
        exact: T tokens give the bits of T calls of one token.
        **override: values to use instead of the configuration.
    """
    chosen = regime(T, B * C, exact)
    values = override or config("selective_scan", arch, dtype_name(dtype), chosen, (("C", C), ("N", N)))
    block_C = min(values["block_C"], power_of_two(C))
    tile = {"BLOCK_C": block_C, "BLOCK_N": power_of_two(N)}
    flags = {"HAS_VALID": given[0], "HAS_STATE": given[1]}
    if chosen == "step":
        names = ("x_BTC", "dt_BTC", "A_CN", "B_BTN", "C_BTN", "valid_B", "before", "y_BTC", "after")
        constants = {"C": C, "N": N, **flags, **tile}
        grid = (B * blocks(C, block_C),)
        return Plan((Launch(selective_step_kernel, grid, (*names, *token_strides, *state_strides), constants, values["num_warps"], 1),))
    chunk = _chunk(T, B * blocks(C, block_C), values) if chosen == "chunks" else most(T, 1)
    K = most(1, blocks(T, chunk)) if chosen == "chunks" else 1

    def part(name: str, before: str, after: str, chunks: int) -> Launch:
        names = ("x_BTC", "dt_BTC", "A_CN", "B_BTN", "C_BTN", "valid_B", before, "y_BTC", after, "total" if K > 1 else "A_CN")
        constants: Mapping[str, Any] = {"C": C, "N": N, **flags, "PART": name, "AHEAD": values["ahead"], **tile}
        grid = (B * blocks(C, block_C), chunks)
        return Launch(selective_scan_kernel, grid, (*names, T, chunk, 1, *token_strides, *state_strides), constants, values["num_warps"], 1)

    if K == 1:
        return Plan((part("whole", "before", "after", 1),))
    carry = Launch(
        selective_scan_carry_kernel,
        (B * blocks(C, block_C),),
        ("A_CN", "before", "states", "total", K, 1, token_strides[4], *state_strides[:2]),
        {"C": C, "N": N, "HAS_STATE": given[1], **tile},
        values["num_warps"],
        1,
    )
    scratch = {"states": Scratch((B, K, N, C), torch.float32), "total": Scratch((B, K, C), torch.float32)}
    return Plan((part("states", "A_CN", "states", K - 1), carry, part("outputs", "states", "after", K)), scratch)


def _chunk(T: int, programs: int, values: Mapping[str, int]) -> int:
    """Tokens of a chunk: as many programs as configured, in all, but no chunk shorter than `least`; a multiple of what is read ahead."""
    K = most(1, least(values["programs"] // programs, T // values["least"]))
    return blocks(blocks(T, K), values["ahead"]) * values["ahead"]
