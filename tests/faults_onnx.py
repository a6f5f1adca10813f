"""Faults in one op, or between ops, of one ONNX file of a bundle: nodes change, weights stay.

In the texts `x` is the value that is wrong and `y` what is put in its place; see `onnx_edits`. The bodies name values by their shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx

from faults import Fault
from onnx_edits import Part, edit_file, in_body, in_graph

ORT, PORTABLE = "model.ort.onnx", "model.onnx"
Change = Callable[[Part], Any]


def _fault(name: str, op: str, family: str, edit: Callable[[onnx.ModelProto], None], graph: str, rest: dict[str, Any]) -> Fault:
    return Fault(name, op, family, "onnxruntime-cpu", partial(edit_file, graph=graph, edit=edit), graph, **rest)


def body(name: str, op: str, family: str, change: Change, graph: str = ORT, **rest: Any) -> Fault:
    """A fault inside the op's body."""
    return _fault(name, op, family, in_body(op, change), graph, rest)


def main(name: str, family: str, change: Change, graph: str = ORT, op: str = "model", **rest: Any) -> Fault:
    """A fault of the main graph: between ops, or in what one node of an op is given."""
    return _fault(name, op, family, in_graph(change), graph, rest)


# Texts.

NEGATIVE = "y = Neg(x)"
NOTHING = "y = Sub(x, x)"
_ROUNDED = "a = Cast <to = {0}> (x)  y = Cast <to = 1> (a)"
BFLOAT16 = _ROUNDED.format(int(onnx.TensorProto.BFLOAT16))
HALF = _ROUNDED.format(int(onnx.TensorProto.FLOAT16))
PLUS_ONE = "one = Constant <value_int = 1> ()  y = Add(x, one)"
LESS_ONE = "one = Constant <value_int = 1> ()  y = Sub(x, one)"
# Int64 1 where a call has one token, else 0.
_SINGLE = "t = Shape <start = 1, end = 2> ({0})  one = Constant <value_int = 1> ()  is = Equal(t, one)  single = Cast <to = 7> (is)  "
# What query heads tiled over two kv heads read, as a reordering of four heads: 0 and 2 the first, 1 and 3 the second.
_TILED = "order = Constant <value_ints = [0, 2, 1, 3]> ()  y = Gather <axis = 2> (x, order)"


# x without its last columns, as `most`, and from column s on, as `last`.
_UP_TO = (
    f"a = Constant <value_ints = [-1]> ()  b = Constant <value_ints = [0]> ()  end = Constant <value_ints = [{2**62}]> ()  "
    "e = Constant <value_ints = [{0}]> ()  most = Slice(x, b, e, a)  last = Slice(x, s, end, a)  "
)


# Changes that take more than a line.


def _cell_late_in_steps(part: Part) -> None:
    last = "s = Shape <start = 2, end = 3> (cache_k_BKSP)  last = Sub(s, one)  late = Add(x, single)  y = Min(late, last)"
    part.distort("position_B", _SINGLE.format("cos_BTF") + last)


def _weight_inside(part: Part) -> None:
    for sigmoid in part.find("Sigmoid"):
        hidden = sigmoid.input[0]
        (active,) = part.readers(sigmoid.output[0])
        (weighted,) = part.readers(active.output[0])
        weight = weighted.input[1]
        part.skip(weighted, 0)
        part.distort(hidden, "y = Mul(x, weight)", weight=weight)


def _overlap_cut_at_the_wrong_side(part: Part) -> None:
    (tail,) = part.find("Slice", lambda node: part.maker(node.input[1]).op_type == "Sub" and part.maker(node.input[2]).op_type == "Shape")
    end, rest = tail.input[2], part.maker(tail.input[1]).input[1]
    start = "chunk = Constant <value_ints = [16]> ()  "
    part.feed(tail, 2, start + "a = Sub(x, chunk)  y = Add(a, rest)", rest=rest)
    part.feed(tail, 1, start + "y = Sub(end, chunk)", end=end)


def _flattened_softmax(part: Part) -> None:
    (softmax,) = part.find("Softmax")
    value = softmax.output[0]
    part.skip(softmax, 0)
    part.distort(value, "s = Shape(x)  flat = Flatten <axis = 1> (x)  p = Softmax <axis = 1> (flat)  y = Reshape(p, s)")


