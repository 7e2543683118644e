"""What is said when VRAM does not suffice in the middle of a run. It knows neither models nor budgets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from moesaic.errors import GenerationError

__all__ = ["told_if_out_of_vram"]


@contextlib.contextmanager
def told_if_out_of_vram(what: str) -> Iterator[None]:
    """Makes of an allocator that has no more memory the failure of one request.

    What it keeps without need goes back to the device, so that the next request finds as much as there can be.

    Args:
        what: is computed inside, as the end of a sentence.

    Raises:
        GenerationError: PyTorch's allocator had no memory left.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        reason = str(error).split(". ")[0]
        raise GenerationError(
            f"the VRAM does not suffice for {what} ({reason}): give more of it with --vram, or use a smaller --context."
        ) from error
