"""Laws of whole models, drawn from every mixer, feed-forward and option: forward against the float64 oracle, itself and its exports.

B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import wm_kernels as ops
from choice_margins import as_tokens, oracle_with_margins
from hypothesis_profiles import law, note_compared
from model_pool import POOL, RUNTIMES, Pool
from session_support import check_fed, feed
from strategies_models import RELATIVE, SEEDS, Drawn, Split, Texts, drawn, models, orders, splits, texts
from wm_graph import State, forward, zero_state
from wm_graph.blocks import layer
from wm_graph.config import ModelConfig
from wm_graph.context import rms_norm
from wm_graph.model import make_context
from wm_graph.oracle import oracle_forward
from wm_graph.params import Params, named_tensors, params_from_flat, params_to_flat
from wm_graph.state import state_to_flat
from wm_graph.tolerances import FLOAT64_MODEL, UNIT_ROUNDOFF, model_limit
from wm_runtimes.snapshot import Array

N = 60  # examples of a law
LIMITS = {torch.float64: FLOAT64_MODEL, torch.float32: model_limit("float32", "eager").max_abs}  # of logits of scale 1


def expected(model: Drawn, rows: list[Array], dtype: torch.dtype = torch.float64) -> tuple[Array, Array]:
    """The oracle's logits [B, T, V] of padded rows, and the tokens [B, T] up to which no choice is as near as rounding to another."""
    logits_BTV, margin_BT = oracle_with_margins(model.cfg, model.params(torch.float64), as_tokens(rows), str(dtype).removeprefix("torch."))
    return logits_BTV, margin_BT >= 1


def worst_move(model: Drawn, rows: list[Array], want_BTV: Array, clear_BT: Array) -> float:
    """How far a clear logit of the oracle's moves where each weight moves by a rounding of float32."""
    noise = UNIT_ROUNDOFF["float32"]
    moved_BTV, _ = oracle_forward(model.cfg, model.params(torch.float64), as_tokens(rows), noise=noise)
    return float(np.abs(moved_BTV.numpy() - want_BTV)[clear_BT & counts(rows)].max())


def check(got_BTV: Tensor, want_BTV: Array | Tensor, clear_BT: Array, limit: float, move: Callable[[], float] | None = None) -> None:
    """Assert equal logits wherever choices are clear; an example in which none is, is no example.

    `move` tells how far the oracle moves; float32 may be off by more than the limit where that is much, as parity has it.
    """
    want = torch.as_tensor(want_BTV).double()
    assert got_BTV.shape == want.shape
    assume(clear_BT.any())
    note_compared(int(clear_BT.sum()))
    error_BT = (got_BTV.double() - want).abs().amax(-1)[torch.from_numpy(clear_BT)]
    scale = float(want.square().mean().sqrt())
    allowed = limit * max(1.0, scale)
    if move is not None and not (error_BT <= allowed).all():
        allowed = model_limit("float32", "eager").max_abs_at(scale, move())
    assert (error_BT <= allowed).all(), f"off by {float(error_BT.max()):.3g}, {allowed:.3g} allowed"


def check_rows(model: Drawn, rows: list[Array], got_BTV: Tensor, want_BTV: Array, clear_BT: Array, dtype: torch.dtype) -> None:
    """`check` of rows whose padding gives 0."""
    move = partial(worst_move, model, rows, want_BTV, clear_BT) if dtype == torch.float32 else None
    check(got_BTV, np.where(counts(rows)[..., None], want_BTV, 0), clear_BT, LIMITS[dtype], move)


def counts(rows: list[Array]) -> Array:
    """[B, T]: which tokens of padded rows count."""
    lengths = np.array([len(row) for row in rows])
    mask: Array = np.arange(lengths.max()) < lengths[:, None]
    return mask


