"""Sizes that GPU kernels keep to, for those who plan a GPU's memory: nothing here needs Triton."""

__all__ = ["EXPANDED_WEIGHTS"]

EXPANDED_WEIGHTS = 1 << 28
"""Weights of a matrix that are bfloat16 at a time, while many tokens are multiplied by it."""
