"""Laws of the scans, the convolution and the rotation: forms that must agree, shifts of position, one op as a case of another.

B rows   T tokens   H heads   P head dim   N state   G groups   R = H/G   F rotated pairs   C channels; s and t are tokens
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
import wm_kernels as wm
from hypothesis_profiles import law, note_compared
from op_calls import Call, Named, near
from op_cases import ConvCase, GatedCase, ResidualCase, RopeCase, SelectiveCase, SsdCase
from op_scales import norm, scales
from strategies_ops import (
    LAST,
    another,
    conv_cases,
    cut_cases,
    gated_cases,
    residual_cases,
    rope_cases,
    selective_cases,
    ssd_cases,
    starts,
)

THETA = 1e4  # of the angles of op_cases


def times(factor: float, scale: dict[str, float]) -> dict[str, float]:
    return {name: factor * value for name, value in scale.items()}


def quadratic(call: Call) -> Named:
    """SSD as attention: y = (L ∘ C Bᵀ) dt x + exp(a_1 + .. + a_t) C S_0, with L[t, s] = exp(a_(s+1) + .. + a_t) for s <= t, a = dt A.

    Dao & Gu 2024, arXiv:2405.21060, eq. (16). Sums of a are kept in numpy's longest float: their differences cancel.
    """
    t = {name: value.numpy() for name, value in call.tensors.items() if value is not None}
    (B, T, H, P), R = t["x_BTHP"].shape, t["x_BTHP"].shape[2] // t["B_BTGN"].shape[2]
    real_BT = np.arange(T) < call.count_B.numpy()[:, None]
    dt_BTH = np.where(real_BT[..., None], t["dt_BTH"], 0)
    b_BTHN, c_BTHN = (np.repeat(t[name], R, 2) for name in ("B_BTGN", "C_BTGN"))
    sum_BTH = np.cumsum((dt_BTH * t["A_H"]).astype(np.longdouble), 1)
    gap_BTSH = sum_BTH[:, :, None] - sum_BTH[:, None]
    causal_TS = np.tri(T, dtype=bool)[None, :, :, None]
    L_BTSH = np.exp(np.where(causal_TS, gap_BTSH, -np.inf)).astype(float)
    head_BTH, dtx_BTHP = np.exp(sum_BTH).astype(float), dt_BTH[..., None] * t["x_BTHP"]
    start = t.get("state_BHNP", np.zeros((B, H, b_BTHN.shape[3], P)))
    y = np.einsum("btsh,bthn,bshn,bshp->bthp", L_BTSH, c_BTHN, b_BTHN, dtx_BTHP, optimize=True)
    y = y + np.einsum("bth,bthn,bhnp->bthp", head_BTH, c_BTHN, start)
    state = np.einsum("bsh,bshn,bshp->bhnp", L_BTSH[:, -1], b_BTHN, dtx_BTHP) + head_BTH[:, -1, :, None, None] * start
    return {"y_BTHP": torch.from_numpy(y * real_BT[..., None, None]), "state_BHNP": torch.from_numpy(state)}


@law(120, "op")
@given(case=ssd_cases(), in_place=st.booleans())
def test_ssd_in_quadratic_form_equals_the_chunks_and_the_recurrence(case: SsdCase, in_place: bool) -> None:
    call = case.call()
    expected, scale = quadratic(call), times(4, scales(call))
    near(call, call.meaningful(call.run()), expected, scale, "chunks")
    if case.T <= 20:
        steps = call.with_states()
        near(call, steps.meaningful(steps.in_pieces(range(case.T), in_place)), expected, scale, "recurrence")


def turned(value: Tensor, axis: int, pairs: int, shift: int) -> Tensor:
    """The first 2F entries of an axis rotated by `shift` positions, as complex numbers."""
    moved = value.movedim(axis, -1)
    angle_F = torch.tensor([math.fmod(shift * THETA ** (-j / pairs), 2 * math.pi) for j in range(pairs)], dtype=torch.float64)
    z = torch.complex(moved[..., :pairs], moved[..., pairs : 2 * pairs]) * torch.polar(torch.ones_like(angle_F), angle_F)
    return torch.cat([z.real, z.imag, moved[..., 2 * pairs :]], -1).movedim(-1, axis)


def shift_slack(position: int) -> float:
    """Angles near a position are rounded to float64 at u of the position, which is this many times the ops' own limit."""
    return 2 + position / 10


@law(120, "op")
@given(case=ssd_cases(rope=True).filter(lambda case: case.start))
def test_shifting_all_positions_turns_the_state_of_ssd_scan_rope_and_changes_no_output(case: SsdCase) -> None:
    shifted, plain = case.call(), SsdCase(**{**vars(case), "start": 0}).call()
    if plain.has("state_BHNP"):
        shifted = shifted.changed({"state_BHNP": turned(plain.given("state_BHNP"), 2, case.F, case.start)})
    expected = plain.meaningful(plain.run())
    expected["state_BHNP"] = turned(expected["state_BHNP"], 2, case.F, case.start)
    scale = times(shift_slack(case.start), scales(shifted))
    near(plain, shifted.meaningful(shifted.run()), expected, scale, f"shifted by {case.start}")