@torch.no_grad()
def in_pieces(
    cfg: ModelConfig, params: Params, rows: list[Array], edges: tuple[int, ...], garbage: int, in_place: bool = False
) -> tuple[Tensor, State]:
    """Rows through `forward` in pieces that end at the edges, each padded with any ids; the logits where tokens count, and the state."""
    dtype, longest = params.norm.dtype, max(len(row) for row in rows)
    state: State | None = zero_state(cfg, len(rows), longest, dtype)
    logits_BTV = torch.zeros(len(rows), longest, cfg.vocab_size, dtype=torch.promote_types(dtype, torch.float32))
    rng = np.random.default_rng(garbage)
    for start, end in pairwise((0, *edges, longest)):
        pieces = [row[start:end] for row in rows]
        tokens_BT = rng.integers(0, cfg.vocab_size, (len(rows), end - start))
        for row, piece in enumerate(pieces):
            tokens_BT[row, : len(piece)] = piece
        valid_B = torch.tensor([len(piece) for piece in pieces])
        assert state is not None
        part_BTV, state = forward(cfg, params, torch.from_numpy(tokens_BT), state, valid_B, in_place=in_place)
        for row, piece in enumerate(pieces):
            logits_BTV[row, start : start + len(piece)] = part_BTV[row, : len(piece)]
    assert state is not None
    return logits_BTV, state


# One text


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@law(2 * N, "model")
@given(model=models(), split=splits(2, 70, 1), garbage=SEEDS)
# Of a token that nearly cancels: the oracle's own logits move by 7.6e-5 when weights move by a rounding, eager's are off by 1.1e-4.
@example(
    drawn(
        "inner_function_attention+none ssd+moe ssd+moe", seed=2780, attention_rope=False, d_ff=1, d_model=8, ifa_mask="static_hard",
        ifa_pick=3, learned_residual=True, moe_form="shared_expert_isolated", n_pick=1, ssd_group=2, ssd_head=4, ssd_head_dim=4,
        ssd_rope=False, ssd_state=5,
    ),
    (Texts(607, (63, 1), 0), (23,)),
    0,
)  # fmt: skip
def test_any_split_of_padded_rows_equals_the_oracle(dtype: torch.dtype, model: Drawn, split: Split, garbage: int) -> None:
    text, edges = split
    rows = text.rows(model.cfg.vocab_size)
    want_BTV, clear_BT = expected(model, rows, dtype)
    got_BTV, state = in_pieces(model.cfg, model.params(dtype), rows, edges, garbage)
    assert state.position.tolist() == [len(row) for row in rows]
    check_rows(model, rows, got_BTV, want_BTV, clear_BT, dtype)


@law(N, "model")
@given(model=models(), split=splits(2, 20, 1), garbage=SEEDS, dtype=st.sampled_from(list(LIMITS)))
def test_in_place_equals_functional_bit_by_bit(model: Drawn, split: Split, garbage: int, dtype: torch.dtype) -> None:
    text, edges = split
    rows, params = text.rows(model.cfg.vocab_size), model.params(dtype)
    (one_BTV, one), (other_BTV, other) = (in_pieces(model.cfg, params, rows, edges, garbage, in_place) for in_place in (False, True))
    assert torch.equal(one_BTV, other_BTV)
    note_compared(int(one_BTV.count_nonzero()))
    for (name, leaf), (_, twin) in zip(named_tensors(one), named_tensors(other), strict=True):
        assert torch.equal(leaf, twin), name


@law(N, "model")
@given(model=models(dynamic_rope=True), text=texts(1, 70, 2), change=SEEDS)
def test_later_tokens_do_not_reach_earlier_logits(model: Drawn, text: Texts, change: int) -> None:
    (row,) = text.rows(model.cfg.vocab_size)
    start = change % (len(row) - 1) + 1
    changed = np.concatenate([row[:start], (row[start:] + 1 + change % 60) % model.cfg.vocab_size])
    want_1TV, clear_1T = expected(model, [row])
    with torch.no_grad():
        got_1TV, _ = forward(model.cfg, model.params(torch.float64), as_tokens([changed]))
    check(got_1TV[:, :start], want_1TV[:, :start], clear_1T[:, :start], LIMITS[torch.float64])
    assert (got_1TV[:, start] - torch.from_numpy(want_1TV)[:, start]).abs().max() > 1e-6


