"""Hypothesis strategies: cases of every op, calls with strides, ways to cut a prompt.

Sizes come from short lists of shapes, so that an ONNX session made for one case serves many. Letters as in op_cases.py.
"""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from op_calls import Call
from op_cases import (
    AttentionCase,
    ConvCase,
    ExpertMixCase,
    GatedCase,
    LinearCase,
    MoeCase,
    ProductKeyCase,
    ResidualCase,
    RopeCase,
    RouterCase,
    ScoredCase,
    SelectiveCase,
    SsdCase,
    WindowCase,
)
from op_values import PATTERNS, SCORES, STEPS

CHUNK = 64  # tokens of a chunk of ssd_scan, and of a span of the onnxruntime body of scored_attention
# Tokens of a row: one, a few, around a chunk, more than two chunks. Hypothesis shrinks to the first.
LENGTHS = (1, 2, 3, 5, 8, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)
SHORT = (1, 2, 3, 4, 7, 12)
LAST = 2**24  # the last position of rope_angles
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("transposed", "sliced", "expanded", "offset")

seeds = st.integers(0, 2**16)
magnitudes = st.sampled_from((0, 0, 0, -10, 10))
patterns = st.sampled_from(PATTERNS)
starts = st.one_of(st.integers(0, 3), st.sampled_from((10**6, LAST - 200)), st.integers(0, LAST - 200))