@law(60, "op")
@given(case=ssd_cases(rope=True, state=False), shift=starts.filter(bool))
def test_shifting_all_positions_changes_no_float32_output_of_ssd_scan_rope(case: SsdCase, shift: int) -> None:
    runs = [SsdCase(**{**vars(case), "start": start}).call().to(torch.float32) for start in (0, shift)]
    before, after = (call.meaningful(call.run())["y_BTHP"] for call in runs)
    # Two runs, and in each the cosines of B and of C are rounded to float32.
    near(runs[0], {"y_BTHP": after}, {"y_BTHP": before}, times(4, scales(runs[1])), f"shifted by {shift}")


@law(60, "op")
@given(case=st.one_of(ssd_cases(), ssd_cases(rope=True), selective_cases()))
def test_scans_are_linear_in_input_and_state_together(case: SsdCase | SelectiveCase) -> None:
    one, two = case.call(), another(case).call()
    names = [name for name in one.tensors if name.startswith(("x_", "state_")) and one.has(name)]
    two = one.changed({name: two.given(name) for name in names})
    both = one.changed({name: one.given(name) + two.given(name) for name in names})
    first, second = (call.meaningful(call.run()) for call in (one, two))
    scale = {name: value + scales(two)[name] for name, value in scales(one).items()}
    near(one, both.meaningful(both.run()), {name: first[name] + second[name] for name in first}, scale, "of a sum")


@law(80, "op")
@given(case=ssd_cases())
def test_ssd_scan_of_one_group_is_selective_scan_with_the_decay_of_each_head_in_all_its_channels(case: SsdCase) -> None:
    call = SsdCase(**{**vars(case), "G": 1}).call()
    x, state, (H, P, N) = call.given("x_BTHP"), call.tensors["state_BHNP"], (case.H, case.P, case.N)
    tensors = {
        "x_BTC": x.flatten(2),
        "dt_BTC": call.given("dt_BTH").repeat_interleave(P, 2),
        "A_CN": call.given("A_H").repeat_interleave(P).unsqueeze(1).expand(H * P, N).contiguous(),
        "B_BTN": call.given("B_BTGN")[:, :, 0],
        "C_BTN": call.given("C_BTGN")[:, :, 0],
        "state_BCN": None if state is None else state.transpose(2, 3).flatten(1, 2),
        "valid_B": call.tensors["valid_B"],
    }
    selective = Call("selective_scan", tensors)
    found = selective.meaningful(selective.run())
    turned_state = found["state_BCN"].unflatten(1, (H, P)).transpose(2, 3)
    expected = {"y_BTHP": found["y_BTC"].view(x.shape), "state_BHNP": turned_state}
    near(call, call.meaningful(call.run()), expected, scales(call), "selective_scan")


@law(80, "op")
@given(case=conv_cases())
def test_causal_conv1d_is_torchs_convolution_of_the_state_and_the_tokens(case: ConvCase) -> None:
    call = case.call().with_states()
    x_BCT, bias = torch.cat([call.given("state_BYC"), call.given("x_BTC")], 1).transpose(1, 2), call.tensors["bias_C"]
    y = F.conv1d(x_BCT, call.given("weight_CL").unsqueeze(1), bias, groups=case.C).transpose(1, 2)
    last = [x_BCT[b, :, count : count + case.L - 1].t() for b, count in enumerate(call.count_B.tolist())]
    expected = call.meaningful({"y_BTC": F.silu(y) if case.activation == "silu" else y, "state_BYC": torch.stack(last)})
    near(call, call.meaningful(call.run()), expected, scales(call), "torch")


@law(60, "op")
@given(cut=cut_cases(conv_cases().filter(lambda case: case.L > 1)))
def test_the_state_of_causal_conv1d_is_the_last_inputs_bit_for_bit_however_they_came(cut: tuple[ConvCase, tuple[int, ...]]) -> None:
    case, where = cut
    call = case.call().with_states()
    seen = torch.cat([call.given("state_BYC"), call.given("x_BTC")], 1)
    for found in (call.run(), call.in_pieces(where), call.in_pieces(where, in_place=True)):
        for b, count in enumerate(call.count_B.tolist()):
            assert torch.equal(found["state_BYC"][b], seen[b, count : count + case.L - 1])
            note_compared(int(seen[b, count : count + case.L - 1].count_nonzero()))


@law(60, "op")
@given(case=rope_cases().filter(lambda case: case.start), distance=st.integers(0, 199))
def test_the_product_of_two_rotated_vectors_depends_on_their_distance_alone(case: RopeCase, distance: int) -> None:
    call = case.call()
    x, other = call.given("x_BTHP"), another(case).call().given("x_BTHP")

    def products(start: int) -> Tensor:
        spots = [torch.full((case.B, case.T), position) for position in (start, start + distance)]
        query, key = (wm.rope(value, *wm.rope_angles(spot, case.F, THETA, True)) for value, spot in zip((x, other), spots, strict=True))
        return (query * key).sum(-1)

    scale = {"y_BTHP": shift_slack(case.start) * norm(x) * norm(other)}
    near(call, {"y_BTHP": products(case.start)}, {"y_BTHP": products(0)}, scale, f"at {case.start}")
    # Turned back, and by the complex numbers of the formula.
    back = wm.rope(wm.rope(x, call.given("cos_BTF"), call.given("sin_BTF")), call.given("cos_BTF"), -call.given("sin_BTF"))
    near(call, {"y_BTHP": back}, {"y_BTHP": x}, scales(call), "turned back")
    token = RopeCase(**{**vars(case), "T": 1}).call()
    expected = turned(token.given("x_BTHP"), 3, case.F, case.start)
    near(token, token.run(), {"y_BTHP": expected}, times(shift_slack(case.start), scales(token)), "complex")


