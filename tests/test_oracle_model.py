"""wm_graph in float64 against `oracles.model_logits`, which shares no code with it: every option, every op output, every state.

T tokens, V vocabulary, K kv heads, P head dim, S cache capacity, W slots.
"""

import ast
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
import wm_kernels as wm
from helpers import lively_params
from oracle_grid import ALL, GRID, STATIC
from wm_graph.config import FORMS, ModelConfig
from wm_graph.oracle import oracle_forward
from wm_graph.params import Params, map_tensors, params_to_flat
from wm_graph.state import zero_state
from wm_graph.taps import ONLY_IN_GRAPHS, OP_OUTPUTS, Taps

LIMIT = 1e-12  # of an output's largest value: thousands of float64 roundings; the largest seen is 6e-14, after eight layers of a loud draw
LENGTH = 70  # longer than the windows of all small models and than a chunk of a scan; ids do not repeat: no two keys have one score
CUTS = (9, 1, 1, 20)  # a prompt in pieces: chunks, single steps, and the rest


def drawn_params(cfg: ModelConfig, loud: bool = False) -> Params:
    """Lively parameters in float64; loud ones have projections four times as large, so that steps, decays and scores differ more."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: Tensor) -> Tensor:
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "mask":  # 0, or from 0.2 to 1.4, some of which round to 0
            tensor = tensor * (0.2 + 1.2 * torch.rand(tensor.shape, generator=generator))
            if cfg.ifa_mask == "static_ste":
                # Its first key is never hidden: a query that sees hidden keys alone would compare numbers of 1e9 with each other.
                tensor = torch.cat([torch.ones_like(tensor[:, :1]), tensor[:, 1:]], 1)
        projects = tensor.ndim > 1 and leaf not in ("embedding", "head", "mask", "A_log")
        return tensor.double() * (4 if loud and projects else 1)

    return map_tensors(lively_params(cfg, seed=int(loud)), change)  # type: ignore[no-any-return]


def drawn_tokens(cfg: ModelConfig) -> Tensor:
    """[1, T] ids of which none repeats."""
    return torch.randperm(cfg.vocab_size, generator=torch.Generator().manual_seed(0))[None, : min(LENGTH, cfg.vocab_size)]


def oracle_run(cfg: ModelConfig, params: Params, tokens_BT: Tensor) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    notes = oracles.Notes()
    flat = {name: tensor.numpy() for name, tensor in params_to_flat(cfg, params).items()}
    return oracles.model_logits(cfg, flat, tokens_BT[0].tolist(), notes), notes.values


@cache
def drawn(name: str, loud: bool = False) -> tuple[Params, Tensor, np.ndarray, dict[str, list[np.ndarray]]]:
    cfg = ALL[name]
    params, tokens_BT = drawn_params(cfg, loud), drawn_tokens(cfg)
    return params, tokens_BT, *oracle_run(cfg, params, tokens_BT)


def pairs(taps: dict[str, Tensor], notes: dict[str, list[np.ndarray]]) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, values of wm, values of the oracle) of every op output in the order of execution, in one shape where they have one."""
    for name, tap in taps.items():
        call, output = name.rsplit(".", 1)
        found, entries = tap.numpy(), notes.get(name)
        if entries is None:
            yield name, found, None
        elif output == "state":
            yield name, found[0], entries[-1]
        elif "keep_window_attention" in call and output != "out":
            yield name, by_position(found[0], taps[f"{call}.slot_position"].numpy()[0]), entries[-1]
        elif output in ("k", "v", "score"):
            yield name, np.moveaxis(found[0], 1, 0)[: len(entries)], np.stack(entries)  # cells of the cache, one per token
        else:
            expected = np.stack(entries)
            yield name, found.reshape(expected.shape) if found.size == expected.size else found, expected


def by_position(slot_KWx: np.ndarray, position_KW: np.ndarray) -> np.ndarray:
    """The slots in use of every head in the order of their positions."""
    used = [[slot for slot in np.argsort(row) if row[slot] >= 0] for row in position_KW]
    return np.array([values[slots] for values, slots in zip(slot_KWx, used, strict=True)])


def differs(found: np.ndarray, expected: np.ndarray | None) -> bool:
    if expected is None or found.shape != expected.shape:
        return True
    return not np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


