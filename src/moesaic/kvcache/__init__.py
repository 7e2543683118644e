"""Where keys, values and MLA latents live.

It knows the cache interface of transformers, and nothing of models or kernels.
"""

from moesaic.kvcache.growing import GrowingCache, GrowingLayer, GrowingSlidingLayer

__all__ = ["GrowingCache", "GrowingLayer", "GrowingSlidingLayer"]
