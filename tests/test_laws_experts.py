"""Laws of the selecting and mixing ops: exhaustive search, sorting, experts in another order, one op as a case of another.

B rows   T tokens   M rows of a flat op   R retrieval heads   J sub-keys   E experts   k picks   D model   I inner width
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import oracles
from hypothesis_profiles import law
from op_calls import Call, differ, near, same
from op_cases import ExpertMixCase, MoeCase, ProductKeyCase, RouterCase
from op_scales import scales
from strategies_ops import DTYPES, another, expert_mix_cases, moe_cases, product_key_cases, router_cases
from wm_kernels.moe_mix.definition import _gathered

ANY_DTYPE = st.sampled_from((torch.float64, *DTYPES))
SEVERAL_PICKS = st.one_of(expert_mix_cases(), moe_cases()).filter(lambda case: case.k > 1)


def with_fields(case: Any, **changes: Any) -> Any:
    return type(case)(**{**vars(case), **changes})


def order(seed: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@law(120, "op")
@given(case=st.sampled_from(("grid", "zeros", "repeated")).flatmap(product_key_cases), dtype=ANY_DTYPE)
def test_product_keys_find_the_best_of_all_pairs_and_the_lower_expert_of_equals_in_every_dtype(
    case: ProductKeyCase, dtype: torch.dtype
) -> None:
    if case.pattern != "grid":
        dtype = torch.float64  # rounding makes other scores
    call = case.call().to(dtype)
    weight, expert = oracles.product_key_topk(call.given("query_BTR2d"), call.given("keys_RJ2d"), case.k)
    found = call.run()
    near(call, found, {"weight_BTRk": weight.to(dtype), "expert_BTRk": expert}, scales(call), "exhaustive")
    same(call, call.run_reference(), found, "reference")


@law(60, "op")
@given(case=product_key_cases("normal").filter(lambda case: case.J > 1), seed=st.integers(0, 999))
def test_sub_keys_in_another_order_are_found_under_their_new_numbers(case: ProductKeyCase, seed: int) -> None:
    call, J = case.call(), case.J
    keys = call.given("keys_RJ2d")
    # New sub-key i of a half is old sub-key first[i], second[i].
    first, second = order(seed, J), order(seed + 1, J)
    mixed = call.changed({"keys_RJ2d": torch.stack([keys[:, first, 0], keys[:, second, 1]], 2)})
    assume(differ(mixed, call))
    found = mixed.run()
    expert = first[found["expert_BTRk"] // J] * J + second[found["expert_BTRk"] % J]
    near(call, {"expert_BTRk": expert, "weight_BTRk": found["weight_BTRk"]}, call.run(), scales(call), "renumbered")


@law(60, "op")
@given(case=expert_mix_cases(), zero=st.sampled_from(("up_ED", "weight_BTRk", "x_BTD")), dtype=ANY_DTYPE)
def test_experts_of_zero_output_weight_or_input_add_exactly_nothing(case: ExpertMixCase, zero: str, dtype: torch.dtype) -> None:
    call = case.call().to(dtype)
    none = call.changed({zero: torch.zeros_like(call.given(zero))})
    expected = {"y_BTD": torch.zeros_like(call.given("x_BTD"))}
    same(none, none.run(), expected, f"zero {zero}")
    # An op that always gives zeros would pass so far.
    near(call, call.double().run(), {"y_BTD": oracles.expert_mix(*call.tensors.values(), *call.plain.values())}, scales(call), "oracle")


@law(60, "op")
@given(case=expert_mix_cases().filter(lambda case: case.E > 1), seed=st.integers(0, 999), dtype=ANY_DTYPE)
def test_experts_of_expert_mix_in_another_order_change_no_bit(case: ExpertMixCase, seed: int, dtype: torch.dtype) -> None:
    call = case.call().to(dtype)
    place = order(seed, case.E)  # expert e moves to place[e]
    tables = {name: torch.empty_like(call.given(name)).index_copy_(0, place, call.given(name)) for name in ("down_ED", "up_ED")}
    mixed = call.changed({"expert_BTRk": place[call.given("expert_BTRk")], **tables})
    assume(differ(mixed, call))
    same(call, mixed.run(), call.run(), f"in places {place.tolist()}")


@law(60, "op")
@given(case=moe_cases().filter(lambda case: case.E > 1), seed=st.integers(0, 999))
def test_experts_of_moe_mix_in_another_order_change_only_rounding(case: MoeCase, seed: int) -> None:
    call = case.call()
    place = order(seed, case.E)
    tables = {
        name: torch.empty_like(value).index_copy_(0, place, value)
        for name, value in call.tensors.items()
        if value is not None and "_E" in name
    }
    mixed = call.changed({"expert_Mk": place[call.given("expert_Mk")], **tables})
    assume(differ(mixed, call))
    near(call, mixed.run(), call.run(), scales(call), f"in places {place.tolist()}")


@law(60, "op")
@given(case=SEVERAL_PICKS, seed=st.integers(0, 999))
def test_picks_in_another_order_change_only_rounding(case: ExpertMixCase | MoeCase, seed: int) -> None:
    call = case.call()
    picks = order(seed, case.k)
    mixed = call.mapped(lambda name, value: value[..., picks] if name.endswith("k") else value)
    assume(differ(mixed, call))
    near(call, mixed.run(), call.run(), scales(call), f"picks {picks.tolist()}")


@law(60, "op")
@given(case=SEVERAL_PICKS, cut=st.integers(0, 3))
def test_mixing_the_picks_in_two_parts_adds_up_to_the_whole(case: ExpertMixCase | MoeCase, cut: int) -> None:
    call, cut = case.call(), 1 + cut % (case.k - 1)
    parts = [
        call.mapped(lambda name, value, part=part: value[..., part] if name.endswith("k") else value)
        for part in (slice(cut), slice(cut, None))
    ]
    ((name, whole),) = call.run().items()
    total = sum((part.run()[name] for part in parts), torch.zeros_like(whole))
    near(call, {name: total}, {name: whole}, scales(call), f"{cut} picks and the others")


@law(80, "op")
@given(case=expert_mix_cases())
def test_expert_mix_is_moe_mix_of_experts_of_one_neuron(case: ExpertMixCase) -> None:
    call = with_fields(case, inside=False).call()
    x, expert, weight, down, up = (call.given(name) for name in ("x_BTD", "expert_BTRk", "weight_BTRk", "down_ED", "up_ED"))
    tensors = {
        "x_MD": x.flatten(0, 1),
        "expert_Mk": expert.flatten(2).flatten(0, 1),
        "weight_Mk": weight.flatten(2).flatten(0, 1),
        "in_EFD": down.unsqueeze(1),
        "in_bias_EF": None,
        "out_EDI": up.unsqueeze(2),
        "out_bias_ED": None,
    }
    moe = Call("moe_mix", tensors, {"activation": case.activation, "gated": False})
    near(call, call.run(), {"y_BTD": moe.run()["y_MD"].view(x.shape)}, scales(call), "moe_mix")


@law(60, "op")
@given(case=moe_cases())
def test_moe_mix_of_equal_experts_is_one_mlp_times_the_sum_of_weights(case: MoeCase) -> None:
    first = case.call()
    call = first.mapped(lambda name, value: value[:1].expand(value.shape).contiguous() if "_E" in name else value)
    t = {name.rsplit("_", 1)[0]: value for name, value in call.tensors.items()}
    inner = F.linear(call.given("x_MD"), call.given("in_EFD")[0], None if t["in_bias"] is None else t["in_bias"][0])
    act = F.silu if case.activation == "silu" else F.gelu
    hidden = act(inner[:, : case.I]) * inner[:, case.I :] if case.gated else act(inner)
    out = F.linear(hidden, call.given("out_EDI")[0], None if t["out_bias"] is None else t["out_bias"][0])
    near(call, call.run(), {"y_MD": out * call.given("weight_Mk").sum(1, keepdim=True)}, scales(call), "one MLP")


@law(60, "op")
@given(case=moe_cases())
def test_moe_mix_by_experts_equals_moe_mix_by_gathered_matrices(case: MoeCase) -> None:
    call = case.call()
    near(call, call.run(), {"y_MD": _gathered(*call.tensors.values(), *call.plain.values())}, scales(call), "gathered")


@law(100, "op")
@given(case=router_cases(), dtype=ANY_DTYPE)
def test_router_topk_sorts_by_logit_then_lower_expert_and_weighs_by_softmax_in_every_dtype(case: RouterCase, dtype: torch.dtype) -> None:
    call = case.call().to(dtype)
    found = call.run()
    rows = call.given("logits_ME").double().tolist()
    best = [sorted(range(case.E), key=lambda e, row=row: (-row[e], e))[: case.k] for row in rows]
    weight = []
    for row, picks in zip(rows, best, strict=True):
        powers = [math.exp(value - max(row)) for value in row]
        total = math.fsum(powers[e] for e in picks) if case.normalize else math.fsum(powers)
        weight.append([powers[e] / total for e in picks])
    expected = {"weight_Mk": torch.tensor(weight, dtype=torch.float64), "expert_Mk": torch.tensor(best)}
    near(call, found, expected, scales(call), "sort")
    if case.normalize or case.k == case.E:
        assert float((found["weight_Mk"].double().sum(1) - 1).abs().max()) <= case.k * torch.finfo(dtype).eps


@law(40, "op")
@given(case=router_cases(), added=st.sampled_from((-7.5, 0.25, 16.0)))
def test_a_number_added_to_all_logits_changes_no_choice_and_no_weight(case: RouterCase, added: float) -> None:
    call = with_fields(case, scores="ties" if case.scores == "normal" else case.scores).call()
    raised = call.mapped(lambda _, value: value + added)
    near(call, raised.run(), call.run(), scales(raised), f"and {added}")


@law(40, "op")
@given(case=st.one_of(expert_mix_cases(), moe_cases()))
def test_mixtures_are_linear_in_what_comes_out_of_their_experts(case: ExpertMixCase | MoeCase) -> None:
    one, two = case.call(), another(case).call()
    names = [name for name in ("up_ED", "out_EDI", "out_bias_ED") if one.has(name)]
    two = one.changed({name: two.given(name) for name in names})
    both = one.changed({name: one.given(name) + two.given(name) for name in names})
    scale = {name: value + scales(two)[name] for name, value in scales(one).items()}
    near(one, both.run(), {name: value + two.run()[name] for name, value in one.run().items()}, scale, "of a sum")