def _decay_left_out_of_steps(part: Part) -> None:
    state = part.readers("state_BCN")[0].output[0]
    (decayed,) = (node for node in part.readers(state) if node.op_type == "Mul")
    part.skip(decayed, 0)


def _gated_after(part: Part) -> None:
    (norm,) = part.find("RMSNormalization")
    gated = part.maker(norm.input[0])
    norm.input[0] = "y_MC"
    part.distort("out_MC", "y = Mul(x, gate)", gate=gated.input[1])


def _oldest_goes(part: Part) -> None:
    (ranked,) = part.find("Where", part.reads(2**62))
    part.skip(ranked, 1)


def _reads_other_layer(name: str, layer: str = "layers.0.", other: str = "layers.1.") -> Change:
    """One node reads the parameter or state of another layer."""

    def change(part: Part) -> None:
        for node in part.readers(f"{layer}{name}"):
            node.input[:] = [f"{other}{name}" if value == f"{layer}{name}" else value for value in node.input]

    return change


def _head_a_row_late(part: Part) -> None:
    (head,) = (item for item in part.proto.initializer if item.name == "head")
    (offset,) = (entry for entry in head.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + head.dims[1] * 4)


def _states_after_the_chunks(part: Part) -> None:
    """x[0:-1] becomes x[1:]."""
    (starts,) = part.find("Slice", lambda node: np.array_equal(part.number(node.input[2]), [-1]))
    part.feed(starts, 1, "y = Constant <value_ints = [1]> ()")
    part.feed(starts, 2, f"y = Constant <value_ints = [{2**62}]> ()")


def _positions_of_padding(part: Part) -> None:
    for node in part.find("Where", part.reads(-1)):
        if part.maker(node.input[0]).op_type == "Less" and part.maker(node.input[1]).op_type == "Add":
            part.skip(node, 1)


def _room_for_one_less(part: Part) -> None:
    part.distort_all("Sub", LESS_ONE, lambda node: part.maker(node.input[1]).op_type == "GatherElements")


def _single_tokens_see_free_cells(part: Part) -> None:
    part.distort(part.find("LessOrEqual")[-1].output[0], _SINGLE.format("cos_BTF") + "y = Or(x, is)")


def _position_one_less(part: Part) -> None:
    (attention,) = [node for node in part.readers("position") if node.op_type == "WmAttentionRope"][:1]
    place = list(attention.input).index("position")
    part.feed(attention, place, "one = Constant <value_int = 1> ()  zero = Sub(one, one)  less = Sub(x, one)  y = Max(less, zero)")


def _halves_exchanged(part: Part) -> None:
    for node in part.find("Split"):
        part.exchange(*node.output)


def _next_for_the_last(part: Part) -> None:
    _of_one_more(part, "s = Constant <value_ints = [-1]> ()  " + _UP_TO.format(-2) + "y = Concat <axis = -1> (most, last)")


def _first_of_few_left_out(part: Part) -> None:
    # Every sixteenth token; tokens are the last axis but one.
    few = "t = Shape <start = -2, end = -1> (x)  n = Squeeze(t)  i = Range(zero, n, one)  d = Constant <value_int = 16> ()  m = Mod(i, d)  "
    few += "five = Constant <value_int = 5> ()  is = Equal(m, five)  column = Unsqueeze(is, a)  "
    few = "zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  " + few
    _of_one_more(part, "s = Constant <value_ints = [1]> ()  " + _UP_TO.format(-1) + few + "y = Where(column, last, most)")


def _of_one_more(part: Part, text: str) -> None:
    """The last TopK takes one more, of which the text leaves one out."""
    topk = part.find("TopK")[-1]
    part.feed(topk, 1, "one = Constant <value_ints = [1]> ()  y = Add(x, one)")
    for name in list(topk.output):
        part.distort(name, text)


