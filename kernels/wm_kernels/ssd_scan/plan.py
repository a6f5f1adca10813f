"""Which launches make one call of `ssd_scan` or `ssd_scan_rope`.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs, 0 without rotation   K segments
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from wm_kernels.symbolic import least, most
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

REGIMES = ("tokens", "sweep", "crowd", "narrow", "fold", "carry")


@dataclass(frozen=True)
class ScanCall:
    """What decides the launches of one call; strides in elements, of the axes that the names end in.

    Attributes:
        dtype: of x, B, C and y.
        has_state: an initial state is given.
        has_valid: `valid_B` is given.
        exact: prefill gives the bits of token after token.
    """

    op: str
    arch: str
    dtype: torch.dtype
    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    F: int
    x_BTH: tuple[int, ...]
    dt_BTH: tuple[int, ...]
    A_H: tuple[int, ...]
    B_BTG: tuple[int, ...]
    C_BTG: tuple[int, ...]
    cos_BT: tuple[int, ...]
    sin_BT: tuple[int, ...]
    state_BHN: tuple[int, ...]
    out_BHN: tuple[int, ...]
    has_state: bool
    has_valid: bool
    exact: bool = False

    @property
    def dims(self) -> tuple[tuple[str, int], ...]:
        """The dimensions that configurations are chosen by."""
        return ("H", self.H), ("P", self.P), ("G", self.G), ("N", self.N), ("F", self.F)


def regime(call: ScanCall) -> str:
    """How a call is run, from integers alone.

    Returns:
        `tokens`: one launch, token after token. Else chunks are prepared, and then `sweep`: each program walks all chunks of a row, a head
        and a tile of P, where these are about as many as multiprocessors. `crowd`: the same for more, several to a multiprocessor.
        `narrow`: the same with small tiles, where there are few and T is small. `fold`: segments of chunks side by side, each adding up the
        states that those before it leave. `carry`: these are added up once.
    """
    if call.T == 1 or call.exact:
        return "tokens"
    programs = _programs(call, values(call, "sweep"))
    if programs >= values(call, "crowd")["programs"]:
        return "crowd"
    if programs >= values(call, "sweep")["programs"]:
        return "sweep"
    if values(call, "narrow")["up_to"] >= call.T:
        return "narrow"
    return "fold" if _segments(call) <= values(call, "fold")["up_to"] else "carry"


def values(call: ScanCall, name: str) -> Any:
    """The configuration of a regime."""
    return config(call.op, call.arch, dtype_name(call.dtype), name, call.dims)


def _programs(call: ScanCall, chosen: Any) -> int:
    """Programs of one segment."""
    return call.B * call.H * -(-call.P // _block_p(call, chosen))


def _segments(call: ScanCall) -> int:
    """Segments that fill the device with programs, none of them too short to be worth its own start."""
    chosen = values(call, "fold")
    wanted = -(-chosen["programs"] // most(1, _programs(call, chosen)))
    return most(1, least(wanted, call.T // chosen["least_tokens"]))


def _block_p(call: ScanCall, chosen: Any) -> int:
    """Columns of a program: the configured ones, fewer where N is large, and no more than there are."""
    fits = max(16, chosen["state"] // power_of_two(call.N))
    return min(chosen["BLOCK_P"], fits, max(16, power_of_two(call.P)))


def plan(call: ScanCall, name: str = "") -> Plan:
    """The launches of a call, which the caller keeps, over tensors `x dt A B C cos sin valid state y out`.

    Stand-ins, never read, take the places of absent ones: `dt` of the angles, `A` of `state`, `valid` and slots. Benchmarks name a regime
    that is not the call's own.
    """
    name = name or regime(call)
    chosen = values(call, name)
    if name == "tokens":
        return Plan((_tokens(call, chosen),))
    return chunked(call, name, chosen, _segments(call) if name in ("fold", "carry") else 1)


def chunked(call: ScanCall, name: str, chosen: Any, segments: int) -> Plan:
    """The launches of a regime other than `tokens`, with K about `segments`."""
    original = call
    chunk = chosen["BLOCK_Q"]
    segment = most(1, blocks(call.T, segments * chunk)) * chunk
    segments = most(1, blocks(call.T, segment)) if name in ("fold", "carry") else 1
    rows, size = call.B * call.H, call.N * call.P
    chunks = blocks(call.T, chunk)
    exact = call.dtype == torch.float32
    scratch = {name: Scratch((rows, chunks * chunk), torch.float32) for name in ("step", "sum", *(("left",) if exact else ()))}
    if call.F:
        scratch |= {name: Scratch((call.B, call.G, call.T, call.N), call.dtype) for name in ("B_rot", "C_rot")}
        rotated = (call.G * call.T * call.N, call.N, call.T * call.N)
        call = replace(call, B_BTG=rotated, C_BTG=rotated)
    launches = [_prepare(original, chosen, chunks)]
    if segments > 1:
        scratch |= {"slot": Scratch((rows, segments, size), torch.float32), "decay": Scratch((rows, segments), torch.float32)}
        launches.append(_segment_states(call, chosen, segment, segments))
    if segments > 1 and name == "carry":
        block = min(1024, power_of_two(size))
        constants = {"SIZE": size, "BLOCK": block, "HAS_STATE": call.has_state}
        launches.append(Launch(_kernels().carry_states, (rows * blocks(size, block),), ("slot", "decay", segments), constants))
    start = "initial" if segments == 1 else "carried" if name == "carry" else "fold"
    launches.append(_scan(call, chosen, segment, segments, start))
    return Plan(tuple(launches), MappingProxyType(scratch))


def _kernels() -> Any:
    from wm_kernels.ssd_scan import triton_kernel

    return triton_kernel


def _launch(call: ScanCall, kernel: Any, grid: tuple[int, ...], arguments: tuple[str | int, ...], constants: Any, chosen: Any) -> Launch:
    """A launch with stand-ins, which are never read, for the tensors that the call lacks."""
    absent = {} if call.F else {"cos": "dt", "sin": "dt", "B_rot": "B", "C_rot": "C"}
    if call.dtype != torch.float32:
        absent["left"] = "sum"
    if not call.has_valid:
        absent["valid"] = "A"
    if not call.has_state:
        absent["state"] = "A"
    named = tuple(absent.get(value, value) if isinstance(value, str) else value for value in arguments)
    constants = {"H": call.H, "G": call.G, "N": call.N, "HAS_VALID": call.has_valid} | constants
    return Launch(kernel, grid, named, constants, chosen["num_warps"], chosen["num_stages"])


def _prepare(call: ScanCall, chosen: Any, chunks: int) -> Launch:
    heads = min(16, power_of_two(call.H))
    shares = max(1, min(blocks(call.H, heads), 8), min(call.G, chosen["shares"]) if call.F else 1)
    constants = {
        "F": call.F,
        "BLOCK_Q": chosen["BLOCK_Q"],
        "BLOCK_H": heads,
        "SHARES": shares,
        "BLOCK_F": power_of_two(max(call.F, 1)),
        "BLOCK_N": power_of_two(call.N),
    }
    constants |= {
        "B_t": call.B_BTG[1],
        "C_t": call.C_BTG[1],
        "cos_t": call.cos_BT[1],
        "sin_t": call.sin_BT[1],
        "EXACT": call.dtype == torch.float32,
    }
    tensors = ("dt", "A", "B", "C", "cos", "sin", "valid", "step", "sum", "left", "B_rot", "C_rot")
    strides = (*call.dt_BTH, *call.A_H, *_outer(call.B_BTG), *_outer(call.C_BTG), call.cos_BT[0], call.sin_BT[0])
    return _launch(
        call,
        _kernels().prepare,
        (call.B * chunks * shares,),
        (*tensors, call.T, *strides),
        constants,
        {"num_warps": chosen["prepare_warps"], "num_stages": 1},
    )


def _tiles(call: ScanCall, chosen: Any) -> dict[str, Any]:
    sizes = {"P": call.P, "BLOCK_Q": chosen["BLOCK_Q"], "BLOCK_P": _block_p(call, chosen), "BLOCK_N": max(16, power_of_two(call.N))}
    strides = {"x_t": call.x_BTH[1], "B_t": call.B_BTG[1]}
    return sizes | strides | {"HAS_STATE": call.has_state, "EXACT": call.dtype == torch.float32}


def _segment_states(call: ScanCall, chosen: Any, segment: int, segments: int) -> Launch:
    constants = _tiles(call, chosen)
    grid = (call.B * call.H * blocks(call.P, constants["BLOCK_P"]), segments if call.has_state else segments - 1)
    tensors = ("x", "B_rot", "step", "sum", "left", "valid", "state", "slot", "decay")
    strides = (*_outer(call.x_BTH), *_outer(call.B_BTG), *call.state_BHN)
    return _launch(call, _kernels().segment_states, grid, (*tensors, call.T, segment, *strides), constants, chosen)


def _scan(call: ScanCall, chosen: Any, segment: int, segments: int, start: str) -> Launch:
    constants = _tiles(call, chosen) | {"C_t": call.C_BTG[1], "START": start}
    grid = (call.B * call.H * blocks(call.P, constants["BLOCK_P"]), segments)
    slots = ("A", "A") if start == "initial" else ("slot", "decay")
    tensors = ("x", "B_rot", "C_rot", "step", "sum", "left", "valid", "state", *slots, "y", "out")
    strides = (*_outer(call.x_BTH), *_outer(call.B_BTG), *_outer(call.C_BTG), *call.state_BHN, *call.out_BHN)
    return _launch(call, _kernels().scan_segments, grid, (*tensors, call.T, segment, *strides), constants, chosen)


def _outer(strides: tuple[int, ...]) -> tuple[int, int]:
    """Without the token's stride, which is a constant of the kernel: a property of the model, and one register less per row of a tile."""
    return strides[0], strides[2]


def _tokens(call: ScanCall, chosen: Any) -> Launch:
    constants = {"P": call.P, "F": call.F, "HAS_STATE": call.has_state, "DEPENDENT": can_wait(call.arch)}
    constants |= {"BLOCK_N": power_of_two(call.N), "BLOCK_P": min(chosen["BLOCK_P"], power_of_two(call.P))}
    grid = (call.B * call.H * blocks(call.P, constants["BLOCK_P"]),)
    tensors = ("x", "dt", "A", "B", "C", "cos", "sin", "valid", "state", "y", "out")
    inputs = (*call.x_BTH, *call.dt_BTH, *call.A_H, *call.B_BTG, *call.C_BTG, *call.cos_BT, *call.sin_BT)
    strides = (*inputs, *call.state_BHN, *call.out_BHN)
    return _launch(call, _kernels().scan_tokens, grid, (*tensors, call.T, *strides), constants, chosen)
