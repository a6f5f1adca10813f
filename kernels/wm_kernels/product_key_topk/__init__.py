"""The k best experts of each retrieval head, found through two sets of sub-keys."""

from wm_kernels.product_key_topk.definition import product_key_topk, product_key_topk_reference

__all__ = ["product_key_topk", "product_key_topk_reference"]
