"""Laws of the attention ops: shifts of position, windows that keep all, scores that say nothing, heads that share.

B rows   T tokens   H heads   K kv heads   P head dim   F rotated pairs   S cache capacity   W slots   A score heads
"""

import math
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import wm_kernels as wm
from hypothesis_profiles import law, note_compared
from op_calls import Call, Named, differ, near, same
from op_cases import AttentionCase, ScoredCase, WindowCase
from op_scales import scales
from strategies_ops import attention_cases, cut_cases, longest, scored_cases, starts, window_cases

THETA = 1e4  # of the angles of op_cases


def with_fields(case: Any, **changes: Any) -> Any:
    return type(case)(**{**vars(case), **changes})


def turned(k_BKSP: Tensor, pairs: int, shift: int) -> Tensor:
    """Keys rotated by `shift` positions, as complex numbers."""
    angle_F = torch.tensor([math.fmod(shift * THETA ** (-j / pairs), 2 * math.pi) for j in range(pairs)], dtype=torch.float64)
    z = torch.complex(k_BKSP[..., :pairs], k_BKSP[..., pairs : 2 * pairs]) * torch.polar(torch.ones_like(angle_F), angle_F)
    return torch.cat([z.real, z.imag, k_BKSP[..., 2 * pairs :]], -1)


@law(120, "op")
@given(case=attention_cases(rope=True).filter(lambda case: case.start))
def test_shifting_all_positions_turns_the_keys_of_attention_rope_and_changes_no_output(case: AttentionCase) -> None:
    shifted, plain = case.call(), with_fields(case, start=0).call()
    if case.past is not None:
        shifted = shifted.changed({"cache_k_BKSP": turned(plain.given("cache_k_BKSP"), case.F, case.start)})
    expected = plain.meaningful(plain.run())
    if case.past is not None:
        expected["cache_k_BKSP"] = turned(expected["cache_k_BKSP"], case.F, case.start)
    # Angles are rounded to float64 at u of the position.
    scale = {name: (2 + case.start / 10) * value for name, value in scales(shifted).items()}
    near(plain, shifted.meaningful(shifted.run()), expected, scale, f"shifted by {case.start}")


@law(60, "op")
@given(case=attention_cases(rope=True).filter(lambda case: longest(case) > 1), shift=starts.filter(bool))
def test_shifting_all_positions_changes_no_float32_output_of_attention_rope(case: AttentionCase, shift: int) -> None:
    runs = [with_fields(case, start=start, past=None).call().to(torch.float32) for start in (0, shift)]
    before, after = (call.meaningful(call.run()) for call in runs)
    # Two runs, and in each the cosines of queries and keys are rounded to float32.
    near(runs[0], after, before, {name: 4 * value for name, value in scales(runs[1]).items()}, f"shifted by {shift}")


@law(60, "op")
@given(case=attention_cases(rope=True))
def test_attention_rope_is_attention_of_what_rope_turns(case: AttentionCase) -> None:
    call = case.call()
    heads = call.given("qkv_BTC").unflatten(2, (-1, case.P))
    q, k, v = heads.split([case.H, case.K, case.K], 2)
    q, k = (wm.rope(value.contiguous(), call.given("cos_BTF"), call.given("sin_BTF")) for value in (q, k))
    rest = {name: call.tensors[name] for name in ("cache_k_BKSP", "cache_v_BKSP", "position_B", "valid_B")}
    plain = Call("attention", {"q_BTHP": q, "k_BTKP": k, "v_BTKP": v, **rest})
    found = plain.meaningful(plain.run())
    expected = {"out_BTE": found.pop("out_BTHP").flatten(2)} | found
    near(call, call.meaningful(call.run()), expected, scales(call), "rope, then attention")


@law(120, "op")
@given(cut=cut_cases(window_cases().filter(lambda case: longest(case) > case.W)), in_place=st.booleans())
def test_slots_that_evict_equal_ranking_all_keys_ever_seen(cut: tuple[WindowCase, tuple[int, ...]], in_place: bool) -> None:
    case, where = cut
    at_hand = with_fields(case, past=None).call()
    call = at_hand.with_states()
    expected, found = at_hand.meaningful(at_hand.run()), call.meaningful(call.in_pieces(where, in_place))
    near(call, found, expected, scales(call), "with eviction")
    for b, count in enumerate(call.count_B.tolist()):
        for g in range(case.K):
            score = at_hand.given("score_BTK")[b, :count, g].tolist()
            best = sorted(sorted(range(count), key=lambda t: (-score[t], -t))[: case.W])
            assert [p for p in found["slot_position_BKW"][b, g].tolist() if p >= 0] == best


