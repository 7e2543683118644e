"""A stream of a card as a queue of copies for code that knows no PyTorch: the driver's own function and its handle.

On AMD's cards the function has another name; nobody has tried it there. It knows neither who copies nor what.
"""

from __future__ import annotations

import ctypes

import torch

from moesaic.engine.gpu.streams import SideStream
from moesaic.errors import KernelError
from moesaic.kernels.expert_uploads import NO_QUEUE, CopyQueue

__all__ = ["copy_queue"]

_CUDA, _HIP = ("libcuda.so.1", "cuMemcpyHtoDAsync_v2"), ("libamdhip64.so", "hipMemcpyHtoDAsync")


def copy_queue(stream: SideStream) -> CopyQueue:
    """Copies from page-locked memory in the order of this stream; for threads that have used the card before.

    Raises:
        KernelError: the driver has no such function.
    """
    if stream.stream is None:
        return NO_QUEUE
    library, name = _CUDA if torch.version.hip is None else _HIP
    try:
        function = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError) as error:
        raise KernelError(f"{library} has no {name}: {error}. Install the driver of the GPU.") from error
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return CopyQueue(address, int(stream.stream.cuda_stream))