def first_difference(taps: dict[str, Tensor], notes: dict[str, list[np.ndarray]]) -> str | None:
    """The first op output, in the order of execution, that is not the oracle's."""
    return next((name for name, found, expected in pairs(taps, notes) if differs(found, expected)), None)


@pytest.mark.parametrize("loud", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_every_op_output_and_the_logits_are_the_oracle_s(name, loud):
    params, tokens_BT, expected_TV, notes = drawn(name, loud)
    taps = Taps()
    logits_BTV, _ = oracle_forward(ALL[name], params, tokens_BT, taps=taps)
    assert first_difference(taps.values, notes) is None
    assert not differs(logits_BTV[0].numpy(), expected_TV)
    # The other way: what the oracle writes down and wm does not is a state that this call has not, or the other cut of attention into ops.
    for missing in set(notes) - set(taps.values):
        call, output = missing.rsplit(".", 1)
        assert output in ("k", "v", "score", "slot_position") or call.rsplit(".", 1)[1] in ("rope", "attention", "attention_rope"), missing


@pytest.mark.parametrize("hidden", [-0.9, -7.0])
@pytest.mark.parametrize("seen", [1.8, 9.0])
def test_a_static_mask_of_inner_function_attention_is_the_oracle_s_below_0_and_above_1(hidden, seen):
    """No key counts for more than a seen one, and none is hidden deeper than another: the first queries see hidden keys alone."""
    cfg = next(cfg for cfg in ALL.values() if cfg.ifa_mask == "static_ste")
    values_S = torch.tensor([hidden, 0.2, 0.0, 0.4, 1.0, seen, hidden, 0.7])

    def change(name: str, tensor: Tensor) -> Tensor:
        return values_S[torch.arange(tensor.shape[1]) % 8].to(tensor.dtype).repeat(len(tensor), 1) if name.endswith(".mask") else tensor

    params = map_tensors(drawn_params(cfg), change)
    tokens_BT = drawn_tokens(cfg)
    logits_BTV, _ = oracle_forward(cfg, params, tokens_BT)
    expected_TV, _ = oracle_run(cfg, params, tokens_BT)
    # Scores beside -1e9 keep 7 digits in float64.
    assert np.abs(logits_BTV[0].numpy() - expected_TV).max() <= 1e-5 * np.abs(expected_TV).max()


@pytest.mark.parametrize("name", ALL)
def test_every_op_output_and_state_of_a_call_with_a_state_is_the_oracle_s(name):
    params, tokens_BT, expected_TV, notes = drawn(name)
    taps, state = Taps(), zero_state(ALL[name], 1, tokens_BT.shape[1] + 3, torch.float64)
    logits_BTV, state = oracle_forward(ALL[name], params, tokens_BT, state, taps=taps)
    assert first_difference(taps.values, notes) is None
    assert not differs(logits_BTV[0].numpy(), expected_TV)


@pytest.mark.parametrize("name", STATIC)
def test_logits_and_states_of_a_prompt_in_pieces_are_the_oracle_s(name):
    params, tokens_BT, expected_TV, notes = drawn(name)
    state, parts = zero_state(ALL[name], 1, tokens_BT.shape[1] + 3, torch.float64), []
    for piece_BT in tokens_BT.split([*CUTS, tokens_BT.shape[1] - sum(CUTS)], 1):
        taps = Taps()
        part_BTV, state = oracle_forward(ALL[name], params, piece_BT, state, taps=taps)
        parts.append(part_BTV)
    assert not differs(torch.cat(parts, 1)[0].numpy(), expected_TV)
    lasting = ("state", "k", "v", "score", "slot_position")
    kept = {name: tap for name, tap in taps.values.items() if name.endswith(tuple(f".{output}" for output in lasting))}
    assert first_difference(kept, notes) is None


# The start of a grid model's name, an option that the oracle is told wrongly, and the op that must differ first.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("ends", {"norm_eps": 1.001e-6}, "attention_rope"),
    ("ends", {"rope_theta": 10001.0}, "rope_angles"),
    ("attention, attention_bias False, qk_norm False, rotary_dim 4", {"attention_rope": False}, "rope_angles"),
    ("attention, attention_bias True", {"attention_bias": False}, "attention"),
    ("attention, attention_bias False, qk_norm True", {"qk_norm": False}, "attention"),
    ("attention, attention_bias False, qk_norm False, rotary_dim 4", {"rotary_dim": 8}, "rope_angles"),
    ("ends, learned_residual True", {"learned_residual": False}, "residual_rms_norm"),
    ("ends, learned_residual False, tie_embeddings True, mlp_bias True", {"mlp_bias": False}, "ssd_scan_rope"),
    ("scaling, rope_scaling linear", {"rope_factor": 2.501}, "rope_angles"),
    ("scaling, rope_scaling llama3", {"rope_low": 1.501}, "rope_angles"),
    ("scaling, rope_scaling llama3", {"rope_high": 5.01}, "rope_angles"),
    ("scaling, rope_scaling llama3", {"rope_original": 31}, "rope_angles"),
    ("scaling, rope_scaling dynamic", {"rope_original": 31}, "rope_angles"),
    ("scans, ssd_group 1, ssd_rope True", {"ssd_rope": False}, "rope_angles"),
    ("scans, ssd_group 2, ssd_rope True, dt_min 0.03", {"dt_min": 0.0301}, "ssd_scan_rope"),
    ("scans, ssd_group 2, ssd_rope False, dt_max 0.02", {"dt_max": 0.0201}, "ssd_scan"),
    ("mamba, conv_bias True", {"conv_bias": False}, "causal_conv1d"),
    ("mamba, conv_bias True, mamba_bias True", {"mamba_bias": False}, "causal_conv1d"),
    ("mamba, conv_bias True, mamba_bias True, mamba1_norm True", {"mamba1_norm": False}, "selective_scan"),
    ("window, dma_mask keep_window, keep_window 6", {"keep_window": 7}, "keep_window_attention"),
    ("window, dma_mask keep_window, keep_window 6", {"dma_mask": "log"}, "keep_window_attention"),
    ("scores, dma_mask additive", {"dma_mask": "binary"}, "scored_attention"),
    ("scores, dma_mask binary, dma_heads query", {"dma_mask": "additive"}, "scored_attention"),
    ("scores, dma_mask ratio", {"dma_ratio": 0.38}, "scored_attention"),
    ("inner function, ifa_form topk_sum", {"ifa_form": "softmax"}, "attention_rope"),
    ("inner function, ifa_form topk_sum", {"ifa_pick": 1}, "router_topk"),
    ("inner function, ifa_form softmax, ifa_head 2, ifa_pick 2, ifa_mask static_hard", {"ifa_mask": "static_ste"}, "scored_attention"),
    ("cdmoe, cdmoe_form c1_parallel", {"cdmoe_form": "c1_serial"}, "product_key_topk"),
    ("moe, moe_form gated, moe_normalize False", {"moe_normalize": True}, "router_topk"),
    ("moe, moe_form shared_expert_isolated, moe_normalize True, n_pick 1", {"n_pick": 2}, "router_topk"),
]


