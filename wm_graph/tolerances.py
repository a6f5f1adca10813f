"""Every limit of the project, in one table: op × dtype × runtime, whole models, choices, single runs. Needs no torch.

`python -m wm_graph.tolerances > docs/tolerances.md` renders it; a limit that is exceeded fails, it never warns.

u is the unit roundoff of a dtype: half the gap between 1 and the next larger number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
RUNTIME_DTYPES = {
    "eager": ("float32", "float16", "bfloat16"),
    "compiled": ("float32", "float16", "bfloat16"),
    "onnxruntime-cpu": ("float32", "float16"),
    "onnxruntime-cuda": ("float32", "float16", "bfloat16"),
    "triton": ("float32", "float16", "bfloat16"),
}
# Sound code is off by at most this many times what the float64 oracle moves when each weight moves by up to u: in rms, and at the worst
# logit, which is one draw from a long tail. Eager is off, in float32, by 1.3 to 6.5 times (rms; the worst logit 2.6 to 13.4 times, both at
# cheems-1.3b) over all families, forms and Mamba2-115M; in float16 by 0.5 to 1.7 times (the worst logit up to 2.8).
MOVED = {"float32": 10.0, "float16": 4.0, "bfloat16": 4.0}
MOVED_WORST = {"float32": 20.0, "float16": 4.0, "bfloat16": 4.0}
AMPLIFIED = 10.0  # a model that amplifies rounding may raise its max abs so many times: Mamba2-115M with random weights, 6 times
FLOOR_ULPS = 2.0  # R's denominator is at least this many u of the output's scale, so that a lucky eager run condemns nobody


@dataclass(frozen=True)
class OpLimit:
    """Limits of one op fed with exact inputs of its dtype. An output that is float32 whatever the model's dtype has the limits of float32.

    Attributes:
        op: name without `wm::`.
        dtype: dtype of the op's inputs.
        runtime: a key of `RUNTIME_DTYPES`.
        ulps: max |runtime - float64 reference| of an output, in units of u(dtype) times the reference's largest |value|.
        R: rms error against the float64 reference, over that of eager or `FLOOR_ULPS` u of the reference's rms; pooled over 64 rows.
        choice_rate: largest share of choices (experts, kept keys) that are not the reference's; 0 for an op that chooses nothing.
        reason: why they are as large as they are.
    """

    op: str
    dtype: str
    runtime: str
    ulps: float
    R: float
    choice_rate: float
    reason: str

    @property
    def relative(self) -> float:
        """The limit as a fraction of the output's scale."""
        return self.ulps * UNIT_ROUNDOFF[self.dtype]


@dataclass(frozen=True)
class ModelLimit:
    """Limits of a whole model's logits.

    Attributes:
        dtype: the model's dtype.
        runtime: a key of `RUNTIME_DTYPES`.
        R: rms error against the float64 oracle, over that of eager at the same dtype.
        max_abs: largest error of one logit, for logits of rms 1 or less; larger logits scale it by their rms. See `max_abs_at`.
        choice_rate: largest share of choices that differ from the oracle's, each of them within its score budget.
        reason: where the numbers come from.
    """

    dtype: str
    runtime: str
    R: float
    max_abs: float
    choice_rate: float
    reason: str

    def max_abs_at(self, scale: float, moved_max_abs: float) -> float:
        """The largest error allowed of logits of rms `scale`, of which the oracle's worst moves by `moved_max_abs` with the weights.

        A model that amplifies rounding, such as a deep stack of scans, takes any runtime over `max_abs`; see `MOVED_WORST` and `AMPLIFIED`.
        """
        table = self.max_abs * max(1.0, scale)
        return max(table, min(MOVED_WORST[self.dtype] * moved_max_abs, AMPLIFIED * table))


@dataclass(frozen=True)
class ScoreBudget:
    """How much worse, by the oracle's own scores, a choice may be than the one that it displaced.

    Attributes:
        op: a selecting op, or `argmax` for greedy decoding.
        dtype: the model's dtype.
        ulps: the budget in units of u(dtype) * scale.
        scale: what the scale of a score is.
        reason: where the number comes from.
    """

    op: str
    dtype: str
    ulps: float
    scale: str
    reason: str

    @property
    def relative(self) -> float:
        """The budget as a fraction of the scores' scale."""
        return self.ulps * UNIT_ROUNDOFF[self.dtype]


