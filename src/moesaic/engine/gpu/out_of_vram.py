"""What is said when VRAM does not suffice in the middle of a run. It knows neither models nor budgets."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch

from moesaic.errors import KernelError, VramError

__all__ = ["told_if_no_lots", "told_if_out_of_vram"]


@contextlib.contextmanager
def told_if_out_of_vram(what: str) -> Iterator[None]:
    """Makes of an allocator that has no more memory the failure of one request.

    What it keeps without need goes back to the device, so that the next request finds as much as there can be. Calls
    that have ended by the failure hold nothing any more: the error may live longer than that.

    Args:
        what: is computed inside, as the end of a sentence.

    Raises:
        VramError: PyTorch's allocator had no memory left.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # tensors of theirs would stay with the error
        torch.cuda.empty_cache()
        raise _error(what, error) from error


@contextlib.contextmanager
def told_if_no_lots(what: str) -> Iterator[None]:
    """The same where memory is lent, and the device or the lender refuses.

    Raises:
        VramError: there was a KernelError inside.
    """
    try:
        yield
    except KernelError as error:
        raise _error(what, error) from error


def _error(what: str, error: Exception) -> VramError:
    reason = str(error).split(". ")[0].removesuffix(".")
    return VramError(
        f"the VRAM does not suffice for {what} ({reason}): give more of it with --vram, or use a smaller --context."
    )
