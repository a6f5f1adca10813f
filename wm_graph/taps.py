"""Taps: stable names for every op output of a forward pass, and replay of recorded choices.

Names are `layers.<i>.<op>.<output>`; a second call of the same op in a layer is `layers.<i>.<op>.1.<output>`. The exporter gives the same
names to the values of the ONNX graph, so that any two runtimes can be compared value by value.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Output names of each op, in order: what taps and ONNX values are called.
OP_OUTPUTS: dict[str, tuple[str, ...]] = {
    "rope_angles": ("cos", "sin"),
    "rope": ("y",),
    "residual_rms_norm": ("normed", "sum"),
    "ssd_scan": ("y", "state"),
    "ssd_scan_rope": ("y", "state"),
    "attention": ("out", "k", "v"),
    "attention_rope": ("out", "k", "v"),
    "keep_window_attention": ("out", "k", "v", "score", "slot_position"),
    "product_key_topk": ("weight", "expert"),
    "expert_mix": ("y",),
    "scored_attention": ("out", "k", "v", "score"),
    "router_topk": ("weight", "expert"),
    "moe_mix": ("y",),
    "causal_conv1d": ("y", "state"),
    "gated_rms_norm": ("out",),
    "selective_scan": ("y", "state"),
    "linear": ("a", "b", "c", "dt"),
}
# No model calls these: the exporter makes nodes of them from what lies between the ops, in the graph for GPUs alone.
ONLY_IN_GRAPHS = ("linear",)


class TapNames:
    """Gives the names of op calls, in execution order."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}

    def next(self, scope: str, op: str) -> str:
        """The prefix for the next call of `op` in `scope` (`layers.3`, or empty for the model itself)."""
        name = self.peek(scope, op)
        base = f"{scope}.{op}" if scope else op
        self._calls[base] = self._calls.get(base, 0) + 1
        return name

    def peek(self, scope: str, op: str) -> str:
        """What `next` would say."""
        base = f"{scope}.{op}" if scope else op
        count = self._calls.get(base, 0)
        return base if count == 0 else f"{base}.{count}"


class Taps:
    """Records op outputs of one `forward`, and can force the choices of selecting ops.

    Args:
        replay: tap name -> choices made by another runtime. `*.product_key_topk.expert` [B, T, R, k] are the experts to take, with the
            weights that this model gives them, and so are `*.router_topk.expert` of any shape with as many entries as [M, k];
            `*.keep_window_attention.score_in` [B, T, K] and `*.scored_attention.score_in` [B, T, A] say which keys are seen in place of
            this model's scores (training path only).
        only: which names to keep; None keeps every op output. Inputs by which a choice is made are kept only if asked for here:
            `*.product_key_topk.query_in`, `*.router_topk.logits_in`, `*.keep_window_attention.score_in` and
            `*.scored_attention.score_in`.
    """

    def __init__(self, replay: Mapping[str, Tensor] | None = None, only: Callable[[str], bool] | None = None) -> None:
        self.values: dict[str, Tensor] = {}
        self.replay = dict(replay or {})
        self._only = only
        self._names = TapNames()

    def record(self, scope: str, op: str, outputs: Sequence[Tensor]) -> None:
        """Keep the outputs of one op call under their names."""
        prefix = self._names.next(scope, op)
        for output, value in zip(OP_OUTPUTS[op], outputs, strict=False):
            if self._only is None or self._only(f"{prefix}.{output}"):
                self.values[f"{prefix}.{output}"] = value.clone()

    def record_input(self, scope: str, op: str, name: str, value: Tensor) -> None:
        """Keep an input by which the coming call of a selecting op chooses, if asked for."""
        full_name = f"{self._names.peek(scope, op)}.{name}_in"
        if self._only is not None and self._only(full_name):
            self.values[full_name] = value.clone()

    def rank(self, scope: str, op: str, score_BTA: Tensor) -> Tensor | None:
        """The replayed scores by which the coming call of `op` hides keys, in the dtype of `score_BTA`; None if there are none."""
        rank_BTA = self.replay.get(f"{self._names.peek(scope, op)}.score_in")
        return None if rank_BTA is None else rank_BTA.to(score_BTA)

    def choose_experts(self, scope: str, query_BTR2d: Tensor, keys_RJ2d: Tensor, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The op's own choice `made` = (weight, expert), or the replayed experts with the weights this model gives them."""
        name = f"{scope}.product_key_topk.expert"
        if name not in self.replay:
            return made
        expert_BTRk = self.replay[name].to(made[1])
        n_subkey = keys_RJ2d.shape[1]
        score_BTRpJ = torch.einsum("btrpd,rjpd->btrpj", query_BTR2d, keys_RJ2d)
        half_x = score_BTRpJ[..., 0, :].gather(-1, expert_BTRk // n_subkey)
        half_y = score_BTRpJ[..., 1, :].gather(-1, expert_BTRk % n_subkey)
        return torch.softmax(half_x + half_y, -1).to(made[0]), expert_BTRk

    def choose_routed(self, scope: str, logits_ME: Tensor, normalize: bool, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The router's own choice `made` = (weight, expert), or the replayed experts with the weights this model gives them."""
        name = f"{self._names.peek(scope, 'router_topk')}.expert"
        if name not in self.replay:
            return made
        expert_Mk = self.replay[name].to(made[1]).view_as(made[1])
        weight_Mk = torch.softmax(logits_ME, -1).gather(-1, expert_Mk)
        if normalize:
            weight_Mk = weight_Mk / weight_Mk.sum(-1, keepdim=True)
        return weight_Mk.to(made[0]), expert_Mk
