"""How `scored_attention` becomes launches: new keys, values and scores go into the cache, which is then read."""

from wm_kernels.attention import triton_kernel as kernels
from wm_kernels.attention.native import NATIVE as ATTENTION
from wm_kernels.attention.native import ROWS, strides_of_cells, strides_of_tokens
from wm_kernels.attention.plan import WRITTEN, block_of, plan
from wm_kernels.native import Call, Native, NotServedError, Output, uncached
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks


def _plan(call: Call) -> Plan:
    (B, T, H, K, A, P, S), scoring = call.dims("BTHKAPS"), call.plain["scoring"]
    if scoring == "ratio":
        raise NotServedError("wm::scored_attention: no kernel serves scoring 'ratio'")
    strides = strides_of_cells(call) | strides_of_tokens(call) | {"score": call.strides("cache_score_BAS")}
    sizes = B, T, H, K, A, P, S, scoring
    made = uncached(plan)(*sizes, True, call.dtypes["q_BTHP"], call.arch, tuple(strides.items()))
    return Plan((_write_scores(call), *made.launches), made.scratch)


def _write_scores(call: Call) -> Launch:
    """A score is a key of width 1; the kernel writes keys and values, so that scores are both."""
    B, T, A, S = call.dims("BTAS")
    (token_b, token_t, token_a), (b, a, s) = call.strides("score_BTA"), call.strides("cache_score_BAS")
    strides = (token_b, token_t, token_a) * 2 + (b, s, a) * 2
    constants = {"P": 1, "BLOCK_P": block_of(1), "BLOCK_T": WRITTEN}
    names = ("score_BTA", "score_BTA", "score", "score", "position")
    return Launch(kernels.write_cells, (blocks(T, WRITTEN), A, B), (*names, *strides, T, S), constants)


NATIVE = Native(
    "scored_attention",
    _plan,
    (*ATTENTION.outputs, Output("next_score_BAS", "score_BTA", alias="cache_score_BAS")),
    names={**ATTENTION.names, "score": "next_score_BAS"},
    attributes={"ratio": ""},
    rows=ROWS,
)