@law(N, "model")
@given(model=models(dynamic_rope=True), text=texts(3, 30, 1), order=orders(3))
def test_rows_do_not_reach_each_other_in_any_order(model: Drawn, text: Texts, order: tuple[int, ...]) -> None:
    rows = text.rows(model.cfg.vocab_size)
    longest = max(len(row) for row in rows)
    tokens_BT = as_tokens(rows)[list(order)]
    with torch.no_grad():
        got_BTV, _ = forward(model.cfg, model.params(torch.float64), tokens_BT)
    for place, row in enumerate(order):
        # Alone, and as long as the longest: dynamic scaling looks at the length of the call.
        want_1TV, clear_1T = expected(model, [np.pad(rows[row], (0, longest - len(rows[row])))])
        check(got_BTV[place : place + 1], want_1TV, clear_1T, LIMITS[torch.float64])


@law(N, "model")
@given(model=models(), text=texts(2, 30, 2), data=st.data())
def test_selected_logits_are_those_of_the_whole(model: Drawn, text: Texts, data: st.DataObject) -> None:
    rows = [row[: min(text.lengths)] for row in text.rows(model.cfg.vocab_size)]
    length = len(rows[0])
    select_BS = np.array([data.draw(st.tuples(*[st.integers(0, length - 1)] * 3), "select") for _ in rows])
    want_BTV, clear_BT = expected(model, rows)
    with torch.no_grad():
        got_BSV, _ = forward(model.cfg, model.params(torch.float64), as_tokens(rows), select_BS=torch.from_numpy(select_BS))
    clear_BS = np.take_along_axis(clear_BT, select_BS, 1)
    check(got_BSV, np.take_along_axis(want_BTV, select_BS[..., None], 1), clear_BS, LIMITS[torch.float64])


# Positions