@dataclass(frozen=True)
class OneRunLimit:
    """R of one tensor in one run, by which `bisect` judges: nothing is pooled there, so that it lies higher than R of many draws.

    Attributes:
        what: `op`, an op's outputs on the inputs that it got; `between`, what lies between ops on the outputs that it got; `depth`, a
            tensor deep in the model, which carries all errors before it.
        dtype: of the tensor.
        R: rms error against float64, over that of the yardstick.
        reason: where the number comes from.
    """

    what: str
    dtype: str
    R: float
    reason: str


CHOICE = 1e-3  # of an op fed with exact inputs; none differs in the test's draws, whose exact ties count
# op: ulps in float32, ulps in a half-precision dtype, reason; about three times what tests/test_tolerances.py measures
_OPS: dict[str, tuple[float, float, str]] = {
    "rope_angles": (2, 2, "two float64-built tables joined by angle addition, rounded to float32 whatever the model's dtype"),
    "rope": (4, 2, "two products and a sum"),
    "residual_rms_norm": (8, 4, "a sum of squares over the width, one root"),
    "ssd_scan": (16, 2, "sums over tokens and state in float32; exponents of cumulative sums"),
    "ssd_scan_rope": (16, 2, "as ssd_scan, with B and C rotated"),
    "attention": (16, 2, "softmax and a weighted sum over the keys in float32"),
    "attention_rope": (16, 3, "as attention, with q and k rotated, and rounded before they meet"),
    "keep_window_attention": (16, 2, "as attention, over the kept keys"),
    "product_key_topk": (8, 2, "softmax over scores that are products over half a query"),
    "expert_mix": (16, 2, "a product over the width per expert, then a sum over the experts, which may nearly cancel"),
    "scored_attention": (16, 2, "as attention, with a score added to each logit in float32"),
    "router_topk": (16, 2, "softmax over all experts, or over those chosen"),
    "moe_mix": (16, 2, "two products per expert, over the width and the inner width, then a sum over the experts"),
    "causal_conv1d": (8, 2, "a sum over the taps in float32, one sigmoid"),
    "gated_rms_norm": (8, 4, "one sigmoid, a sum of squares over the width, one root"),
    "selective_scan": (16, 2, "sums over tokens and state in float32; one exp per token and state"),
    "linear": (20, 4, "a sum over the inputs; a gate multiplies two such sums, each rounded to the dtype before"),
}
# runtime: factor on the ulps of _OPS, R, share of differing choices of an op that chooses, reason
_RUNTIMES: dict[str, tuple[float, float, float, str]] = {
    "eager": (1.0, 1.0, CHOICE, "the reference's arithmetic"),
    "compiled": (1.0, 1.0, CHOICE, "ops are opaque to the compiler: the same code"),
    "onnxruntime-cpu": (2.0, 1.5, CHOICE, "other orders of summation; exp and softmax of another library"),
    "onnxruntime-cuda": (2.0, 1.5, CHOICE, "other orders of summation, in Triton's kernels and in ONNX Runtime's; exp of another library"),
    "triton": (2.0, 1.5, CHOICE, "other orders of summation: float32 products of a GPU are added one after another"),
}
_CHOOSING = ("keep_window_attention", "product_key_topk", "router_topk")
_FLOAT32_ALWAYS = ("rope_angles",)
_ROUNDED_BEFORE = ("linear",)  # step sizes are softplus of what a linear layer of the dtype gives


def _op_limits() -> Iterator[OpLimit]:
    for op, (ulps_32, ulps_half, op_reason) in _OPS.items():
        for runtime, (factor, R, choice_rate, runtime_reason) in _RUNTIMES.items():
            for dtype in ("float32",) if op in _FLOAT32_ALWAYS else RUNTIME_DTYPES[runtime]:
                ulps = ulps_32 if dtype == "float32" else ulps_half
                rate = choice_rate if op in _CHOOSING else 0.0
                yield OpLimit(op, dtype, runtime, factor * ulps, R, rate, f"{op_reason}; {runtime_reason}")


