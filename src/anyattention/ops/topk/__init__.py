"""Attention to the keys of the largest scores."""

from anyattention.ops.topk.api import explain_topk, topk_attention, topk_search

__all__ = ["explain_topk", "topk_attention", "topk_search"]
