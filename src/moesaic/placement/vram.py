"""The budget of a GPU's memory: what a plan puts there, what a step needs beside it, what is left for busy experts.

What a running model may allocate follows from the same numbers. It knows neither rules nor how a plan was made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moesaic.errors import PlanError
from moesaic.kernels.limits import EXPANDED_WEIGHTS
from moesaic.modules.mla import latent_heads_at_once
from moesaic.placement.lots import VramLots, divide
from moesaic.placement.roles import layer_of

if TYPE_CHECKING:
    from moesaic.placement.gpus import Gpu
    from moesaic.placement.hardware import Hardware
    from moesaic.placement.plan import Placement, Plan

__all__ = [
    "DEFAULT_CONTEXT",
    "DRIVER_BYTES",
    "KV_BLOCK",
    "LEAST_CHUNK",
    "LENT_STAGING_BYTES",
    "LONG_CHUNK",
    "MAX_BATCH",
    "MAX_STATES",
    "MAX_UPLOADS",
    "NO_STEP",
    "PREFILL_CHUNK",
    "STAGING_BYTES",
    "STAGING_GROUPS",
    "StepSizes",
    "VramBudget",
    "cache_blocks",
    "is_absorbed",
    "require_gpu",
    "usable_gpu",
    "vram_budget",
    "vram_total",
]

DEFAULT_CONTEXT = 4096
KV_BLOCK = 64
"""Positions of a block of the paged cache."""
PREFILL_CHUNK = 4096
"""Tokens of a prompt that go through the layers at once, at most, in memory that is set aside for them."""
LONG_CHUNK = 8192
"""The same where experts lend memory: experts that are streamed pass once for twice as many tokens."""
LEAST_CHUNK = 512
"""The same that is not cut where VRAM runs out: what it takes is little beside what else a step needs."""
MAX_BATCH = 32
"""Sequences of a decode step, at most."""
MAX_STATES = 8
"""Sequences of a model with recurrent states that can be there at once."""
STAGING_BYTES = 384 * 1024**2
"""What experts pass through that are streamed to the GPU in prefill, if an expert is not larger than a group of it."""
LENT_STAGING_BYTES = 1280 * 1024**2
"""The same where experts lend it: what the link brings while the GPU does all but experts."""
STAGING_GROUPS = 4
"""Groups of such experts that are there at a time: while some are multiplied, others are on their way."""
MAX_UPLOADS = 16
"""Experts of a layer that a decode step brings to the GPU itself, at most."""
DRIVER_BYTES = 600 * 1024**2
"""What the driver takes for a process: its context, modules of kernels, their stacks."""

_UPLOAD_PART = 32  # of the experts that there is room for, at most one in so many
_MARGIN_SHARE = 20  # a twentieth of what is free is left to others
_MIN_MARGIN = 512 * 1024**2
_ALLOCATOR = 128 * 1024**2  # beside tensors: 32 MiB of cuBLAS, idle parts of segments of 20 MiB, sums of split keys
_STREAMS = 4  # hidden states per token: the residual, the normalised, a block's output, what comes from the CPU
_FLOAT, _BFLOAT16 = 4, 2
_CHOICE_BYTES = 20  # an expert's number and whether the CPU has it (int64 each), its weight (float32)


def cache_blocks(context: int) -> int:
    """Blocks of a cache for `context` positions, of which each sequence of a batch may have begun one."""
    return -(-context // KV_BLOCK) + MAX_BATCH


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Numbers of floats by which the buffers of a step are measured.

    Attributes:
        hidden_size: of a hidden state.
        top_k: routed experts of a token.
        vocab_size: logits of a token.
        widest: floats per token that the widest block but attention holds beside hidden states.
        rotary: floats per position of the table of rotary angles.
        longest: positions of a sequence that the model was made for; 0 if its configuration does not say.
        attention: floats per token that attention holds.
        latent_heads, latent_dim: of MLA, whose queries and sums on the latents come on top, of some heads at a time.
        largest: weights of the largest matrix but routed experts and head.
    """

    hidden_size: int = 0
    top_k: int = 0
    vocab_size: int = 0
    widest: int = 0
    rotary: int = 0
    longest: int = 0
    attention: int = 0
    latent_heads: int = 0
    latent_dim: int = 0
    largest: int = 0

    def working_bytes(self, context: int) -> int:
        """VRAM of a step: activations of a chunk of a prompt, logits with a copy to sample from, rotary angles."""
        expanded = _BFLOAT16 * min(self.largest, EXPANDED_WEIGHTS)
        rest = 2 * MAX_BATCH * self.vocab_size + cache_blocks(context) * KV_BLOCK * self.rotary
        return _ALLOCATOR + expanded + self.chunk_bytes(min(PREFILL_CHUNK, context)) + rest * _FLOAT

    def chunk_bytes(self, num_tokens: int) -> int:
        """Of that, what the activations of so many tokens of a prompt take."""
        attention = self.attention
        if self.latent_heads:  # queries, sums, and a copy of one of them in bfloat16
            heads = latent_heads_at_once(num_tokens, self.latent_heads, self.latent_dim)
            attention += heads * (5 * self.latent_dim // 2)
        return num_tokens * (_STREAMS * self.hidden_size + max(self.widest, attention)) * _FLOAT

    def mailbox_bytes(self, context: int) -> int:
        """Pinned DRAM through which the tokens of a chunk and those of a decode step are handed to the CPU and back."""
        chunk = max(min(PREFILL_CHUNK, context), min(LONG_CHUNK, self.longest))
        num_tokens = chunk + MAX_BATCH
        return num_tokens * (2 * self.hidden_size * _FLOAT + self.top_k * _CHOICE_BYTES)


NO_STEP = StepSizes()


@dataclass(frozen=True, slots=True)
class VramBudget:
    """How a plan divides a GPU's memory; everything in bytes unless it says otherwise.

    Attributes:
        total: what may be used.
        context: positions that the cache has room for.
        weights: packed weights and vectors on the GPU.
        absorbed: both halves of MLA's `kv_b_proj` in bfloat16, by which queries and sums are multiplied.
        kv_cache: states in `num_blocks` blocks, of the layers on the GPU.
        working: activations and logits.
        driver: what the driver takes.
        expert_bytes: the largest expert in DRAM, its matrices on 64-byte boundaries: a slot of the expert cache.
        num_experts: experts in DRAM that slots could hold, over all layers.
        states: recurrent states of MAX_STATES sequences, of linear attention.
        upload_experts: slots that misses of decode steps pass through.
        streamed: bytes of slots that experts pass through in prefill, if none is larger than a group of them.
        lots: how the last three are divided where memory can be moved between them; None: once and for all.
        fixed: why not, "" if it can or there is nothing to move.
    """

    total: int
    context: int
    weights: int
    absorbed: int
    kv_cache: int
    working: int
    driver: int
    expert_bytes: int
    num_experts: int
    states: int = 0
    upload_experts: int = 0
    streamed: int = STAGING_BYTES
    lots: VramLots | None = None
    fixed: str = ""

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return cache_blocks(self.context)

    @property
    def max_chunk(self) -> int:
        """Tokens of a prompt that go through the layers at once, at most."""
        longest = 0 if self.lots is None else self.lots.long_chunk
        return max(longest, min(PREFILL_CHUNK, self.context))

    @property
    def required(self) -> int:
        """What cannot be done without."""
        return self.weights + self.absorbed + self.kv_cache + self.states + self.working + self.driver

    @property
    def shortfall(self) -> int:
        """What is missing; 0 if it fits."""
        return max(0, self.required - self.total)

    @property
    def left(self) -> int:
        """What is left for experts that stay, or are streamed in prefill."""
        return max(0, self.total - self.required - self.uploads)

    @property
    def uploads(self) -> int:
        """Bytes of the slots that misses of decode steps pass through."""
        return self.upload_experts * self.expert_bytes

    @property
    def num_slots(self) -> int:
        """Experts that there is room for, in all."""
        return self.left // self.expert_bytes if self.expert_bytes else 0

    @property
    def staging_experts(self) -> int:
        """Of those, slots for experts streamed in prefill: some equal groups, none where there is no room for two."""
        if not self.num_experts or self.num_slots < 2:
            return 0
        most = min(self.num_experts, max(2, self.num_slots // 2))  # the cache gets as many at least
        count = min(max(STAGING_GROUPS, self.streamed // self.expert_bytes), most)
        return count // STAGING_GROUPS * STAGING_GROUPS or count

    @property
    def cache_experts(self) -> int:
        """Of those, slots of the expert cache: the rest, at most one for each expert in DRAM."""
        return min(self.num_experts, self.num_slots - self.staging_experts)

    @property
    def cached_share(self) -> float:
        """Of the experts in DRAM, what the cache holds at first: hits of routers that choose all equally often."""
        slots = self.cache_experts if self.lots is None else self.lots.first_slots
        return slots / self.num_experts if self.num_experts else 0.0

    @property
    def staging(self) -> int:
        """Bytes of the staging buffers."""
        return self.staging_experts * self.expert_bytes

    @property
    def cache(self) -> int:
        """Bytes of the expert cache."""
        return self.cache_experts * self.expert_bytes


def vram_budget(plan: Plan, total: int, context: int, fixed: str = "") -> VramBudget | None:
    """The budget of a plan for a GPU of which `total` bytes may be used; None if the plan uses no GPU.

    Args:
        plan: with its entries.
        total: bytes.
        context: positions to have room for.
        fixed: why memory of this GPU cannot be moved, "" if it can.
    """
    if not plan.uses_gpu:
        return None
    absorbed = sum(entry.nbytes for entry in plan.entries if entry.device == "gpu" and is_absorbed(entry))
    in_dram = [entry for entry in plan.entries if entry.role == "experts" and entry.device == "cpu"]
    cached = [entry for entry in in_dram if layer_of(entry.module) in plan.gpu_layers]
    budget = VramBudget(
        total=total,
        context=context,
        weights=plan.nbytes_on("gpu") - absorbed,
        absorbed=absorbed,
        kv_cache=cache_blocks(context) * KV_BLOCK * plan.kv_bytes_on("gpu"),
        working=plan.step.working_bytes(context),
        driver=DRIVER_BYTES,
        expert_bytes=max((entry.expert_bytes for entry in cached), default=0),
        num_experts=sum(entry.num_experts for entry in cached),
        states=MAX_STATES * plan.state_bytes_on("gpu"),
    )
    # Where all experts stay on the GPU none is missing.
    has_misses = budget.cache_experts < budget.num_experts
    uploads = min(MAX_UPLOADS, budget.num_slots // _UPLOAD_PART) if has_misses else 0
    budget = replace(budget, upload_experts=uploads)
    on_gpu = [entry for entry in plan.entries if entry.role == "experts" and entry.device == "gpu"]
    lent = replace(budget, streamed=LENT_STAGING_BYTES)
    lots = None if on_gpu else divide(lent, plan.step, KV_BLOCK, MAX_BATCH, long_chunk=LONG_CHUNK)
    if lots is None:
        return budget
    return replace(budget, fixed=fixed) if fixed else replace(lent, lots=lots)


def is_absorbed(entry: Placement) -> bool:
    """Whether a module holds MLA's `kv_b_proj`, or its two halves where the file stores those."""
    return entry.role == "attention" and (entry.module.endswith(".kv_b_proj") or "k_b" in entry.formats)


def usable_gpu(hardware: Hardware) -> Gpu | None:
    """The GPU that is used: the first, if it can be."""
    return next((gpu for gpu in hardware.gpus[:1] if not gpu.problem), None)


def vram_total(hardware: Hardware, vram: int | None, plan: str) -> int:
    """Bytes of VRAM that a plan may use: those asked for, or what is free less a margin of 5%, at least 512 MiB.

    Args:
        hardware: the computer; with `vram` its GPU is not looked at.
        vram: bytes asked for, or None.
        plan: its name, for errors.

    Raises:
        PlanError: there is no GPU, or its memory is unknown.
    """
    if vram is not None:
        return vram
    gpu = require_gpu(hardware, plan)
    free = gpu.memory_free or gpu.memory_total
    if not free:
        raise PlanError(f"the memory of {gpu.name} is unknown: say how much of it to use, e.g. --vram 8GiB.")
    return max(0, free - max(_MIN_MARGIN, free // _MARGIN_SHARE))


def require_gpu(hardware: Hardware, plan: str) -> Gpu:
    """The GPU of a computer.

    Raises:
        PlanError: there is none, or it cannot be used.
    """
    gpu = usable_gpu(hardware)
    if gpu is not None:
        return gpu
    found = "nvidia-smi found none, nor is there an AMD card"
    if hardware.gpus:
        found = f"{hardware.gpus[0].name} cannot be used: {hardware.gpus[0].problem}"
    raise PlanError(f"plan '{plan}' needs a GPU: {found}. Use the plan 'auto' or 'cpu', or mend the driver.")