OP_LIMITS: tuple[OpLimit, ...] = tuple(_op_limits())

MODEL_LIMITS: tuple[ModelLimit, ...] = (
    ModelLimit("float32", "eager", 1.05, 1e-4, 1e-3, "the same arithmetic as the yardstick, in place"),
    ModelLimit("float32", "compiled", 2.0, 1e-4, 1e-3, "fused norms and activations round elsewhere"),
    ModelLimit("float32", "onnxruntime-cpu", 2.0, 1e-4, 1e-3, "other matrix products, other orders of summation"),
    ModelLimit("float32", "onnxruntime-cuda", 2.0, 1e-4, 1e-3, "other matrix products, other orders of summation; no TF32"),
    ModelLimit("float16", "eager", 1.05, 5e-2, 2e-2, "the same arithmetic as the yardstick, in place"),
    ModelLimit("float16", "compiled", 1.5, 5e-2, 2e-2, "fused operations keep float32 between steps that eager rounds"),
    ModelLimit("float16", "onnxruntime-cpu", 1.0, 5e-2, 2e-2, "bodies and matrix products in float32, rounded between nodes: 0.2 to 0.8"),
    ModelLimit("float16", "onnxruntime-cuda", 1.5, 5e-2, 2e-2, "products of another library, rounded where eager rounds"),
    ModelLimit("bfloat16", "eager", 1.05, 3e-1, 1.5e-1, "the yardstick's arithmetic, in place; 5.2 % of choices in cheems-20m-moe"),
    ModelLimit("bfloat16", "compiled", 1.5, 3e-1, 1.5e-1, "fused operations keep float32 between steps that eager rounds: 0.71 to 0.94"),
    ModelLimit("bfloat16", "onnxruntime-cuda", 1.5, 3e-1, 1.5e-1, "products of another library, rounded where eager rounds"),
)

_HALF = "an op computes in float32 and rounds once, to a quarter of R's floor: sound runtimes stay below 0.5"
_BETWEEN = "sound runtimes reach 3.3: logits of routers and queries of product keys, of which one run has few"
_DEPTH = "it only says where to look; sound runtimes reach 9.3 in float32 (a scan of one row of 9 tokens), 2.6 in float16"
ONE_RUN_LIMITS: tuple[OneRunLimit, ...] = (
    OneRunLimit("op", "float32", 8.0, "sound runtimes reach 3.8: ssd_scan on a few rows"),
    OneRunLimit("op", "float16", 1.5, _HALF),
    OneRunLimit("op", "bfloat16", 1.5, _HALF),
    *(OneRunLimit("between", dtype, 8.0, _BETWEEN) for dtype in UNIT_ROUNDOFF),
    *(OneRunLimit("depth", dtype, 16.0, _DEPTH) for dtype in UNIT_ROUNDOFF),
)

# Two float64 computations of the same, as shares of the largest value; tests hold references, laws and oracles to them.
FLOAT64_OP = 1e-14  # 90 u; thousands of drawn calls of ops stay below 5 u
FLOAT64_MODEL = 1e-9  # models drawn at random may amplify rounding a thousandfold and more; those of the families stay below 6e-14

