"""RoPE scaling: the op against its formula and transformers, models, their schedules and files, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import wm_kernels as wm
from helpers import LIMIT, lively_params, random_tokens
from import_sources import convert, make_doge, make_llama, write_gguf
from onnx_cases import joined, rope_angles_case
from wm_export import export_bundle, export_into
from wm_export.program import export_program
from wm_graph import Model, ModelConfig, forward, load_checkpoint, save_checkpoint, zero_state
from wm_graph.errors import BundleError, ConfigError
from wm_graph.importers import import_source
from wm_graph.importers.fields import Fields
from wm_graph.importers.rope import read_rope, write_rope
from wm_graph.params import Params, cast_params, map_tensors, params_from_flat
from wm_runtimes import open_bundle, open_session

FAR = 2**24
NUMBERS = {"factor": 4.3, "original": 24, "low": 1.1, "high": 3.9}
SCALINGS = ("linear", "llama3", "dynamic")
STATIC = ("none", "linear", "llama3")
# Cheems with two rotated widths, and Llama; both turned far enough within `rope_original` that llama3 has all three kinds of frequency.
SCALED = {"rope_theta": 100.0, "rope_factor": 4.3, "rope_original": 24, "rope_low": 1.1, "rope_high": 3.9}
CHEEMS = ModelConfig(
    name="two-widths", vocab_size=64, d_model=32, d_ff=48, n_head=4, n_kv_head=2, head_dim=16, ssd_head=2, ssd_head_dim=16, ssd_state=12,
    keep_window=64, layers=(("ssd", "mlp"), ("mamba2", "mlp"), ("dynamic_mask_attention", "mlp"), ("attention", "mlp")),
    **SCALED,
)  # fmt: skip
LLAMA = ModelConfig(
    name="llama", vocab_size=64, d_model=32, d_ff=48, n_head=4, n_kv_head=2, head_dim=16, layers=(("attention", "mlp"),) * 2, **SCALED
)
# As transformers has them: a length of 16 and the scalings' own numbers.
PARAMETERS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


def transformers_config(scaling: str, **sizes: int) -> LlamaConfig:
    parameters = PARAMETERS[scaling] | {"rope_theta": 100.0}
    return LlamaConfig(rope_parameters=parameters, max_position_embeddings=16 if scaling == "dynamic" else 64, **sizes)


def arguments(config: LlamaConfig, length: int, rows: int = 1) -> dict:
    """What the op needs for the scaling of a transformers configuration."""
    values = read_rope(Fields("config.json", json.loads(config.to_json_string())))
    names = {"rope_theta": "theta", "rope_scaling": "scaling", "rope_factor": "factor", "rope_original": "original"}
    names |= {"rope_low": "low", "rope_high": "high"}
    return {names[name]: value for name, value in values.items()} | {"length_B": torch.full((rows,), length)}


def formula(position: int, length: int, pairs: int, theta: float, scaling: str, factor: float, original: int, low: float, high: float):
    """Angles of one position, pair by pair, from the words of the papers."""
    if scaling == "dynamic" and length > original and pairs > 1:
        width = 2 * pairs
        theta = theta * (factor * length / original - (factor - 1)) ** (width / (width - 2))
    angles = []
    for j in range(pairs):
        frequency = theta ** (-j / pairs)
        if scaling == "linear":
            frequency /= factor
        if scaling == "llama3":
            turns = original * frequency / (2 * math.pi)
            if turns < low:
                frequency /= factor
            elif turns <= high:
                smooth = (turns - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        angles.append(position * frequency)
    return angles


@pytest.mark.parametrize("pairs", [1, 2, 8])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_equal_the_formula_to_position_two_to_the_24(scaling, pairs):
    position, length = [[0, 1, 23], [24, 700, 70000], [3, FAR - 1, FAR]], [24, 70001, FAR + 1]
    call = {"scaling": scaling, "length_B": torch.tensor(length), **NUMBERS}
    rows = zip(position, length, strict=True)
    angles = [[formula(p, n, pairs, 1e4, scaling, *NUMBERS.values()) for p in row] for row, n in rows]
    exact = torch.tensor(angles, dtype=torch.float64)
    for double, limit in ((True, 3e-8), (False, 1e-7)):
        cos, sin = wm.rope_angles(torch.tensor(position), pairs, 1e4, double, **call)
        assert cos.dtype == sin.dtype == (torch.float64 if double else torch.float32)
        torch.testing.assert_close(cos.double(), exact.cos(), rtol=0, atol=limit)
        torch.testing.assert_close(sin.double(), exact.sin(), rtol=0, atol=limit)


@pytest.mark.parametrize("scaling", [*SCALINGS, "none"])
def test_where_nothing_is_stretched_angles_are_those_without_scaling_bit_by_bit(scaling):
    position = torch.arange(7).view(1, 7) + torch.tensor([[0], [17]])
    call = {"linear": {"factor": 1.0}, "llama3": {"original": 10**9}, "dynamic": {"length_B": torch.tensor([7, 24])}, "none": NUMBERS}
    scaled = wm.rope_angles(position, 8, 1e4, scaling=scaling, **({} if scaling == "none" else NUMBERS) | call[scaling])
    for found, plain in zip(scaled, wm.rope_angles(position, 8, 1e4), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("length", [1, 16, 17, 100])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies_are_those_of_transformers(scaling, length):
    config = transformers_config(scaling, hidden_size=64, num_attention_heads=2)
    expected, attention = ROPE_INIT_FUNCTIONS[scaling](config, "cpu", seq_len=length)
    assert attention == 1.0
    cos, sin = wm.rope_angles(torch.ones((1, 1), dtype=torch.int64), 16, double=True, **arguments(config, length))
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0], expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_are_those_of_the_transformers_module_below_and_beyond_the_original_length(scaling):
    config = transformers_config(scaling, hidden_size=64, num_attention_heads=2)
    for length in (3, 16, 17, 40):
        expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
        found = wm.rope_angles(torch.arange(length)[None], 16, **arguments(config, length))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs[..., :16], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fake_kernel_agrees(scaling):
    call = (torch.arange(6).view(2, 3), 4, 1e4, False, torch.tensor([3, 6]), scaling, 2.0, 4, 1.0, 4.0)
    torch.library.opcheck(wm.rope_angles, call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "yarn"}, "scaling is 'yarn', expected one of none, linear, llama3, dynamic"),
        ({"factor": 0.0}, "factor is 0.0, expected a positive number"),
        ({"original": 0}, "original is 0, expected at least 1"),
        ({"low": 4.0}, "low is 4.0, expected less than high, 3.9"),
        ({"scaling": "dynamic"}, "dynamic scaling needs length_B"),
        ({"scaling": "dynamic", "length_B": torch.zeros(3, dtype=torch.int64)}, r"length_B has shape \(3\), expected \(B=2\)"),
        ({"scaling": "dynamic", "length_B": torch.zeros(2)}, "length_B is torch.float32, expected torch.int64"),
    ],
)
def test_malformed_call_is_refused(changes, message):
    call = {"scaling": "llama3", **NUMBERS} | changes
    with pytest.raises(RuntimeError, match=f"wm::rope_angles: {message}"):
        wm.rope_angles(torch.zeros((2, 1), dtype=torch.int64), 4, 1e4, **call)


@pytest.mark.parametrize("scaling", ["linear", "dynamic"])
def test_bounds_of_frequencies_are_nothing_to_other_scalings(scaling):
    length_B = torch.ones(2, dtype=torch.int64) if scaling == "dynamic" else None
    call = {"scaling": scaling, **NUMBERS, "length_B": length_B}
    position_BT = torch.arange(6).view(2, 3)
    for given, expected in zip(*(wm.rope_angles(position_BT, 4, 1e4, **call | {"low": low}) for low in (4.0, 1.0)), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("flavour", ["portable", "ort"])
def test_nodes_of_two_scalings_in_one_model_have_a_body_each(flavour):
    cases = [rope_angles_case(2, 3), rope_angles_case(2, 3, scaling="linear", factor=2.0)]
    model, feeds = joined(cases, flavour)
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    for i, case in enumerate(cases):
        for value, expected in zip(found[2 * i : 2 * i + 2], case.reference(), strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=4e-7)
    assert not np.allclose(found[0], found[2])


def turned_params(cfg: ModelConfig) -> Params:
    """Parameters by which scores depend so much on angles that logits tell them apart."""
    return map_tensors(lively_params(cfg), lambda name, tensor: tensor * 20 if name.endswith(("mixer.qkv", "mixer.in_proj")) else tensor)


def wide_params(cfg: ModelConfig) -> Params:
    return cast_params(turned_params(cfg), torch.float64)


def scaled(cfg: ModelConfig, scaling: str, **changes: object) -> ModelConfig:
    return replace(cfg, rope_scaling=scaling, rope_dynamic_cache=scaling == "dynamic", **changes)


def run(cfg, params, tokens, pieces=None, valid=None):
    """Logits; pieces are lengths of calls on a state, None is the call without."""
    with torch.no_grad():
        if pieces is None:
            return forward(cfg, params, tokens, valid_B=valid)[0]
        state, parts = zero_state(cfg, *tokens.shape, dtype=params.norm.dtype), []
        for piece in tokens.split(pieces, 1):
            part, state = forward(cfg, params, piece, state)
            parts.append(part)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("cfg", [CHEEMS, LLAMA], ids=lambda cfg: cfg.name)
def test_every_rotated_width_is_scaled(cfg, scaling):
    params = wide_params(cfg)
    tokens = random_tokens(cfg, 2, 40)
    whole = run(scaled(cfg, scaling), params, tokens)
    assert float((whole - run(cfg, params, tokens)).abs().max()) > 0.01
    for mixer, _ in cfg.layers:
        alone = replace(cfg, layers=((mixer, "mlp"),))
        single = wide_params(alone)
        assert not torch.allclose(run(scaled(alone, scaling), single, tokens), run(alone, single, tokens))


@pytest.mark.parametrize("pieces", [(40,), (1, 39), (17, 7, 1, 15), (1,) * 40], ids=len)
@pytest.mark.parametrize("scaling", STATIC)
def test_static_scaling_in_pieces_equals_the_whole(scaling, pieces):
    cfg = scaled(CHEEMS, scaling)
    params, tokens = wide_params(cfg), random_tokens(cfg, 2, 40)
    torch.testing.assert_close(run(cfg, params, tokens, pieces), run(cfg, params, tokens), rtol=0, atol=1e-9)


def test_dynamic_scaling_in_pieces_equals_the_whole_up_to_the_original_length_and_not_beyond():
    cfg = scaled(CHEEMS, "dynamic")
    params, tokens = wide_params(cfg), random_tokens(cfg, 2, 30)
    short = tokens[:, :24]
    torch.testing.assert_close(run(cfg, params, short, (10, 14)), run(replace(cfg, rope_scaling="none"), params, short), rtol=0, atol=1e-9)
    torch.testing.assert_close(run(cfg, params, tokens, (30,)), run(cfg, params, tokens), rtol=0, atol=1e-9)
    assert float((run(cfg, params, tokens, (10, 20)) - run(cfg, params, tokens)).abs().max()) > 1e-3


@pytest.mark.parametrize("with_state", [False, True])
def test_dynamic_angles_of_a_row_depend_on_neither_other_rows_nor_padding(with_state):
    cfg = scaled(CHEEMS, "dynamic")
    params, tokens = wide_params(cfg), random_tokens(cfg, 4, 60)
    valid = torch.tensor([60, 24, 25, 3])
    with torch.no_grad():
        state = zero_state(cfg, 4, 60, dtype=torch.float64) if with_state else None
        together, _ = forward(cfg, params, tokens, state, valid)
    for row, length in enumerate(valid.tolist()):
        alone = run(cfg, params, tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-9)


def test_dynamic_lengths_count_from_each_row_s_position():
    cfg = scaled(LLAMA, "dynamic")
    params, tokens = wide_params(cfg), random_tokens(cfg, 2, 40)
    with torch.no_grad():
        _, state = forward(cfg, params, tokens, zero_state(cfg, 2, 80, dtype=torch.float64), torch.tensor([5, 30]))
        together, _ = forward(cfg, params, tokens, state, torch.tensor([2, 40]))
        for row, (first, second) in enumerate(((5, 2), (30, 40))):
            one = tokens[row : row + 1]
            _, state = forward(cfg, params, one[:, :first], zero_state(cfg, 1, 80, dtype=torch.float64))
            alone, _ = forward(cfg, params, one[:, :second], state)
            torch.testing.assert_close(together[row, :second], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [12, 16, 17, 40])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("make", [make_llama, make_doge])
def test_import_gives_the_logits_of_transformers(make, scaling, length, tmp_path):
    longest = 16 if scaling == "dynamic" else 64
    options = {"rope_parameters": PARAMETERS[scaling] | {"rope_theta": 100.0}, "max_position_embeddings": longest}
    model = make(**options)
    model.save_pretrained(tmp_path)
    imported = import_source(tmp_path)
    assert imported.cfg.rope_scaling == scaling
    params = params_from_flat(imported.cfg, imported.tensors)
    tokens = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:length] for seed in (1, 2)])
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    found = run(imported.cfg, params, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)
    if scaling != "dynamic" or length > 16:
        assert float((run(replace(imported.cfg, rope_scaling="none"), params, tokens) - expected).abs().max()) > 100 * LIMIT


@pytest.mark.parametrize("scaling", SCALINGS)
def test_cached_steps_give_the_logits_of_transformers(scaling, tmp_path):
    longest = 16 if scaling == "dynamic" else 64
    model = make_llama(rope_parameters=PARAMETERS[scaling] | {"rope_theta": 100.0}, max_position_embeddings=longest)
    model.save_pretrained(tmp_path)
    imported = import_source(tmp_path)
    cfg = replace(imported.cfg, rope_dynamic_cache=True)
    params, tokens = params_from_flat(cfg, imported.tensors), random_tokens(cfg, 2, 32)
    with torch.no_grad():
        reference, state = model(tokens[:, :14], use_cache=True), zero_state(cfg, 2, 32)
        logits, state = forward(cfg, params, tokens[:, :14], state)
        torch.testing.assert_close(logits, reference.logits, rtol=0, atol=LIMIT)
        for step in range(14, 32):
            reference = model(tokens[:, step : step + 1], past_key_values=reference.past_key_values, use_cache=True)
            logits, state = forward(cfg, params, tokens[:, step : step + 1], state)
            torch.testing.assert_close(logits, reference.logits, rtol=0, atol=LIMIT)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, ("linear", 5e5, 2.0, 2048)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 512}, ("dynamic", 1e4, 4.0, 512)),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {"rope_type": "default"}}, ("linear", 1e4, 3.0, 2048)),
        ({"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, ("none", 7.0, 1.0, 2048)),
        ({"rope_scaling": None, "rope_theta": 9.0}, ("none", 9.0, 1.0, 2048)),
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
                "max_position_embeddings": 99,
            },
            ("llama3", 1e4, 8.0, 99),
        ),
    ],
)
def test_both_styles_of_config_are_read_as_transformers_reads_them(config, expected):
    cfg = replace(LLAMA, **{"rope_factor": 1.0, "rope_original": 2048} | read_rope(Fields("config.json", config)))
    assert (cfg.rope_scaling, cfg.rope_theta, cfg.rope_factor, cfg.rope_original) == expected
    theirs = LlamaConfig(**config)
    assert theirs.rope_parameters["rope_theta"] == expected[1]
    assert {"none": "default"}.get(expected[0], expected[0]) == theirs.rope_parameters["rope_type"]


@pytest.mark.parametrize("scaling", ["none", *SCALINGS])
def test_written_scaling_is_read_again(scaling):
    cfg = replace(LLAMA, rope_scaling=scaling)
    values = read_rope(Fields("config.json", json.loads(json.dumps(write_rope(cfg)))))
    assert values["rope_theta"] == 100.0
    assert all(getattr(cfg, name) == value for name, value in values.items())
    assert values.get("rope_scaling", "none") == scaling


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"type": "linear", "factor": 2.2}, 2.2),
        ({"factor": 2.2}, 2.2),
        ({"type": "linear", "factor": 2.2, "original_context_length": 32, "finetuned": True}, 2.2),
        ({"type": "none", "factor": 2.2}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 0.0}, None),
    ],
    ids=str,
)
def test_gguf_scaling_is_read_as_llama_cpp_reads_it(metadata, factor, tmp_path):
    rope = {"rope_type": "linear", "factor": factor} if factor else {"rope_type": "default"}
    model = make_llama(rope_parameters=rope | {"rope_theta": 100.0})
    keys = {f"llama.rope.scaling.{name}": value for name, value in metadata.items()}
    imported = import_source(write_gguf(tmp_path / "model.gguf", model, metadata=keys))
    assert (imported.cfg.rope_scaling, imported.cfg.rope_factor) == (("linear", factor) if factor else ("none", 1.0))
    tokens = random_tokens(imported.cfg, 2, 40)
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(run(imported.cfg, params_from_flat(imported.cfg, imported.tensors), tokens), expected, rtol=0, atol=LIMIT)


def test_old_gguf_key_of_linear_scaling_is_read(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_llama(), metadata={"llama.rope.scale_linear": 4.0})
    assert (import_source(path).cfg.rope_scaling, import_source(path).cfg.rope_factor) == ("linear", 4.0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("cfg", [CHEEMS, LLAMA], ids=lambda cfg: cfg.name)
def test_both_onnx_files_equal_eager(cfg, scaling, tmp_path):
    cfg = scaled(cfg, scaling)
    params, tokens = turned_params(cfg), random_tokens(cfg, 3, 45).numpy()
    save_checkpoint(tmp_path / "checkpoint", cfg, params)
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    sessions = [open_session(tmp_path / "bundle", "eager", 3, 64)]
    sessions += [
        open_session(tmp_path / "bundle", batch=3, capacity=64, graph=file, threads=1) for file in ("model.ort.onnx", "model.onnx")
    ]
    answers = []
    for one in sessions:
        with one:
            parts = [one.prefill(tokens[:, :40], valid=[40, 7, 20])]
            answers.append(np.stack(parts[0].swapaxes(0, 1).tolist() + [one.decode(tokens[:, step]) for step in range(40, 45)]))
    assert 0.3 < answers[0].std() < 3
    for found in answers[1:]:
        np.testing.assert_allclose(found, answers[0], rtol=0, atol=LIMIT)


def angle_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "WmRopeAngles"]


def test_plain_models_have_the_node_that_they_had(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", LLAMA, lively_params(LLAMA))
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    for file in ("model.onnx", "model.ort.onnx"):
        model = onnx.load(str(tmp_path / "bundle" / file), load_external_data=False)
        (node,) = angle_nodes(model)
        assert len(node.input) == 1
        assert sorted(attribute.name for attribute in node.attribute) == ["pairs", "theta"]
        (function,) = (function for function in model.functions if function.name == "WmRopeAngles")
        assert len(function.input) == 1
        # Two digits, six look-ups, two additions of angles; the rest are constants.
        assert sum(made.op_type != "Constant" for made in function.node) == 2 + 2 + 6 + 2 * 6


@pytest.mark.parametrize("flavour", ["portable", "ort"])
def test_theta_that_is_no_float32_is_exact_in_the_file(flavour):
    case = rope_angles_case(3, 5)
    case.extra["theta"] = case.attributes["theta"] = 12345.678901
    position_BT = torch.from_numpy(case.arguments["position_BT"])

    def largest_error() -> float:
        (cos, _) = ReferenceEvaluator(case.model(flavour)).run(None, case.feeds())
        exact, _ = wm.rope_angles(position_BT, 32, 12345.678901, True)
        return float(np.abs(cos - exact.numpy()).max())

    assert largest_error() > 1e-3
    case.attributes["exact_theta"] = "12345.678901"
    assert largest_error() < 4e-7


def refuses(what: str = "rope_scaling is 'dynamic'", error: type[Exception] = ConfigError):
    return pytest.raises(error, match=rf"^[^\n]*{what}[^\n]*rope_dynamic_cache[^\n]*$")


def test_dynamic_scaling_with_a_state_is_refused_at_once(tmp_path):
    allowed = scaled(LLAMA, "dynamic")
    cfg = replace(allowed, rope_dynamic_cache=False)
    params, tokens = lively_params(cfg), random_tokens(cfg, 1, 3)
    with refuses():
        zero_state(cfg, 1, 8)
    state = zero_state(allowed, 1, 8)
    with refuses():
        forward(cfg, params, tokens, state)
    with refuses():
        Model(cfg, params)(tokens, state)
    with refuses():
        export_program(cfg, torch.float32)
    forward(cfg, params, tokens)
    save_checkpoint(tmp_path / "checkpoint", cfg, params)
    with refuses():
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_bundle_of_dynamic_scaling_without_permission_is_refused_when_it_is_opened(tmp_path):
    cfg = scaled(LLAMA, "dynamic")
    save_checkpoint(tmp_path / "checkpoint", cfg, lively_params(cfg))
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    open_bundle(tmp_path / "bundle")
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["rope_dynamic_cache"] = False
    file.write_text(json.dumps(manifest))
    with refuses(error=BundleError):
        open_session(tmp_path / "bundle")
    with refuses():
        export_into(tmp_path / "bundle")


def test_imported_dynamic_model_runs_without_a_state_and_waits_for_permission(tmp_path):
    make_llama(rope_parameters=PARAMETERS["dynamic"] | {"rope_theta": 100.0}).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made")
    cfg, params = load_checkpoint(tmp_path / "made")
    assert (cfg.rope_scaling, cfg.rope_dynamic_cache) == ("dynamic", False)
    assert run(cfg, cast_params(params, torch.float64), random_tokens(cfg, 1, 5)).isfinite().all()
    with refuses():
        zero_state(cfg, 1, 8)