@pytest.mark.parametrize(("start", "wrong", "op"), WRONG, ids=[f"{start}: {wrong}" for start, wrong, _ in WRONG])
def test_an_oracle_with_one_wrong_option_disagrees_first_at_the_op_that_reads_it(start, wrong, op):
    cfg = next(cfg for name, cfg in GRID.items() if name.startswith(start))
    params, tokens_BT, taps = drawn_params(cfg), drawn_tokens(cfg), Taps()
    oracle_forward(cfg, params, tokens_BT, taps=taps)
    _, notes = oracle_run(replace(cfg, **wrong), params, tokens_BT)
    name = first_difference(taps.values, notes)
    assert name is not None
    assert op in name.split(".")


def reads(cfg: ModelConfig) -> set[tuple[str, str]]:
    """(option, form) of every option of forms that a layer of the model reads."""
    parts = {part for layer in cfg.layers for part in layer}
    rotates = (cfg.ssd_rope and "ssd" in parts) or (cfg.attention_rope and "attention" in parts)
    used = {
        "dma": "dynamic_mask_attention" in parts,
        "ifa": "inner_function_attention" in parts,
        "cdmoe": "cdmoe" in parts,
        "moe": "moe" in parts,
        "rope": rotates,
    }
    return {(option, getattr(cfg, option)) for option in FORMS if used[option.split("_")[0]]}


def test_every_form_of_every_option_is_in_a_model():
    found = set().union(*(reads(cfg) for cfg in ALL.values()))
    assert found == {(option, form) for option, forms in FORMS.items() for form in forms}


