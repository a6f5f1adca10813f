"""Laws that every op obeys, each example comparing two ways to compute the same: op, in-place op, reference, naive loops, parts, rows.

A failure prints its case, which makes the same tensors again: see op_cases.py. B rows, T tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hypothesis_profiles import law
from op_calls import OUTPUTS, STATEFUL, Call, by_token, differ, from_oracle, judged, near, same
from op_scales import rounded, scales
from strategies_ops import CASES, DTYPES, LAYOUTS, another, cut_cases, laid_out, longest, shuffles

FLAT = ("residual_rms_norm", "gated_rms_norm", "router_topk", "moe_mix", "linear")
TOKENWISE = ("rope", "product_key_topk", "expert_mix")


@pytest.mark.parametrize("op", CASES)
@law(24, "op")
@given(data=st.data())
def test_op_and_reference_equal_the_naive_loops_in_float64(op: str, data: st.DataObject) -> None:
    call = data.draw(CASES[op]).call()
    expected, scale = from_oracle(call), scales(call)
    near(call, call.meaningful(call.run()), expected, scale, "op")
    near(call, call.meaningful(call.run_reference()), expected, scale, "reference")


@pytest.mark.parametrize("op", CASES)
@law(24, "op")
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_low_precision_is_within_the_ops_limit_of_float64(op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    call = rounded(data.draw(CASES[op]).call(), dtype)
    expected, scale = judged(call, call.double().run()), scales(call)
    outputs = call.run()
    assert {value.dtype for name, value in outputs.items() if name == OUTPUTS[op][0]} == {_model_dtype(call)}
    near(call, judged(call, outputs), expected, scale, "op")
    near(call, judged(call, call.run_reference()), expected, scale, "reference")


def _model_dtype(call: Call) -> torch.dtype:
    """The dtype of the op's first argument, which is that of its first output."""
    return next(value.dtype for value in call.tensors.values() if value is not None)


@pytest.mark.parametrize("op", STATEFUL)
@law(40, "op")
@given(data=st.data(), in_place=st.booleans())
def test_any_split_of_the_tokens_equals_the_whole(op: str, in_place: bool, data: st.DataObject) -> None:
    case, where = data.draw(cut_cases(CASES[op]))
    call = case.call()
    whole = call.meaningful(call.run())
    started = call.with_states()
    pieces = started.meaningful(started.in_pieces(where, in_place))
    near(call, pieces, whole, scales(call), f"cut before {where}")


@pytest.mark.parametrize("op", STATEFUL)
@law(24, "op")
@given(data=st.data())
def test_one_token_at_a_time_equals_the_naive_loops(op: str, data: st.DataObject) -> None:
    call = data.draw(CASES[op].filter(lambda case: longest(case) > 1 and case.T <= 20)).call().with_states()
    _, T = call.size
    near(call, call.meaningful(call.in_pieces(range(1, T), in_place=True)), from_oracle(call), scales(call), "token by token")


@pytest.mark.parametrize("op", STATEFUL)
@law(24, "op")
@given(data=st.data())
def test_each_row_alone_without_its_padding_equals_its_part_of_the_batch(op: str, data: st.DataObject) -> None:
    call = data.draw(CASES[op].filter(lambda case: case.B > 1 or 0 < longest(case) < case.T)).call().with_states()
    batch, scale = call.meaningful(call.run()), scales(call)
    for b, count in enumerate(call.count_B.tolist()):
        alone = call.rows([b]).changed({"valid_B": None})
        expected = {name: value[b : b + 1, :count] if by_token(name) else value[b : b + 1] for name, value in batch.items()}
        if count:
            piece = alone.piece(0, count)
            near(call, piece.meaningful(piece.run()), expected, scale, f"row {b} alone")
        else:
            before = {name: alone.given(name) for name in call.states}
            unchanged = alone.changed({"valid_B": torch.tensor([0])}).meaningful(before)
            same(call, {name: expected[name] for name in before}, unchanged, f"empty row {b}")


@pytest.mark.parametrize("op", [*TOKENWISE, *FLAT])
@law(16, "op")
@given(data=st.data(), token=st.integers(0, 100))
def test_each_token_alone_equals_its_part_of_the_batch(op: str, token: int, data: st.DataObject) -> None:
    call = data.draw(CASES[op]).call()
    if op in FLAT:
        M = next(iter(call.tensors.values())).shape[0]  # type: ignore[union-attr]
        assume(M > 1)
        m = token % M
        part, expected = call.rows([m]), {name: value[m : m + 1] for name, value in call.run().items()}
    else:
        B, T = call.size
        assume(B * T > 1)
        b, t = token % B, token % T
        part, expected = call.rows([b]).piece(t, t + 1), {name: value[b : b + 1, t : t + 1] for name, value in call.run().items()}
    near(call, judged(part, part.run()), judged(part, expected), scales(call), f"token {token} alone")