_TERMS = "|q_x| max|k_x| + |q_y| max|k_y|: an upper bound of every expert's score"
_DEEP_QUERY = "the query's error, carried through every layer below: in float16 31 in cheems-20m-moe, the worst of a million choices"
_DEEPEST_QUERY = "the query's error, at worst in cheems-20m-moe without constant parameters: 69, where weights moved by u alone make 32"
_SCORE = "largest |score| among the row's keys"
_HIDDEN = "the values' error, amplified by exp, twice; the score's distance from the threshold counts"
_ROUTE = "largest |logit| of the token"
_DEEP_LOGIT = "the logits' error, carried through every layer below: 36 in jamba-tiny in bfloat16"
_DEEPEST_LOGIT = "the logits' error, at worst in cheems-2407-320m, nothing constant: 65, where weights moved by u alone make 60"
_LOGIT = "rms of the logits, at least 1"
SCORE_BUDGETS: tuple[ScoreBudget, ...] = (
    ScoreBudget("product_key_topk", "float32", 64, _TERMS, "the query's error, carried through every layer below, twice"),
    ScoreBudget("product_key_topk", "float16", 96, _TERMS, _DEEPEST_QUERY),
    ScoreBudget("product_key_topk", "bfloat16", 48, _TERMS, _DEEP_QUERY),
    ScoreBudget("keep_window_attention", "float32", 64, _SCORE, "the values' error, amplified by exp, twice"),
    ScoreBudget("keep_window_attention", "float16", 16, _SCORE, "the values' error, amplified by exp, twice"),
    ScoreBudget("keep_window_attention", "bfloat16", 16, _SCORE, "the values' error, amplified by exp, twice"),
    ScoreBudget("scored_attention", "float32", 64, _SCORE, _HIDDEN),
    ScoreBudget("scored_attention", "float16", 16, _SCORE, _HIDDEN),
    ScoreBudget("scored_attention", "bfloat16", 16, _SCORE, _HIDDEN),
    ScoreBudget("router_topk", "float32", 64, _ROUTE, "the logits' error, carried through every layer below, twice"),
    ScoreBudget("router_topk", "float16", 96, _ROUTE, _DEEPEST_LOGIT),
    ScoreBudget("router_topk", "bfloat16", 48, _ROUTE, _DEEP_LOGIT),
    ScoreBudget("argmax", "float32", 2 * 1e-4 * 2**24, _LOGIT, "two logits, each within the model's max abs limit"),
    ScoreBudget("argmax", "float16", 2 * 5e-2 * 2**11, _LOGIT, "two logits, each within the model's max abs limit"),
    ScoreBudget("argmax", "bfloat16", 2 * 3e-1 * 2**8, _LOGIT, "two logits, each within the model's max abs limit"),
)

_OP_INDEX = {(limit.op, limit.dtype, limit.runtime): limit for limit in OP_LIMITS}
_MODEL_INDEX = {(limit.dtype, limit.runtime): limit for limit in MODEL_LIMITS}
_BUDGET_INDEX = {(budget.op, budget.dtype): budget for budget in SCORE_BUDGETS}
_ONE_RUN_INDEX = {(limit.what, limit.dtype): limit for limit in ONE_RUN_LIMITS}


def op_limit(op: str, dtype: str, runtime: str) -> OpLimit:
    """The limit of an op at a dtype in a runtime; KeyError where there is none."""
    return _OP_INDEX[op, "float32" if op in _FLOAT32_ALWAYS else dtype, runtime]


def output_limit(op: str, dtype: str, output: str, runtime: str) -> OpLimit:
    """The limit of one output of an op, of inputs of `dtype` and itself of dtype `output`.

    A float32 output has the limits of float32 whatever the inputs are, unless the op rounds to their dtype on the way to it.
    """
    return op_limit(op, dtype if op in _ROUNDED_BEFORE else output, runtime)


def model_limit(dtype: str, runtime: str) -> ModelLimit:
    """The limits of a whole model at a dtype in a runtime; KeyError where there is none."""
    return _MODEL_INDEX[dtype, runtime]


def score_budget(op: str, dtype: str) -> ScoreBudget:
    """The score budget of a selecting op, or of `argmax`; KeyError where there is none."""
    return _BUDGET_INDEX[op, dtype]


def one_run_R(what: str, dtype: str) -> float:
    """The limit of R of one tensor in one run; KeyError where there is none."""
    return _ONE_RUN_INDEX[what, dtype].R


def _rows(title: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(title)} |"
    yield f"|{'---|' * len(title)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _introduction() -> Iterator[str]:
    yield "# Tolerances\n"
    yield "Written by `python -m wm_graph.tolerances` from the table in `wm_graph/tolerances.py`."
    yield "A limit fails, it never warns.\n"
    yield "u is the unit roundoff: " + ", ".join(f"{dtype} {u:.3g}" for dtype, u in UNIT_ROUNDOFF.items()) + ".\n"


