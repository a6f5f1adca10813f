"""`upcycle`: a dense model becomes sparse and computes the same. B rows, T tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cli_support import wm
from helpers import FAMILIES, MODELS, OPTIONS, lively_params, random_tokens
from wm_export import export_bundle
from wm_graph import ModelConfig, forward, load_checkpoint, save_checkpoint, upcycle, zero_state
from wm_graph.errors import ConfigError
from wm_graph.params import params_to_flat
from wm_graph.shapes import count_parameters
from wm_graph.upcycling import CARRIED, _available_memory, upcycle_checkpoint, upcycled_config
from wm_runtimes import open_session

SIZES = {"n_expert": 64, "n_retrieval_head": 2, "n_pick": 4, "d_retrieval": 16}
FLAGS = ("--experts", 64, "--retrieval-heads", 2, "--picks", 4, "--retrieval-width", 16)
DENSE = {name: FAMILIES[name] for name in ("cheems-tiny", "llama-tiny", "doge-tiny", "bamba-tiny")}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bitwise_unchanged(name: str, dtype: torch.dtype) -> None:
    cfg = DENSE[name]
    params = lively_params(cfg, dtype=dtype)
    sparse, sparse_params = upcycle(cfg, params, **SIZES)
    assert {feed_forward for _, feed_forward in sparse.layers} == {"cdmoe"}
    tokens = random_tokens(cfg, 2, 40)
    with torch.no_grad():
        for state, sparse_state in ((None, None), (zero_state(cfg, 2, 40, dtype), zero_state(sparse, 2, 40, dtype))):
            expected, _ = forward(cfg, params, tokens, state)
            assert torch.equal(forward(sparse, sparse_params, tokens, sparse_state)[0], expected)


def test_dense_parameters_load_unchanged_and_the_rest_comes_from_the_seed() -> None:
    cfg = DENSE["cheems-tiny"]
    params = lively_params(cfg)
    dense = params_to_flat(cfg, params)
    first, again, other = (params_to_flat(*upcycle(cfg, params, **SIZES, seed=seed)) for seed in (3, 3, 4))
    fresh = [name for name in first if name not in dense]
    assert {name.rsplit(".", 1)[-1] for name in fresh} == {"query", "keys", "expert_down", "expert_up"}
    assert all(first[name] is tensor for name, tensor in dense.items())
    for name in fresh:
        assert torch.equal(first[name], again[name]), name
        if name.endswith("expert_up"):
            assert not first[name].any(), name
        else:
            assert not torch.equal(first[name], other[name]), name
            assert first[name].std() == pytest.approx(0.02, rel=0.25), name


def test_experts_get_a_gradient_at_once() -> None:
    cfg = DENSE["llama-tiny"]
    sparse, params = upcycle(cfg, lively_params(cfg), **SIZES)
    table = params.layers[0].feed_forward.expert_up.requires_grad_()
    forward(sparse, params, random_tokens(cfg, 1, 8))[0].square().mean().backward()
    assert table.grad is not None
    assert table.grad.abs().max() > 0


def test_from_the_command_line_to_onnx(capfd, tmp_path: Path) -> None:
    cfg = MODELS["llama-20m widths"]
    save_checkpoint(tmp_path / "dense", cfg, lively_params(cfg))
    assert wm(capfd, "init", "cheems-tiny", "-o", tmp_path / "other").code == 0
    for name in CARRIED:
        (tmp_path / "dense" / name).write_text((tmp_path / "other" / name).read_text())
    result = wm(capfd, "upcycle", tmp_path / "dense", "-o", tmp_path / "sparse", *FLAGS, "--seed", 7, "--json")
    assert result.code == 0, result.err
    assert result.json["seed"] == 7
    for name in CARRIED:
        assert (tmp_path / "sparse" / name).read_text() == (tmp_path / "dense" / name).read_text()
    for kind in ("dense", "sparse"):
        export_bundle(tmp_path / kind, tmp_path / f"{kind}.bundle")
    tokens = random_tokens(cfg, 1, 20).numpy()
    logits = []
    for kind in ("dense", "sparse"):
        with open_session(tmp_path / f"{kind}.bundle", batch=1, capacity=24) as session:
            logits.append(np.concatenate([session.prefill(tokens)[:, 0], session.decode([5])]))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=2e-6)  # the residual sum is joined with other nodes


def test_imported_checkpoints_upcycle(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from import_sources import convert, make_doge

    make_doge().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    sparse = upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", **SIZES)
    (cfg, params), (loaded, sparse_params) = load_checkpoint(tmp_path / "dense"), load_checkpoint(tmp_path / "sparse")
    assert loaded == sparse
    tokens = random_tokens(cfg, 2, 20)
    assert torch.equal(forward(sparse, sparse_params, tokens)[0], forward(cfg, params, tokens)[0])


BIASED = next(cfg for cfg in OPTIONS.values() if cfg.mlp_bias)
REFUSED = {
    "experts already": (FAMILIES["cheems-tiny-moe"], {}, "are cdmoe, expected mlp"),
    "other experts beside": (FAMILIES["jamba-tiny"], {}, "are mlp, moe, expected mlp"),
    "no feed-forward": (FAMILIES["mamba2-tiny"], {}, "are none, expected mlp"),
    "no square": (FAMILIES["llama-tiny"], {"n_expert": 60}, "n_expert 60 is not a perfect square"),
    "no pick": (FAMILIES["llama-tiny"], {"n_pick": 0}, "n_pick is 0"),
    "odd width": (FAMILIES["llama-tiny"], {"d_retrieval": 7}, "d_retrieval 7 is odd"),
    "a million million": (
        FAMILIES["llama-tiny"],
        {"n_expert": 10**12},
        r"need 4,096,001.0 GB of memory, [\d,.]+ GB are available; take fewer",
    ),
    "no float holds it": (FAMILIES["llama-tiny"], {"n_expert": 10**400}, "n_expert is above 281474976710656"),
    "wide queries": (FAMILIES["llama-tiny"], {"d_retrieval": 10**12}, "GB of memory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_upcycled_is_refused_in_one_line(case: str) -> None:
    cfg, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        upcycle(cfg, lively_params(cfg), **(SIZES | changes))
    assert "\n" not in str(caught.value)


def test_experts_past_the_memory_are_refused_before_anything_is_drawn(capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = FAMILIES["llama-tiny"]
    save_checkpoint(tmp_path / "dense", cfg, lively_params(cfg))
    sparse = upcycled_config(cfg, SIZES)
    needed = 4 * (count_parameters(sparse) - count_parameters(cfg))
    monkeypatch.setattr("wm_graph.upcycling._available_memory", lambda: needed)
    assert wm(capfd, "upcycle", tmp_path / "dense", "-o", tmp_path / "sparse", *FLAGS).code == 0
    monkeypatch.setattr("wm_graph.upcycling._available_memory", lambda: needed - 1)
    monkeypatch.setattr("wm_graph.upcycling.draw", lambda *args: pytest.fail("drawn"))
    result = wm(capfd, "upcycle", tmp_path / "dense", "-o", tmp_path / "other", *FLAGS)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "the tables of 64 experts need" in result.err
    assert not (tmp_path / "other").exists()


def gives(answer: object) -> Callable[..., object]:
    def call(*_: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


@pytest.mark.parametrize(
    ("meminfo", "pages", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   7 kB\n", 5, 7 * 1024),
        ("MemTotal: 9 kB\n", 5, 25),
        ("MemAvailable: some\n", 5, 25),
        ("no such format", 5, 25),
        (OSError(), 5, 25),
        (OSError(), AttributeError(), None),
        (OSError(), OSError(), None),
        (OSError(), ValueError(), None),
    ],
)
def test_memory_is_what_the_system_says_in_one_way_or_another(monkeypatch, meminfo: object, pages: object, expected: int | None) -> None:
    monkeypatch.setattr("wm_graph.upcycling.Path", lambda _: SimpleNamespace(read_text=gives(meminfo)))
    monkeypatch.setattr("wm_graph.upcycling.os", SimpleNamespace(sysconf=gives(pages)))
    assert _available_memory() == expected


def test_biases_are_refused_and_nothing_is_written(capfd, tmp_path: Path) -> None:
    values = BIASED.to_dict()
    cfg = ModelConfig.from_dict(values | {"layers": [[mixer, "mlp"] for mixer, _ in BIASED.layers]})
    save_checkpoint(tmp_path / "dense", cfg, lively_params(cfg))
    result = wm(capfd, "upcycle", tmp_path / "dense", "-o", tmp_path / "sparse", *FLAGS)
    assert result.code == 2
    assert result.err.startswith("wm: error: upcycle: the mlp layers of")
    assert not (tmp_path / "sparse").exists()
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["mlp_bias"]
