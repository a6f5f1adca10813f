import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy_bundle import CONFIG, make_toy_bundle, write_manifest
from wm_graph.errors import BundleError
from wm_runtimes import open_bundle, sha256_of

NULL: Any = None


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle")


def manifest_of(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return manifest


def refused(path: Path, message: str, **options: bool) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(path, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_bundle_opens_as_typed_data(toy: Path) -> None:
    bundle = open_bundle(toy, verify=True)
    assert bundle.config == CONFIG
    assert bundle.dtype == "float32"
    assert [leaf.name for leaf in bundle.state][:2] == ["position", "layers.0.ssd"]
    assert bundle.state[3].reset == float("-inf")
    assert bundle.state[4].concrete_shape(2, 5, 3) == (2, 3)
    assert bundle.limits.vocab_size == 16
    assert bundle.tokens.stop == (1,)
    assert bundle.file("model.onnx") == toy / "model.onnx"
    assert bundle.files["model.onnx"].sha256 == sha256_of(toy / "model.onnx")
    with pytest.raises(AttributeError):
        bundle.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        bundle.files["more"] = bundle.files["model.onnx"]  # type: ignore[index]


def test_opening_imports_neither_torch_nor_onnx_nor_onnxruntime(toy: Path) -> None:
    program = (
        "import sys; import wm_runtimes; wm_runtimes.open_bundle(sys.argv[1], verify=True);"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(toy)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_follows_weights_and_configuration_not_the_folder(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    assert open_bundle(toy).fingerprint == open_bundle(tmp_path / "copy").fingerprint
    assert open_bundle(toy).fingerprint != open_bundle(make_toy_bundle(tmp_path / "half", dtype="float16")).fingerprint


def test_a_file_the_bundle_lacks_is_named_with_those_it_has(toy: Path) -> None:
    with pytest.raises(BundleError, match=r"no engine\.plan; it holds model\.onnx, model\.ort\.onnx, model\.safetensors"):
        open_bundle(toy).file("engine.plan")


# Files


def test_a_missing_folder_or_manifest_is_refused(toy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such bundle folder")
    refused(toy / "model.onnx", "no such bundle folder")
    (toy / "manifest.json").unlink()
    refused(toy, r"manifest\.json: no such file")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"schema": 2}', '{"schema": true}', "{}", "\xff", "[" * 100_000])
def test_a_damaged_manifest_is_refused(toy: Path, text: str) -> None:
    (toy / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(toy, r"manifest\.json: (not valid JSON|expected a JSON object|schema)")


@pytest.mark.parametrize("name", ["model.onnx", "model.ort.onnx", "model.safetensors"])
def test_a_missing_shortened_or_grown_file_is_named(toy: Path, name: str) -> None:
    data = (toy / name).read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        (toy / name).write_bytes(changed)
        refused(toy, rf"{name}: {len(changed)} bytes, manifest.json says {len(data)}")
    (toy / name).unlink()
    refused(toy, rf"{name}: missing")
    (toy / name).mkdir()
    refused(toy, rf"{name}: missing")


def test_a_flipped_byte_is_found_by_verify_alone(toy: Path) -> None:
    data = bytearray((toy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (toy / "model.safetensors").write_bytes(data)
    open_bundle(toy)
    refused(toy, r"model\.safetensors: SHA-256 .*, manifest\.json says", verify=True)


def header(values: Any) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"\xff" * 64,
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{x",
        header([]),
        header({"w": 1}),
        header({"w": {"dtype": "F128", "shape": [1], "data_offsets": [0, 16]}}) + bytes(16),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}) + bytes(4),
        header({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}) + bytes(4),
    ],
)
def test_an_implausible_safetensors_header_is_refused(toy: Path, data: bytes) -> None:
    (toy / "model.safetensors").write_bytes(data)
    write_manifest(toy, {key: value for key, value in manifest_of(toy).items() if key != "files"})
    refused(toy, r"model\.safetensors: ")


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x0a", b"garbage", b"\x08\x0a\x3a\xff\x01", b"<html></html>", b"\x00" * 64, b"\x3a\xff\xff\xff\xff\xff\xff"]
)
def test_a_file_that_is_no_onnx_model_is_refused(toy: Path, data: bytes) -> None:
    (toy / "model.onnx").write_bytes(data)
    write_manifest(toy, {key: value for key, value in manifest_of(toy).items() if key != "files"})
    refused(toy, r"model\.onnx: not an ONNX model")


@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_file_open_or_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = make_toy_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")
    rest = {key: value for key, value in manifest_of(path).items() if key != "files"}
    for name in ("model.safetensors", "model.onnx"):
        (path / name).write_bytes(data)
        write_manifest(path, rest)
        message = ""
        try:
            open_bundle(path)
        except BundleError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "/etc/hostname",
        "../secret",
        "a/../../secret",
        "..",
        ".",
        "",
        "a//b",
        "./a",
        "a\\b",
        "..\\secret",
        "C:secret",
        "a\0b",
        "manifest.json",
    ],
)
def test_a_listed_path_that_leaves_the_bundle_is_refused(toy: Path, name: str) -> None:
    (toy.parent / "secret").write_text("x")
    manifest = manifest_of(toy)
    manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    (toy / "manifest.json").write_text(json.dumps(manifest))
    refused(toy, "expected a plain path below the bundle")


def test_a_link_that_leaves_the_bundle_is_refused(toy: Path) -> None:
    (toy / "model.onnx").rename(toy.parent / "outside.onnx")
    (toy / "model.onnx").symlink_to(toy.parent / "outside.onnx")
    refused(toy, r"model\.onnx: a link that leaves the bundle")


def test_a_bundle_reached_through_a_link_opens(toy: Path) -> None:
    (toy.parent / "link").symlink_to(toy)
    open_bundle(toy.parent / "link")


# Fields


@pytest.mark.parametrize(
    "field", ["name", "config", "dtype", "opset", "parameters", "state", "files", "versions", "limits", "tokens", "chat_template"]
)
def test_a_missing_or_mistyped_field_is_named(toy: Path, field: str) -> None:
    manifest = manifest_of(toy)
    value = manifest.pop(field)
    (toy / "manifest.json").write_text(json.dumps(manifest))
    refused(toy, f"field '{field}' is missing")
    for wrong in (1.5, True, "text" if not isinstance(value, str | None) else 7):
        (toy / "manifest.json").write_text(json.dumps(manifest | {field: wrong}))
        refused(toy, field)


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown dtype": ({"dtype": "int4"}, "dtype is 'int4', expected one of float32"),
    "bad config": ({"config": CONFIG.to_dict() | {"n_head": 0}}, "n_head is 0"),
    "unknown config field": ({"config": CONFIG.to_dict() | {"colour": 1}}, "unknown field 'colour'"),
    "config layers of numbers": ({"config": CONFIG.to_dict() | {"layers": [[1, 2]]}}, "config"),
    "negative parameters": ({"parameters": -1}, "parameters is -1, expected at least 0"),
    "limits disagree": ({"limits": {"max_position": 8, "vocab_size": 17}}, "vocab_size is 17, config.vocab_size is 16"),
    "no position": ({"limits": {"max_position": 0, "vocab_size": 16}}, "max_position is 0"),
    "positions too large": ({"limits": {"max_position": 2**25, "vocab_size": 16}}, "exact up to 16777216"),
    "token out of range": ({"tokens": {"bos": 16, "eos": NULL, "pad": NULL, "stop": [], "add_bos": False}}, "id 16 is outside"),
    "stop out of range": ({"tokens": {"bos": NULL, "eos": NULL, "pad": NULL, "stop": [-1], "add_bos": False}}, "id -1 is outside"),
    "stop of text": ({"tokens": {"bos": NULL, "eos": NULL, "pad": NULL, "stop": ["x"], "add_bos": False}}, "id 'x'"),
    "add_bos without bos": ({"tokens": {"bos": NULL, "eos": NULL, "pad": NULL, "stop": [], "add_bos": True}}, "bos is null"),
    "state empty": ({"state": []}, "needs a leaf 'position'"),
    "state of numbers": ({"state": [1]}, r"state\[0\] is 1, expected an object"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_value_out_of_range_is_named(tmp_path: Path, case: str) -> None:
    overrides, message = BAD_FIELDS[case]
    refused(make_toy_bundle(tmp_path / "bundle", **overrides), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "colour"}, "kind 'colour'"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"shape": ["capacity"]}, "expected 'batch'"),
        ({"shape": ["batch", 0]}, "shape"),
        ({"shape": ["batch", "width"]}, "shape"),
        ({"shape": ["batch", [1]]}, "shape"),
        ({"shape": [["batch"]]}, "shape"),
        ({"reset": "inf"}, "resets to 'inf'"),
        ({"reset": NULL}, "reset"),
        ({"alias": 1}, "alias"),
        ({"name": "position"}, "share a name"),
        ({"output": "position.next"}, "share a name"),
    ],
)
def test_a_damaged_state_leaf_is_named(toy: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = manifest_of(toy)["state"]
    state[1] |= change
    refused(make_toy_bundle(tmp_path / "other", state=state), message)


@pytest.mark.parametrize(
    "entry",
    [1, {}, {"sha256": "0" * 64}, {"sha256": "0" * 63, "size": 1}, {"sha256": "Z" * 64, "size": 1}, {"sha256": "0" * 64, "size": -1}],
)
def test_a_damaged_file_entry_is_named(toy: Path, entry: Any) -> None:
    manifest = manifest_of(toy)
    manifest["files"]["model.onnx"] = entry
    (toy / "manifest.json").write_text(json.dumps(manifest))
    refused(toy, r"files\['model\.onnx'\]")


def test_the_weights_must_be_listed(toy: Path) -> None:
    manifest = manifest_of(toy)
    del manifest["files"]["model.safetensors"]
    (toy / "manifest.json").write_text(json.dumps(manifest))
    refused(toy, "files lists no model.safetensors")
