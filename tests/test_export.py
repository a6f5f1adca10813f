"""What `wm_export` writes: two ONNX headers over one weights file, equal to eager, on any runtime, and nothing when it fails."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx.inliner import inline_local_functions
from safetensors.numpy import load_file

import wm_export.to_onnx
from helpers import FAMILIES, LIMIT, NEW_FAMILIES, OPTIONS, Judge, random_tokens, sharp_params
from wm_export import export_bundle, export_into
from wm_graph import ModelConfig, forward, init_params, load_checkpoint, save_checkpoint, zero_state
from wm_graph.errors import CheckpointError, ExportError
from wm_graph.params import Params
from wm_graph.shapes import state_leaves
from wm_graph.state import state_from_flat, state_to_flat
from wm_graph.taps import Taps


def shaped(preset: str, **changes: object) -> ModelConfig:
    """Eight layers of a preset (Cheems: 7 ssd, 1 dynamic_mask_attention) with a window that long inputs overflow."""
    cfg = ModelConfig.preset(preset)
    return replace(cfg, layers=cfg.layers[:8], keep_window=24, **changes)


CONFIGS = {name: FAMILIES[name] for name in ("cheems-tiny-moe", "llama-tiny")}
EVERY_FAMILY = CONFIGS | {name: FAMILIES[name] for name in NEW_FAMILIES}
OTHERS = {
    "cheems-tiny": shaped("cheems-tiny"),
    "cheems-20m widths": shaped("cheems-20m", vocab_size=1024),
    "cheems-20m-moe widths": shaped("cheems-20m-moe", vocab_size=1024),
}
ONE_OF_EACH = ModelConfig(
    name="one-of-each", vocab_size=64, d_model=32, d_ff=48, n_head=4, n_kv_head=2, head_dim=8, ssd_head=2, ssd_head_dim=16, ssd_state=8,
    ssd_group=1, keep_window=6, qk_norm=True, learned_residual=True, n_expert=16, n_retrieval_head=2, n_pick=2, d_retrieval=8,
    layers=(("ssd", "cdmoe"), ("dynamic_mask_attention", "cdmoe"), ("attention", "cdmoe")),
)  # fmt: skip
_PICKY = next(cfg for cfg in OPTIONS.values() if cfg.ifa_form == "softmax")  # inner function attention beside normalised experts
TWO_BODIES = {
    "routers of unequal k": (replace(_PICKY, ifa_pick=_PICKY.n_pick + 1), {"WmRouterTopk"}),
    "a router that is not normalised, heads in groups beside heads alone": (
        replace(_PICKY, moe_normalize=False, attention_rope=True, layers=(("inner_function_attention", "moe"), ("attention", "mlp"))),
        {"WmRouterTopk", "WmAttentionRope"},
    ),
}
FILES = ("model.onnx", "model.ort.onnx")
FOR_GPUS = "model.cuda.onnx"
STATE_TAPS = [
    *((op, "state") for op in ("ssd_scan", "ssd_scan_rope", "selective_scan", "causal_conv1d")),
    *((op, leaf) for op in ("attention", "attention_rope") for leaf in ("k", "v")),
    *(("keep_window_attention", leaf) for leaf in ("k", "v", "score", "slot_position")),
]


@pytest.fixture(scope="session", params=CONFIGS)
def exported(request, made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny model, exported once."""
    return made(CONFIGS[request.param])