_SCANS = (
    body("the state of an empty row moves on", "causal_conv1d", "mamba2-tiny",
         lambda part: part.distort("valid_B", "one = Constant <value_int = 1> ()  y = Max(x, one)"), shows="pieces"),
    body("B and C turn the wrong way", "ssd_scan_rope", "cheems-tiny", lambda part: part.distort("sin_BTF", NEGATIVE)),
    body("neighbours turned as pairs", "ssd_scan_rope", "cheems-tiny", lambda part: part.set("RotaryEmbedding", interleaved=1)),
    body("B and C exchanged", "ssd_scan", "mamba2-tiny", lambda part: part.exchange("B_BTGN", "C_BTGN")),
    body("A without its sign", "ssd_scan", "bamba-tiny", lambda part: part.distort("A_H", NEGATIVE)),
    body("state rounded to bfloat16", "ssd_scan", "mamba2-tiny", lambda part: part.distort("next_BHNP", BFLOAT16), shows="decode"),
    body("groups tiled over the heads", "ssd_scan", "bamba-tiny",
         lambda part: part.distort(part.value("Expand"), "y = Transpose <perm = [0, 1, 3, 2, 4]> (x)")),
    body("state before a chunk is the one after it", "ssd_scan_rope", "cheems-tiny",
         _states_after_the_chunks, PORTABLE),
    body("decay counts the source itself", "ssd_scan_rope", "cheems-tiny", lambda part: part.retype("Greater", "GreaterOrEqual"), PORTABLE),
    body("decay since the start one token short", "ssd_scan_rope", "cheems-tiny",
         lambda part: part.feed(part.find("Exp")[0], 0, "y = Sub(x, own)", own=part.find("CumSum")[0].input[0]), PORTABLE, shows="decode"),
    # In place, prefill shows it too: the second layer reads what the first has just written.
    main("two layers' states exchanged", "mamba2-tiny", lambda part: part.exchange("layers.0.ssd", "layers.1.ssd"), op="ssd_scan"),
    # The op's own masking of dt, done once for all its nodes in front of them.
    main("the first token of the padding enters the state", "mamba2-tiny", lambda part: part.retype("Less", "LessOrEqual"), op="ssd_scan",
         shows="padding"),
    body("padding enters the state", "selective_scan", "jamba-tiny", lambda part: part.skip(part.find("Where")[0], 1), shows="padding"),
    body("dt left out of what enters", "selective_scan", "jamba-tiny",
         lambda part: part.skip(next(node for node in part.readers("x_BTC") if node.op_type == "Mul"), 0)),
    body("single tokens do not decay the state", "selective_scan", "jamba-tiny", _decay_left_out_of_steps, shows="decode"),
)  # fmt: skip

_CONVOLUTIONS = (
    body("SiLU dropped", "causal_conv1d", "mamba2-tiny", lambda part: part.skip(part.find("Mul")[-1], 0)),
    body("taps in reverse order", "causal_conv1d", "mamba2-tiny",
         lambda part: part.distort("weight_CL", "i = Constant <value_ints = [3, 2, 1, 0]> ()  y = Gather <axis = 1> (x, i)")),
    body("bias dropped", "causal_conv1d", "mamba2-tiny", lambda part: part.distort("bias_C", NOTHING)),
    body("state one input late", "causal_conv1d", "mamba2-tiny", lambda part: part.distort("valid_B", LESS_ONE), shows="decode"),
    body("state ends with the padding", "causal_conv1d", "mamba2-tiny",
         lambda part: part.distort("valid_B", "t = Shape <start = 1, end = 2> (x_BTC)  b = Shape(x)  y = Expand(t, b)"), shows="padding"),
)  # fmt: skip

_NORMS = (
    body("epsilon of another value", "gated_rms_norm", "mamba2-tiny", lambda part: part.set("RMSNormalization", epsilon=1e-6)),
    body("gated after the norm", "gated_rms_norm", "mamba2-tiny", _gated_after),
    body("residual scale missing", "residual_rms_norm", "cheems-tiny", lambda part: part.skip(part.find("Mul")[0], 0)),
    body("the sum handed on is not scaled", "residual_rms_norm", "cheems-tiny",
         lambda part: part.distort("sum_MD", "y = Add(x_MD, residual_MD)")),
    main("weight of another layer's norm", "llama-tiny", _reads_other_layer("feed_forward_norm"), op="residual_rms_norm"),
)  # fmt: skip

