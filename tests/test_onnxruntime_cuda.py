"""Sessions on a GPU through ONNX Runtime: kernels and bodies of every family, graphs, and the bits of Triton's own launches.

B rows, T tokens, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_bundles import DTYPES, PRESETS, bundle_of, missing
from wm_graph.tolerances import model_limit
from wm_runtimes import Session, open_bundle, open_session
from wm_runtimes.snapshot import Array

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CUDA = "onnxruntime-cuda"
WAYS = {"kernels": True, "bodies": False}
WITHOUT_CHOICES = ("llama-tiny", "mamba2-tiny")  # in half precision, another choice explains another logit


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(preset, dtype) -> its bundle, made once."""
    root, made = tmp_path_factory.mktemp("cuda"), {}

    def folder(preset: str, dtype: str) -> Path:
        if (preset, dtype) not in made:
            made[preset, dtype] = bundle_of(root, preset, dtype)
        return made[preset, dtype]

    return folder


def tokens_of(session: Session, rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, session.bundle.limits.vocab_size, (rows, length))


def state_of(session: Session) -> dict[str, Array]:
    return session.snapshot().leaves


def assert_same_bits(got: dict[str, Array], expected: dict[str, Array]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name].view(np.uint8), array.view(np.uint8), err_msg=name)


def limit_of(session: Session, logits: Array) -> float:
    """Two runs of a session's model may be so far apart: each is so far from the oracle."""
    table = model_limit(session.bundle.dtype, CUDA).max_abs
    return 2 * table * max(1.0, float(np.sqrt(np.square(logits, dtype=np.float64).mean())))


each_bundle = [pytest.mark.parametrize("preset", PRESETS), pytest.mark.parametrize("dtype", DTYPES)]
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_kernels_and_bodies_are_within_the_budgets_of_the_oracle(folder_of, preset, dtype):
    """Random rows, prompts and steps, all logits; choices are judged as sets."""
    from wm_runtimes.parity import measure_parity

    labels = [f"{CUDA}:{way}" for way in WAYS]
    report = measure_parity(open_bundle(folder_of(preset, dtype)), labels, draws=16, longest_prompt=70, decode_steps=4)
    assert [row.runtime for row in report.rows] == labels
    for row in report.rows:
        assert row.passed, (row.runtime, row.R, row.max_abs, row.choice_rate, row.failures)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_golden_logits_come_in_place_by_graphs_and_by_copies(folder_of, preset, dtype):
    from wm_runtimes.check import check_bundle

    report = check_bundle(folder_of(preset, dtype), [CUDA])
    assert [row.what for row in report.rows[1:]] == [f"{CUDA}:{way}{tail}" for way in WAYS for tail in ("", " in place")]
    for row in report.rows:
        assert row.passed, row


@each_way
@pytest.mark.parametrize(
    ("preset", "dtype"), [*((p, "fp32") for p in PRESETS), *((p, d) for p in WITHOUT_CHOICES for d in ("fp16", "bf16"))]
)
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(folder_of, preset, dtype, way):
    with open_session(folder_of(preset, dtype), CUDA, batch=3, capacity=100, kernels=WAYS[way]) as session:
        tokens_BT = tokens_of(session, 3, 90)
        whole_BTV = session.prefill(tokens_BT, select=np.tile(np.arange(90), (3, 1)))
        session.reset()
        parts, start = [], 0
        for length in (1, 1, 7, 64, 1, 16):
            part = tokens_BT[:, start : start + length]
            parts.append(session.prefill(part, select=np.tile(np.arange(length), (3, 1))))
            start += length
        assert np.abs(np.concatenate(parts, 1) - whole_BTV).max() <= limit_of(session, whole_BTV)


@each_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_restored_state_goes_on_as_it_did(folder_of, preset, dtype, way):
    with open_session(folder_of(preset, dtype), CUDA, batch=2, capacity=40, kernels=WAYS[way]) as session:
        tokens_BT = tokens_of(session, 2, 30)
        session.prefill(tokens_BT[:, :9], valid=[9, 4])
        before = session.snapshot()
        first = [session.decode(tokens_BT[:, step]) for step in range(9, 14)]
        after = state_of(session)
        session.prefill(tokens_BT[:, 14:])
        session.restore(before)
        second = [session.decode(tokens_BT[:, step]) for step in range(9, 14)]
        np.testing.assert_array_equal(np.stack(first), np.stack(second))
        assert_same_bits(state_of(session), after)