pairs_of_angles = st.sampled_from((1, 2, 5, 16))
thetas = st.sampled_from((1e4, 5e5, 100.0))


@law(100, "op")
@given(start=st.integers(0, LAST), F=pairs_of_angles, theta=thetas, share=st.floats(0, 1))
def test_rope_angles_at_a_sum_of_positions_are_the_sum_of_angles_to_the_last_position(
    start: int, F: int, theta: float, share: float
) -> None:
    first = int(share * start)
    whole, one, two = (torch.complex(*wm.rope_angles(torch.tensor([[p]]), F, theta, True)) for p in (start, first, start - first))
    assert float((whole - one * two).abs().max()) <= 2e-15 * (1 + start)
    note_compared(whole.numel())
    expected = oracles.rope_angles(np.array([[start]]), F, theta)
    for found, value in zip(wm.rope_angles(torch.tensor([[start]]), F, theta), expected, strict=True):
        assert found.dtype == torch.float32
        assert float((found.double() - value).abs().max()) <= 2 * 2.0**-24


def scaled_frequency(f: float, scaling: str, factor: float, original: int, low: float, high: float) -> float:
    """The frequency by the words of the papers: by wavelength, as transformers writes it."""
    if scaling == "linear":
        return f / factor
    wavelength = 2 * math.pi / f
    if wavelength < original / high:
        return f
    if wavelength > original / low:
        return f / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


@law(80, "op")
@given(
    start=st.integers(0, LAST), F=pairs_of_angles, theta=thetas, scaling=st.sampled_from(("linear", "llama3")),
    factor=st.sampled_from((1.0, 2.0, 8.1)), original=st.sampled_from((1, 60, 8192)), low=st.sampled_from((1.0, 1.1)),
)  # fmt: skip
def test_scaled_rope_angles_equal_the_formula_by_wavelength(
    start: int, F: int, theta: float, scaling: str, factor: float, original: int, low: float
) -> None:
    found = torch.complex(*wm.rope_angles(torch.tensor([[start]]), F, theta, True, None, scaling, factor, original, low, 4.0))
    note_compared(F)
    for j in range(F):
        angle = start * scaled_frequency(theta ** (-j / F), scaling, factor, original, low, 4.0)
        assert abs(complex(found[0, 0, j]) - complex(math.cos(angle), math.sin(angle))) <= 2e-15 * (1 + start)


@law(80, "op")
@given(
    lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=3), F=pairs_of_angles, theta=thetas,
    factor=st.sampled_from((1.0, 4.3)), original=st.sampled_from((1, 60, 8192)),
)  # fmt: skip
def test_dynamic_rope_angles_are_those_of_another_theta_in_each_row_beyond_the_original_length(
    lengths: list[int], F: int, theta: float, factor: float, original: int
) -> None:
    assume(F > 1)  # one pair has the frequency 1 whatever theta is
    position = torch.tensor(lengths).unsqueeze(1) - 1
    found = torch.complex(*wm.rope_angles(position, F, theta, True, torch.tensor(lengths), "dynamic", factor, original))
    note_compared(len(lengths) * F)
    for b, length in enumerate(lengths):
        base = theta if length <= original else theta * (factor * length / original - (factor - 1)) ** (F / (F - 1))
        expected = torch.complex(*wm.rope_angles(position[b : b + 1], F, base, True))
        assert float((found[b] - expected[0]).abs().max()) <= 1e-14 * (1 + length)


@law(50, "op")
@given(case=residual_cases())
def test_residual_rms_norm_is_torchs_norm_of_a_sum_that_is_exact(case: ResidualCase) -> None:
    call = case.call()
    x, residual, weight = (call.given(name) for name in ("x_MD", "residual_MD", "weight_D"))
    total = x + (call.given("scale_D") if case.scale else 1) * residual
    near(call, call.run(), {"normed_MD": F.rms_norm(total, (case.D,), weight, case.eps), "sum_MD": total}, scales(call), "torch")


@law(50, "op")
@given(case=gated_cases())
def test_gated_rms_norm_is_torchs_norm_of_the_gated_value(case: GatedCase) -> None:
    call = case.call()
    y, z, weight = (call.given(name) for name in ("y_MC", "z_MC", "weight_C"))
    gated = y * z * z.sigmoid()
    near(call, call.run(), {"out_MC": F.rms_norm(gated, (case.C,), weight, case.eps)}, scales(call), "torch")