_ATTENTIONS = (
    body("single tokens see free cells", "attention_rope", "llama-tiny", _single_tokens_see_free_cells, PORTABLE, shows="decode"),
    main("a position one less", "llama-tiny", _position_one_less),
    body("cosine and sine exchanged", "attention_rope", "llama-tiny", lambda part: part.exchange("cos_BTF", "sin_BTF")),
    body("neighbours turned as pairs", "attention_rope", "llama-tiny",
         lambda part: part.set("GroupQueryAttention", rotary_interleaved=1)),
    body("logits not divided by the root of P", "attention_rope", "llama-tiny", lambda part: part.set("GroupQueryAttention", scale=1.0)),
    body("only the last 24 keys seen", "attention_rope", "llama-tiny",
         lambda part: part.set("GroupQueryAttention", local_window_size=24), shows="window"),
    body("query heads tiled over the kv heads", "attention", "jamba-tiny",
         lambda part: (part.distort("q_BTHP", _TILED), part.distort("out_BTHP", _TILED))),
    body("cache cell written one late by single tokens", "attention_rope", "llama-tiny", _cell_late_in_steps, shows="decode"),
    body("causal mask one too wide", "attention_rope", "llama-tiny",
         lambda part: part.feed(part.find("LessOrEqual")[-1], 1, PLUS_ONE), PORTABLE),
    body("softmax over the flattened axes, as before opset 13", "attention_rope", "llama-tiny", _flattened_softmax, PORTABLE),
    body("logits in half precision", "attention_rope", "llama-tiny", lambda part: part.distort(part.value("MatMul"), HALF), PORTABLE),
    body("rows that go on together are not scaled", "attention_rope", "llama-tiny",
         lambda part: part.skip(part.find("Mul", part.reads(np.float32(0.25)))[0], 0), shows="pieces"),
)  # fmt: skip

_WINDOWS = (
    body("the oldest key leaves, not the worst", "keep_window_attention", "doge-tiny", _oldest_goes, shows="window"),
    body("a stale key stays in its slot", "keep_window_attention", "doge-tiny",
         lambda part: part.skip(part.find("ScatterElements", lambda node: node.input[0] == "slot_k_BKWP")[0], 0), shows="decode"),
    body("padding enters the window", "keep_window_attention", "doge-tiny", _positions_of_padding, shows="padding"),
    body("window one too small", "keep_window_attention", "doge-tiny", _room_for_one_less, shows="window"),
    body("of equal scores the later key leaves", "keep_window_attention", "log, single_head, static_hard, partly rotated attention",
         lambda part: part.retype("Sub", "Add", part.reads(np.int64(2**31))), PORTABLE, shows="window"),
    body("score not added", "keep_window_attention", "doge-tiny",
         lambda part: part.distort_all("Max", "zero = Constant <value_float = 0.0> ()  y = Min(x, zero)")),
    main("exponential of the score left out", "doge-tiny", lambda part: part.skip(part.find("Exp")[0], 0)),
    body("keys at the threshold hidden", "scored_attention", "log, single_head, static_hard, partly rotated attention",
         lambda part: part.retype("GreaterOrEqual", "Greater", part.reads(np.float32(1.0)))),
    body("threshold one key low", "scored_attention", "ratio, shared_expert_isolated, mamba1 as published",
         lambda part: part.distort_all("Cast", "one = Constant <value_float = 1.0> ()  d = CastLike(one, x)  y = Sub(x, d)",
                                       lambda node: node.attribute[0].i == onnx.TensorProto.DOUBLE)),
)  # fmt: skip

_EXPERTS = (
    body("halves of the expert's number exchanged", "product_key_topk", "cheems-tiny-moe",
         lambda part: part.exchange(part.value("Squeeze", 2), part.value("Squeeze", 3))),
    body("weights not normalised", "product_key_topk", "cheems-tiny-moe",
         lambda part: (part.set("Softmax", axis=None), part.retype("Softmax", "Exp"))),
    body("last pick dropped", "expert_mix", "cheems-tiny-moe",
         lambda part: part.distort("weight_BTRk", "m = Constant <value_floats = [1.0, 1.0, 1.0, 0.0]> ()  y = Mul(x, m)")),
    body("tables exchanged", "expert_mix", "cheems-tiny-moe", lambda part: part.exchange("down_ED", "up_ED")),
    body("weight inside the activation", "expert_mix", "cheems-tiny-moe", _weight_inside),
    body("overlap of the last chunk cut at the wrong side", "expert_mix", "cheems-tiny-moe", _overlap_cut_at_the_wrong_side),
    body("softmax over the chosen alone", "router_topk", "jamba-tiny",
         lambda part: part.distort("weight_Mk", "y = Softmax <axis = 1> (best)", best=part.value("TopK"))),
    body("gate and up exchanged", "moe_mix", "jamba-tiny", _halves_exchanged),
    body("experts counted from one", "moe_mix", "jamba-tiny",
         lambda part: part.distort("expert_Mk", "e = Shape <start = 0, end = 1> (in_EFD)  one = Constant <value_int = 1> ()  "
                                                "a = Add(x, one)  y = Mod(a, e)")),
    body("a second expert overwrites the first", "moe_mix", "ratio, shared_expert_isolated, mamba1 as published",
         lambda part: part.set("ScatterND", reduction=None)),
)  # fmt: skip