@torch.no_grad()
def forward_from(cfg: ModelConfig, params: Params, tokens_BT: Tensor, start: int) -> Tensor:
    """`forward` without a state, its rotary angles those of tokens start, start + 1, ..."""
    context = make_context(cfg, tokens_BT, None, None, params.norm.dtype)
    scaling = (None, cfg.rope_scaling, cfg.rope_factor, cfg.rope_original, cfg.rope_low, cfg.rope_high)
    angles = {
        width: ops.rope_angles(context.position_BT + start, width // 2, cfg.rope_theta, params.norm.dtype == torch.float64, *scaling)
        for width in context.angles
    }
    context = replace(context, angles=angles)
    x_MD = params.embedding[tokens_BT.reshape(-1)]
    for index, layer_params in enumerate(params.layers):
        x_MD, _ = layer(cfg, layer_params, x_MD, None, context, f"layers.{index}", None)
    head = params.embedding if params.head is None else params.head
    return (rms_norm(x_MD, params.norm, cfg.norm_eps) @ head.T).reshape(*tokens_BT.shape, -1)


STARTS = st.integers(1, 10**6) | st.sampled_from((1, 63, 1000, 10**6))


@law(N, "model")
@given(model=models(mixers=(*RELATIVE, "inner_function_attention"), ifa_mask="none"), text=texts(2, 30, 1), start=STARTS)
def test_only_distances_between_tokens_matter_to_rotation(model: Drawn, text: Texts, start: int) -> None:
    rows = text.rows(model.cfg.vocab_size)
    want_BTV, clear_BT = expected(model, rows)
    check(forward_from(model.cfg, model.params(torch.float64), as_tokens(rows), start), want_BTV, clear_BT, LIMITS[torch.float64])


@law(N, "model")
@given(
    model=models(mixers=("ssd", "mamba2", "dynamic_mask_attention", "mamba1")),
    split=splits(2, 30, 2),
    start=STARTS,
    dtype=st.sampled_from(list(LIMITS)),
)
def test_a_text_may_start_at_any_position_of_a_state_without_cells(model: Drawn, split: Split, start: int, dtype: torch.dtype) -> None:
    text, edges = split
    model = drawn(model.layers, model.seed, **(dict(model.options) | {"dma_mask": "log", "dma_heads": "kv", "dma_ratio": 0.0}))
    cfg, params = model.cfg, model.params(dtype)
    rows = text.rows(cfg.vocab_size)
    rows = [np.resize(row, max(text.lengths)) for row in rows]  # without padding: what a state holds is compared by what comes of it
    want_BTV, clear_BT = expected(model, rows, dtype)
    state: State | None = zero_state(cfg, 2, 70, dtype)
    assert state is not None
    state = replace(state, position=state.position + start)
    parts = []
    for begin, end in pairwise((0, *edges, len(rows[0]))):
        with torch.no_grad():
            part_BTV, state = forward(cfg, params, as_tokens([row[begin:end] for row in rows]), state)
        parts.append(part_BTV)
    check_rows(model, rows, torch.cat(parts, 1), want_BTV, clear_BT, dtype)


# Parts of a model that equal others


@law(N, "model")
@given(
    model=models(mixers=("dynamic_mask_attention", "attention", "ssd"), keep_window=70),
    mask=st.sampled_from(("keep_window", "log", "additive")),
    split=splits(2, 66, 1),
)
def test_a_window_of_equal_scores_that_holds_every_key_is_plain_attention(model: Drawn, mask: str, split: Split) -> None:
    text, edges = split
    options = dict(model.options) | {"dma_mask": mask, "dma_ratio": 0.0}
    options |= {"dma_heads": "kv"} if mask != "additive" else {}
    model = drawn(f"dynamic_mask_attention+none {model.layers}", model.seed, **options)
    cfg, tensors = model.cfg, params_to_flat(model.cfg, model.params(torch.float64))
    equal = {name: torch.zeros_like(tensor) if name.endswith("mixer.A") else tensor for name, tensor in tensors.items()}
    layers = tuple((mixer.replace("dynamic_mask_", ""), feed_forward) for mixer, feed_forward in cfg.layers)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(("mixer.A", "mixer.dt"))}
    rows, attention = text.rows(cfg.vocab_size), replace(cfg, layers=layers)
    want_BTV, margin_BT = oracle_with_margins(attention, params_from_flat(attention, plain), as_tokens(rows), "float64")
    got_BTV, _ = in_pieces(cfg, params_from_flat(cfg, equal), rows, edges, 0)
    check(got_BTV, np.where(counts(rows)[..., None], want_BTV, 0), margin_BT >= 1, LIMITS[torch.float64])


@law(N, "model")
@given(model=models(feed_forwards=("cdmoe", "moe")), text=texts(2, 20, 1), seed=SEEDS)
def test_experts_may_stand_in_any_order(model: Drawn, text: Texts, seed: int) -> None:
    cfg, generator = model.cfg, torch.Generator().manual_seed(seed)
    tensors = params_to_flat(cfg, model.params(torch.float64))
    for index, (_, feed_forward) in enumerate(cfg.layers):
        prefix = f"layers.{index}.feed_forward."
        if feed_forward == "moe":
            order = torch.randperm(cfg.n_expert, generator=generator)
            for name in tensors:
                if name.startswith((f"{prefix}router", f"{prefix}expert")):
                    tensors[name] = tensors[name][order]
            continue
        # Expert x·J + y has the sub-keys x of the first half and y of the second.
        J = cfg.n_subkey
        x, y = torch.randperm(J, generator=generator), torch.randperm(J, generator=generator)
        for name in ("expert_down", "expert_up"):
            tensors[prefix + name] = tensors[prefix + name][(x[:, None] * J + y).flatten()]
        if cfg.cdmoe_form == "single_head":
            tensors[f"{prefix}router"] = tensors[f"{prefix}router"][torch.cat([x, J + y])]
        else:
            keys_RJ2d = tensors[f"{prefix}keys"]
            tensors[f"{prefix}keys"] = torch.stack([keys_RJ2d[:, x, 0], keys_RJ2d[:, y, 1]], 2)
    before = params_to_flat(cfg, model.params(torch.float64))
    assume(any(not torch.equal(tensor, before[name]) for name, tensor in tensors.items()))
    rows = text.rows(cfg.vocab_size)
    want_BTV, clear_BT = expected(model, rows)
    with torch.no_grad():
        got_BTV, _ = forward(cfg, params_from_flat(cfg, tensors), as_tokens(rows))
    check(got_BTV, want_BTV, clear_BT, LIMITS[torch.float64])


