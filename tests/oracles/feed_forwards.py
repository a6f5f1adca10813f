"""Feed-forwards of one token: gated MLP, mixture of experts, cross-domain mixture of experts.

D model width, d half a query, J sub-keys per half, R retrieval heads, E experts, k picks. `note` writes down what an op of wm would give.
"""

from collections.abc import Callable, Mapping

import numpy as np

from oracles.choosing import best_pairs, expert_out, half_scores, neuron_sum, route
from oracles.functions import Array, each, linear, sigmoid, silu
from wm_graph.config import ModelConfig

Weights = Mapping[str, Array]
Note = Callable[..., None]


def feed_forward(kind: str, cfg: ModelConfig, weights: Weights, x_D: Array, note: Note) -> Array:
    """The feed-forward of a layer of this kind."""
    return {"mlp": mlp, "moe": moe, "cdmoe": cdmoe}[kind](cfg, weights, x_D, note)


def mlp(cfg: ModelConfig, weights: Weights, x_D: Array, note: Note) -> Array:
    """W_down(SiLU(W_gate x) ⊙ W_up x), with biases where the model has them (arXiv:2002.05202)."""
    biased = cfg.mlp_bias
    return gated(weights, x_D, weights["gate_up_bias"] if biased else None, weights["down_bias"] if biased else None)


def gated(weights: Weights, x_D: Array, gate_up_bias: Array | None = None, down_bias: Array | None = None) -> Array:
    gate, up = np.split(linear(weights["gate_up"], x_D, gate_up_bias), 2)
    return linear(weights["down"], each(silu, gate) * up, down_bias)


def moe(cfg: ModelConfig, weights: Weights, x_D: Array, note: Note) -> Array:
    """The k likeliest of E experts, weighted by their probability.

        gated (arXiv:2403.19887)     Σ p_e W_out(SiLU(W_gate x) ⊙ W_up x)
        shared_expert_isolated       Σ p_e (W_out SiLU(W_in x + b) + b') + sigmoid(x · w_s) (the same form once more, for every token)

    Probabilities are those among all experts; `moe_normalize` divides them by the sum over the picks.
    """
    probability_k, expert_k = route(linear(weights["router"], x_D).tolist(), cfg.n_pick, cfg.moe_normalize)
    note("router_topk", weight=probability_k, expert=expert_k)
    isolated, y_D = cfg.moe_form == "shared_expert_isolated", np.zeros_like(x_D)
    for probability, e in zip(probability_k, expert_k, strict=True):
        inner = weights["expert_in"][e], weights["expert_in_bias"][e] if isolated else None
        outer = weights["expert_out"][e], weights["expert_out_bias"][e] if isolated else None
        y_D += probability * expert_out(x_D, inner, outer, "silu", not isolated)
    note("moe_mix", y=y_D)
    if not isolated:
        return y_D
    shared = (weights["shared_in"], weights["shared_in_bias"]), (weights["shared_out"], weights["shared_out_bias"])
    return y_D + sigmoid(float(weights["shared_gate"][0] @ x_D)) * expert_out(x_D, *shared, "silu", False)


def cdmoe(cfg: ModelConfig, weights: Weights, x_D: Array, note: Note) -> Array:
    """A shared MLP that every token passes, and experts of one neuron that every token retrieves by product keys.

    c2, single_head    W_down(SiLU(W_gate x) ⊙ W_up x) + Σ w SiLU(x · down_e) up_e          (arXiv:2412.11834)
    c1_parallel        s + Σ SiLU(w (x · down_e)) up_e        s = W_down SiLU(W_up x)       (arXiv:2407.16958)
    c1_serial          Σ SiLU(w (s · down_e)) up_e, the experts chosen by s too
    """
    earlier = cfg.cdmoe_form in ("c1_parallel", "c1_serial")
    shared_D = linear(weights["down"], each(silu, linear(weights["up"], x_D))) if earlier else gated(weights, x_D)
    input_D = shared_D if cfg.cdmoe_form == "c1_serial" else x_D
    choice = retrieve(cfg, weights, input_D)
    note("product_key_topk", weight=choice[0], expert=choice[1])
    y_D = neuron_sum(input_D, choice, weights["expert_down"], weights["expert_up"], "silu", earlier)
    note("expert_mix", y=y_D)
    return y_D if cfg.cdmoe_form == "c1_serial" else shared_D + y_D


def retrieve(cfg: ModelConfig, weights: Weights, x_D: Array) -> tuple[Array, np.ndarray]:
    """(weight_Rk, expert_Rk). Each head scores the sub-keys of either half; in form single_head a linear layer gives the scores as such."""
    heads, scores = cfg.n_retrieval_head, []
    if cfg.cdmoe_form == "single_head":
        x_J, y_J = np.split(linear(weights["router"], x_D), 2)
        scores.append((x_J.tolist(), y_J.tolist()))
    else:
        query_2Rd = linear(weights["query"], x_D).reshape(2, heads, cfg.d_retrieval // 2)  # the half is the slowest axis
        scores += [half_scores(query_2Rd[:, r], weights["keys"][r]) for r in range(heads)]
    chosen = [best_pairs(x_J, y_J, cfg.n_pick) for x_J, y_J in scores]
    return np.array([weight for weight, _ in chosen]), np.array([expert for _, expert in chosen])
