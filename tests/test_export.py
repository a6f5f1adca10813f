"""What `wm_export` writes: two ONNX headers over one weights file, equal to eager, on any runtime, and nothing when it fails."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

import wm_export.bundle
import wm_export.to_onnx
from wm_export import export_bundle, export_into
from wm_graph import ModelConfig, forward, init_params, load_checkpoint, save_checkpoint, zero_state
from wm_graph.errors import CheckpointError, ExportError
from wm_graph.shapes import state_leaves
from wm_graph.state import state_from_flat, state_to_flat
from wm_graph.taps import Taps

PRESETS = ("cheems-tiny-moe", "llama-tiny")
FILES = ("model.onnx", "model.ort.onnx")
STATE_TAPS = [
    ("ssd_scan_rope", "state"),
    *(("attention", leaf) for leaf in ("k", "v")),
    *(("keep_window_attention", leaf) for leaf in ("k", "v", "score", "slot_position")),
]
LIMIT = 1e-4  # max abs on logits of scale about 1, float32: see wm_graph.tolerances


@pytest.fixture(scope="session", params=PRESETS)
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny model, exported once."""
    root = tmp_path_factory.mktemp("export")
    cfg = ModelConfig.preset(request.param)
    save_checkpoint(root / "checkpoint", cfg, init_params(cfg, seed=3))
    export_bundle(root / "checkpoint", root / "bundle")
    return root / "checkpoint", root / "bundle"


def random_inputs(cfg: ModelConfig, batch: int, tokens: int, capacity: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the graph for a first call on an empty state."""
    rng = np.random.default_rng(seed)
    state = state_to_flat(cfg, zero_state(cfg, batch, capacity))
    return {
        "tokens": rng.integers(0, cfg.vocab_size, (batch, tokens)),
        "valid": rng.integers(max(1, tokens // 2), tokens + 1, batch),
        "select": np.tile(np.arange(tokens), (batch, 1)),
    } | {name: leaf.numpy() for name, leaf in state.items()}


def eager_outputs(cfg: ModelConfig, params, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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


def session(bundle: Path, file: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 257])
def test_onnx_equals_eager_then_decodes_on(exported, file, batch, tokens):
    checkpoint, bundle = exported
    cfg, params = load_checkpoint(checkpoint)
    run = session(bundle, file)
    inputs = random_inputs(cfg, batch, tokens, capacity=300, seed=tokens)
    for _ in range(3):
        names = [output.name for output in run.get_outputs()]
        got = dict(zip(names, run.run(None, inputs), strict=True))
        assert_same_logits(inputs, got["logits"], eager_outputs(cfg, params, inputs)["logits"])
        rng = np.random.default_rng(tokens)
        inputs = {name: got[f"{name}.next"] for name in inputs if f"{name}.next" in got} | {
            "tokens": rng.integers(0, cfg.vocab_size, (batch, 1)),
            "valid": np.ones(batch, np.int64),
            "select": np.zeros((batch, 1), np.int64),
        }


def test_reference_evaluator_runs_the_portable_file(exported):
    checkpoint, bundle = exported
    cfg, params = load_checkpoint(checkpoint)
    evaluator = onnx.reference.ReferenceEvaluator(str(bundle / "model.onnx"))
    for tokens in (1, 5):
        inputs = random_inputs(cfg, 2, tokens, capacity=9, seed=tokens)
        logits = evaluator.run(["logits"], inputs)[0]
        assert_same_logits(inputs, logits, eager_outputs(cfg, params, inputs)["logits"])


def test_capacity_of_one_runs(exported):
    checkpoint, bundle = exported
    cfg, params = load_checkpoint(checkpoint)
    inputs = random_inputs(cfg, 1, 1, capacity=1)
    for file in FILES:
        assert_same_logits(inputs, session(bundle, file).run(["logits"], inputs)[0], eager_outputs(cfg, params, inputs)["logits"])


@pytest.mark.parametrize("file", FILES)
def test_file_passes_the_full_checker_and_names_no_machine(exported, file):
    _, bundle = exported
    onnx.checker.check_model(str(bundle / file), full_check=True)
    data = (bundle / file).read_bytes()
    assert len(data) < 5_000_000
    for word in (b"site-packages", b".py", str(Path.home()).encode() + b"/", b"stack_trace"):
        assert word not in data


@pytest.mark.parametrize("file", FILES)
def test_every_op_is_a_wm_node_with_a_body(exported, file):
    _, bundle = exported
    model = onnx.load(bundle / file, load_external_data=False)
    nodes = {node.op_type for node in model.graph.node if node.domain == "wm"}
    assert nodes == {function.name for function in model.functions}
    assert all(node.domain in ("", "wm") for node in model.graph.node)
    assert {item.domain: item.version for item in model.opset_import}[""] == 23
    contrib = {item.domain for function in model.functions for item in function.opset_import} - {"", "wm"}
    assert contrib == (set() if file == "model.onnx" else {"com.microsoft"})


@pytest.mark.parametrize("file", FILES)
def test_every_weight_is_read_from_the_bundle_weights_file(exported, file):
    _, bundle = exported
    stored = load_file(bundle / "model.safetensors")
    model = onnx.load(bundle / file, load_external_data=False)
    external = {item.name: item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
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


def test_every_tap_name_is_a_value_of_the_graph(exported):
    checkpoint, bundle = exported
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
        # Half precision rounds weights to 2^-11; eight layers of that on logits of scale 0.2 stay well inside 2 %.
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
