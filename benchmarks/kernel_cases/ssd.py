"""Cases of the state space scans.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import wm_kernels as ops
from kernel_cases import Case, Inputs, Peer, Space, grid
from kernel_cases._common import compiled, generator, normal, once, without_init
from wm_graph.tolerances import UNIT_ROUNDOFF, op_limit
from wm_kernels.rope import rope_reference
from wm_kernels.ssd_scan import ssd_scan_reference
from wm_kernels.ssd_scan_rope import ssd_scan_rope_reference

DTYPE = "bfloat16"
SIZE = 2  # bytes of an entry
CHECKED = 4096  # tokens that are compared with float64
CHUNK = 256  # mamba_ssm's, its fastest at both shapes


def cases() -> list[Case]:
    """S1 is Granite's long prefill, S2 that of Cheems; short prefills of one row; a step of 128 rows and of one."""
    made = [prefill("S1", 1, 65536, 128, 64, 1, 128, 0, {"× mamba_ssm": 2.0})]
    bars = {"× mamba_ssm + rope": 2.5, "× chunk_simple_gla + rope": 1.3}
    made.append(prefill("S2", 4, 4096, 16, 128, 16, 128, 64, bars))
    made += [prefill(f"T {T} B 1", 1, T, 16, 128, 16, 128, 64, {"× mamba_ssm": 3.0, "launches": 2}) for T in (64, 128, 256, 512)]
    made += [step(128, 16, 128, 128, {"copy rate": 0.85, "× mamba_ssm": 1.0}), step(1, 16, 128, 128, {})]
    # Token after token, with the same bits for every split: at most twice the time of as many steps.
    return made + [exact(128, T, 16, 128, 128, {"time ÷ step B 128": 2.0 * T}) for T in (1, 16)]


def spaces() -> list[Space]:
    """Long prefills of many heads, short ones of few, and the step. A row's thresholds of regimes are kept as they are."""
    long = {"BLOCK_Q": 64, "BLOCK_P": 64, "state": 8192, "num_warps": 4, "num_stages": 3, "prepare_warps": 8, "shares": 16, "programs": 96}
    tiles = [grid(BLOCK_P=[32, 64], num_stages=[2, 3, 4]), grid(prepare_warps=[4, 8], shares=[4, 8, 16])]
    made = [Space(case, "sweep", {}, long, tiles) for case in cases() if case.name in ("S1", "S2")]
    short = long | {"BLOCK_P": 16, "programs": 2**20, "up_to": 4096}
    made += [Space(case, "narrow", {}, short, [grid(BLOCK_P=[16, 32], num_stages=[2, 3])]) for case in cases() if case.name == "T 512 B 1"]
    token = {"BLOCK_P": 64, "num_warps": 4, "num_stages": 1}
    token_tiles = [grid(BLOCK_P=[16, 32, 64, 128], num_warps=[1, 2, 4, 8])]
    return made + [Space(case, "tokens", {}, token, token_tiles) for case in cases() if case.name == "step B 128"]


def tensors(B: int, T: int, H: int, P: int, G: int, N: int, F: int, state: bool) -> Inputs:
    g = generator()
    angle = 6 * torch.rand((B, T, F), generator=g, device="cuda")
    made: Inputs = {
        "x": normal(g, B, T, H, P, dtype=DTYPE),
        "dt": torch.nn.functional.softplus(normal(g, B, T, H) - 1),
        "A": -torch.linspace(0.1, 8, H, device="cuda"),
        "B": normal(g, B, T, G, N, dtype=DTYPE),
        "C": normal(g, B, T, G, N, dtype=DTYPE),
        "state": normal(g, B, H, N, P) if state else None,
    }
    return made | ({"cos": angle.cos(), "sin": angle.sin()} if F else {})


def prefill(name: str, B: int, T: int, H: int, P: int, G: int, N: int, F: int, bars: dict[str, float]) -> Case:
    """From a zero state to the final one."""
    op = "ssd_scan_rope" if F else "ssd_scan"

    def ours(v: Inputs) -> Any:
        angles = (v["cos"], v["sin"]) if F else ()
        return getattr(ops, op)(v["x"], v["dt"], v["A"], v["B"], v["C"], *angles, None, None)

    def oracle(v: Inputs) -> float:
        """Of the first tokens: the kernels and the references are causal. The state is that of a call which ends there."""
        first = {
            key: value[:, :CHECKED] if key in ("x", "dt", "B", "C", "cos", "sin") else value for key, value in v.items() if key != "truth"
        }
        whole, (_, state) = ours(v)[0], ours(first)
        y, expected = once(v, lambda: reference(first))
        return max(over(op, whole[:, :CHECKED], y), over(op, state, expected))

    peers: dict[str, Peer] = {"mamba_ssm": mamba_prefill}
    if F:
        peers |= {"chunk_simple_gla": simple_gla, "rope": compiled(rotate, "B", "C", "cos", "sin")}
    moved = SIZE * B * T * (2 * H * P + 2 * G * N) + 4 * B * T * (H + 2 * F) + 4 * B * H * N * P
    flops = 2 * B * H * T * 2 * N * P
    return Case(op, name, DTYPE, lambda: tensors(B, T, H, P, G, N, F, False), ours, oracle, peers, moved, flops, bars)