@pytest.mark.parametrize("preset", PRESETS)
def test_snapshots_travel_to_the_cpu_and_back(folder_of, preset):
    """Native kernels keep whole windows, other sessions as many slots as tokens fit."""
    folder = folder_of(preset, "fp32")
    with (
        open_session(folder, CUDA, batch=2, capacity=24) as there,
        open_session(folder, "onnxruntime-cpu", batch=2, capacity=24) as here,
    ):
        tokens_BT = tokens_of(there, 2, 20)
        there.prefill(tokens_BT[:, :9], valid=[9, 5])
        here.restore(there.snapshot())
        for step in range(9, 14):
            got, expected = there.decode(tokens_BT[:, step]), here.decode(tokens_BT[:, step])
            assert np.abs(got - expected).max() <= limit_of(there, expected)
        there.restore(here.snapshot())
        got, expected = there.decode(tokens_BT[:, 15]), here.decode(tokens_BT[:, 15])
        assert np.abs(got - expected).max() <= limit_of(there, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_replayed_steps_give_the_bits_of_launched_ones(folder_of, preset, dtype, batch):
    folder = folder_of(preset, dtype)
    with (
        open_session(folder, CUDA, batch=batch, capacity=40, kernels=True) as replaying,
        open_session(folder, CUDA, batch=batch, capacity=40, kernels=True, capture=False) as launching,
    ):
        tokens_BT = tokens_of(replaying, batch, 30)
        for session in (replaying, launching):
            session.prefill(tokens_BT[:, :5])
        for step in range(5, 25):
            np.testing.assert_array_equal(replaying.decode(tokens_BT[:, step]), launching.decode(tokens_BT[:, step]), err_msg=str(step))
            if step == 12:
                for session in (replaying, launching):  # other shapes between replays use the same memory
                    session.prefill(tokens_BT[:, 26:29])
        assert_same_bits(state_of(replaying), state_of(launching))
        assert isinstance(replaying.steps.reason, str)
        assert (replaying.steps.captured, replaying.steps.reason, launching.steps.captured) == (1, "", 0)
        assert replaying.steps.replays == 19


def test_a_few_rows_of_a_batch_are_stepped_without_the_others(folder_of):
    with open_session(folder_of("cheems-tiny", "bf16"), CUDA, batch=4, capacity=40, kernels=True) as session:
        tokens_BT = tokens_of(session, 4, 12)
        session.prefill(tokens_BT[:, :6])
        for rows in ([1, 2], [3], [2, 0], [1, 2]):
            before = state_of(session)
            session.decode(tokens_BT[: len(rows), 8], rows=rows)
            others = [row for row in range(4) if row not in rows]
            after = state_of(session)
            for name, array in before.items():
                np.testing.assert_array_equal(after[name][others].view(np.uint8), array[others].view(np.uint8), err_msg=name)
            assert any((after[name][rows].view(np.uint8) != array[rows].view(np.uint8)).any() for name, array in before.items())


def test_steps_of_another_thread_are_right(folder_of):
    """Graphs belong to the thread that captured them."""
    from concurrent.futures import ThreadPoolExecutor

    folder = folder_of("cheems-tiny-moe", "bf16")
    with (
        open_session(folder, CUDA, capacity=40, kernels=True) as session,
        open_session(folder, CUDA, capacity=40, kernels=True, capture=False) as plain,
    ):
        tokens_1T = tokens_of(session, 1, 12)
        expected = [plain.decode(tokens_1T[:, step]) for step in range(12)]
        got = [session.decode(tokens_1T[:, step]) for step in range(4)]
        with ThreadPoolExecutor(1) as thread:
            got += [thread.submit(session.decode, tokens_1T[:, step]).result() for step in range(4, 8)]
        got += [session.decode(tokens_1T[:, step]) for step in range(8, 12)]
        np.testing.assert_array_equal(np.stack(got), np.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_op_with_kernels_is_a_node_on_the_gpu_and_only_sizes_are_on_the_host(folder_of, preset, dtype):
    bundle = open_bundle(folder_of(preset, dtype))
    assert bundle.manifest["native"]["without"] == []
    with open_session(bundle, CUDA, capacity=16, kernels=True) as session:
        placed = session.placement()
        import onnx

        nodes = onnx.load(str(bundle.file("model.cuda.onnx")), load_external_data=False).graph.node
        mine = {node.name for node in nodes if node.domain == "wm"}
        assert mine
        assert mine <= set(placed["CUDAExecutionProvider"]), mine - set(placed["CUDAExecutionProvider"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plans_update_every_state_in_place(folder_of, preset):
    """Which leaves a session may bind to input and output: all but the position, whose next is the sum of two inputs."""
    bundle = open_bundle(folder_of(preset, "bf16"))
    found = {}
    for node, entry in _nodes_with_entries(bundle):
        places = [one["name"] for one in entry["inputs"]]
        for name, output in zip(node.output, entry["outputs"], strict=True):
            if output["alias"] is not None:
                found[name] = node.input[places.index(output["alias"])]
    assert found == {leaf.output: leaf.name for leaf in bundle.state if leaf.alias}
    assert [leaf.name for leaf in bundle.state if not leaf.alias] == ["position"]


def test_weights_are_on_the_gpu_once(folder_of):
    """A tied head and an embedding are one initializer of the graph that runs."""
    import onnx

    for preset in PRESETS:
        model = onnx.load(str(open_bundle(folder_of(preset, "bf16")).file("model.cuda.onnx")), load_external_data=False)
        places = [(item.external_data[1].value, item.external_data[2].value) for item in model.graph.initializer if item.external_data]
        assert len(places) == len(set(places))


# The bits of Triton's launches


def _nodes_with_entries(bundle: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The graph's wm nodes and the entries of the plans that serve them."""
    import onnx

    plans = json.loads((bundle.path / "kernels/plans.json").read_text())
    model = onnx.load(str(bundle.file("model.cuda.onnx")), load_external_data=False)
    found = []
    for node in model.graph.node:
        given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for entry in plans["ops"]:
            wanted = entry["onnx"] or {"op_type": "", "attributes": {}}
            if node.op_type == wanted["op_type"] and all(_equal(given[name], value) for name, value in wanted["attributes"].items()):
                found.append((node, entry))
                break
    return found


def _equal(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return bool(np.float32(given) == np.float32(wanted["float"]))
    return bool((given.decode() if isinstance(given, bytes) else given) == wanted)


def _plain(schema: Any, key: dict[str, Any]) -> dict[str, Any]:
    """Plain arguments as the torch op takes them."""
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    turns = {"float": float, "bool": bool, "int": int, "str": str}
    return {name: turns[kinds[name]](value) for name, value in key.items()}


# Eager takes products of another library, or torch's own operations around the kernel, for these calls.
_OTHERWISE = {
    "prompt": ("attention", "attention_rope", "expert_mix", "moe_mix", "scored_attention"),
    "step": ("attention_rope", "scored_attention"),
}


@pytest.mark.parametrize("call", ["prompt", "step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_node_gives_the_bits_of_the_same_kernels_launched_by_triton(folder_of, preset, dtype, call):
    """What each node got and gave is told by the session; the op is called in eager on the same."""
    import onnx
    import torch

    import wm_kernels  # noqa: F401  (registers the ops)
    from wm_graph.checkpoints import load_tensors
    from wm_runtimes.promoted_session import open_promoting

    bundle = open_bundle(folder_of(preset, dtype))
    nodes = [(node, entry) for node, entry in _nodes_with_entries(bundle) if entry["op"].removeprefix("wm::") not in _OTHERWISE[call]]
    wanted = {f"{node.name} in {i}": (node.name, -1 - i) for node, _ in nodes for i in range(len(node.input))}
    wanted |= {f"{node.name} out {i}": (node.name, i) for node, _ in nodes for i in range(len(node.output))}
    rows, length = 2, 1 if call == "step" else 37
    own = {item.name: onnx.numpy_helper.to_array(item) for item in _inside(bundle)}
    weights = load_tensors(bundle.path)
    compared = 0
    with open_promoting(bundle, CUDA, rows, 64, wanted, kernels=True) as session:
        tokens_BT = tokens_of(session, rows, 60)
        session.prefill(tokens_BT[:, :7], valid=[7, 5])
        place_B = session.position
        before = session._buffers.save(0, rows)
        valid_B = np.array([length, max(1, length - 3)])
        session.prefill(tokens_BT[:, 7 : 7 + length], valid=valid_B)
        state = {leaf.name: _tensor(before[leaf.name], leaf.dtype) for leaf in bundle.state if leaf.name in before}
        after = {f"{name}.next": value for name, value in session._buffers.save(0, rows).items()}
        given = state | {"valid": torch.from_numpy(valid_B), "position": torch.from_numpy(place_B)}
        for node, entry in nodes:
            dtypes = entry["dtypes"]
            tensors: dict[str, Any] = {}
            for index, one in enumerate(entry["inputs"]):
                name = node.input[index] if index < len(node.input) else ""
                if not name:
                    tensors[one["name"]] = None
                    continue
                told = session.told.get(f"{node.name} in {index}")
                value = torch.from_numpy(told) if told is not None else given.get(name)
                value = weights.get(name) if value is None else value
                value = torch.from_numpy(np.array(own[name])) if value is None else value
                tensors[one["name"]] = value.to(getattr(torch, dtypes[one["name"]])).cuda().contiguous()
            op = getattr(torch.ops.wm, entry["op"].removeprefix("wm::")).default
            with torch.inference_mode():
                out = op(**tensors, **_plain(op._schema, entry["key"]))
            for index, value in enumerate((out,) if isinstance(out, torch.Tensor) else out):
                expected = value.cpu()
                if node.output[index] in after:
                    got = _tensor(after[node.output[index]], str(expected.dtype).removeprefix("torch."))
                else:
                    got = torch.from_numpy(session.told[f"{node.name} out {index}"])
                shown = f"{node.name}, output {index}: {(got != expected.to(got.dtype)).sum()} of {got.numel()} values differ"
                if index == 0 and valid_B.min() < length and got.ndim >= 2 and got.shape[:2] == (rows, length):
                    got, expected = (torch.cat([x[row, :valid] for row, valid in enumerate(valid_B)]) for x in (got, expected))
                assert torch.equal(got, expected.to(got.dtype)), shown
                compared += got.numel()
    assert compared


def _inside(bundle: Any) -> list[Any]:
    """Initializers that the header holds itself."""
    import onnx

    model = onnx.load(str(bundle.file("model.cuda.onnx")), load_external_data=False)
    return [item for item in model.graph.initializer if not item.external_data]


def _tensor(array: Array, dtype: str) -> Any:
    import torch

    value = torch.from_numpy(array)
    return value.view(torch.bfloat16) if dtype == "bfloat16" else value
