"""Product-key memory: attention to the best of n x n slots, found by two times n half keys."""

from anyattention.ops.product_keys.api import explain_product_keys, product_key_attention, product_key_search
from anyattention.ops.product_keys.slot_gradient import SlotGradient

__all__ = ["SlotGradient", "explain_product_keys", "product_key_attention", "product_key_search"]
