"""What PyTorch's allocator may take of a GPU: the budget, less what is moved between borrowers, and more for a while.

Memory that the plan does not allow for cannot be taken by mistake. Lots of `lending` come on top; the allocator does
not know of them.
"""

from __future__ import annotations

import torch

from moesaic.placement.vram import DRIVER_BYTES

__all__ = ["AllocatorLimit"]


class AllocatorLimit:
    """The limit of this process.

    Args:
        total: bytes of VRAM that the process may use, the driver's share included.
        device: the GPU.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._total, self._device, self._elsewhere = total, device, 0
        self._set(0)

    def leave(self, nbytes: int) -> None:
        """So many bytes of the total lie elsewhere."""
        self._elsewhere = nbytes
        self._set(0)

    def allow(self, extra: int) -> bool:
        """Let the allocator have so many bytes more than its part, until the next call; False if it holds more.

        What it holds without need goes back to the device first: tensors of one size would be cut from what it had for
        larger ones, which then find no room. So this comes before the first tensor of whoever wants more.
        """
        torch.cuda.empty_cache()
        if torch.cuda.memory_reserved(self._device) > self._part + extra:
            return False
        self._set(extra)
        return True

    @property
    def _part(self) -> int:
        return max(0, self._total - self._elsewhere - DRIVER_BYTES)

    def _set(self, extra: int) -> None:
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (self._part + extra) / total), self._device)
