"""CDMoE against an independent implementation: peer-pytorch's PEER plus the gated MLP of a transformers Llama.

Llama and Doge themselves are compared with transformers in test_import.py. B rows, T tokens, D model width.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from helpers import LIMIT, lively_params, random_tokens
from wm_graph import ModelConfig, forward, zero_state
from wm_graph.feed_forwards import cdmoe
from wm_graph.model import make_context
from wm_graph.params import CdmoeParams

PEER = pytest.importorskip("PEER_pytorch", reason="peer-pytorch is not installed: pip install 'wm-graph[test]'").PEER


class PeerAndMlp(nn.Module):
    """Llama MLP + PEER experts with the weights of our block."""

    def __init__(self, cfg: ModelConfig, params: CdmoeParams) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

        self.mlp = LlamaMLP(LlamaConfig(hidden_size=cfg.d_model, intermediate_size=cfg.d_ff))
        self.peer = PEER(
            cfg.d_model,
            heads=cfg.n_retrieval_head,
            num_experts=cfg.n_expert,
            num_experts_per_head=cfg.n_pick,
            dim_key=cfg.d_retrieval // 2,
            activation=nn.SiLU,
            non_competing_scores=False,
            pre_rmsnorm=False,
        )
        gate, up = params.gate_up.chunk(2)
        weights = {
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": params.down,
            "peer.to_queries.0.weight": params.query,
            "peer.keys": params.keys,
            "peer.weight_down_embed.weight": params.expert_down,
            "peer.weight_up_embed.weight": params.expert_up,
        }
        self.load_state_dict(weights, strict=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp(x_BTD) + self.peer(x_BTD)


@pytest.mark.parametrize("name", ["cheems-tiny-moe", "cheems-20m-moe"])
@torch.no_grad()
def test_cdmoe_equals_peer_plus_llama_mlp(name: str) -> None:
    preset = ModelConfig.preset(name)
    cfg = replace(preset, layers=preset.layers[:1], vocab_size=64)
    params = lively_params(cfg)
    block = params.layers[0].feed_forward
    tokens = random_tokens(cfg, 2, 9)
    context = make_context(cfg, tokens, zero_state(cfg, 2, 16), None, torch.float32)
    x_BTD = torch.randn(2, 9, cfg.d_model, generator=torch.Generator().manual_seed(3))
    # Twenty times the usual experts: beside the MLP, expert outputs of random weights would be lost in the tolerance.
    block = replace(block, expert_down=block.expert_down * 20, expert_up=block.expert_up * 20)
    ours = cdmoe(cfg, block, x_BTD.reshape(-1, cfg.d_model), context, "layers.0").reshape(x_BTD.shape)
    theirs = PeerAndMlp(cfg, block)
    expected = theirs(x_BTD)
    assert theirs.peer(x_BTD).std() > 0.1 * expected.std()
    torch.testing.assert_close(ours, expected, rtol=0, atol=LIMIT * float(expected.std()))


@torch.no_grad()
def test_a_whole_model_runs_on_the_peer_block() -> None:
    preset = ModelConfig.preset("cheems-tiny-moe")
    cfg = replace(preset, layers=preset.layers[6:8])
    params, tokens = lively_params(cfg), random_tokens(cfg, 2, 12)
    peers = [PeerAndMlp(cfg, layer.feed_forward) for layer in params.layers]
    expected, _ = forward(cfg, params, tokens)
    calls = iter(peers)

    def theirs(_cfg, _params, x_MD, context, _scope):
        return next(calls)(x_MD.reshape(context.batch, context.tokens, -1)).reshape(x_MD.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wm_graph.feed_forwards.cdmoe", theirs)
        found, _ = forward(cfg, params, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)