_ROTATIONS = (
    body("neighbours turned as pairs", "rope", "doge-tiny", lambda part: part.set("RotaryEmbedding", interleaved=1)),
    body("position one ahead for single tokens", "rope_angles", "llama-tiny",
         lambda part: part.distort("position_BT", _SINGLE.format("x") + "y = Add(x, single)"), shows="decode"),
    body("second digit of the position to base 255", "rope_angles", "bamba-tiny",
         lambda part: part.feed(part.find("Div")[0], 1, "y = Constant <value_int = 255> ()"), shows="far"),
    body("angles rounded to half precision", "rope_angles", "llama-tiny", lambda part: part.distort("cos_BTF", HALF)),
)  # fmt: skip

_BETWEEN = (
    main("skip D dropped", "mamba2-tiny", lambda part: part.skip(part.readers("layers.0.ssd_scan.y")[0], 0)),
    main("bias of the step size dropped", "mamba2-tiny", lambda part: part.skip(part.readers("layers.0.mixer.dt_bias")[0], 0)),
    main("exponential for softplus", "mamba2-tiny", lambda part: part.retype("Softplus", "Exp")),
    main("sigmoid of 1.702 x, as GELU takes it, in SiLU", "llama-tiny",
         lambda part: part.feed(part.find("Sigmoid")[0], 0, "c = Constant <value_float = 1.702> ()  y = Mul(x, c)")),
    main("residual scale of another layer", "doge-tiny", _reads_other_layer("feed_forward_residual")),
    main("projection of another layer", "llama-tiny", _reads_other_layer("mixer.out")),
    main("tied head read one row late", "llama-tiny", _head_a_row_late),
    main("selected tokens counted from one", "llama-tiny", lambda part: part.distort("select", LESS_ONE)),
    main("norm of queries without its weight", "doge-tiny",
         lambda part: part.feed(part.readers("layers.0.mixer.q_norm")[0], 1, "a = Sub(x, x)  y = Exp(a)")),
)  # fmt: skip

_SLICE = "s = Constant <value_ints = [{0}]> ()  e = Constant <value_ints = [{1}]> ()  a = Constant <value_ints = [2]> ()  "
_KEYS = _SLICE.format(64, 128) + "y = Slice(qkv_BTC, s, e, a)"  # of four heads of 16
_IN_HALF = {"dtype": "fp16", "shows": "float16"}
_HALF = (
    body("mean over the tokens", "gated_rms_norm", "mamba2-tiny",
         lambda part: part.feed(part.find("ReduceMean")[0], 1, "y = Constant <value_ints = [0]> ()"), **_IN_HALF),
    body("epsilon forgotten", "gated_rms_norm", "mamba2-tiny", lambda part: part.skip(part.find("Add")[0], 0), **_IN_HALF),
    body("rounded to bfloat16 on the way", "residual_rms_norm", "llama-tiny",
         lambda part: part.feed(part.find("Cast", lambda node: "sum_MD" in node.output)[0], 0, BFLOAT16), **_IN_HALF),
    body("scores rounded to the file's dtype", "keep_window_attention", "doge-tiny",
         lambda part: part.distort("score_BTK", part.own), **_IN_HALF),
    body("keys not turned", "attention_rope", "llama-tiny",
         lambda part: part.feed(part.find("GroupQueryAttention", lambda node: node.input[1] != "")[0], 1, _KEYS), **_IN_HALF),
)  # fmt: skip

_CHOICES = {"dtype": "fp16", "shows": "choices"}
_PICKS = tuple(
    body(name, op, family, change, graph, **_CHOICES)
    for name, change in (("best expert of a few tokens left out", _first_of_few_left_out), ("next expert for the last", _next_for_the_last))
    for op, family, graph in (("product_key_topk", "cheems-tiny-moe", ORT), ("router_topk", "jamba-tiny", PORTABLE))
)

ONNX_FAULTS: tuple[Fault, ...] = (
    *_SCANS, *_CONVOLUTIONS, *_NORMS, *_ATTENTIONS, *_WINDOWS, *_EXPERTS, *_ROTATIONS, *_BETWEEN, *_HALF, *_PICKS,
)  # fmt: skip
