"""The k best of a router's experts, and their weights."""

from wm_kernels.router_topk.definition import router_topk, router_topk_reference

__all__ = ["router_topk", "router_topk_reference"]
