"""Laws of `linear`: what it joins is what torch's linear layers, split, gate and softplus give one after another.

M rows   K inputs   N outputs before gates   A, B, C, H widths of the parts
"""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import oracles
import wm_kernels as wm
from hypothesis_profiles import law
from op_calls import OUTPUTS, Call, near
from op_cases import LinearCase
from op_scales import scales
from strategies_ops import linear_cases

NO_ROWS = 0


def layer(call: Call) -> torch.Tensor:
    return F.linear(*(call.tensors[name] for name in ("x_MK", "weight_NK", "bias_N")))


@law(60, "op")
@given(case=linear_cases(gated=False))
def test_the_parts_are_torchs_linear_layer_split_and_the_last_one_its_softplus(case: LinearCase) -> None:
    call = case.call()
    *parts, last_MH = layer(call).split(list(case.parts), -1)
    last_MH = last_MH + call.given("step_bias_H") if case.step_bias else last_MH
    expected = [*parts, torch.logaddexp(last_MH, torch.zeros_like(last_MH))]
    near(call, call.run(), dict(zip(OUTPUTS["linear"], expected, strict=True)), scales(call), "torch")


@law(60, "op")
@given(case=linear_cases(gated=True))
def test_what_is_gated_is_the_silu_of_the_first_half_times_the_second(case: LinearCase) -> None:
    call = case.call()
    gate_MA, up_MA = layer(call).chunk(2, -1)
    found = call.run()
    near(call, found, {"a_MA": F.silu(gate_MA) * up_MA}, scales(call), "torch")
    assert [tuple(found[name].shape) for name in OUTPUTS["linear"][1:]] == [(case.M, 0)] * 3


@law(40, "op")
@given(case=linear_cases(gated=False))
def test_each_part_is_that_of_a_layer_of_its_own_rows_of_the_weight(case: LinearCase) -> None:
    call, found = case.call(), case.call().run()
    ends = list(accumulate(case.parts))
    for place, (name, width, end) in enumerate(zip(OUTPUTS["linear"], case.parts, ends, strict=True)):
        rows = slice(end - width, end)
        own = {"weight_NK": call.given("weight_NK")[rows], "bias_N": call.given("bias_N")[rows] if case.bias else None}
        alone = call.changed(own | ({} if name == "dt_MH" else {"step_bias_H": None}))
        widths = {letter: width if index == place else 0 for index, letter in enumerate("ABCH")}
        near(call, found, {name: replace(alone, plain=widths | {"gated": False}).run()[name]}, scales(call), f"{name} alone")


@law(30, "op")
@given(case=linear_cases(), swapped=st.booleans())
def test_a_bias_is_one_more_input_that_is_always_one(case: LinearCase, swapped: bool) -> None:
    call = case.call()
    bias_N = call.tensors["bias_N"]
    more_N1 = (torch.zeros(call.given("weight_NK").shape[0], dtype=torch.float64) if bias_N is None else bias_N).unsqueeze(1)
    ones_M1 = torch.ones((case.M, 1), dtype=torch.float64)
    pairs = ((call.given("x_MK"), ones_M1), (call.given("weight_NK"), more_N1))
    x_MK, weight_NK = (torch.cat(pair[::-1] if swapped else pair, 1) for pair in pairs)
    near(call, call.changed({"x_MK": x_MK, "weight_NK": weight_NK, "bias_N": None}).run(), call.run(), scales(call), "bias as a weight")


STEPS = (-1000.0, -104.0, -88.0, -40.0, -17.0, -1.0, 0.0, 1.0, 19.9, 20.1, 23.0, 39.9, 40.1, 88.0, 1000.0)


def of_steps(dtype: torch.dtype, biased: bool) -> torch.Tensor:
    """Step sizes of a layer that hands on its input, as the bias of it or as the product."""
    step_H = torch.tensor(STEPS, dtype=dtype)
    given = torch.zeros((1, 1), dtype=dtype) if biased else torch.ones((1, 1), dtype=dtype)
    return wm.linear(given, step_H[:, None], None, step_H if biased else None, 0, 0, 0, len(STEPS), False)[3][0]


@pytest.mark.parametrize("biased", [False, True])
def test_step_sizes_are_softplus_to_the_last_bits_from_far_below_zero_to_far_above(biased: bool) -> None:
    found = of_steps(torch.float64, biased)
    *_, expected = oracles.linear(
        torch.ones(1, 1), torch.tensor(STEPS, dtype=torch.float64)[:, None], None, None, 0, 0, 0, len(STEPS), False
    )
    torch.testing.assert_close(found, expected[0], rtol=4e-16, atol=0)
    assert (found > 0).tolist() == [step > -700 for step in STEPS]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = torch.tensor(STEPS, dtype=dtype).double()
        wide = of_steps(dtype, biased)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide.double(), torch.logaddexp(rounded, torch.zeros(())), rtol=3e-7, atol=1e-37)


@pytest.mark.parametrize("gated", [False, True])
def test_no_rows_give_no_rows(gated: bool) -> None:
    parts = (6, 0, 0, 0) if gated else (3, 4, 0, 5)
    found = wm.linear(torch.ones(NO_ROWS, 7), torch.ones(12, 7), None, None, *parts, gated)
    assert [tuple(value.shape) for value in found] == [(NO_ROWS, width) for width in parts]
