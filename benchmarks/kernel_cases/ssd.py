"""Cases of the state space scans.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
PIECE = 8192  # tokens that float64 takes at once, so that its copies fit
CHUNK = 256  # mamba_ssm's, its fastest at both shapes
CHEEMS, SMALL_CHEEMS = (16, 128, 16, 128, 64), (8, 128, 8, 128, 64)  # H, P, G, N, F of cheems-1.3b and of cheems-320m
GRANITE, MAMBA2 = (128, 64, 1, 128, 0), (64, 64, 1, 128, 0)  # and of Granite's layers and mamba2-1.3b's
DESIGNS = ("sweep", "crowd", "narrow", "fold", "carry")


def cases() -> list[Case]:
    """S1 is Granite's long prefill, S2 that of Cheems; short prefills of one row; prompts of models; a step of 128 rows and of one.

    Each prefill stands beside our other designs of it.
    """
    made = [prefill("S1", 1, 65536, GRANITE, "sweep", {"× mamba_ssm": 2.0})]
    made.append(prefill("S2", 4, 4096, CHEEMS, "sweep", {"× mamba_ssm + rope": 2.5, "× chunk_simple_gla + rope": 1.3}))
    made += [prefill(f"T {T} B 1", 1, T, CHEEMS, "narrow", {"× mamba_ssm": 3.0, "launches": 2}) for T in (64, 128, 256, 512)]
    for T in (8192, 65536):
        made += [prefill(f"cheems-1.3b T {T}", 1, T, CHEEMS, "fold", {}), prefill(f"mamba2-1.3b T {T}", 1, T, MAMBA2, "fold", {})]
        made.append(prefill(f"cheems-320m T {T}", 1, T, SMALL_CHEEMS, "carry", {}))
    made.append(prefill("T 2048 B 16", 16, 2048, CHEEMS, "crowd", {}))
    made += [step(128, 16, 128, 128, {"copy rate": 0.85, "× mamba_ssm": 1.0}), step(1, 16, 128, 128, {})]
    # Token after token, with the same bits for every split: at most twice the time of as many steps.
    return made + [exact(B, T, 16, 128, 128, {f"time ÷ step B {B}": 2.0 * T}) for B, T in ((128, 1), (128, 16), (1, 512))]


def spaces() -> list[Space]:
    """Each regime on a prefill that chooses it, and the step.

    What parts the regimes is not tried: it follows from the figures of `designs`. `programs` of sweep lies above the programs of every case
    where fold or narrow is faster than sweep and at most at those of the others, `programs` of crowd likewise between sweep and crowd;
    `up_to` of narrow is the longest prompt where narrow is faster than fold, that of fold the most segments with which it is faster than
    carry. A row's thresholds are kept as they are.
    """
    values = {"BLOCK_Q": 64, "BLOCK_P": 64, "state": 8192, "num_warps": 4, "num_stages": 3, "prepare_warps": 8, "shares": 16}
    tiles, prepared = grid(BLOCK_P=[32, 64], num_stages=[2, 3, 4]), grid(prepare_warps=[4, 8], shares=[4, 8, 16])
    segments = grid(programs=[128, 256, 512], least_tokens=[128, 256, 512])
    tried: list[tuple[str, str, Mapping[str, int], Sequence[Sequence[Mapping[str, int]]]]] = [
        ("S1", "sweep", {"programs": 96}, [tiles, prepared]),
        ("S2", "sweep", {"programs": 96}, [tiles, prepared]),
        ("T 2048 B 16", "crowd", {"num_stages": 2, "programs": 133}, [tiles, prepared]),
        ("T 512 B 1", "narrow", {"BLOCK_P": 16, "up_to": 4096}, [grid(BLOCK_P=[16, 32], num_stages=[2, 3])]),
        ("cheems-1.3b T 8192", "fold", {"num_stages": 2, "programs": 256, "least_tokens": 256, "up_to": 8}, [tiles, segments]),
        ("mamba2-1.3b T 8192", "fold", {"num_stages": 2, "programs": 256, "least_tokens": 256, "up_to": 8}, [tiles, segments]),
        ("cheems-320m T 8192", "carry", {"num_stages": 2}, [tiles]),
    ]
    named = {case.name: case for case in cases()}
    made = [Space(forced(named[name], regime), regime, {}, values | own, groups) for name, regime, own, groups in tried]
    token = {"BLOCK_P": 64, "num_warps": 4, "num_stages": 1}
    token_tiles = [grid(BLOCK_P=[16, 32, 64, 128], num_warps=[1, 2, 4, 8])]
    return [*made, Space(named["step B 128"], "tokens", {}, token, token_tiles)]


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


def prefill(name: str, B: int, T: int, sizes: tuple[int, int, int, int, int], regime: str, bars: dict[str, float]) -> Case:
    """From a zero state to the final one; `regime` is the design that such a call chooses, beside which the others stand."""
    H, P, G, N, F = sizes
    op = "ssd_scan_rope" if F else "ssd_scan"

    def ours(v: Inputs) -> Any:
        angles = (v["cos"], v["sin"]) if F else ()
        return getattr(ops, op)(v["x"], v["dt"], v["A"], v["B"], v["C"], *angles, None, None)

    # Few tokens, or programs that fill the device, make one segment: fold and carry do then what crowd does.
    others = DESIGNS[:3] if T < 512 or regime == "crowd" else DESIGNS
    designs = {f"as {other}": by_design(other, ours) for other in others if other != regime}

    def oracle(v: Inputs) -> float:
        """The worst of all tokens and the final state, in every design; one that is wrong is named."""
        y, state = once(v, lambda: reference(v))
        errors = {}
        for design, call in {"ours": ours, **designs}.items():
            found, after = call(v)
            errors[design] = max(over(op, found, y), over(op, after, state))
            if not errors[design] <= 1:
                raise ArithmeticError(f"{design}: {errors[design]:.3g} times the budget")
        return max(errors.values())

    peers: dict[str, Peer] = {"mamba_ssm": mamba_prefill}
    if F:
        peers |= {"chunk_simple_gla": simple_gla, "rope": compiled(rotate, "B", "C", "cos", "sin")}
    moved = SIZE * B * T * (2 * H * P + 2 * G * N) + 4 * B * T * (H + 2 * F) + 4 * B * H * N * P
    flops = 2 * B * H * T * 2 * N * P
    make = partial(tensors, B, T, H, P, G, N, F, False)
    of_designs = {"× the fastest of our designs": 0.95}
    return Case(op, name, DTYPE, make, ours, oracle, peers, moved, flops, bars | of_designs, designs=designs)


_known: dict[str, dict[Any, Any]] = {}  # plans of each design, apart from those that the ops remember of their own


@contextmanager
def designed(name: str) -> Iterator[None]:
    """Within the block, the scans run as this regime, with its own values and its own number of segments."""
    from wm_kernels.ssd_scan import triton_op
    from wm_kernels.ssd_scan.plan import plan

    kept = {key: vars(triton_op)[key] for key in ("plan", "_known")}
    vars(triton_op).update(plan=partial(plan, name=name), _known=_known.setdefault(name, {}))
    try:
        yield
    finally:
        vars(triton_op).update(kept)


def by_design(name: str, call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """The call in the design of a regime."""

    def run(v: Inputs) -> Any:
        with designed(name):
            return call(v)

    return run


def forced(case: Case, name: str) -> Case:
    """The case in the design of a regime, whatever its values say, as the tuner wants it."""

    def oracle(v: Inputs) -> float:
        y, state = once(v, lambda: reference(v))
        found, after = by_design(name, case.ours)(v)
        return max(over(case.op, found, y), over(case.op, after, state))

    return replace(case, ours=by_design(name, case.ours), oracle=oracle, designs={})


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
    """The float64 answer: piece after piece of the tokens, each from the state that the one before it leaves."""
    parts, state = [], None if v["state"] is None else v["state"].double()
    for first in range(0, v["x"].shape[1], PIECE):
        names = ("x", "dt", "A", "B", "C", *(("cos", "sin") if "cos" in v else ()))
        piece = (v[name].double() if name == "A" else v[name][:, first : first + PIECE].double() for name in names)
        y, state = (ssd_scan_rope_reference if "cos" in v else ssd_scan_reference)(*piece, state, None)
        parts.append(y)
    return torch.cat(parts, 1), state


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
