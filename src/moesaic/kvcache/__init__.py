"""Where keys, values and MLA latents live.

It knows the cache interface of transformers, and nothing of models or kernels.
"""

from moesaic.kvcache.argument import CACHE_ARGUMENT, given_cache
from moesaic.kvcache.growing import GrowingCache, GrowingLayer, GrowingSlidingLayer

__all__ = ["CACHE_ARGUMENT", "GrowingCache", "GrowingLayer", "GrowingSlidingLayer", "given_cache"]