def attention_of(call: Call, cache: Named) -> Named:
    """Plain attention on the queries, keys and values of a call of another op, over the cache given."""
    tensors: dict[str, Tensor | None] = {name: call.tensors[name] for name in ("q_BTHP", "k_BTKP", "v_BTKP")}
    tensors |= {name: cache.get(name) for name in ("cache_k_BKSP", "cache_v_BKSP", "position_B")}
    plain = Call("attention", tensors | {"valid_B": call.tensors["valid_B"]})
    return plain.meaningful(plain.run())


def as_cache(call: Call, room: int) -> Named:
    """Slots that hold every key so far, as a cache with room for the call: cell s is position s."""
    position, found = call.given("slot_position_BKW"), {}
    for slot, name in (("slot_k_BKWP", "cache_k_BKSP"), ("slot_v_BKWP", "cache_v_BKSP")):
        leaf_BKWP = call.given(slot)
        B, K, W, P = leaf_BKWP.shape
        # One more cell takes what empty slots hold.
        cache = leaf_BKWP.new_zeros((B, K, W + room + 1, P))
        index = torch.where(position < 0, W + room, position).unsqueeze(-1).expand_as(leaf_BKWP)
        found[name] = cache.scatter(2, index, leaf_BKWP)
    return found | {"position_B": call.given("position_B")}


@law(120, "op")
@given(cut=cut_cases(window_cases()))
def test_a_window_of_all_keys_of_equal_score_is_plain_attention(cut: tuple[WindowCase, tuple[int, ...]]) -> None:
    case, where = cut
    case = with_fields(case, scores="equal", W=case.T + (case.past or 0) + case.W - 1)
    call = case.call()
    started = call.with_states()
    expected = {"out_BTHP": attention_of(started, as_cache(started, case.T))["out_BTHP"]}
    scale = scales(started)
    near(call, call.meaningful(call.run()), expected, scale, "whole")
    near(call, started.meaningful(started.in_pieces(where)), expected, scale, f"cut before {where}")
    near(call, started.meaningful(started.in_pieces(range(1, case.T), in_place=True)), expected, scale, "token by token")


@law(80, "op")
@given(case=window_cases())
def test_a_window_of_all_keys_is_scored_attention_with_the_scores_added(case: WindowCase) -> None:
    case = with_fields(case, W=case.T + (case.past or 0))
    call = case.call().with_states()
    B, K, W, _ = call.given("slot_k_BKWP").shape
    position = call.given("slot_position_BKW")
    old = torch.zeros((B, K, W + case.T + 1), dtype=torch.float64)
    score = call.given("slot_score_BKW").masked_fill(position < 0, 0)
    old = old.scatter(2, torch.where(position < 0, W + case.T, position), score)
    cache = as_cache(call, case.T)
    tensors: dict[str, Tensor | None] = {name: call.tensors[name] for name in ("q_BTHP", "k_BTKP", "v_BTKP")}
    tensors |= {"score_BTA": call.given("score_BTK"), "cache_k_BKSP": cache["cache_k_BKSP"], "cache_v_BKSP": cache["cache_v_BKSP"]}
    tensors |= {"cache_score_BAS": old, "position_B": cache["position_B"], "valid_B": call.tensors["valid_B"]}
    scored = Call("scored_attention", tensors, {"scoring": "additive", "ratio": 0.0})
    expected = {"out_BTHP": scored.meaningful(scored.run())["out_BTHP"]}
    near(call, call.meaningful(call.run()), expected, scales(call), "scored_attention")