@pytest.fixture(scope="session", params=OTHERS)
def other(request, made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of models that are run but not taken apart."""
    return made(OTHERS[request.param])


@pytest.fixture(scope="session", params=EVERY_FAMILY)
def family(request, made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny model of every family."""
    return made(EVERY_FAMILY[request.param])


@pytest.fixture(scope="session")
def one_of_each(made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of the smallest model of a Cheems that has every op of it."""
    return made(ONE_OF_EACH)


def random_inputs(cfg: ModelConfig, batch: int, tokens: int, capacity: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the graph for a first call on an empty state."""
    rng = np.random.default_rng(seed)
    state = state_to_flat(cfg, zero_state(cfg, batch, capacity))
    return {
        "tokens": rng.integers(0, cfg.vocab_size, (batch, tokens)),
        "valid": rng.integers(max(1, tokens // 2), tokens + 1, batch),
        "select": np.tile(np.arange(tokens), (batch, 1)),
    } | {name: leaf.numpy() for name, leaf in state.items()}


def next_inputs(cfg: ModelConfig, outputs: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Inputs for one more token per row, on the state that a call gave."""
    batch = len(outputs["position.next"])
    return {name.removesuffix(".next"): value for name, value in outputs.items() if name.endswith(".next")} | {
        "tokens": np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, 1)),
        "valid": np.ones(batch, np.int64),
        "select": np.zeros((batch, 1), np.int64),
    }


def eager_outputs(cfg: ModelConfig, params: Params, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same call through `forward`, by output name."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in inputs.items()}
    state = state_from_flat(cfg, {spec.name: tensors[spec.name] for spec in state_leaves(cfg)})
    with torch.no_grad():
        logits, after = forward(cfg, params, tensors["tokens"], state, tensors["valid"], tensors["select"])
    return {"logits": logits.numpy()} | {f"{name}.next": leaf.numpy() for name, leaf in state_to_flat(cfg, after).items()}


def assert_same_logits(inputs: dict[str, np.ndarray], got: np.ndarray, expected: np.ndarray) -> None:
    """Logits agree at every valid position; those of padding are undefined."""
    real = inputs["select"] < inputs["valid"][:, None]
    assert got.shape == expected.shape
    assert np.abs(got[real] - expected[real]).max() <= LIMIT


@cache
def eager_calls(checkpoint: Path, batch: int, tokens: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(inputs, logits) of a prefill of unequal rows and two single tokens after it."""
    cfg, params = load_checkpoint(checkpoint)
    inputs, calls = random_inputs(cfg, batch, tokens, capacity=300, seed=tokens), []
    for step in range(3):
        outputs = eager_outputs(cfg, params, inputs)
        calls.append((inputs, outputs["logits"]))
        inputs = next_inputs(cfg, outputs, seed=tokens + step)
    return calls


def assert_onnx_equals_eager(made: tuple[Path, Path], file: str, batch: int, tokens: int) -> None:
    """The file's logits are eager's, on a prefill and on two single tokens after it, each side going on from its own state."""
    checkpoint, bundle = made
    cfg, _ = load_checkpoint(checkpoint)
    run = session(bundle, file)
    names = [output.name for output in run.get_outputs()]
    inputs = None
    for step, (eager_inputs, expected) in enumerate(eager_calls(checkpoint, batch, tokens)):
        inputs = eager_inputs if inputs is None else inputs
        got = dict(zip(names, run.run(None, inputs), strict=True))
        assert_same_logits(inputs, got["logits"], expected)
        inputs = next_inputs(cfg, got, seed=tokens + step)


@cache
def session(bundle: Path, file: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_models_here_have_logits_of_scale_one_and_keep_keys_by_score(name):
    cfg = (CONFIGS | OTHERS)[name]
    with torch.no_grad():
        logits, state = forward(cfg, sharp_params(cfg), random_tokens(cfg, 2, 65), zero_state(cfg, 2, 65))
    assert 0.3 < logits.std() < 3
    kept = [leaf for leaf_name, leaf in state_to_flat(cfg, state).items() if leaf_name.endswith("slot_position")]
    assert len(kept) == sum(mixer == "dynamic_mask_attention" for mixer, _ in cfg.layers)
    for position_BKW in kept:
        assert (position_BKW.sort(-1).values != torch.arange(41, 65)).any(-1).all()  # not the latest 24


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 257])
def test_onnx_equals_eager_then_decodes_on(family, file, batch, tokens):
    assert_onnx_equals_eager(family, file, batch, tokens)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 65])
def test_onnx_equals_eager_for_other_feed_forwards_and_widths(other, file, batch, tokens):
    assert_onnx_equals_eager(other, file, batch, tokens)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("tokens", [1, 65])
def test_eager_equals_oracle_for_other_feed_forwards_and_widths(name, tokens):
    judge = Judge(OTHERS[name], sharp_params(OTHERS[name]), random_tokens(OTHERS[name], 3, tokens))
    for pieces in (None, (tokens,)):
        assert judge.max_abs(*judge.run(pieces)) <= LIMIT


@cache
def evaluator(bundle: Path) -> onnx.reference.ReferenceEvaluator:
    return onnx.reference.ReferenceEvaluator(str(bundle / "model.onnx"))


@pytest.mark.parametrize("tokens", [1, 5])
def test_reference_evaluator_runs_the_portable_file(family, tokens):
    checkpoint, bundle = family
    cfg, params = load_checkpoint(checkpoint)
    inputs = random_inputs(cfg, 2, tokens, capacity=9, seed=tokens)
    assert_same_logits(inputs, evaluator(bundle).run(["logits"], inputs)[0], eager_outputs(cfg, params, inputs)["logits"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 63, 65, 257])
def test_reference_evaluator_equals_eager_at_every_length(one_of_each, batch, tokens):
    checkpoint, bundle = one_of_each
    for inputs, expected in eager_calls(checkpoint, batch, tokens)[:2]:
        assert_same_logits(inputs, evaluator(bundle).run(["logits"], inputs)[0], expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_evaluator_equals_eager_for_every_option(made, name):
    checkpoint, bundle = made(OPTIONS[name])
    for inputs, expected in eager_calls(checkpoint, 2, 9)[:2]:
        assert_same_logits(inputs, evaluator(bundle).run(["logits"], inputs)[0], expected)


@pytest.mark.parametrize("name", TWO_BODIES)
def test_model_whose_ops_need_two_bodies_equals_eager(made, name):
    cfg, twice = TWO_BODIES[name]
    checkpoint, bundle = made(cfg)
    for file in FILES:
        onnx.checker.check_model(str(bundle / file), full_check=True)
        model = onnx.load(bundle / file, load_external_data=False)
        assert model.ir_version >= 10  # the first with overloads
        assert {function.name for function in model.functions if function.overload == "2"} == twice
        for tokens in (1, 9):
            assert_onnx_equals_eager((checkpoint, bundle), file, 2, tokens)
    # The reference evaluator takes an op's last overload for every node; inlined, each has its own.
    inlined = onnx.reference.ReferenceEvaluator(inline_local_functions(onnx.load(bundle / "model.onnx")))
    for inputs, expected in eager_calls(checkpoint, 2, 9)[:2]:
        assert_same_logits(inputs, inlined.run(["logits"], inputs)[0], expected)


def test_capacity_of_one_runs(family):
    checkpoint, bundle = family
    cfg, params = load_checkpoint(checkpoint)
    inputs = random_inputs(cfg, 1, 1, capacity=1)
    for file in FILES:
        assert_same_logits(inputs, session(bundle, file).run(["logits"], inputs)[0], eager_outputs(cfg, params, inputs)["logits"])


@pytest.mark.parametrize("file", [*FILES, FOR_GPUS])
def test_file_passes_the_full_checker_and_names_no_machine(family, file):
    _, bundle = family
    onnx.checker.check_model(str(bundle / file), full_check=True)
    data = (bundle / file).read_bytes()
    assert len(data) < 5_000_000
    for word in (b"site-packages", b".py", str(Path.home()).encode() + b"/", b"stack_trace"):
        assert word not in data


@pytest.mark.parametrize("file", [*FILES, FOR_GPUS])
def test_every_op_is_a_wm_node_with_a_body(family, file):
    _, bundle = family
    model = onnx.load(bundle / file, load_external_data=False)
    nodes = {node.op_type for node in model.graph.node if node.domain == "wm"}
    assert nodes == {function.name for function in model.functions}
    others = {(node.domain, node.op_type) for node in model.graph.node if node.domain not in ("", "wm")}
    joined = {("com.microsoft", "SkipSimplifiedLayerNormalization")}
    assert others == (joined if file == "model.ort.onnx" else set())
    assert {item.domain: item.version for item in model.opset_import}[""] == 23
    contrib = {item.domain for function in model.functions for item in function.opset_import} - {"", "wm"}
    assert contrib == ({"com.microsoft"} if file == "model.ort.onnx" else set())


@pytest.mark.parametrize("file", [*FILES, FOR_GPUS])
def test_every_weight_is_read_from_the_bundle_weights_file(exported, file):
    _, bundle = exported
    stored = load_file(bundle / "model.safetensors")
    model = onnx.load(bundle / file, load_external_data=False)
    external = {item.name: item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    if file == "model.ort.onnx":
        stored.setdefault("head", stored["embedding"])  # a tied head maps the embedding's bytes a second time
    assert set(external) == set(stored)
    raw = (bundle / "model.safetensors").read_bytes()
    for name, item in external.items():
        entry = {pair.key: pair.value for pair in item.external_data}
        assert entry["location"] == "model.safetensors"
        offset, length = int(entry["offset"]), int(entry["length"])
        assert raw[offset : offset + length] == stored[name].tobytes()


def test_two_exports_are_byte_equal(exported, tmp_path):
    checkpoint, bundle = exported
    export_bundle(checkpoint, tmp_path / "again")
    for file in (*FILES, "model.safetensors", "golden.safetensors", "manifest.json"):
        assert (bundle / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_every_tap_name_is_a_value_of_the_graph(family):
    checkpoint, bundle = family
    cfg, params = load_checkpoint(checkpoint)
    taps = Taps()
    with torch.no_grad():
        forward(cfg, params, torch.zeros(1, 2, dtype=torch.int64), zero_state(cfg, 1, 4), taps=taps)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    outputs = {name for node in model.graph.node for name in node.output}
    # A state's output carries its leaf's name instead: `layers.7.keep_window_attention.k` is `layers.7.k.next`.
    renamed = {f"{spec.name.rsplit('.', 1)[0]}.{op}.{leaf}" for spec in state_leaves(cfg) for op, leaf in STATE_TAPS if "." in spec.name}
    assert not set(taps.values) - outputs - renamed


def test_golden_logits_are_those_of_the_float64_model(exported):
    checkpoint, bundle = exported
    cfg, params = load_checkpoint(checkpoint, torch.float64)
    golden = load_file(bundle / "golden.safetensors")
    with torch.no_grad():
        logits, _ = forward(cfg, params, torch.from_numpy(golden["tokens"]))
    assert golden["logits"].dtype == np.float64
    assert np.abs(golden["logits"] - logits.numpy()).max() < 1e-12


def test_half_precision_bundle_stays_near_float32(exported, tmp_path):
    checkpoint, _ = exported
    cfg, params = load_checkpoint(checkpoint)
    export_bundle(checkpoint, tmp_path / "half", dtype="fp16")
    assert json.loads((tmp_path / "half" / "manifest.json").read_text())["dtype"] == "float16"
    inputs = random_inputs(cfg, 2, 9, capacity=12)
    expected = eager_outputs(cfg, params, inputs)["logits"]
    for file in FILES:
        run = session(tmp_path / "half", file)
        half = {name: value.astype(np.float16) if _is_half(run, name) else value for name, value in inputs.items()}
        got = run.run(["logits"], half)[0]
        real = inputs["select"] < inputs["valid"][:, None]
        # Half precision rounds weights to 2^-11; eight layers of that on logits of scale 1 stay well inside 2 %.
        assert np.sqrt(np.mean((got[real] - expected[real]) ** 2)) < 0.02 * np.sqrt(np.mean(expected[real] ** 2)) + 2e-3


def _is_half(run: onnxruntime.InferenceSession, name: str) -> bool:
    return {item.name: item.type for item in run.get_inputs()}[name] == "tensor(float16)"


def test_targets_can_be_made_anew_inside_a_bundle(exported, tmp_path):
    checkpoint, bundle = exported
    export_bundle(checkpoint, tmp_path / "bundle")
    before = (tmp_path / "bundle" / "model.onnx").read_bytes()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"damaged")
    export_into(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "model.onnx").read_bytes() == before
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()


def test_opset_fallback_of_the_exporter_is_refused(exported, tmp_path, monkeypatch):
    checkpoint, _ = exported
    monkeypatch.setattr(wm_export.to_onnx, "OPSET", 27)
    with pytest.raises(ExportError, match="asked for opset 27"):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "bf17"}, "unknown dtype 'bf17'"), ({"targets": ("onyx",)}, "unknown target 'onyx'"), ({"targets": ()}, "no target given")],
)
def test_bad_options_write_nothing(exported, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_bundle(exported[0], tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_taken_folder_is_left_alone(exported, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="already exists"):
        export_bundle(exported[0], tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["mine"]


def test_nan_weights_are_refused_by_name(tmp_path):
    cfg = ModelConfig.preset("llama-tiny")
    params = init_params(cfg)
    params.layers[2].mixer.qkv[0, 0] = float("nan")
    save_checkpoint(tmp_path / "checkpoint", cfg, params)
    with pytest.raises(ExportError, match=r"layers\.2\.mixer\.qkv.*NaN"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
