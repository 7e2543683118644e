"""Reading weights into the card's second-level cache while it waits for the CPU.

What a step needs next lies in VRAM, and the card has nothing to do until an answer comes: so it reads the first weights
that will be needed, as many as stay in its cache until then. Nothing is computed from them here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe

__all__ = ["ReadAhead", "cache_share"]

_TENSORS = 8
_TOGETHER = 16  # bytes that a load brings
_BLOCK = 4096  # words that a program has under way
_PROGRAMS = 256
_SHARE = 0.6
"""Of the cache: what else a step reads and writes meanwhile needs its place, too."""
_WITHOUT_GPU = 1 << 16


def cache_share(device: torch.device) -> int:
    """Bytes that are worth reading ahead on a device."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    return int(_SHARE * torch.cuda.get_device_properties(device).L2_cache_size)


class ReadAhead:
    """Weights that will be needed.

    Args:
        tensors: in the order in which they are needed, contiguous, whole words on one device. Eight at most are read.
        max_bytes: of all together; the last one may be cut, as all are to multiples of 16.

    Attributes:
        num_bytes: that are read.

    Raises:
        KernelError: a tensor is not as described.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], max_bytes: int) -> None:
        self._words: list[torch.Tensor] = []
        left = max_bytes // _TOGETHER * (_TOGETHER // 4)
        for tensor in list(tensors)[:_TENSORS]:
            if not tensor.is_contiguous() or tensor.nbytes % 4:
                raise KernelError(f"Weights to read ahead are {describe(tensor)}: expected whole words, contiguous.")
            words = tensor.view(-1).view(torch.int32)[:left]
            words = words[: len(words) // 4 * 4]
            left -= len(words)
            if len(words):
                self._words.append(words)
        self.num_bytes = 4 * sum(len(words) for words in self._words)
        if self._words:
            self._sink = torch.zeros(_BLOCK, dtype=torch.int32, device=self._words[0].device)

    def launch(self) -> None:
        """Read, in the order of the current stream."""
        if not self._words:
            return
        words = [*self._words, *[self._sink] * (_TENSORS - len(self._words))]
        counts = [*(len(each) // 4 for each in self._words), *[0] * (_TENSORS - len(self._words))]
        programs = max(1, min(_PROGRAMS, triton.cdiv(self.num_bytes // 4, _BLOCK)))
        _read_kernel[(programs,)](*words, *counts, self._sink, BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _read(words, count, total, BLOCK: tl.constexpr):
    """Of `count` times four words, which are inside together."""
    for start in range(tl.program_id(0) * BLOCK, count * 4, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total ^= tl.load(words + offsets, mask=offsets // 4 < count, other=0)
    return total


@triton.jit(do_not_specialize=["na", "nb", "nc", "nd", "ne", "nf", "ng", "nh"])
def _read_kernel(a, b, c, d, e, f, g, h, na, nb, nc, nd, ne, nf, ng, nh, sink, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    total = _read(a, na, total, BLOCK)
    total = _read(b, nb, total, BLOCK)
    total = _read(c, nc, total, BLOCK)
    total = _read(d, nd, total, BLOCK)
    total = _read(e, ne, total, BLOCK)
    total = _read(f, nf, total, BLOCK)
    total = _read(g, ng, total, BLOCK)
    total = _read(h, nh, total, BLOCK)
    # Nobody reads it, which the compiler does not know: it would leave out loads of which nothing is stored.
    tl.store(sink + tl.arange(0, BLOCK), total, mask=total == 0x5EED5EED)
