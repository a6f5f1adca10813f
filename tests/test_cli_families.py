"""Every verb of `wm` on the tiny model of every family; those of the older families are in test_cli.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_support import make_bundle, wm
from helpers import FAMILIES, NEW_FAMILIES, random_tokens, sharp_params
from wm_graph import forward, load_checkpoint, save_checkpoint
from wm_graph.params import params_to_flat
from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters

DENSE = [name for name, cfg in FAMILIES.items() if {feed_forward for _, feed_forward in cfg.layers} == {"mlp"}]
HUGGING_FACE = {f"{kind}-tiny": kind for kind in ("llama", "doge", "mamba2", "jamba", "bamba")}


@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_every_verb_works(capfd, tmp_path: Path, made, name: str) -> None:
    checkpoint, bundle = make_bundle(tmp_path, preset=name) if name in PRESETS else made(FAMILIES[name])
    facts = [wm(capfd, "info", each, "--json").json for each in (checkpoint, bundle)]
    assert {fact["parameters"] for fact in facts} == {count_parameters(FAMILIES[name])}
    result = wm(capfd, "check", bundle, "--runtimes", "eager,onnxruntime-cpu", "--json")
    assert (result.code, result.json["passed"]) == (0, True), result
    result = wm(capfd, "parity", bundle, "--runtimes", "eager,onnxruntime-cpu", "--draws", 4, "--json")
    assert (result.code, result.json["passed"]) == (0, True), result
    eager, ort = (
        wm(capfd, "generate", bundle, "--prompt-ids", "72,101,108", "--runtime", runtime, "--max-tokens", 8, "--json")
        for runtime in ("eager", "onnxruntime-cpu")
    )
    assert eager.code == 0, eager.err
    assert eager == ort


@pytest.mark.parametrize("name", FAMILIES)
def test_bench_measures_every_family(capfd, made, name: str) -> None:
    _, bundle = made(FAMILIES[name])
    argv = ("--runtimes", "onnxruntime-cpu", "--prompt-tokens", 5, "--new-tokens", 2, "--repeats", 1, "--json")
    result = wm(capfd, "bench", bundle, *argv)
    assert result.code == 0, result.err
    (row,) = result.json["results"]
    assert row.pop("runtime") == "onnxruntime-cpu"
    assert all(value > 0 for value in row.values())


@pytest.mark.parametrize("name", DENSE)
def test_upcycled_family_generates_the_same_tokens_in_onnxruntime(capfd, tmp_path: Path, made, name: str) -> None:
    cfg = FAMILIES[name]
    cfg = replace(cfg, layers=tuple(dict.fromkeys(cfg.layers)))  # a layer of each kind: every case exports twice
    checkpoint, bundle = made(cfg)
    sizes = ("--experts", 16, "--retrieval-heads", 2, "--picks", 2, "--retrieval-width", 8)
    made_sparse = wm(capfd, "upcycle", checkpoint, "-o", tmp_path / "sparse", *sizes, "--json")
    assert made_sparse.code == 0, made_sparse.err
    assert made_sparse.json["parameters"] > count_parameters(cfg)
    exported = wm(capfd, "export", tmp_path / "sparse", "-o", tmp_path / "bundle")
    assert exported.code == 0, exported.err
    rest = ("--prompt-ids", "72,101,108", "--runtime", "onnxruntime-cpu", "--max-tokens", 8, "--json")
    dense, sparse = (wm(capfd, "generate", folder, *rest) for folder in (bundle, tmp_path / "bundle"))
    assert dense.code == 0, dense.err
    assert sparse == dense


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_family_exported_for_transformers_loads_there_and_here(capfd, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    cfg, params, checkpoint = FAMILIES[name], sharp_params(FAMILIES[name]), tmp_path / "checkpoint"
    save_checkpoint(checkpoint, cfg, params)
    exported = wm(capfd, "export", checkpoint, "--targets", "hf", "-o", tmp_path / "hf")
    assert exported.code == 0, exported.err
    imported = wm(capfd, "import", tmp_path / "hf", "-o", tmp_path / "again", "--json")
    assert imported.code == 0, imported.err
    other, again = load_checkpoint(tmp_path / "again")
    expected, found = params_to_flat(cfg, params), params_to_flat(other, again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    tokens = random_tokens(cfg, 1, 13)
    attention = {"attn_implementation": "eager"} if name == "doge-tiny" else {}  # its default is not causal in transformers 5.17
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **attention).eval()
    assert model.config.model_type == HUGGING_FACE[name]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, use_cache=False).logits, forward(cfg, params, tokens)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {*HUGGING_FACE}))
def test_family_that_transformers_does_not_know_is_not_exported_for_it(capfd, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", FAMILIES[name], sharp_params(FAMILIES[name]))
    refused = wm(capfd, "export", tmp_path / "checkpoint", "--targets", "hf", "-o", tmp_path / "hf")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "no Hugging Face architecture" in refused.err
    assert not (tmp_path / "hf").exists()