def _valid(draw: Any, B: int, T: int) -> tuple[int, ...] | None:
    """None, or tokens of each row: none, one, all but one, all, or some."""
    if draw(st.booleans()):
        return None
    return tuple(draw(st.sampled_from((T, 0, 1, T - 1, T // 2))) for _ in range(B))


def _rows(draw: Any, T: int) -> int:
    return draw(st.integers(1, 2 if T > 20 else 3))


@st.composite
def ssd_cases(draw: Any, rope: bool = False, state: bool | None = None) -> SsdCase:
    T = draw(st.sampled_from(LENGTHS))
    B = _rows(draw, T)
    H, G, P, N, F = draw(st.sampled_from(((1, 1, 1, 2, 1), (2, 1, 3, 5, 2), (4, 2, 8, 12, 6), (3, 3, 4, 4, 1))))
    return SsdCase(
        draw(seeds), B, T, H, G, P, N, F if rope else 0, draw(st.sampled_from(STEPS)), draw(patterns), draw(magnitudes),
        draw(starts) if rope else 0, draw(st.booleans()) if state is None else state, _valid(draw, B, T),
    )  # fmt: skip


@st.composite
def selective_cases(draw: Any) -> SelectiveCase:
    T = draw(st.sampled_from(LENGTHS[:-1]))
    B = _rows(draw, T)
    C, N = draw(st.sampled_from(((1, 1), (3, 2), (5, 4))))
    fields = draw(st.sampled_from(STEPS)), draw(patterns), draw(magnitudes), draw(st.booleans())
    return SelectiveCase(draw(seeds), B, T, C, N, *fields, _valid(draw, B, T))


@st.composite
def conv_cases(draw: Any) -> ConvCase:
    T = draw(st.sampled_from(LENGTHS[:-1]))
    B = _rows(draw, T)
    C, L, bias, activation = draw(
        st.sampled_from(((1, 1, False, "none"), (3, 2, True, "silu"), (16, 4, True, "silu"), (5, 6, False, "silu")))
    )
    return ConvCase(draw(seeds), B, T, C, L, bias, activation, draw(patterns), draw(magnitudes), draw(st.booleans()), _valid(draw, B, T))


def _past(draw: Any) -> tuple[int | None, int]:
    """The largest position, None for no cache; and free cells after the call, often none."""
    return draw(st.sampled_from((None, 0, 1, 3, 9, 30))), draw(st.sampled_from((0, 0, 1, 5)))


@st.composite
def attention_cases(draw: Any, rope: bool = False) -> AttentionCase:
    T = draw(st.sampled_from((*SHORT, CHUNK + 1)))
    B = _rows(draw, T)
    H, K, P, F = draw(st.sampled_from(((1, 1, 2, 1), (4, 2, 8, 4), (3, 3, 16, 8), (6, 1, 8, 3))))
    past, room = _past(draw)
    fields = draw(patterns), draw(st.sampled_from((0, 0, 1, -3))), draw(magnitudes), draw(starts) // 2 if rope else 0
    return AttentionCase(draw(seeds), B, T, H, K, P, F if rope else 0, *fields, past, room, _valid(draw, B, T))


@st.composite
def scored_cases(draw: Any) -> ScoredCase:
    T = draw(st.sampled_from((*SHORT, CHUNK + 1)))
    B = _rows(draw, T)
    H, K, P, A = draw(st.sampled_from(((1, 1, 2, 1), (4, 2, 8, 2), (6, 3, 4, 6), (4, 2, 8, 1))))
    past, room = _past(draw)
    scoring, ratio = draw(
        st.sampled_from(
            (("additive", 0.0), ("binary", 0.0), ("binary", 0.0), ("ratio", 0.29), ("ratio", 0.7), ("ratio", 1.0), ("ratio", 0.0))
        )
    )
    # Binary scoring turns on scores of exactly 1, which only ties have.
    scores = draw(st.sampled_from(("ties", "ties", *SCORES) if scoring == "binary" else SCORES))
    fields = scores, draw(patterns), draw(st.sampled_from((0, 0, 1, -3))), draw(magnitudes)
    return ScoredCase(draw(seeds), B, T, H, K, P, A, scoring, ratio, *fields, past, room, _valid(draw, B, T))


@st.composite
def window_cases(draw: Any) -> WindowCase:
    T = draw(st.sampled_from((*SHORT, 33)))
    B = _rows(draw, T)
    H, K, P = draw(st.sampled_from(((1, 1, 2), (4, 2, 8), (3, 3, 4))))
    W = draw(st.sampled_from((1, 2, 5, 12, 40)))
    fields = draw(st.sampled_from(SCORES)), draw(patterns), draw(st.sampled_from((0, 0, 1, -3))), draw(magnitudes)
    past, _ = _past(draw)
    return WindowCase(draw(seeds), B, T, H, K, P, W, *fields, past, _valid(draw, B, T))


@st.composite
def rope_cases(draw: Any) -> RopeCase:
    H, P, F = draw(st.sampled_from(((1, 2, 1), (3, 5, 2), (2, 20, 8), (4, 8, 4))))
    return RopeCase(
        draw(seeds), draw(st.integers(1, 3)), draw(st.sampled_from(SHORT)), H, P, F, draw(patterns), draw(magnitudes), draw(starts)
    )


@st.composite
def residual_cases(draw: Any) -> ResidualCase:
    D, scale = draw(st.sampled_from(((1, False), (5, True), (24, True), (24, False))))
    fields = draw(st.sampled_from((1e-6, 1e-5))), draw(patterns), draw(magnitudes)
    return ResidualCase(draw(seeds), draw(st.sampled_from(SHORT)), D, scale, *fields)


@st.composite
def gated_cases(draw: Any) -> GatedCase:
    fields = draw(st.sampled_from((1e-6, 1e-5))), draw(patterns), draw(magnitudes)
    return GatedCase(draw(seeds), draw(st.sampled_from(SHORT)), draw(st.sampled_from((1, 5, 24))), *fields)


_PARTS = (((5, 3, 4, 2), True), ((6, 0, 0, 0), False), ((0, 0, 0, 3), True), ((4, 0, 7, 1), False), ((1, 1, 0, 0), False))


@st.composite
def linear_cases(draw: Any, gated: bool | None = None) -> LinearCase:
    """Parts, with step sizes and without, all of them or some; or a gate."""
    gate = draw(st.booleans()) if gated is None else gated
    parts, step_bias = ((draw(st.sampled_from((4, 1, 7))), 0, 0, 0), False) if gate else draw(st.sampled_from(_PARTS))
    K, bias = draw(st.sampled_from(((9, False), (1, True), (16, True), (70, False))))
    fields = parts, gate, bias, step_bias, draw(patterns), draw(magnitudes)
    return LinearCase(draw(seeds), draw(st.sampled_from(SHORT)), K, *fields)


@st.composite
def product_key_cases(draw: Any, pattern: str | None = None) -> ProductKeyCase:
    R, J, width, k = draw(st.sampled_from(((1, 1, 1, 1), (2, 3, 2, 3), (1, 4, 3, 2), (2, 9, 6, 4), (1, 6, 2, 6))))
    B, T = draw(st.integers(1, 2)), draw(st.sampled_from(SHORT))
    return ProductKeyCase(draw(seeds), B, T, R, J, width, k, draw(patterns) if pattern is None else pattern)


_activations = st.sampled_from((("silu", False), ("gelu", True), ("silu", True), ("gelu", False)))


@st.composite
def expert_mix_cases(draw: Any) -> ExpertMixCase:
    R, k, E, D = draw(st.sampled_from(((1, 1, 1, 1), (2, 3, 9, 5), (1, 4, 25, 10))))
    (activation, inside), distinct = draw(_activations), draw(st.sampled_from((1, E)))
    B, T = draw(st.integers(1, 2)), draw(st.sampled_from((*SHORT, 17)))
    return ExpertMixCase(draw(seeds), B, T, R, k, E, D, distinct, activation, inside, draw(patterns), draw(magnitudes))


@st.composite
def router_cases(draw: Any) -> RouterCase:
    E, k, normalize = draw(st.sampled_from(((1, 1, True), (9, 3, False), (9, 3, True), (9, 9, False), (4, 1, False))))
    return RouterCase(draw(seeds), draw(st.sampled_from(SHORT)), E, k, normalize, draw(st.sampled_from(SCORES)))


@st.composite
def moe_cases(draw: Any) -> MoeCase:
    k, E, D, I = draw(st.sampled_from(((1, 1, 1, 1), (2, 5, 6, 4), (3, 6, 10, 7))))
    gated, bias, activation = draw(st.sampled_from(((True, False, "silu"), (False, True, "gelu"), (True, True, "gelu"))))
    distinct = draw(st.sampled_from((E, 1)))
    return MoeCase(
        draw(seeds), draw(st.sampled_from(SHORT)), k, E, D, I, distinct, gated, bias, activation, draw(patterns), draw(magnitudes)
    )


CASES: dict[str, st.SearchStrategy[Any]] = {
    "rope": rope_cases(),
    "residual_rms_norm": residual_cases(),
    "ssd_scan": ssd_cases(),
    "ssd_scan_rope": ssd_cases(rope=True),
    "attention": attention_cases(),
    "attention_rope": attention_cases(rope=True),
    "keep_window_attention": window_cases(),
    "product_key_topk": product_key_cases(),
    "expert_mix": expert_mix_cases(),
    "scored_attention": scored_cases(),
    "router_topk": router_cases(),
    "moe_mix": moe_cases(),
    "causal_conv1d": conv_cases(),
    "gated_rms_norm": gated_cases(),
    "selective_scan": selective_cases(),
    "linear": linear_cases(),
}
NEAR = (1, 2, 3, 5, 11, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2)  # places to cut a prompt before


def longest(case: Any) -> int:
    """Tokens that count of the row that has most of them."""
    return case.T if case.valid is None else max(case.valid)


@st.composite
def cut_cases(draw: Any, cases: st.SearchStrategy[Any]) -> tuple[Any, tuple[int, ...]]:
    """A case, and 1 to 4 places to cut its tokens before: the first inside its longest row, others there or in the padding after it."""
    case = draw(cases.filter(lambda case: longest(case) > 1))

    def place(end: int) -> st.SearchStrategy[int]:
        return st.sampled_from([cut for cut in NEAR if cut < end]) | st.integers(1, end - 1)

    return case, tuple(sorted({draw(place(longest(case))), *draw(st.lists(place(case.T), max_size=3))}))


def shuffles(count: int) -> st.SearchStrategy[list[int]]:
    """Orders of two rows or more, other than the one that they are in."""
    return st.permutations(range(count)).map(lambda order: order[::-1] if order == sorted(order) else order)


def laid_out(call: Call, layout: str) -> Call:
    """The call on tensors of other strides.

    transposed: the axes lie in memory in reverse order; sliced: every second entry of a buffer whose others are NaN; expanded: one row for
    all, with stride 0, so that the values differ; offset: the tensor begins one entry into its storage.
    """

    def change(name: str, value: Tensor) -> Tensor:
        if layout == "transposed":
            back = tuple(reversed(range(value.dim())))
            return value.permute(back).contiguous().permute(back)
        if layout == "sliced":
            wide = value.new_full([2 * n for n in value.shape], torch.nan if value.is_floating_point() else 0)
            every = wide[tuple(slice(None, None, 2) for _ in value.shape)]
            return every.copy_(value)
        if layout == "expanded":
            return value[:1].expand(value.shape) if value.is_floating_point() else value
        flat = value.new_zeros(value.numel() + 1)[1:]
        return flat.view(value.shape).copy_(value)

    return call.mapped(change)


def another(case: Any) -> Any:
    """The same case of other random values."""
    return replace(case, seed=case.seed + 2**17)
