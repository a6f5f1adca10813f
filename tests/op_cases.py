"""Cases of every op: frozen data of a seed and a few small numbers, whose `call()` makes the tensors.

strategies_ops.py draws and shrinks the numbers; a failure prints the case, and that line, pasted, is the case again:
SsdCase(seed=3, B=1, T=65, ...).call().run()

B rows   T tokens   M rows of a flat op   H heads   K kv heads   G groups   P head dim   N state   F rotated pairs   C channels   L taps
S cache capacity   W slots   A score heads   R retrieval heads   J sub-keys   E experts   k picks   D model   I inner width
A, B, C, H widths of the parts of a linear layer of K inputs, with which alone they mean that
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from op_calls import Call
from op_values import Valid, Values, angles, tensor, valid_B


@dataclass(frozen=True)
class SsdCase:
    """`ssd_scan`, or with F > 0 `ssd_scan_rope` of tokens at positions start, start + 1, ..."""

    seed: int
    B: int
    T: int
    H: int
    G: int
    P: int
    N: int
    F: int
    steps: str
    pattern: str
    magnitude: int
    start: int
    state: bool
    valid: Valid

    def call(self) -> Call:
        v, B, T = Values(self.seed), self.B, self.T
        tensors: dict[str, Tensor | None] = {
            "x_BTHP": v.tokens(self.pattern, B, T, self.H, self.P, magnitude=self.magnitude),
            "dt_BTH": v.steps(self.steps, B, T, self.H),
            "A_H": v.decays(self.H),
            "B_BTGN": v.tokens(self.pattern, B, T, self.G, self.N),
            "C_BTGN": v.tokens("normal", B, T, self.G, self.N),
        }
        if self.F:
            tensors |= angles((self.start + torch.arange(T)).repeat(B, 1), self.F)
        state = v.normal(B, self.H, self.N, self.P) * 2.0**self.magnitude
        tensors |= {"state_BHNP": state if self.state else None, "valid_B": valid_B(self.valid)}
        attributes = {"head_dim": self.P, "num_groups": self.G, "num_heads": self.H, "state_dim": self.N}
        return Call("ssd_scan_rope" if self.F else "ssd_scan", tensors, {}, attributes | ({"pairs": self.F} if self.F else {}))


@dataclass(frozen=True)
class SelectiveCase:
    """`selective_scan`."""

    seed: int
    B: int
    T: int
    C: int
    N: int
    steps: str
    pattern: str
    magnitude: int
    state: bool
    valid: Valid

    def call(self) -> Call:
        v, (B, T, C, N) = Values(self.seed), (self.B, self.T, self.C, self.N)
        tensors: dict[str, Tensor | None] = {
            "x_BTC": v.tokens(self.pattern, B, T, C, magnitude=self.magnitude),
            "dt_BTC": v.steps(self.steps, B, T, C),
            "A_CN": v.decays(C, N),
            "B_BTN": v.tokens(self.pattern, B, T, N),
            "C_BTN": v.normal(B, T, N),
        }
        state = v.normal(B, C, N) * 2.0**self.magnitude
        return Call("selective_scan", tensors | {"state_BCN": state if self.state else None, "valid_B": valid_B(self.valid)})


@dataclass(frozen=True)
class ConvCase:
    """`causal_conv1d`."""

    seed: int
    B: int
    T: int
    C: int
    L: int
    bias: bool
    activation: str
    pattern: str
    magnitude: int
    state: bool
    valid: Valid

    def call(self) -> Call:
        v, (B, T, C, L) = Values(self.seed), (self.B, self.T, self.C, self.L)
        tensors: dict[str, Tensor | None] = {
            "x_BTC": v.tokens(self.pattern, B, T, C, magnitude=self.magnitude),
            "weight_CL": v.normal(C, L),
            "bias_C": v.normal(C) if self.bias else None,
        }
        state = v.normal(B, L - 1, C) * 2.0**self.magnitude
        tensors |= {"state_BYC": state if self.state else None, "valid_B": valid_B(self.valid)}
        plain = {"activation": self.activation}
        return Call("causal_conv1d", tensors, plain, plain | {"channels": C, "taps": L})


@dataclass(frozen=True)
class AttentionCase:
    """`attention`, or with F > 0 `attention_rope`; past is the largest position, None is no cache; room cells stay free."""

    seed: int
    B: int
    T: int
    H: int
    K: int
    P: int
    F: int
    pattern: str
    sharp: int
    magnitude: int
    start: int
    past: int | None
    room: int
    valid: Valid

    def call(self) -> Call:
        v = Values(self.seed)
        heads = _heads(v, self)
        position, cache = _cache(v, self)
        tail: dict[str, Tensor | None] = {**cache, "position_B": position, "valid_B": valid_B(self.valid)}
        sizes = {"head_dim": self.P, "kv_num_heads": self.K, "num_heads": self.H}
        if not self.F:
            return Call("attention", {**heads, **tail}, {}, sizes)
        begin_B = torch.zeros(self.B, dtype=torch.int64) if position is None else position
        packed = {"qkv_BTC": torch.cat(list(heads.values()), 2).flatten(2)}
        turns = angles(self.start + begin_B.unsqueeze(1) + torch.arange(self.T), self.F)
        plain = {"n_head": self.H, "n_kv_head": self.K, "head_dim": self.P}
        return Call("attention_rope", {**packed, **turns, **tail}, plain, sizes | {"pairs": self.F})


@dataclass(frozen=True)
class ScoredCase:
    """`scored_attention`; past and room as in AttentionCase."""

    seed: int
    B: int
    T: int
    H: int
    K: int
    P: int
    A: int
    scoring: str
    ratio: float
    scores: str
    pattern: str
    sharp: int
    magnitude: int
    past: int | None
    room: int
    valid: Valid

    def call(self) -> Call:
        v = Values(self.seed)
        heads = _heads(v, self)
        position, cache = _cache(v, self)
        score_BSA = v.scores(self.scores, self.B, self.T + (self.past or 0) + self.room, self.A)
        score_BTA, old_BAS = score_BSA[:, score_BSA.shape[1] - self.T :].clone(), score_BSA.transpose(1, 2).contiguous()
        tensors = {**heads, "score_BTA": score_BTA, **cache, "cache_score_BAS": None if position is None else old_BAS}
        tensors |= {"position_B": position, "valid_B": valid_B(self.valid)}
        attributes = {"head_dim": self.P, "kv_num_heads": self.K, "num_heads": self.H, "score_num_heads": self.A}
        attributes |= {"scoring": self.scoring, "ratio": repr(self.ratio)}
        return Call("scored_attention", tensors, {"scoring": self.scoring, "ratio": self.ratio}, attributes)


@dataclass(frozen=True)
class WindowCase:
    """`keep_window_attention`; past is the largest number of earlier tokens, of which the slots hold the best; None is no slots."""

    seed: int
    B: int
    T: int
    H: int
    K: int
    P: int
    W: int
    scores: str
    pattern: str
    sharp: int
    magnitude: int
    past: int | None
    valid: Valid

    def call(self) -> Call:
        v, past = Values(self.seed), self.past or 0
        heads = _heads(v, self)
        position = v.up_to(past, self.B)
        score_BSK = v.scores(self.scores, self.B, past + self.T, self.K)
        tensors: dict[str, Tensor | None] = {**heads, "score_BTK": score_BSK[:, past:].clone()}
        slots = _slots(v, self, score_BSK[:, :past], position)
        tensors |= dict.fromkeys(slots) | {"position_B": None} if self.past is None else slots | {"position_B": position}
        tensors["valid_B"] = valid_B(self.valid)
        attributes = {"head_dim": self.P, "kv_num_heads": self.K, "num_heads": self.H, "window": self.W}
        return Call("keep_window_attention", tensors, {"window": self.W}, attributes)


def _heads(v: Values, case: AttentionCase | ScoredCase | WindowCase) -> dict[str, Tensor]:
    # Magnitudes spread over 2^12 would make logits of thousands, of which rounding leaves nothing to compare.
    near = "normal" if case.pattern == "spread" else case.pattern
    sizes = case.B, case.T
    return {
        "q_BTHP": v.tokens(near, *sizes, case.H, case.P, magnitude=case.sharp),
        "k_BTKP": v.tokens(near, *sizes, case.K, case.P),
        "v_BTKP": v.tokens(case.pattern, *sizes, case.K, case.P, magnitude=case.magnitude),
    }


def _cache(v: Values, case: AttentionCase | ScoredCase) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    if case.past is None:
        return None, {"cache_k_BKSP": None, "cache_v_BKSP": None}
    cells = case.B, case.K, case.past + case.T + case.room, case.P
    cache: dict[str, Tensor | None] = {"cache_k_BKSP": v.normal(*cells), "cache_v_BKSP": v.normal(*cells) * 2.0**case.magnitude}
    return v.up_to(case.past, case.B), cache


def _slots(v: Values, case: WindowCase, score_BSK: Tensor, position_B: Tensor) -> dict[str, Tensor]:
    """Slots, in random order, as they are after `position` tokens of the scores given."""
    B, K, W = case.B, case.K, case.W
    score, position = np.full((B, K, W), -np.inf), np.full((B, K, W), -1)
    for b, g in np.ndindex(B, K):
        ranked = sorted(range(int(position_B[b])), key=lambda s: (-float(score_BSK[b, s, g]), -s))[:W]
        places = v.rng.permutation(W)[: len(ranked)]
        position[b, g, places], score[b, g, places] = ranked, [float(score_BSK[b, s, g]) for s in ranked]
    used = tensor(position >= 0).unsqueeze(-1)
    slot_k, slot_v = v.normal(B, K, W, case.P) * used, v.normal(B, K, W, case.P) * used * 2.0**case.magnitude
    return {"slot_k_BKWP": slot_k, "slot_v_BKWP": slot_v, "slot_score_BKW": tensor(score), "slot_position_BKW": tensor(position)}


@dataclass(frozen=True)
class RopeCase:
    """`rope` of tokens at positions start, start + 1, ..."""

    seed: int
    B: int
    T: int
    H: int
    P: int
    F: int
    pattern: str
    magnitude: int
    start: int

    def call(self) -> Call:
        x = Values(self.seed).tokens(self.pattern, self.B, self.T, self.H, self.P, magnitude=self.magnitude)
        turns = angles((self.start + torch.arange(self.T)).repeat(self.B, 1), self.F)
        return Call("rope", {"x_BTHP": x, **turns}, {}, {"head_dim": self.P, "num_heads": self.H, "pairs": self.F})


@dataclass(frozen=True)
class ResidualCase:
    """`residual_rms_norm`."""

    seed: int
    M: int
    D: int
    scale: bool
    eps: float
    pattern: str
    magnitude: int

    def call(self) -> Call:
        v = Values(self.seed)
        x, residual = (v.tokens(self.pattern, self.M, self.D, axis=0, magnitude=self.magnitude) for _ in range(2))
        scale = v.normal(self.D) if self.scale else None
        tensors = {"x_MD": x, "residual_MD": residual, "scale_D": scale, "weight_D": v.normal(self.D)}
        return Call("residual_rms_norm", tensors, {"eps": self.eps}, {"eps": self.eps})


@dataclass(frozen=True)
class GatedCase:
    """`gated_rms_norm`."""

    seed: int
    M: int
    C: int
    eps: float
    pattern: str
    magnitude: int

    def call(self) -> Call:
        v = Values(self.seed)
        y, z = v.tokens(self.pattern, self.M, self.C, axis=0, magnitude=self.magnitude), v.tokens("normal", self.M, self.C, axis=0)
        return Call("gated_rms_norm", {"y_MC": y, "z_MC": 2 * z, "weight_C": v.normal(self.C)}, {"eps": self.eps}, {"eps": self.eps})


@dataclass(frozen=True)
class LinearCase:
    """`linear` of K inputs, in parts of widths A, B, C and H step sizes; or A gated outputs."""

    seed: int
    M: int
    K: int
    parts: tuple[int, int, int, int]
    gated: bool
    bias: bool
    step_bias: bool
    pattern: str
    magnitude: int

    def call(self) -> Call:
        v, outputs = Values(self.seed), sum(self.parts) * (2 if self.gated else 1)
        tensors: dict[str, Tensor | None] = {
            "x_MK": v.tokens(self.pattern, self.M, self.K, axis=0, magnitude=self.magnitude),
            "weight_NK": v.normal(outputs, self.K),
            "bias_N": v.normal(outputs) if self.bias else None,
            "step_bias_H": v.normal(self.parts[3]) if self.step_bias else None,
        }
        plain = dict(zip("ABCH", self.parts, strict=True)) | {"gated": self.gated}
        return Call("linear", tensors, plain, plain | {"gated": int(self.gated)})


@dataclass(frozen=True)
class ProductKeyCase:
    """`product_key_topk` of d = width values; "grid" makes all scores exact and many equal, "repeated" all sub-keys of a head."""

    seed: int
    B: int
    T: int
    R: int
    J: int
    width: int
    k: int
    pattern: str

    def call(self) -> Call:
        v = Values(self.seed)
        query = v.tokens(self.pattern, self.B, self.T, self.R, 2, self.width)
        keys = v.tokens(self.pattern, self.R, self.J, 2, self.width)
        attributes = {"k": self.k, "num_heads": self.R, "num_keys": self.J}
        return Call("product_key_topk", {"query_BTR2d": query, "keys_RJ2d": keys}, {"k": self.k}, attributes)


@dataclass(frozen=True)
class ExpertMixCase:
    """`expert_mix` of k picks of R heads; distinct is how many experts there are to pick from, at most E."""

    seed: int
    B: int
    T: int
    R: int
    k: int
    E: int
    D: int
    distinct: int
    activation: str
    inside: bool
    pattern: str
    magnitude: int

    def call(self) -> Call:
        v, picks = Values(self.seed), (self.B, self.T, self.R, self.k)
        tensors: dict[str, Tensor | None] = {
            "x_BTD": v.tokens(self.pattern, self.B, self.T, self.D),
            "expert_BTRk": v.whole(self.distinct, *picks),
            "weight_BTRk": v.normal(*picks),
            "down_ED": v.normal(self.E, self.D),
            "up_ED": v.normal(self.E, self.D) * 2.0**self.magnitude,
        }
        plain = {"activation": self.activation, "weight_inside": self.inside}
        attributes = plain | {"weight_inside": int(self.inside), "num_picks": self.R * self.k, "width": self.D}
        return Call("expert_mix", tensors, plain, attributes)


@dataclass(frozen=True)
class RouterCase:
    """`router_topk`."""

    seed: int
    M: int
    E: int
    k: int
    normalize: bool
    scores: str

    def call(self) -> Call:
        logits = Values(self.seed).scores(self.scores, self.M, self.E)
        plain = {"k": self.k, "normalize": self.normalize}
        return Call("router_topk", {"logits_ME": logits}, plain, plain | {"normalize": int(self.normalize)})


@dataclass(frozen=True)
class MoeCase:
    """`moe_mix`; distinct is how many experts there are to pick from, at most E."""

    seed: int
    M: int
    k: int
    E: int
    D: int
    I: int
    distinct: int
    gated: bool
    bias: bool
    activation: str
    pattern: str
    magnitude: int

    def call(self) -> Call:
        v, F = Values(self.seed), 2 * self.I if self.gated else self.I
        tensors: dict[str, Tensor | None] = {
            "x_MD": v.tokens(self.pattern, self.M, self.D, axis=0),
            "expert_Mk": v.whole(self.distinct, self.M, self.k),
            "weight_Mk": v.normal(self.M, self.k),
            "in_EFD": v.normal(self.E, F, self.D),
            "in_bias_EF": v.normal(self.E, F) if self.bias else None,
            "out_EDI": v.normal(self.E, self.D, self.I) * 2.0**self.magnitude,
            "out_bias_ED": v.normal(self.E, self.D) * 2.0**self.magnitude if self.bias else None,
        }
        plain = {"activation": self.activation, "gated": self.gated}
        size = (F + self.I) * self.D
        return Call("moe_mix", tensors, plain, plain | {"gated": int(self.gated), "expert_size": size, "num_picks": self.k})
