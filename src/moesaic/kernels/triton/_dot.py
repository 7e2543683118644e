"""The matrix product of tiles as all kernels here want it: exact operands, float32 sums."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dot"]

_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """`acc + a b`: bfloat16 and float16 on tensor cores, float32 as it is (no TF32)."""
    if _INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