def test_every_op_has_an_oracle_and_is_in_a_model():
    runs = (oracle_run(cfg, drawn_params(cfg), drawn_tokens(cfg)[:, :2]) for cfg in GRID.values())
    written = {part for _, notes in runs for name in notes for part in name.split(".")}
    for op in OP_OUTPUTS:
        assert callable(getattr(oracles, op, None)), f"{op} has no oracle"
        assert (op in written) is (op not in ONLY_IN_GRAPHS)


SCALED: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 8.0, "original": 24, "low": 1.5, "high": 5.0},
    "dynamic": {"factor": 4.0, "original": 24},
}


@pytest.mark.parametrize("pairs", [1, 2, 7])
@pytest.mark.parametrize("scaling", FORMS["rope_scaling"])
def test_rope_angles_are_the_oracle_s_under_every_scaling(scaling, pairs):
    far = 2**24
    position, length = torch.tensor([[0, 1, 23], [24, 700, 70000], [3, far - 1, far]]), torch.tensor([24, 70001, far + 1])
    call = (
        position,
        pairs,
        100.0,
        True,
        length,
        scaling,
        *({"factor": 1.0, "original": 1, "low": 1.0, "high": 4.0} | SCALED[scaling]).values(),
    )
    for found, expected in zip(wm.rope_angles(*call), oracles.rope_angles(*call), strict=True):
        # A rounding of a frequency is 2e-9 radians at the last position.
        assert float((found - expected).abs().max()) < 1e-8
        assert float((found - expected)[0].abs().max()) < 1e-13


def test_ops_that_rotate_are_their_oracles_in_the_op_s_own_arguments():
    g = torch.Generator().manual_seed(0)
    B, T, H, K, P, N = 2, 9, 4, 2, 6, 4
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    cos, sin = oracles.rope_angles(torch.arange(T).repeat(B, 1) + 5, N // 2, 10.0)
    valid = torch.tensor([T, T])
    scan = (
        normal(B, T, H, P),
        normal(B, T, H).exp(),
        -normal(H).exp(),
        normal(B, T, K, N),
        normal(B, T, K, N),
        cos,
        sin,
        normal(B, H, N, P),
        valid,
    )
    for found, expected in zip(wm.ssd_scan_rope(*scan), oracles.ssd_scan_rope(*scan), strict=True):
        assert not differs(found.numpy(), expected.numpy())
    caches = normal(B, K, T + 5, P), normal(B, K, T + 5, P), torch.tensor([5, 2]), valid
    attend = (normal(B, T, (H + 2 * K) * P), cos, sin, *caches, H, K, P)
    out, *after = wm.attention_rope(*attend)
    expected, live = oracles.attention_rope(*attend)
    assert not differs(out.numpy(), expected.numpy())
    for (b, g), cells in live.items():
        for leaf, rows in zip(after, cells, strict=True):
            assert not differs(leaf[b, g, : len(rows)].numpy(), np.array(rows))


SOURCES = sorted(Path(oracles.__file__).parent.glob("*.py"))


def nodes(kind: type[ast.AST]) -> Iterator[Any]:
    for path in SOURCES:
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def test_the_oracle_imports_nothing_of_the_project_but_the_configuration():
    libraries = {"ast", "collections", "dataclasses", "functools", "math", "numpy", "oracles", "typing"}
    for node in nodes(ast.Import):
        assert {name.name.split(".")[0] for name in node.names} <= libraries
    for node in nodes(ast.ImportFrom):
        names = {name.name for name in node.names}
        allowed = {"wm_graph.config": {"ModelConfig"}, "torch": {"Tensor", "from_numpy"}}.get(node.module)
        assert node.module.split(".")[0] in libraries if allowed is None else names <= allowed, f"{node.module}: {names}"
    assert not {node.id for node in nodes(ast.Name)} & {"__import__", "importlib", "eval", "exec"}


def test_the_oracle_reads_every_option_of_the_configuration_and_none_of_its_properties():
    read = {
        node.attr
        for node in nodes(ast.Attribute)
        if (isinstance(node.value, ast.Name) and node.value.id == "cfg")
        or (isinstance(node.value, ast.Attribute) and node.value.attr == "cfg")
    }
    # The shapes of the parameters tell these sizes; the name is for people, and the last one allows a call.
    untold = {"vocab_size", "d_model", "d_ff", "ifa_value", "ifa_positions", "n_expert", "name", "rope_dynamic_cache"}
    assert read == {field.name for field in fields(ModelConfig)} - untold
