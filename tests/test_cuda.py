"""The same functions on a GPU: every op and the model agree with the float64 oracle there."""

import pytest
import torch

from wm_graph import ModelConfig, forward, init_params, zero_state
from wm_graph.oracle import oracle_forward
from wm_graph.params import map_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

PRESETS = ("cheems-tiny", "cheems-tiny-moe", "cheems-2407-tiny", "llama-tiny", "mamba2-tiny", "jamba-tiny")


@pytest.fixture(autouse=True)
def _full_precision_products():
    """TF32 rounds float32 products to 10 bits, which is another dtype's budget."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_cuda(node):
    return map_tensors(node, lambda _, tensor: tensor.cuda())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("in_place", [False, True])
def test_prefill_and_decode_on_cuda_equal_the_oracle(preset, in_place):
    cfg = ModelConfig.preset(preset)
    params = init_params(cfg, seed=1)
    tokens = torch.randint(0, cfg.vocab_size, (3, 70), generator=torch.Generator().manual_seed(0))
    expected, _ = oracle_forward(cfg, params, tokens)
    state = zero_state(cfg, 3, 80, device="cuda")
    got = []
    with torch.no_grad():
        for part in tokens.cuda().split([65, 1, 1, 3], 1):
            logits, state = forward(cfg, on_cuda(params), part, state, in_place=in_place)
            got.append(logits)
    assert (torch.cat(got, 1).cpu() - expected).abs().max() <= 1e-4
    assert state.position.tolist() == [70, 70, 70]


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_on_cuda_equal_those_on_the_cpu(preset):
    cfg = ModelConfig.preset(preset)
    params = init_params(cfg, seed=1)
    tokens = torch.randint(0, cfg.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for device in ("cpu", "cuda"):
        leaves = map_tensors(params, lambda _, tensor, device=device: tensor.detach().to(device).requires_grad_())
        forward(cfg, leaves, tokens.to(device))[0].square().mean().backward()
        gradients.append(torch.cat([leaves.embedding.grad.flatten(), leaves.layers[-1].mixer_norm.grad.flatten()]).cpu())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 1 - 1e-5


@pytest.mark.parametrize("preset", ["cheems-tiny", "mamba2-tiny"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_cuda_near_the_oracle(preset, dtype):
    cfg = ModelConfig.preset(preset)
    params = init_params(cfg, seed=1, dtype=dtype)
    tokens = torch.randint(0, cfg.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    expected, _ = oracle_forward(cfg, params, tokens)
    with torch.no_grad():
        logits, _ = forward(cfg, on_cuda(params), tokens.cuda(), zero_state(cfg, 2, 40, dtype=dtype, device="cuda"))
    error = (logits.cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


@pytest.mark.parametrize("preset", PRESETS)
def test_compiled_forward_on_cuda_equals_eager(preset):
    cfg = ModelConfig.preset(preset)
    params = on_cuda(init_params(cfg, seed=1))
    tokens = torch.randint(0, cfg.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0)).cuda()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    with torch.no_grad():
        state = zero_state(cfg, 2, 32, device="cuda")
        got, _ = compiled(cfg, params, tokens, state)
        expected, _ = forward(cfg, params, tokens, state)
    assert (got - expected).abs().max() <= 1e-4
