"""The model's laws: one definition, any schedule. B rows, T tokens, S capacity, V vocabulary."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import FAMILIES, LIMIT, NEW_FAMILIES, OPTIONS, Judge, lively_params, random_tokens
from helpers import MODELS as FIRST_MODELS
from wm_graph import Model, ModelConfig, State, forward, init_params, load_checkpoint, save_checkpoint, zero_state
from wm_graph.errors import ConfigError
from wm_graph.oracle import oracle_forward
from wm_graph.params import cast_params, named_tensors, parameter_count, params_to_flat
from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters, parameter_shapes

MODELS = FIRST_MODELS | {name: FAMILIES[name] for name in NEW_FAMILIES} | OPTIONS
SMALL = ("window", "llama-tiny", *OPTIONS)  # an eviction, retrieval and a scan; a cache; everything else
LENGTH = 70


@cache
def judge_of(name: str, rows: int = 2, length: int = LENGTH) -> Judge:
    cfg = MODELS[name]
    return Judge(cfg, lively_params(cfg), random_tokens(cfg, rows, length))


def leaves(state: State | None) -> dict[str, Tensor]:
    assert state is not None
    return dict(named_tensors(state))


@pytest.mark.parametrize("name", MODELS)
def test_eager_equals_oracle(name: str) -> None:
    judge = judge_of(name)
    assert 0.3 < judge.own.logits_BTV.std() < 3
    assert judge.max_abs(*judge.run(None)) <= LIMIT


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [(LENGTH,), (64, 1, 5), (1, 69)])
def test_prefill_with_a_state_equals_oracle(name: str, pieces: tuple[int, ...]) -> None:
    judge = judge_of(name)
    assert judge.max_abs(*judge.run(pieces)) <= LIMIT


@pytest.mark.parametrize("name", [*SMALL, "cheems-tiny", "cheems-20m-moe widths", *NEW_FAMILIES])
def test_token_by_token_equals_oracle(name: str) -> None:
    judge = judge_of(name, 2, 20)
    assert judge.max_abs(*judge.run((1,) * 20)) <= LIMIT


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=4)
@given(data=st.data())
def test_any_split_equals_oracle(name: str, data: st.DataObject) -> None:
    judge = judge_of(name, 2, 40)
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=6)))
    pieces = [end - start for start, end in zip([0, *cuts], [*cuts, 40], strict=True)]
    assert judge.max_abs(*judge.run(pieces)) <= LIMIT


@pytest.mark.parametrize("name", SMALL)
def test_in_place_equals_functional_bitwise(name: str) -> None:
    judge = judge_of(name)
    pieces = (30, 1, 1, 38)
    functional, in_place = judge.run(pieces), judge.run(pieces, in_place=True)
    assert torch.equal(functional[0], in_place[0])
    for tap, value in functional[1].items():
        assert torch.equal(value, in_place[1][tap])


@pytest.mark.parametrize("name", [*SMALL, "jamba-tiny", "cheems-2407-tiny"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_in_place_form_writes_into_every_tensor_of_the_given_state(name: str, tokens: int) -> None:
    cfg = MODELS[name]
    params, tokens_BT = lively_params(cfg), random_tokens(cfg, 2, tokens)
    given, start = zero_state(cfg, 2, 32), zero_state(cfg, 2, 32)
    _, returned = forward(cfg, params, tokens_BT, given, in_place=True)
    _, functional = forward(cfg, params, tokens_BT, start)
    for leaf, value in leaves(returned).items():
        assert value is leaves(given)[leaf], leaf
        assert torch.equal(value, leaves(functional)[leaf]), leaf
        # Static scores of seen keys may be 0, as those of free cells are.
        assert leaf.endswith(".score") or not torch.equal(value, leaves(start)[leaf]), leaf


@pytest.mark.parametrize("name", SMALL)
def test_a_state_before_any_token_is_zero_but_for_what_marks_empty_slots(name: str) -> None:
    found = leaves(zero_state(MODELS[name], 3, 9))
    for leaf, value in found.items():
        layer, kind = f".{leaf}".rsplit(".", 1)
        slots = f"{layer}.slot_position".removeprefix(".") in found
        assert (value == ({"score": -math.inf, "slot_position": -1}.get(kind, 0) if slots else 0)).all(), leaf


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_state_has_keys_and_values_in_the_model_s_dtype_and_sums_in_float32_or_higher(name: str, dtype: torch.dtype) -> None:
    for leaf, value in leaves(zero_state(MODELS[name], 2, 9, dtype)).items():
        kind = leaf.rsplit(".", 1)[-1]
        high = torch.float64 if dtype == torch.float64 else torch.float32
        assert value.dtype == {"k": dtype, "v": dtype, "position": torch.int64, "slot_position": torch.int64}.get(kind, high), leaf


@pytest.mark.parametrize("name", SMALL)
def test_functional_form_leaves_the_given_state_alone(name: str) -> None:
    cfg = MODELS[name]
    params, tokens = lively_params(cfg), random_tokens(cfg, 2, 12)
    _, state = forward(cfg, params, tokens, zero_state(cfg, 2, 32))
    before = {leaf: value.clone() for leaf, value in leaves(state).items()}
    forward(cfg, params, tokens, state)
    for leaf, value in leaves(state).items():
        assert torch.equal(before[leaf], value), leaf


# Rows of one batch are unequal in length; each alone, without padding, must give the same. In float64, where no rounding decides a choice.
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lengths", [(5, 17, 1), (17, 0, 9)])
def test_padded_rows_equal_rows_alone(name: str, lengths: tuple[int, ...]) -> None:
    cfg = MODELS[name]
    params = lively_params(cfg)
    tokens, longest = random_tokens(cfg, 3, 20), max(lengths)
    after = tokens[:, longest : longest + 2]
    _, state = oracle_forward(cfg, params, tokens[:, :4], zero_state(cfg, 3, 32, torch.float64))
    first, middle = oracle_forward(cfg, params, tokens[:, :longest], state, torch.tensor(lengths))
    then, _ = oracle_forward(cfg, params, after, middle)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        _, alone = oracle_forward(cfg, params, tokens[one, :4], zero_state(cfg, 1, 32, torch.float64))
        if length:
            expected, alone = oracle_forward(cfg, params, tokens[one, :length], alone)
            torch.testing.assert_close(first[one, :length], expected, rtol=0, atol=1e-11)
        expected, _ = oracle_forward(cfg, params, after[one], alone)
        torch.testing.assert_close(then[one], expected, rtol=0, atol=1e-11)
        assert leaves(middle)["position"][row] == 4 + length


@pytest.mark.parametrize("name", SMALL)
def test_padded_float32_rows_equal_rows_alone(name: str) -> None:
    judge = judge_of(name, 2, 20)
    cfg, params, tokens = judge.cfg, judge.params, random_tokens(judge.cfg, 2, 20)
    _, state = forward(cfg, params, tokens[:, :12], zero_state(cfg, 2, 20), torch.tensor([12, 7]))
    tail = torch.stack([tokens[0, 12:20], tokens[1, 7:15]])
    logits, _ = forward(cfg, params, tail, state)
    expected = torch.from_numpy(judge.own.logits_BTV)
    torch.testing.assert_close(logits.double(), torch.stack([expected[0, 12:20], expected[1, 7:15]]), rtol=0, atol=LIMIT)


@pytest.mark.parametrize("name", SMALL)
def test_later_tokens_do_not_reach_earlier_logits(name: str) -> None:
    cfg = MODELS[name]
    params, tokens = lively_params(cfg), random_tokens(cfg, 1, 30)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % cfg.vocab_size
    first, second = (oracle_forward(cfg, params, each)[0] for each in (tokens, changed))
    torch.testing.assert_close(first[:, :20], second[:, :20], rtol=0, atol=1e-11)
    assert (first[:, 20:] - second[:, 20:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("name", ["cheems-tiny", "window"])
@pytest.mark.parametrize("shift", [1, 1000, 2**24 - 64])
def test_logits_do_not_depend_on_where_a_text_starts(name: str, shift: int) -> None:
    judge = judge_of(name, 2, 30)
    cfg = judge.cfg
    tokens = torch.from_numpy(judge.draws.tokens_BT)
    for dtype, limit in ((torch.float64, 1e-8), (torch.float32, LIMIT)):
        state = zero_state(cfg, 2, 64, dtype)
        shifted, _ = forward(cfg, cast_params(judge.params, dtype), tokens, replace(state, position=state.position + shift))
        torch.testing.assert_close(shifted.double(), torch.from_numpy(judge.own.logits_BTV), rtol=0, atol=limit)


@pytest.mark.parametrize("name", SMALL)
def test_select_and_modules_give_the_same_logits(name: str) -> None:
    cfg = MODELS[name]
    params, tokens = lively_params(cfg), random_tokens(cfg, 2, 9)
    everything, _ = forward(cfg, params, tokens)
    some, _ = forward(cfg, params, tokens, select_BS=torch.tensor([[8, 0], [3, 3]]))
    torch.testing.assert_close(some, torch.stack([everything[0, [8, 0]], everything[1, [3, 3]]]), rtol=0, atol=1e-6)
    model = Model(cfg, params)
    assert torch.equal(model(tokens)[0], everything)
    assert {path: tuple(tensor.shape) for path, tensor in model.named_parameters()} == parameter_shapes(cfg)


PUBLISHED = {
    "cheems-320m": 335.7, "cheems-320m-moe": 487.8, "cheems-1.3b": 1208.6, "llama-320m": 335.6, "llama-1.3b": 1208.0,
    "mamba2-320m": 331.2, "jamba-320m": 420.6,
}  # fmt: skip
# Published of the form whose score reads the values by query head; ours, that of the released weights, reads them by kv head.
DOGE = {"doge-20m": 13.12, "doge-60m": 54.58, "doge-160m": 152.70, "doge-320m": 335.81}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert round(count_parameters(ModelConfig.preset(name)) / 1e6, 1) == PUBLISHED[name]


def test_parameter_counts_that_take_more_than_a_look() -> None:
    assert round(count_parameters(ModelConfig.preset("mamba2-1.3b")) / 1e6) == 1168
    jamba = ModelConfig.preset("jamba-320m")
    experts = {name: shape for name, shape in parameter_shapes(jamba).items() if name.rsplit(".", 1)[-1] in ("expert_in", "expert_out")}
    idle = sum((jamba.n_expert - jamba.n_pick) * math.prod(shape[1:]) for shape in experts.values())
    assert round((count_parameters(jamba) - idle) / 1e6, 1) == 269.6
    for name, published in DOGE.items():
        cfg = ModelConfig.preset(name)
        by_query_head = replace(cfg, dma_mask="additive", dma_heads="query", qk_norm=False)
        assert round(count_parameters(by_query_head) / 1e6, 2) == published
        assert abs(count_parameters(cfg) / 1e6 - published) < 0.06


@pytest.mark.parametrize("name", ["cheems-demo", *FAMILIES, *OPTIONS])
def test_counted_parameters_are_the_held_ones(name: str) -> None:
    cfg = (FAMILIES | OPTIONS | PRESETS)[name]
    assert parameter_count(init_params(cfg)) == count_parameters(cfg)


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_round_trip(name: str) -> None:
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_json(cfg.to_json()) == cfg


def json_with(**changes: object) -> str:
    return json.dumps(ModelConfig.preset("llama-tiny").to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        (json_with(layers="attention"), "'layers' must be a list"),
        (json_with(layers=[["attention"]]), "'layers' must be a list"),
        (json_with(layers=["ab"]), "'layers' must be a list"),
        (json_with(no_such=1), "unknown field 'no_such'"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^ModelConfig: .*{message}") as caught:
        ModelConfig.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoint_round_trip(tmp_path, dtype: torch.dtype) -> None:
    cfg = MODELS["window"]
    params = lively_params(cfg, dtype=dtype)
    save_checkpoint(tmp_path / "model", cfg, params)
    loaded_cfg, loaded = load_checkpoint(tmp_path / "model")
    assert loaded_cfg == cfg
    for path, tensor in params_to_flat(cfg, params).items():
        found = params_to_flat(cfg, loaded)[path]
        assert found.dtype == tensor.dtype, path
        assert torch.equal(found, tensor), path


# Models with a layer of each kind and little else. What Inductor makes of some is compared with the oracle in the tests of parity.
COMPILED = {
    "cheems": replace(
        MODELS["window"], layers=(("ssd", "cdmoe"), ("dynamic_mask_attention", "mlp"), ("attention", "mlp")), name="compiled", vocab_size=64
    ),
    "jamba": replace(FAMILIES["jamba-tiny"], layers=(("mamba1", "moe"), ("attention", "mlp")), vocab_size=64),
    **{name: OPTIONS[name] for name in OPTIONS if name.startswith("additive")},  # retrieval of values, mamba2, scored attention
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_makes_at_most_two_graphs(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    cfg = COMPILED[name]
    params = lively_params(cfg)

    def step(tokens: Tensor, state: State, valid: Tensor) -> tuple[Tensor, State | None]:
        return forward(cfg, params, tokens, state, valid)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    lengths = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 90)
    with torch.no_grad():
        state = zero_state(cfg, 2, 512)
        for length in (*lengths, 1, 4):
            tokens = random_tokens(cfg, 2, length)
            valid = torch.tensor([length, (length + 1) // 2])
            logits, new = compiled(tokens, state, valid)
            expected, state = step(tokens, state, valid)
            assert torch.equal(logits, expected), length
            for leaf, value in leaves(new).items():
                assert torch.equal(value, leaves(state)[leaf]), (length, leaf)
    assert counter.frame_count <= 2


def test_positions_end_with_the_static_mask_of_a_layer_and_with_exact_angles_otherwise():
    for cfg in (*OPTIONS.values(), FAMILIES["cheems-2407-tiny"]):
        masked = cfg.ifa_mask != "none" and "inner_function_attention" in {mixer for mixer, _ in cfg.layers}
        assert cfg.max_position == (300 if masked else 2**24), cfg
    assert any(cfg.max_position == 300 for cfg in OPTIONS.values())