@law(80, "op")
@given(cut=cut_cases(window_cases()))
def test_a_window_of_one_key_gives_the_value_of_the_best_score_so_far_the_latest_of_equals(
    cut: tuple[WindowCase, tuple[int, ...]],
) -> None:
    case, where = cut
    call = with_fields(case, W=1).call().with_states()
    found = call.meaningful(call.in_pieces(where))["out_BTHP"]
    for b, count in enumerate(call.count_B.tolist()):
        for g in range(case.K):
            best = float(call.given("slot_score_BKW")[b, g, 0])
            value = call.given("slot_v_BKWP")[b, g, 0]
            for t in range(count):
                score = float(call.given("score_BTK")[b, t, g])
                if score >= best:
                    best, value = score, call.given("v_BTKP")[b, t, g]
                heads = range(g * case.H // case.K, (g + 1) * case.H // case.K)
                for h in heads:
                    # One weight, exp(0) / exp(0), is 1.
                    assert torch.equal(found[b, t, h], value)
                    note_compared(int(value.count_nonzero()))


@law(60, "op")
@given(case=window_cases().filter(lambda case: case.W > 1 and case.past), seed=st.integers(0, 99), in_place=st.booleans())
def test_the_order_of_slots_has_no_meaning(case: WindowCase, seed: int, in_place: bool) -> None:
    call = case.call().with_states()
    order = torch.randperm(case.W, generator=torch.Generator().manual_seed(seed))
    mixed = call.mapped(lambda name, value: value[:, :, order] if name.startswith("slot") else value)
    assume(differ(mixed, call))
    expected, found = call.meaningful(call.run()), mixed.meaningful(mixed.run_in_place() if in_place else mixed.run())
    near(call, found, expected, scales(call), f"slots in order {order.tolist()}")
    states = {name: expected[name] for name in call.states}
    same(call, found, states, f"slots in order {order.tolist()}")


@law(60, "op")
@given(case=st.one_of(scored_cases(), window_cases()), added=st.sampled_from((-7.5, 0.25, 16.0)))
def test_a_number_added_to_all_scores_changes_no_output(case: ScoredCase | WindowCase, added: float) -> None:
    if isinstance(case, ScoredCase) and case.scoring == "binary":
        case = with_fields(case, scoring="additive")
    call = case.call()
    raised = call.mapped(lambda name, value: value + added if "score" in name else value)
    expected = {"out_BTHP": call.meaningful(call.run())["out_BTHP"]}
    near(call, raised.meaningful(raised.run()), expected, scales(raised), f"scores and {added}")


@law(80, "op")
@given(case=scored_cases(), kind=st.sampled_from(("additive", "ratio", "binary")))
def test_scores_that_tell_no_keys_apart_make_scored_attention_plain(case: ScoredCase, kind: str) -> None:
    call = with_fields(case, scoring=kind, scores="equal").call()
    if kind == "binary":  # all seen
        call = call.mapped(lambda name, value: value.abs() + 1 if "score" in name else value)
    cache = {name: call.given(name) for name in ("cache_k_BKSP", "cache_v_BKSP", "position_B") if call.has(name)}
    near(call, call.meaningful(call.run()), attention_of(call, cache), scales(call), "attention")


@law(60, "op")
@given(case=scored_cases())
def test_binary_scores_are_the_additive_ones_of_0_and_minus_infinity_and_zeros_where_no_key_is_seen(case: ScoredCase) -> None:
    call = with_fields(case, scoring="binary").call()
    # Small enough to hide a key, finite as scores must be.
    hiding = call.mapped(lambda name, value: (value < 1).to(value.dtype) * -1e30 if "score" in name else value)
    additive = Call(call.op, hiding.tensors, {"scoring": "additive", "ratio": 0.0})
    out = call.meaningful(call.run())["out_BTHP"]
    expected = additive.meaningful(additive.run())["out_BTHP"]
    seen = torch.zeros(out.shape[:3], dtype=torch.bool)
    for b, count in enumerate(call.count_B.tolist()):
        start = int(call.given("position_B")[b]) if call.has("position_B") else 0
        for h in range(case.H):
            a = h // (case.H // case.A)
            old = call.given("cache_score_BAS")[b, a, :start].tolist() if start else []
            any_seen = any(score >= 1 for score in old)
            for t in range(count):
                any_seen = any_seen or float(call.given("score_BTA")[b, t, a]) >= 1
                seen[b, t, h] = any_seen
    near(call, {"out_BTHP": out}, {"out_BTHP": torch.where(seen.unsqueeze(-1), expected, 0.0)}, scales(call), "additive")


@law(80, "op")
@given(case=st.one_of(attention_cases(), scored_cases(), window_cases()).filter(lambda case: case.H > case.K))
def test_query_heads_that_share_a_kv_head_equal_heads_with_copies_of_it(case: AttentionCase | ScoredCase | WindowCase) -> None:
    call, R = case.call(), case.H // case.K

    def copied(name: str, value: Tensor) -> Tensor:
        letters = name.rsplit("_", 1)[1]
        return value.repeat_interleave(R, letters.index("K")) if "K" in letters else value

    own = call.mapped(copied)
    expected = {"out_BTHP": own.meaningful(own.run())["out_BTHP"]}
    near(call, call.meaningful(call.run()), expected, scales(call), "a kv head for each query head")


@law(60, "op")
@given(case=st.one_of(attention_cases(), attention_cases(rope=True), scored_cases()), more=st.integers(1, 9))
def test_free_cells_of_a_cache_change_no_output(case: AttentionCase | ScoredCase, more: int) -> None:
    call = with_fields(case, past=case.past or 0, room=0).call()

    def larger(name: str, value: Tensor) -> Tensor:
        if not name.startswith("cache"):
            return value
        return torch.cat([value, torch.full_like(value[:, :, :1], 1e3).repeat_interleave(more, 2)], 2)

    roomy = call.mapped(larger)
    outputs, filled = roomy.meaningful(roomy.run()), call.meaningful(call.run())
    cells = call.given("cache_k_BKSP").shape[2]
    found = {name: value[:, :, :cells] if name.startswith("cache") else value for name, value in outputs.items()}
    near(call, found, filled, scales(call), f"{more} free cells")
