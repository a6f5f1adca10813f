"""Cases of the ops that work row by row: norms, convolution, rotation, selective scan.

B batch   T tokens   M = B*T   C, D channels   L taps   H heads   P head dimension   N state
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from kernel_cases import Case, Inputs, Space, grid
from kernel_cases._common import compiled, eager, generator, normal, once, over_budget, wide, without_init
from wm_kernels.causal_conv1d import causal_conv1d_reference
from wm_kernels.gated_rms_norm import gated_rms_norm_reference
from wm_kernels.residual_rms_norm import residual_rms_norm_reference
from wm_kernels.rope import rope_reference
from wm_kernels.rope_angles.definition import rope_angles_reference
from wm_kernels.selective_scan import selective_scan_reference

EPS = 1e-6
CHECKED = 256  # rows or tokens of the outputs that are compared with float64
DTYPE = "bfloat16"
SIZE = 2  # bytes of an entry


def cases() -> list[Case]:
    """Norms at three widths; convolution and rotation over 16384 tokens, and a step; the scan at two lengths."""
    made = [norm(16384, D) for D in (2048, 4096, 8192)] + [gated(16384, C) for C in (2048, 4096, 8192)]
    made += [convolution("M", 4, 4096, 4352), convolution("long", 1, 65536, 4352), convolution_step(128, 4352)]
    steps = [scan_step(128, 4096, 16), *(exact_scan(128, T, 4096, 16) for T in (1, 16))]
    made += [rotation(4, 4096, 20, 128), angles(1, 4096, 64), angles(1, 1, 64)]
    return [*made, scan("short", 4, 512, 4096, 16), scan("long", 1, 8192, 4096, 16), *steps]


def spaces() -> list[Space]:
    """Norms by width, convolution, rotation, scan."""
    rows = {"rows": 1, "programs": 65536, "num_warps": 4}
    tiles = [grid(rows=[1], num_warps=[1, 2, 4, 8]) + grid(rows=[2, 4], num_warps=[4, 8]), grid(programs=[1056, 2112, 65536])]
    made = [Space(norm(16384, D), "rows", {"D": D}, rows, tiles) for D in (2048, 4096, 8192)]
    made += [Space(gated(16384, C), "rows", {"C": C}, rows, tiles) for C in (2048, 4096, 8192)]
    conv = grid(block_T=[8, 16, 32], block_C=[128], num_warps=[1]) + grid(block_T=[8, 16, 32], block_C=[256], num_warps=[1, 2])
    made.append(Space(convolution("M", 4, 4096, 4352), "tokens", {}, {"block_T": 16, "block_C": 256, "num_warps": 2}, [conv]))
    step = grid(block_T=[1], block_C=[64, 128, 256], num_warps=[1, 2])
    made.append(Space(convolution_step(128, 4352), "step", {}, {"block_T": 1, "block_C": 256, "num_warps": 1}, [step]))
    turn = grid(block_M=[1, 2, 4], block_H=[4, 8], num_warps=[1, 2, 4]) + grid(block_M=[1], block_H=[32], num_warps=[4, 8])
    made.append(Space(rotation(4, 4096, 20, 128), "many", {}, {"block_M": 4, "block_H": 8, "num_warps": 4}, [turn]))
    walk = [grid(block_C=[32, 64], num_warps=[1]) + grid(block_C=[64, 128], num_warps=[2, 4]), grid(programs=[1024, 2048, 4096, 8192])]
    chunks = {"block_C": 32, "programs": 4096, "least": 64, "ahead": 8, "num_warps": 1}
    made.append(Space(scan("long", 1, 8192, 4096, 16), "chunks", {}, chunks, [*walk, grid(ahead=[4, 8])]))
    step = [grid(block_C=[32, 64, 128, 256], num_warps=[1, 2, 4])]
    token = {"block_C": 64, "programs": 0, "least": 1, "ahead": 1, "num_warps": 4}
    made.append(Space(scan_step(128, 4096, 16), "step", {}, token, step))
    return made


def norm(M: int, D: int) -> Case:
    """Residual addition and norm, without a scale."""

    def make() -> Inputs:
        g = generator()
        return {"x": normal(g, M, D, dtype=DTYPE), "residual": normal(g, M, D, dtype=DTYPE), "weight": normal(g, D, dtype=DTYPE)}

    def ours(v: Inputs) -> Any:
        return ops.residual_rms_norm(v["x"], v["residual"], None, v["weight"], EPS)

    def oracle(v: Inputs) -> float:
        def truth() -> Any:
            x, residual, weight = wide(v["x"][:CHECKED], v["residual"][:CHECKED], v["weight"])
            return residual_rms_norm_reference(x, residual, None, weight, EPS)

        return over_budget("residual_rms_norm", DTYPE, [y[:CHECKED] for y in ours(v)], once(v, truth))

    reference = partial(residual_rms_norm_reference, scale_D=None, eps=EPS)
    names = {"x_MD": "x", "residual_MD": "residual", "weight_D": "weight"}

    def call(v: Inputs, function: Callable[..., Any]) -> Callable[[], Any]:
        given = {name: v[key] for name, key in names.items()}
        return lambda: function(**given)

    peers = {
        "torch.compile": lambda v: call(v, torch.compile(reference, mode="max-autotune-no-cudagraphs", dynamic=False)),
        "eager": lambda v: call(v, reference),
        "Liger": _liger_norm,
    }
    bars = {"copy rate": 0.9, "× torch.compile": 1.0}
    return Case("residual_rms_norm", f"D {D}", DTYPE, make, ours, oracle, peers, 4 * M * D * SIZE, 6 * M * D, bars)


def _liger_norm(v: Inputs) -> Callable[[], Any]:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return lambda: fused_add_rms_norm_forward(v["x"], v["residual"], v["weight"], EPS, 0.0, "llama")


def gated(M: int, C: int) -> Case:
    """Gate and norm."""

    def make() -> Inputs:
        g = generator()
        return {"y": normal(g, M, C, dtype=DTYPE), "z": normal(g, M, C, dtype=DTYPE), "weight": normal(g, C, dtype=DTYPE)}

    def ours(v: Inputs) -> Any:
        return ops.gated_rms_norm(v["y"], v["z"], v["weight"], EPS)

    def oracle(v: Inputs) -> float:
        truth = once(v, lambda: gated_rms_norm_reference(*wide(v["y"][:CHECKED], v["z"][:CHECKED], v["weight"]), EPS))
        return over_budget("gated_rms_norm", DTYPE, [ours(v)[:CHECKED]], [truth])

    def reference(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm_reference(y, z, weight, EPS)

    peers = {
        "torch.compile": compiled(reference, "y", "z", "weight"),
        "eager": eager(reference, "y", "z", "weight"),
        "fla": _fla_gated,
    }
    bars = {"copy rate": 0.9, "× torch.compile": 1.0}
    return Case("gated_rms_norm", f"C {C}", DTYPE, make, ours, oracle, peers, 3 * M * C * SIZE, 9 * M * C, bars)


def _fla_gated(v: Inputs) -> Callable[[], Any]:
    from fla.modules.norm.layernorm_gated import rmsnorm_fn

    return lambda: rmsnorm_fn(v["y"], v["weight"], None, v["z"], EPS, None, False)


def convolution(name: str, B: int, T: int, C: int, L: int = 4) -> Case:
    """Convolution with bias, SiLU and an initial state."""

    def make() -> Inputs:
        g = generator()
        x, weight, bias = normal(g, B, T, C, dtype=DTYPE), normal(g, C, L, dtype=DTYPE), normal(g, C, dtype=DTYPE)
        return {"x": x, "weight": weight, "bias": bias, "state": normal(g, B, L - 1, C)}

    def ours(v: Inputs) -> Any:
        return ops.causal_conv1d(v["x"], v["weight"], v["bias"], v["state"], None, "silu")

    def oracle(v: Inputs) -> float:
        y, after = ours(v)
        parts = ((v["x"][:, :CHECKED], v["state"]), (v["x"][:, -CHECKED:], None))
        head, tail = once(
            v, lambda: [causal_conv1d_reference(*wide(x, v["weight"], v["bias"], state, None), "silu")[0] for x, state in parts]
        )
        last = v["x"][:, 1 - L :].double()
        exact = 0.0 if torch.equal(after.double(), last) else float("inf")
        error = over_budget("causal_conv1d", DTYPE, [y[:, :CHECKED], y[:, L - 1 - CHECKED :]], [head, tail[:, L - 1 :]])
        return max(exact, error)

    def formula(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d_reference(x, weight, bias, state, None, "silu")

    def library(v: Inputs) -> Callable[[], Any]:
        kernel = v["weight"].unsqueeze(1)
        return lambda: F.silu(F.conv1d(v["x"].transpose(1, 2), kernel, v["bias"], padding=L - 1, groups=C)[..., :T]).transpose(1, 2)

    peers = {"torch.compile": compiled(formula, "x", "weight", "bias", "state"), "eager conv1d": library, "fla": _fla_convolution}
    bars = {"copy rate": 0.8, "× torch.compile": 1.0}
    return Case("causal_conv1d", name, DTYPE, make, ours, oracle, peers, 2 * B * T * C * SIZE, 2 * L * B * T * C, bars)


def _fla_convolution(v: Inputs) -> Callable[[], Any]:
    from fla.modules.causal_conv1d import causal_conv1d

    return lambda: causal_conv1d(v["x"], v["weight"], v["bias"], activation="swish", output_final_state=True)


def convolution_step(B: int, C: int, L: int = 4) -> Case:
    """One token of every row, in place."""

    def make() -> Inputs:
        g = generator()
        x, weight, bias = normal(g, B, 1, C, dtype=DTYPE), normal(g, C, L, dtype=DTYPE), normal(g, C, dtype=DTYPE)
        return {"x": x, "weight": weight, "bias": bias, "state": normal(g, B, L - 1, C)}

    def ours(v: Inputs) -> Any:
        return ops.causal_conv1d_(v["x"], v["weight"], v["bias"], v["state"], None, "silu")

    def oracle(v: Inputs) -> float:
        state = v["state"].clone()
        truth, after = causal_conv1d_reference(*wide(v["x"], v["weight"], v["bias"], state, None), "silu")
        y = ops.causal_conv1d_(v["x"], v["weight"], v["bias"], state, None, "silu")
        return max(over_budget("causal_conv1d", DTYPE, [y], [truth]), 0.0 if torch.equal(state.double(), after) else float("inf"))

    def formula(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        y, after = causal_conv1d_reference(x, weight, bias, state, None, "silu")
        state.copy_(after)
        return y

    peers = {"torch.compile": compiled(formula, "x", "weight", "bias", "state"), "eager": eager(formula, "x", "weight", "bias", "state")}
    size = B * C * (2 * SIZE + 2 * 4 * (L - 1)) + C * (L + 1) * SIZE
    return Case("causal_conv1d", f"step B {B}", DTYPE, make, ours, oracle, peers, size, 2 * L * B * C, {"× torch.compile": 1.0})


def angles(B: int, T: int, pairs: int) -> Case:
    """Of a prompt, or of a step."""

    def make() -> Inputs:
        return {"position": torch.arange(T, device="cuda").repeat(B, 1) + 1000}

    def ours(v: Inputs) -> Any:
        return ops.rope_angles(v["position"], pairs, 1e4)

    def oracle(v: Inputs) -> float:
        return over_budget("rope_angles", "float32", ours(v), rope_angles_reference(v["position"], pairs, 1e4, True))

    formula = partial(rope_angles_reference, pairs=pairs, theta=1e4)
    peers = {"torch.compile": compiled(formula, "position"), "eager": eager(formula, "position")}
    size, bars = B * T * (8 + 2 * 4 * pairs), {"× torch.compile": 1.0}
    return Case("rope_angles", f"B {B} T {T}", "float32", make, ours, oracle, peers, size, 4 * B * T * pairs, bars)


def rotation(B: int, T: int, H: int, P: int) -> Case:
    """Queries and keys together."""

    def make() -> Inputs:
        g = generator()
        cos, sin = ops.rope_angles(torch.arange(T, device="cuda").repeat(B, 1), P // 2, 1e4)
        return {"x": normal(g, B, T, H, P, dtype=DTYPE), "cos": cos, "sin": sin}

    def ours(v: Inputs) -> Any:
        return ops.rope(v["x"], v["cos"], v["sin"])

    def oracle(v: Inputs) -> float:
        truth = once(v, lambda: rope_reference(*wide(v["x"][:, :CHECKED], v["cos"][:, :CHECKED], v["sin"][:, :CHECKED])))
        return over_budget("rope", DTYPE, [ours(v)[:, :CHECKED]], [truth])

    peers = {"torch.compile": compiled(rope_reference, "x", "cos", "sin"), "eager": eager(rope_reference, "x", "cos", "sin")}
    size = 2 * B * T * H * P * SIZE + 2 * B * T * P // 2 * 4
    return Case("rope", f"H {H} P {P}", DTYPE, make, ours, oracle, peers, size, 3 * B * T * H * P, {"× torch.compile": 1.0})


def _scan_inputs(B: int, T: int, C: int, N: int) -> Inputs:
    g = generator()
    dt = torch.rand((B, T, C), generator=g, device="cuda") * 0.1
    A = -torch.rand((C, N), generator=g, device="cuda") * N - 0.1
    x, b, c = normal(g, B, T, C, dtype=DTYPE), normal(g, B, T, N, dtype=DTYPE), normal(g, B, T, N, dtype=DTYPE)
    return {"x": x, "dt": dt, "A": A, "B": b, "C": c, "state": normal(g, B, C, N)}


def scan(name: str, B: int, T: int, C: int, N: int) -> Case:
    """From a state, with the state after the last token."""

    def ours(v: Inputs) -> Any:
        return ops.selective_scan(v["x"], v["dt"], v["A"], v["B"], v["C"], v["state"], None)

    def oracle(v: Inputs) -> float:
        # Channels do not mix: a few of them over all tokens.
        some = slice(0, 64)
        y, after = ours(v)
        inputs = (v["x"][..., some], v["dt"][..., some], v["A"][some], v["B"], v["C"], v["state"][:, some], None)
        truth = once(v, lambda: selective_scan_reference(*wide(*inputs)))
        return over_budget("selective_scan", DTYPE, [y[..., some], after[:, some]], truth)

    def reference(v: Inputs) -> Callable[[], Any]:
        return lambda: selective_scan_reference(v["x"], v["dt"], v["A"], v["B"], v["C"], v["state"], None)

    peers, bars = {"eager": reference, "mamba_ssm": _mamba_scan}, {"× eager": 5.0, "× mamba_ssm": 1.0}
    size = B * T * C * (2 * SIZE + 4) + B * T * N * 2 * SIZE + 2 * 4 * B * C * N
    flops = 8 * B * T * C * N
    return Case("selective_scan", name, DTYPE, lambda: _scan_inputs(B, T, C, N), ours, oracle, peers, size, flops, bars)


def scan_step(B: int, C: int, N: int) -> Case:
    """One token of every row, in place."""

    def ours(v: Inputs) -> Any:
        return ops.selective_scan_(v["x"], v["dt"], v["A"], v["B"], v["C"], v["state"], None)

    def oracle(v: Inputs) -> float:
        state = v["state"].clone()
        truth, after = selective_scan_reference(*wide(v["x"], v["dt"], v["A"], v["B"], v["C"], state, None))
        y = ops.selective_scan_(v["x"], v["dt"], v["A"], v["B"], v["C"], state, None)
        return over_budget("selective_scan", DTYPE, [y, state], [truth, after])

    def formula(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
        wide_dt = dt[:, 0].unsqueeze(-1)
        state.copy_(torch.exp(wide_dt * A) * state + wide_dt * x[:, 0].float().unsqueeze(-1) * b.float())
        return (state * c.float()).sum(-1).unsqueeze(1).to(x.dtype)

    def copy(v: Inputs) -> Callable[[], Any]:
        source, target = torch.randn_like(v["state"]), torch.empty_like(v["state"])
        return lambda: target.copy_(source)

    names = ("x", "dt", "A", "B", "C", "state")
    peers = {"torch.compile": compiled(formula, *names), "eager": eager(formula, *names), "mamba_ssm": _mamba_step}
    peers["copy of the state"] = copy  # so few bytes are copied below the rate of many
    size = 2 * 4 * B * C * N + B * C * (2 * SIZE + 4) + 4 * C * N
    bars = {"× torch.compile": 1.0, "copy rate": 0.8}
    return Case("selective_scan", f"step B {B}", DTYPE, lambda: _scan_inputs(B, 1, C, N), ours, oracle, peers, size, 8 * B * C * N, bars)


def exact_scan(B: int, T: int, C: int, N: int) -> Case:
    """T tokens with exact numerics, in place: at most twice the time of as many steps."""
    by_token = ("x", "dt", "B", "C")

    def ours(v: Inputs) -> Tensor:
        with ops.numerics("exact"):
            return ops.selective_scan_(v["x"], v["dt"], v["A"], v["B"], v["C"], v["state"], None)

    def oracle(v: Inputs) -> float:
        """Infinitely wrong where single tokens do not give the bits of the whole."""
        whole, parts = v | {"state": v["state"].clone()}, v | {"state": v["state"].clone()}
        truth, after = selective_scan_reference(*wide(*(v[name] for name in ("x", "dt", "A", "B", "C", "state"))), None)
        found = ours(whole)
        pieces = [ours(parts | {name: v[name][:, t : t + 1] for name in by_token}) for t in range(T)]
        if not torch.equal(torch.cat(pieces, 1), found) or not torch.equal(parts["state"], whole["state"]):
            return float("inf")
        return over_budget("selective_scan", DTYPE, [found, whole["state"]], [truth, after])

    size, bars = 2 * 4 * B * C * N + B * T * C * (2 * SIZE + 4) + 4 * C * N, {f"time ÷ step B {B}": 2.0 * T}
    make = partial(_scan_inputs, B, T, C, N)
    return Case("selective_scan", f"exact T {T} B {B}", DTYPE, make, ours, oracle, {}, size, 8 * B * T * C * N, bars)


def _mamba_scan(v: Inputs) -> Callable[[], Any]:
    """mamba_ssm's CUDA kernel, where it was built: on its own layout, [B, C, T], with steps in the dtype of x and from a zero state."""
    import selective_scan_cuda

    x, dt, b, c = (v[name].transpose(1, 2).to(v["x"].dtype).contiguous() for name in ("x", "dt", "B", "C"))
    return lambda: selective_scan_cuda.fwd(x, dt, v["A"], b.unsqueeze(1), c.unsqueeze(1), None, None, None, False)


def _mamba_step(v: Inputs) -> Callable[[], Any]:
    """mamba_ssm's step, in place on its own copy of the state; it does not run without a skip and a bias, so both are zero."""
    without_init("mamba_ssm")
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state, zero = v["state"].clone(), torch.zeros(v["A"].shape[0], device="cuda")
    x, dt, b, c = (v[name][:, 0] for name in ("x", "dt", "B", "C"))
    return lambda: selective_state_update(state, x, dt, v["A"], b, c, D=zero, dt_bias=zero)