@law(N, "model")
@given(
    model=models(feed_forwards=("cdmoe", "mlp", "none"), mlp_bias=False),
    form=st.sampled_from(("c2", "single_head")),
    split=splits(2, 20, 1),
)
def test_experts_that_give_zero_leave_the_shared_mlp(model: Drawn, form: str, split: Split) -> None:
    text, edges = split
    sizes = {"n_retrieval_head": 1} if form == "single_head" else {}
    sparse = drawn(f"ssd+cdmoe {model.layers}", model.seed, **(dict(model.options) | {"cdmoe_form": form, "d_retrieval": 6} | sizes))
    cfg, tensors = sparse.cfg, params_to_flat(sparse.cfg, sparse.params(torch.float64))
    silent = {name: torch.zeros_like(tensor) if name.endswith("expert_up") else tensor for name, tensor in tensors.items()}
    layers = tuple((mixer, feed_forward.replace("cdmoe", "mlp")) for mixer, feed_forward in cfg.layers)
    experts = ("expert_up", "expert_down", "query", "keys", "feed_forward.router")
    shared = {name: tensor for name, tensor in tensors.items() if not name.endswith(experts) or name.endswith("value_query")}
    shared |= {name: tensor for name, tensor in tensors.items() if name.endswith("value_keys")}
    rows, dense = text.rows(cfg.vocab_size), replace(cfg, layers=layers)
    want_BTV, margin_BT = oracle_with_margins(dense, params_from_flat(dense, shared), as_tokens(rows), "float64")
    got_BTV, _ = in_pieces(cfg, params_from_flat(cfg, silent), rows, edges, 0)
    check(got_BTV, np.where(counts(rows)[..., None], want_BTV, 0), margin_BT >= 1, LIMITS[torch.float64])


# Gradients


@law(N, "model")
@given(model=models(dynamic_rope=True), text=texts(2, 12, 1), seed=SEEDS)
def test_gradients_are_finite_and_those_of_finite_differences(model: Drawn, text: Texts, seed: int) -> None:
    cfg, rows, generator = model.cfg, text.rows(model.cfg.vocab_size), torch.Generator().manual_seed(seed)
    tokens_BT = as_tokens(rows)
    tensors = {name: tensor.clone() for name, tensor in params_to_flat(cfg, model.params(torch.float64)).items()}
    # A static mask is rounded; its straight-through gradient is no derivative.
    moved = {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in tensors.items() if not name.endswith("mask")}
    weight_BTV = torch.randn(*tokens_BT.shape, cfg.vocab_size, generator=generator).double()
    step = 1e-6

    def loss(scale: float, grad: bool) -> Tensor:
        at = {name: tensor + scale * moved[name] if name in moved else tensor for name, tensor in tensors.items()}
        with torch.set_grad_enabled(grad):
            return (forward(cfg, params_from_flat(cfg, at), tokens_BT)[0] * weight_BTV).sum()

    _, margin_BT = oracle_with_margins(cfg, model.params(torch.float64), tokens_BT, "float32")
    assume(margin_BT.min() >= 10)  # no choice within a step of another
    for tensor in tensors.values():
        tensor.requires_grad_()
    loss(0.0, True).backward()
    slope, size = 0.0, 1.0
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all(), name
        if tensor.grad is not None and name in moved:
            slope += float((tensor.grad * moved[name]).sum())
            size += float((tensor.grad * moved[name]).abs().sum())
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    difference = float(loss(step, False) - loss(-step, False)) / (2 * step)
    note_compared(len(moved))
    assert abs(slope - difference) <= 1e-5 * size, (slope, difference)


