"""Product-key retrieval as product-key-memory has it. The package is not in the test extra: it brings five more for one test."""

import pytest
import torch

import wm_kernels as ops

package = pytest.importorskip("product_key_memory", reason="product-key-memory is not installed: pip install product-key-memory==0.3.0")


@pytest.mark.parametrize(("heads", "keys", "picks", "width"), [(1, 4, 4, 3), (2, 7, 3, 8), (4, 16, 5, 6)])
def test_retrieved_values_are_those_of_the_package(heads, keys, picks, width):
    torch.manual_seed(0)
    memory = package.PKM(dim=24, heads=heads, num_keys=keys, topk=picks, dim_head=width).eval()
    x_BTD = torch.randn(2, 9, 24)
    with torch.no_grad():
        expected = memory(x_BTD)
        # Its projection's outputs are [half, head, width], as those of a cdmoe layer, and each half is normalised.
        query_BTR2d = memory.norm(memory.to_queries(x_BTD).unflatten(-1, (2, heads, width)).transpose(2, 3))
        weight, expert = ops.product_key_topk(query_BTR2d, memory.keys, picks)
        found = (weight.unsqueeze(-1) * memory.values.weight[expert]).sum((2, 3))
    assert expected.std() > 0.1  # a limit on nothing would always hold
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