@pytest.mark.parametrize("op", CASES)
@law(12, "op")
@given(data=st.data())
def test_permuted_rows_give_permuted_outputs(op: str, data: st.DataObject) -> None:
    call = data.draw(CASES[op].filter(lambda case: (case.M if op in FLAT else case.B) > 1)).call()
    outputs = call.meaningful(call.run())
    order = data.draw(shuffles(len(next(iter(outputs.values())))))
    assume(any(not torch.equal(value, value[order]) for value in outputs.values()))
    mixed = call.rows(order)
    found = mixed.meaningful(mixed.run())
    near(call, judged(mixed, found), judged(mixed, {name: value[order] for name, value in outputs.items()}), scales(call), str(order))


def _padded(case: Any) -> Any:
    """The case with padding in every row: as drawn, where some is, else half of the tokens."""
    short = case.valid is not None and min(case.valid) < case.T
    return case if short else replace(case, valid=(case.T // 2,) * case.B)


@pytest.mark.parametrize("op", STATEFUL)
@law(20, "op")
@given(data=st.data())
def test_what_lies_after_valid_in_unused_cells_and_in_empty_slots_changes_no_bit(op: str, data: st.DataObject) -> None:
    case = data.draw(CASES[op].map(_padded))
    call, other = case.call(), another(case).call()

    def garbage(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        wild = 1000 * other.given(name)
        if by_token(name):
            return torch.where(_from(value, 1, call.count_B), wild, value)
        if name.startswith("cache"):
            return torch.where(_from(value, 2, call.given("position_B")), wild, value)
        if name in ("slot_k_BKWP", "slot_v_BKWP"):
            return torch.where(call.given("slot_position_BKW").unsqueeze(-1) < 0, wild + 1000, value)
        return value

    wild = call.mapped(garbage)
    assume(differ(wild, call))
    same(call, wild.meaningful(wild.run()), call.meaningful(call.run()), "with garbage in the padding")
    if call.has(call.states[0]):
        same(call, wild.meaningful(wild.run_in_place()), call.meaningful(call.run()), "with garbage in the padding, in place")


def _from(value: torch.Tensor, axis: int, start_B: torch.Tensor) -> torch.Tensor:
    """True from an index of each row on."""
    shape = [1] * value.dim()
    shape[axis] = value.shape[axis]
    return torch.arange(value.shape[axis]).view(shape) >= start_B.view([-1] + [1] * (value.dim() - 1))


@pytest.mark.parametrize("op", STATEFUL)
@law(20, "op")
@given(data=st.data(), cut=st.integers(1, 129))
def test_later_tokens_change_no_bit_of_earlier_outputs(op: str, cut: int, data: st.DataObject) -> None:
    case = data.draw(CASES[op].filter(lambda case: case.T > 1))
    cut = 1 + cut % (case.T - 1) if case.T > 2 else 1
    call, other = case.call(), another(case).call()
    mixed = call.mapped(lambda name, value: torch.cat([value[:, :cut], other.given(name)[:, cut:]], 1) if by_token(name) else value)
    assume(differ(mixed, call))
    found, expected = mixed.meaningful(mixed.run()), call.meaningful(call.run())
    early = {name: value[:, :cut] for name, value in expected.items() if by_token(name)}
    same(call, {name: value[:, :cut] for name, value in found.items() if by_token(name)}, early, f"changed from token {cut} on")


@pytest.mark.parametrize("op", STATEFUL)
@law(24, "op")
@given(data=st.data(), dtype=st.sampled_from((torch.float64, *DTYPES)))
def test_in_place_equals_the_functional_op_bit_for_bit_and_the_reference_within_rounding(
    op: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    call = rounded(data.draw(CASES[op]).call().with_states(), dtype)
    given = call.copied()
    outputs = call.run()
    same(call, {name: value for name, value in call.tensors.items() if value is not None}, _given(given), "after the call")
    same(call, call.meaningful(call.run_in_place()), call.meaningful(outputs), "in place")
    expected, scale = call.meaningful(call.run_reference()), scales(call)
    near(call, call.meaningful(outputs), expected, {name: 2 * value for name, value in scale.items()}, "reference; both round")


def _given(call: Call) -> dict[str, torch.Tensor]:
    return {name: value for name, value in call.tensors.items() if value is not None}


@pytest.mark.parametrize("op", CASES)
@law(16, "op")
@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_strides_of_the_arguments_change_nothing(op: str, layout: str, data: st.DataObject) -> None:
    call = laid_out(data.draw(CASES[op]).call(), layout)
    plain, scale = call.mapped(lambda _, value: value.clone(memory_format=torch.contiguous_format)), scales(call)
    assume(differ(plain, call))
    outputs = call.run()
    assert all(value.is_contiguous() for value in outputs.values())
    expected = judged(call, plain.run())
    near(call, judged(call, outputs), expected, scale, layout)
    if call.states and call.has(call.states[0]) and layout != "expanded":
        near(call, call.meaningful(call.run_in_place()), expected, scale, f"{layout}, in place")