def step(B: int, H: int, P: int, N: int, bars: dict[str, float]) -> Case:
    """One token, the state in place."""

    def ours(v: Inputs) -> Tensor:
        return ops.ssd_scan_rope_(v["x"], v["dt"], v["A"], v["B"], v["C"], v["cos"], v["sin"], v["state"], None)

    def oracle(v: Inputs) -> float:
        first = v | {"state": v["state"].clone()}
        y, expected = reference(first)
        found = ours(first)
        return max(over("ssd_scan_rope", found, y), over("ssd_scan_rope", first["state"], expected))

    moved = 8 * B * H * N * P
    case = (lambda: tensors(B, 1, H, P, H, N, N // 2, True), ours, oracle, {"mamba_ssm": mamba_step}, moved, 5 * B * H * N * P, bars)
    return Case("ssd_scan_rope", f"step B {B}", DTYPE, *case)


def exact(B: int, T: int, H: int, P: int, N: int, bars: dict[str, float]) -> Case:
    """T tokens with exact numerics, the state in place."""
    by_token = ("x", "dt", "B", "C", "cos", "sin")

    def ours(v: Inputs) -> Tensor:
        with ops.numerics("exact"):
            return ops.ssd_scan_rope_(v["x"], v["dt"], v["A"], v["B"], v["C"], v["cos"], v["sin"], v["state"], None)

    def oracle(v: Inputs) -> float:
        """Infinitely wrong where single tokens do not give the bits of the whole."""
        whole, parts = v | {"state": v["state"].clone()}, v | {"state": v["state"].clone()}
        y, expected = reference(v)
        found = ours(whole)
        pieces = [ours(parts | {key: v[key][:, t : t + 1] for key in by_token}) for t in range(T)]
        if not torch.equal(torch.cat(pieces, 1), found) or not torch.equal(parts["state"], whole["state"]):
            return float("inf")
        return max(over("ssd_scan_rope", found, y), over("ssd_scan_rope", whole["state"], expected))

    made = (lambda: tensors(B, T, H, P, H, N, N // 2, True), ours, oracle, {}, 8 * B * H * N * P, 5 * B * T * H * N * P, bars)
    return Case("ssd_scan_rope", f"exact T {T} B {B}", DTYPE, *made)


def reference(v: Inputs) -> tuple[Tensor, Tensor]:
    """The float64 answer."""
    x, dt, A, b, c = (v[key].double() for key in ("x", "dt", "A", "B", "C"))
    state = None if v["state"] is None else v["state"].double()
    if "cos" in v:
        return ssd_scan_rope_reference(x, dt, A, b, c, v["cos"].double(), v["sin"].double(), state, None)
    return ssd_scan_reference(x, dt, A, b, c, state, None)


def over(op: str, found: Tensor, truth: Tensor) -> float:
    """The worst error over the limit of the model's dtype, which is the state's too: the products that add to it round to it."""
    if not found.isfinite().all():
        return float("inf")
    allowed = op_limit(op, DTYPE, "eager").ulps * UNIT_ROUNDOFF[DTYPE] * truth.abs().max().item()
    return (found.double() - truth).abs().max().item() / allowed


def rotate(b: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation that peers lack."""
    return rope_reference(b, cos, sin), rope_reference(c, cos, sin)


def mamba_prefill(v: Inputs) -> Callable[[], Any]:
    """mamba_ssm's five kernels."""
    without_init("mamba_ssm")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda: mamba_chunk_scan_combined(v["x"], v["dt"], v["A"], v["B"], v["C"], CHUNK, return_final_states=True)


def mamba_step(v: Inputs) -> Callable[[], Any]:
    """mamba_ssm's step, in place on its own copy of the state; it does not run without a skip and a bias, so both are zero."""
    without_init("mamba_ssm")
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    B, H, N, P = v["state"].shape
    state, zero = v["state"].transpose(2, 3).contiguous(), torch.zeros(H, 1, device="cuda").expand(H, P)
    dt, A = v["dt"][:, 0, :, None].expand(B, H, P), v["A"][:, None, None].expand(H, P, N)
    return lambda: selective_state_update(state, v["x"][:, 0], dt, A, v["B"][:, 0], v["C"][:, 0], D=zero, dt_bias=zero)


def simple_gla(v: Inputs) -> Callable[[], Any]:
    """fla-core's two kernels; x dt and A dt are made beforehand."""
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    from fla.ops.simple_gla import chunk_simple_gla

    values, decays = (v["x"] * v["dt"].unsqueeze(-1)).to(v["x"].dtype), v["A"] * v["dt"]
    return lambda: chunk_simple_gla(v["C"], v["B"], values, decays, scale=1.0, output_final_state=True)
