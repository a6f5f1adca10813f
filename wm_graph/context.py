"""What the layers of one call share, and the norm that all of them use.

B batch, T tokens, D model width, F rotated pairs.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from wm_graph.taps import Taps


@dataclass(frozen=True)
class Context:
    """What all layers of one call share.

    Attributes:
        batch: rows of the call (B).
        tokens: tokens per row, padding included (T).
        position_BT: position of every token.
        position_B: tokens each row has seen before the call; None without a state.
        valid_B: tokens of each row that count; None when all do.
        angles: rotated width -> (cos_BTF, sin_BTF).
        in_place: ops write into the given state.
        taps: recorder of op outputs, or None.
    """

    batch: int
    tokens: int
    position_BT: Tensor
    position_B: Tensor | None
    valid_B: Tensor | None
    angles: dict[int, tuple[Tensor, Tensor]]
    in_place: bool = False
    taps: Taps | None = None

    def tap(self, scope: str, op: str, *outputs: Tensor) -> None:
        """Record the outputs of one op call, if somebody listens."""
        if self.taps is not None:
            self.taps.record(scope, op, outputs)

    def choose_routed(self, scope: str, logits_ME: Tensor, normalize: bool, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The choice of a `router_topk` call, recorded or replayed if somebody listens."""
        if self.taps is not None:
            self.taps.record_input(scope, "router_topk", "logits", logits_ME)
            made = self.taps.choose_routed(scope, logits_ME, normalize, made)
        self.tap(scope, "router_topk", *made)
        return made


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, accumulated in float32 or higher (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