# Exports


@cache
def program_of(model: Drawn) -> Any:
    """The torch.export program of a model, with its parameters."""
    from wm_export.program import export_program

    exported = export_program(model.cfg, torch.float32).exported  # on the meta device
    flat = params_to_flat(model.cfg, model.params())
    exported.state_dict.update({f"model.{name}": torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in flat.items()})
    for node in exported.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cpu")}
    # Its guards would refuse one selected token, which its example sizes happen to tell apart; the program itself takes any number.
    return exported.module(check_guards=False)


def check_program(model: Drawn, rows: list[Array], edges: tuple[int, ...], room: int) -> None:
    """Assert that the exported program equals the oracle, and its states eager's, over a text in pieces."""
    cfg, program, longest = model.cfg, program_of(model), max(len(row) for row in rows)
    want_BTV, clear_BT = expected(model, rows, torch.float32)
    got_BTV = torch.zeros(want_BTV.shape)
    leaves = state_to_flat(cfg, zero_state(cfg, len(rows), longest + room))
    for start, end in pairwise((0, *edges, longest)):
        pieces = [row[start:end] for row in rows]
        valid_B = torch.tensor([len(piece) for piece in pieces])
        tokens_BT = torch.nn.functional.pad(as_tokens(pieces), (0, end - start - max(map(len, pieces))))
        select_BT = torch.arange(end - start).expand(len(rows), -1)
        with torch.no_grad():
            part_BTV, *after = program(tokens_BT, valid_B, select_BT, tuple(leaves.values()))
        leaves = dict(zip(leaves, after, strict=True))
        for row, piece in enumerate(pieces):
            got_BTV[row, start : start + len(piece)] = part_BTV[row, : len(piece)]
    assert leaves["position"].tolist() == [len(row) for row in rows]
    check_rows(model, rows, got_BTV, want_BTV, clear_BT, torch.float32)


@law(2 * N, "model")
@given(name=st.sampled_from(sorted(POOL)), split=splits(2, 66, 1), room=st.integers(0, 9))
def test_an_exported_program_equals_the_oracle(name: str, split: Split, room: int) -> None:
    text, edges = split
    check_program(POOL[name], text.rows(POOL[name].cfg.vocab_size), edges, room)


@law(6, "model")
@given(model=models(), split=splits(2, 20, 1), room=st.integers(0, 9))
def test_any_model_can_be_exported_to_a_program(model: Drawn, split: Split, room: int) -> None:
    text, edges = split
    check_program(model, text.rows(model.cfg.vocab_size), edges, room)


@law(6, "model")
@given(model=models(), split=splits(2, 20, 1))
# onnxruntime's attention takes no such heads, and the only com.microsoft node is outside the ops' bodies
@example(model=drawn("attention+mlp", head_dim=5, rotary_dim=4), split=(Texts(0, (12, 13)), (1, 4, 8)))
def test_any_model_runs_as_a_bundle_in_both_graphs(tmp_path_factory: pytest.TempPathFactory, model: Drawn, split: Split) -> None:
    text, edges = split
    member = Pool(tmp_path_factory.mktemp("drawn"), {"drawn": model})["drawn"]
    rows = text.rows(model.cfg.vocab_size)
    for runtime in RUNTIMES:
        session = member.session(runtime, 2, 20)
        for start, end in pairwise((0, *edges, max(text.lengths))):
            fed = feed(session, [row[start:end] for row in rows])
            for row, got_SV in zip(rows, fed, strict=True):
                check_fed(member, runtime, row, min(end, len(row)), got_SV)
        member.close()
