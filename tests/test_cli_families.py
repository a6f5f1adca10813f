"""Every verb of `wm` on the tiny model of every new family."""

from pathlib import Path

import pytest

from cli_support import make_bundle, wm
from helpers import FAMILIES, NEW_FAMILIES
from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters


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