def _models() -> Iterator[str]:
    yield "\n## Whole models\n"
    yield "R = rms(runtime - oracle) / rms(eager - oracle), pooled over draws; the oracle is the float64 reference of the same"
    yield f"stored weights. The denominator is at least {FLOOR_ULPS:g} u times the rms of the oracle's logits, and at most a few times the"
    yield "rms by which the oracle moves when each weight moves by up to u: an eager that is further off is wrong, and its R tells. Max abs"
    yield "is for logits of rms 1 or less; larger logits scale it by their rms, and a model that amplifies rounding raises it to as many"
    yield f"times the largest move, but at most {AMPLIFIED:g}-fold. As many times:"
    yield f"{_times(MOVED)} (rms), {_times(MOVED_WORST)} (worst); sound eager code is off by 1.3 to 6.5 moves (rms) and"
    yield "2.6 to 13.4 (worst) in float32, by 0.5 to 1.7 and up to 2.8 in float16. NaN and infinity always fail.\n"
    title = ("dtype", "runtime", "R", "max abs", "differing choices", "reason")
    yield from _rows(title, ((m.dtype, m.runtime, f"{m.R:g}", f"{m.max_abs:g}", f"{m.choice_rate:.2%}", m.reason) for m in MODEL_LIMITS))


def _times(moves: dict[str, float]) -> str:
    return ", ".join(f"{dtype} {times:g}" for dtype, times in moves.items())


def _budgets() -> Iterator[str]:
    yield "\n## Choices\n"
    yield "A choice may differ from the oracle's only where, by the oracle's scores, it is worse by at most `ulps · u · scale`."
    yield "No op that chooses may exceed the share of differing choices above."
    yield "Values are then compared with an oracle that made the runtime's choices. Greedy texts are compared up to the first"
    yield "step whose two best logits are closer than the budget of `argmax`.\n"
    title = ("op", "dtype", "ulps", "as a fraction", "scale", "reason")
    yield from _rows(title, ((b.op, b.dtype, f"{b.ulps:.4g}", f"{b.relative:.2g}", b.scale, b.reason) for b in SCORE_BUDGETS))


def _one_run() -> Iterator[str]:
    yield "\n## One run\n"
    yield "`wm bisect` judges single tensors of single runs: an op's outputs on the inputs that it got, what lies between ops on the"
    yield "outputs that it got, and, to find where to look, tensors deep in the model.\n"
    yield from _rows(("what", "dtype", "R", "reason"), ((one.what, one.dtype, f"{one.R:g}", one.reason) for one in ONE_RUN_LIMITS))
    yield f"\nTwo float64 computations of the same agree to {FLOAT64_OP:g} of the largest value for an op, {FLOAT64_MODEL:g} for a model."


def _ops() -> Iterator[str]:
    yield "\n## Ops\n"
    yield "Each op, fed with exact inputs of its dtype: max |runtime - float64 reference| <= ulps · u · max |reference|, for each output,"
    yield f"and R as above, over at least 64 rows, with a floor of {FLOOR_ULPS:g} u of the output's rms. An output that is float32 in"
    yield "any model (a state) has the limits of float32, but for step sizes of linear, which are made of numbers that are rounded."
    yield "Differing choices are a share of the experts or kept keys.\n"
    title = ("op", "dtype", "runtime", "ulps", "as a fraction", "R", "differing choices", "reason")
    yield from _rows(title, (_op_row(limit) for limit in OP_LIMITS))


def _op_row(o: OpLimit) -> tuple[str, ...]:
    choices = f"{o.choice_rate:.2%}" if o.choice_rate else "–"
    return o.op, o.dtype, o.runtime, f"{o.ulps:g}", f"{o.relative:.2g}", f"{o.R:g}", choices, o.reason


def render() -> str:
    """The table as Markdown."""
    return "\n".join((*_introduction(), *_models(), *_budgets(), *_one_run(), *_ops())) + "\n"


if __name__ == "__main__":
    print(render(), end="")
