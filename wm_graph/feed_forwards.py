"""Feed-forwards: gated MLP, mixture of experts, cross-domain mixture of experts.

B batch, T tokens, M = B·T, D model width, f hidden width, E experts, R retrieval heads, J sub-keys, k picks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.config import ModelConfig
from wm_graph.context import Context
from wm_graph.params import CdmoeParams, FeedForward, MlpParams, MoeParams


def feed_forward(cfg: ModelConfig, params: FeedForward, x_MD: Tensor, context: Context, scope: str) -> Tensor:
    """The feed-forward of a layer, on normed tokens."""
    if isinstance(params, MlpParams):
        return mlp(params, x_MD)
    if isinstance(params, MoeParams):
        return moe(cfg, params, x_MD, context, scope)
    return cdmoe(cfg, params, x_MD, context, scope)


def mlp(params: MlpParams, x_MD: Tensor) -> Tensor:
    """Gated MLP: W_down(SiLU(W_gate x) ⊙ W_up x) (arXiv:2002.05202)."""
    return _gated(x_MD, params.gate_up, params.gate_up_bias, params.down, params.down_bias)


def _gated(x_MD: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    gate_MC, up_MC = F.linear(x_MD, gate_up, gate_up_bias).chunk(2, -1)
    return F.linear(F.silu(gate_MC) * up_MC, down, down_bias)


def moe(cfg: ModelConfig, params: MoeParams, x_MD: Tensor, context: Context, scope: str) -> Tensor:
    """Mixture of experts: the k likeliest of E by a softmax router.

        gated: out = Σ_k p_k W_out(SiLU(W_gate x) ⊙ W_up x)
        shared expert isolation: out = Σ_k p_k (W_out SiLU(W_in x + b) + b') + sigmoid(x·w_s) shared(x), the shared expert like the others

    Source:
        Jamba, arXiv:2403.19887; shared expert isolation: arXiv:2401.06066, gated as in the baselines of arXiv:2412.11834.
    """
    logits_ME = F.linear(x_MD, params.router)
    made = ops.router_topk(logits_ME, cfg.n_pick, cfg.moe_normalize)
    weight_Mk, expert_Mk = context.choose_routed(scope, logits_ME, cfg.moe_normalize, made)
    gated = cfg.moe_form == "gated"
    matrices = (params.expert_in, params.expert_in_bias, params.expert_out, params.expert_out_bias)
    y_MD = ops.moe_mix(x_MD, expert_Mk, weight_Mk, *matrices, "silu", gated)
    context.tap(scope, "moe_mix", y_MD)
    if params.shared_in is None or params.shared_out is None or params.shared_gate is None:
        return y_MD
    shared_MD = F.linear(F.silu(F.linear(x_MD, params.shared_in, params.shared_in_bias)), params.shared_out, params.shared_out_bias)
    return y_MD + torch.sigmoid(F.linear(x_MD, params.shared_gate)) * shared_MD


def cdmoe(cfg: ModelConfig, params: CdmoeParams, x_MD: Tensor, context: Context, scope: str) -> Tensor:
    """Cross-domain mixture of experts: a shared MLP plus k one-neuron experts per retrieval head, found by product keys.

        c2, single_head: out = W_d(SiLU(W_g x) ⊙ W_u x) + Σ_{heads, picks} w · SiLU(x·down_e) · up_e
        c1_parallel: out = s(x) + Σ SiLU(w (x·down_e)) · up_e        s(x) = W_d SiLU(W_u x)
        c1_serial: out = Σ SiLU(w (s(x)·down_e)) · up_e, the experts chosen by s(x) too

    Source:
        arXiv:2412.11834 (c2); arXiv:2407.16958 (c1); retrieval as arXiv:2407.04153.
    """
    if params.gate_up is not None:
        shared_MD = _gated(x_MD, params.gate_up, None, params.down, None)
    else:
        assert params.up is not None
        shared_MD = F.linear(F.silu(F.linear(x_MD, params.up)), params.down)
    serial = cfg.cdmoe_form == "c1_serial"
    y_MD = _retrieved(cfg, params, shared_MD if serial else x_MD, context, scope)
    return y_MD if serial else shared_MD + y_MD


def _retrieved(cfg: ModelConfig, params: CdmoeParams, x_MD: Tensor, context: Context, scope: str) -> Tensor:
    """The sum of the experts that every token retrieves."""
    rows = (context.batch, context.tokens)
    keys_RJ2d = product_keys(cfg, params)
    if params.router is not None:
        query_BTR2d = F.linear(x_MD, params.router).reshape(*rows, 1, 2, cfg.n_subkey)
    else:
        assert params.query is not None
        # The two halves are the slowest axis of the query projection's outputs: [2, R, d].
        query_BTR2d = F.linear(x_MD, params.query).reshape(*rows, 2, cfg.n_retrieval_head, cfg.d_retrieval // 2).transpose(2, 3)
    weight_BTRk, expert_BTRk = ops.product_key_topk(query_BTR2d, keys_RJ2d, cfg.n_pick)
    if context.taps is not None:
        context.taps.record_input(scope, "product_key_topk", "query", query_BTR2d)
        weight_BTRk, expert_BTRk = context.taps.choose_experts(scope, query_BTR2d, keys_RJ2d, (weight_BTRk, expert_BTRk))
    context.tap(scope, "product_key_topk", weight_BTRk, expert_BTRk)
    weight_inside = cfg.cdmoe_form.startswith("c1")
    tables = (params.expert_down, params.expert_up)
    y_BTD = ops.expert_mix(x_MD.reshape(*rows, cfg.d_model), expert_BTRk, weight_BTRk, *tables, "silu", weight_inside)
    context.tap(scope, "expert_mix", y_BTD)
    return y_BTD.reshape(-1, cfg.d_model)


def product_keys(cfg: ModelConfig, params: CdmoeParams) -> Tensor:
    """keys_RJ2d of a cdmoe layer. In form single_head the router's outputs are the scores themselves: its keys are the unit vectors."""
    if params.keys is not None:
        return params.keys
    unit_JJ = torch.eye(cfg.n_subkey, dtype=params.expert_down.dtype, device=params.expert_down.device)
    return unit_JJ.unsqueeze(1).expand(-1, 2, -1).unsqueeze(0)
