"""How a runner of a model on a GPU uses memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.placement.vram import LEAST_CHUNK, PREFILL_CHUNK

__all__ = ["RunnerOptions"]


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """How a runner uses memory and time.

    Attributes:
        num_blocks: blocks of the cache.
        block_size: positions of a block.
        kv_dtype: what the cache stores.
        max_batch: most sequences of a decode step.
        graphs: whether decode steps are captured; only a GPU can.
        timeout: seconds that GPU and CPU wait for each other.
        num_states: sequences that can be there at once, if the model has recurrent states; `max_batch` if None.
        max_positions: of a sequence; what fits into all blocks if None.
        max_chunk: tokens of a prompt that go through the layers at once, at most.
        reads_ahead: whether routers in decode say beforehand what they will probably ask for, so that the CPU reads it
            into its caches while it would wait; answers are the same either way.
        least_chunk: tokens that go through them at once however little VRAM there is.
    """

    num_blocks: int
    block_size: int = 64
    kv_dtype: torch.dtype = torch.bfloat16
    max_batch: int = 8
    graphs: bool = True
    timeout: float = 30.0
    num_states: int | None = None
    max_positions: int | None = None
    max_chunk: int = PREFILL_CHUNK
    least_chunk: int = LEAST_CHUNK
    reads_ahead: bool = True
