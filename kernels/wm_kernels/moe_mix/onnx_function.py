"""WmMoeMix: the weighted sum of a token's experts.

    y = sum_k w_k (W_out h + b_out)        h = act(W_in x + b_in)        gated: h = act(first half) ⊙ second half

A Scan over the experts hands out their matrices one by one, without a copy; those that some token chose take all of its tokens together.

Letters: M tokens, k picks, D model, E experts, N tokens of one expert, I inner width, F = I, or 2 I where gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from wm_kernels.expert_mix.onnx_function import activate
from wm_kernels.onnx_body import FLOAT, Body, Flavour, Value
from wm_kernels.onnx_body import INT64 as INT
from wm_kernels.onnx_schema import FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmMoeMix"
INPUTS = [
    ("x_MD", FLOAT_T),
    ("expert_Mk", INT64),
    ("weight_Mk", FLOAT_T),
    ("in_EFD", FLOAT_T),
    ("in_bias_EF", FLOAT_T),
    ("out_EDI", FLOAT_T),
    ("out_bias_ED", FLOAT_T),
]
OUTPUTS = [("y_MD", FLOAT_T)]
_ATTRIBUTES = {"activation": str, "expert_size": int, "gated": int, "num_picks": int}
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, _ATTRIBUTES, optional=["in_bias_EF", "out_bias_ED"])

# The onnxruntime body copies the matrices of all picks where they have no more entries than this (2 MB in float32): less than the turns
# of the Scan cost.
_GATHERED_ENTRIES = 2**19


def translation(
    x_MD: Any,
    expert_Mk: Any,
    weight_Mk: Any,
    in_EFD: Any,
    in_bias_EF: Any,
    out_EDI: Any,
    out_bias_ED: Any,
    activation: str,
    gated: bool,
) -> Any:
    """torch.ops.wm.moe_mix to its node."""
    D, I = size(out_EDI, 1), size(out_EDI, 2)
    attributes = {"activation": activation, "expert_size": (size(in_EFD, 1) + I) * D, "gated": int(gated), "num_picks": size(expert_Mk, 1)}
    return _node(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, **attributes)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one activation, one k and one size of an expert."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    inputs = dict(zip((name for name, _ in INPUTS), g.all_inputs(), strict=True))
    x_MD, expert_Mk, weight_Mk = g.f32(inputs["x_MD"]), inputs["expert_Mk"], g.f32(inputs["weight_Mk"])
    biases = {name: None if name in one["absent"] else inputs[name] for name in ("in_bias_EF", "out_bias_ED")}
    tables = (inputs["in_EFD"], biases["in_bias_EF"], inputs["out_EDI"], biases["out_bias_ED"])
    mix = _Mix(g, x_MD, expert_Mk, weight_Mk, *tables, one["activation"], bool(one["gated"]))
    few = _GATHERED_ENTRIES // (one["num_picks"] * one["expert_size"])
    if g.ort and few:
        (y_MD,) = g.branch(g.Squeeze(g.dim(x_MD, 0), [0]) <= few, (FLOAT,), lambda: [mix.gathered()], lambda: [mix.scanned()])
    else:
        y_MD = mix.scanned()
    return g.function({"y_MD": g.narrow(y_MD)})


@dataclass
class _Mix:
    """One node's inputs and the two ways to compute it."""

    g: Body
    x_MD: Value
    expert_Mk: Value
    weight_Mk: Value
    in_EFD: Value
    in_bias_EF: Value | None
    out_EDI: Value
    out_bias_ED: Value | None
    activation: str
    gated: bool

    def hidden(self, inner: Value) -> Value:
        """The activation, over the last axis."""
        if not self.gated:
            return activate(self.g, self.activation, inner)
        gate, up = self.g.Split(inner, axis=-1, num_outputs=2, outs=2)
        return activate(self.g, self.activation, gate) * up

    def scanned(self) -> Value:
        """Expert by expert, each over the tokens that chose it."""
        g = self.g
        tables = (self.in_EFD, self.out_EDI, self.in_bias_EF, self.out_bias_ED)
        given = [table for table in tables if table is not None]

        def step(e: Value, y_MD: Value, in_FD: Value, out_DI: Value, *biases: Value) -> Sequence[Value]:
            of = iter(biases)
            in_bias_F, out_bias_D = (None if table is None else next(of) for table in tables[2:])
            here_Mk = g.Equal(self.expert_Mk, e)
            hit_M = g.ReduceMax(g.int64(here_Mk), [1], keepdims=0)

            def add() -> list[Value]:
                row_N = g.reshape(g.NonZero(hit_M), -1)
                # Picks of the same expert by one token become one, so that no row is added to twice in one go.
                weight_N1 = g.Gather(g.ReduceSum(g.Where(here_Mk, self.weight_Mk, 0.0), [1], keepdims=1), row_N)
                hidden_NI = self.hidden(self._affine(g.Gather(self.x_MD, row_N), in_FD, in_bias_F))
                return [g.ScatterND(y_MD, g.unsqueeze(row_N, 1), self._affine(hidden_NI, out_DI, out_bias_D) * weight_N1, reduction="add")]

            (added_MD,) = g.branch(g.ReduceMax(hit_M, keepdims=0) > 0, (FLOAT,), add, lambda: [y_MD])
            return [e + 1, added_MD]

        states = [g.constant(0), g.ConstantOfShape(g.Shape(self.x_MD))]
        return g.scan_all(states, given, [INT, FLOAT, *[g.dtype] * len(given)], step)[1]

    def _affine(self, x: Value, matrix: Value, bias: Value | None) -> Value:
        g = self.g
        biases = [] if bias is None else [g.f32(bias)]
        return g.Gemm(x, g.f32(matrix), *biases, transB=1)

    def gathered(self) -> Value:
        """All picks at once, with a copy of each one's matrices."""
        g = self.g
        inner_MkF = self._batched(g.unsqueeze(self.x_MD, 1, 3), self.in_EFD, self.in_bias_EF)
        out_MkD = self._batched(g.unsqueeze(self.hidden(inner_MkF), 3), self.out_EDI, self.out_bias_ED)
        return g.Squeeze(g.unsqueeze(self.weight_Mk, 1) @ out_MkD, [1])

    def _batched(self, column: Value, matrix: Value, bias: Value | None) -> Value:
        g = self.g
        y = g.Squeeze(g.f32(g.Gather(matrix, self.expert_Mk)) @ column, [3])
        return y if bias is None else y + g.f32(g.Gather(bias, self.expert_Mk))
