"""Parameters: how they start, that they are a pytree, and the noise that parity's yardstick moves them by."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from helpers import FAMILIES, MODELS, OPTIONS, lively_params
from oracle_grid import GRID
from wm_graph import init_params
from wm_graph.errors import CheckpointError
from wm_graph.oracle import _moved
from wm_graph.params import cast_params, named_tensors, params_from_flat

BIASED = ("attention, attention_bias True", "mamba, conv_bias True")
ALL = MODELS | FAMILIES | OPTIONS | {name: cfg for name, cfg in GRID.items() if name.startswith(BIASED)}
ONES = {"norm", "mixer_norm", "feed_forward_norm", "q_norm", "k_norm", "dt_norm", "B_norm", "C_norm"}
ONES |= {"mixer_residual", "feed_forward_residual", "D", "mask"}
ZEROS = {"A", "qkv_bias", "out_bias", "in_proj_bias", "out_proj_bias", "conv_bias", "gate_up_bias", "down_bias"}
ZEROS |= {"expert_in_bias", "expert_out_bias", "shared_in_bias", "shared_out_bias"}


def starts_as_documented(leaf: str, value: Tensor) -> bool:
    """See `init_params`."""
    if leaf in ONES | ZEROS:
        return bool((value == (leaf in ONES)).all())
    if leaf == "A_log":
        return torch.equal(value, torch.arange(1.0, value.shape[-1] + 1).log().expand_as(value))
    if leaf == "dt_bias":
        step = torch.nn.functional.softplus(value.double())
        return bool(((step > 0.00099) & (step < 0.101)).all()) and bool(step.max() > step.min())
    if leaf in ("conv_weight", "dt_proj"):
        share = value.abs().max() * value.shape[-1] ** 0.5
        return bool(0.9 < share <= 1) and abs(float(value.mean())) < 0.2 * float(value.abs().max())
    # The standard deviation of n draws is off by 1 / sqrt(2 n) of itself.
    return abs(float(value.std()) / 0.02 - 1) < 5 / (2 * value.numel()) ** 0.5


@pytest.mark.parametrize("name", ALL)
def test_parameters_start_as_documented(name: str) -> None:
    for path, value in named_tensors(init_params(ALL[name])):
        assert starts_as_documented(path.rsplit(".", 1)[-1], value), path


def test_the_seed_makes_the_parameters_in_every_dtype() -> None:
    cfg = MODELS["window"]
    unsaid, other, half = init_params(cfg), init_params(cfg, 1), init_params(cfg, 0, torch.bfloat16)
    assert not torch.equal(unsaid.embedding, other.embedding)
    for (path, said), (_, value), (_, low) in zip(*map(named_tensors, (init_params(cfg, seed=0), unsaid, half)), strict=True):
        assert torch.equal(said, value), path
        assert torch.equal(low, value.to(low.dtype)), path
        assert low.dtype == (torch.float32 if path.endswith((".A_log", ".A")) else torch.bfloat16)


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_a_pytree_of_their_tensors(name: str) -> None:
    params = init_params(OPTIONS[name])
    assert {id(leaf) for leaf in tree_leaves(params)} == {id(tensor) for _, tensor in named_tensors(params)}
    doubled = tree_map(lambda tensor: 2 * tensor, params)
    assert type(doubled) is type(params)
    for (path, value), (_, twice) in zip(named_tensors(params), named_tensors(doubled), strict=True):
        assert torch.equal(2 * value, twice), path


@pytest.mark.parametrize("path", ["embedding", "layers.0.mixer_norm", "layers.1.feed_forward.keys"])
def test_a_tensor_of_another_shape_is_refused_by_name(path: str) -> None:
    cfg = MODELS["window"]
    tensors = dict(named_tensors(init_params(cfg)))
    tensors[path] = tensors[path].unsqueeze(0)
    with pytest.raises(CheckpointError, match=rf"tensor '{path}' has shape \[1, .*\], configuration '{cfg.name}' expects \["):
        params_from_flat(cfg, tensors)


def test_noise_moves_each_number_by_its_share_and_what_is_always_float32_by_a_float32_rounding() -> None:
    params = cast_params(lively_params(MODELS["window"]), torch.float64)
    for (path, value), (_, moved), (_, again) in zip(*map(named_tensors, (params, *(_moved(params, 1e-3, 7) for _ in "ab"))), strict=True):
        share = ((moved - value) / value)[value != 0].abs().max()
        least, most = (1e-8, 2**-24) if path.endswith((".A_log", ".A")) else (5e-4, 1e-3)
        assert least < share <= most * (1 + 1e-6), path
        assert torch.equal(moved, again)
    assert _moved(params, 0.0, 7) is params
