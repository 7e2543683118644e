"""From hidden states to experts on a GPU: the router's exact product, and the choice that `ops.route` makes on the CPU.

The choice can look up at once which experts a cache on the GPU holds, and which are left to the CPU. It knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import choice, describe
from moesaic.kernels.block_parts import RouteOptions
from moesaic.kernels.routing import GROUP_SCORES, ROUTE_SCORES
from moesaic.kernels.triton.route_kernels import logits_kernel, route_kernel, row_logits_kernel

__all__ = ["MAX_ROUTE_EXPERTS", "Request", "Routed", "route", "router_logits"]

MAX_ROUTE_EXPERTS = 4096
"""What a program can sort through in registers."""
_FEW_TOKENS = 8  # up to here a product is bound by reading the weight once
_VERY_FEW_TOKENS = 4  # whose rows fit in registers, whole
_WHOLE_ROW = 16384


class Routed(NamedTuple):
    """What a router chose.

    Attributes:
        weights: float32 `[tokens, top_k]`.
        experts: int64 `[tokens, top_k]`, best first.
        slots: int32 `[tokens, top_k]`: where the expert lies on the GPU, -1: not there; None if not asked for.
        misses: int64 `[tokens, top_k]`: the expert if it is not on the GPU, otherwise -1; None if not asked for.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    slots: torch.Tensor | None
    misses: torch.Tensor | None


class Request(NamedTuple):
    """A request to the CPU that routers write.

    Attributes:
        hidden, chosen, experts, weights: of the mailbox; see `Mailbox`.
        requested: its counter.
        base: int64 `[1]` on the device: number of the last request of the steps before.
        arrivals: int32 `[1]` on the device, 0 between launches.
        position: which request of the step this is, from 0 on.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    requested: torch.Tensor
    base: torch.Tensor
    arrivals: torch.Tensor
    position: int


def route(
    logits: torch.Tensor,
    options: RouteOptions,
    *,
    slot_of_expert: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    request: Request | None = None,
) -> Routed:
    """Choose experts for each token, in the order and with the ties of `ops.route`.

    Args:
        logits: float32 `[tokens, experts]`, rows contiguous.
        options: see `ops.route`; its bias is float32 `[experts]` on the device.
        slot_of_expert: int32 `[experts]`, contiguous: where an expert lies on the GPU, -1: not there.
        slot_mapping: int64 `[tokens]` of the step (see `StepInput`): tokens that go nowhere are padding, and get
            weights of 0, -1 in the place of experts, and neither slots nor misses.
        request: also ask the CPU for what is not on the GPU (for all that was chosen, without `slot_of_expert`); what
            the experts are to compute from was written into the mailbox by launches before.

    Returns:
        Tensors of their own.

    Raises:
        KernelError: shapes, types or numbers that do not go together.
    """
    if logits.dtype != torch.float32 or logits.ndim != 2 or logits.stride(-1) != 1:
        raise KernelError(f"logits is {describe(logits)}: expected float32 [tokens, experts], rows contiguous.")
    tokens, num_experts = logits.shape
    top_k, groups = options.top_k, options.num_groups
    if not 1 <= top_k <= num_experts <= MAX_ROUTE_EXPERTS:
        raise KernelError(
            f"top_k is {top_k} of {num_experts} experts: expected 1 <= top_k <= experts <= {MAX_ROUTE_EXPERTS}."
        )
    if groups < 1 or num_experts % groups or not 1 <= options.topk_groups <= groups:
        raise KernelError(
            f"{options.topk_groups} of {groups} groups of {num_experts} experts: expected equal groups and "
            "1 <= topk_groups <= num_groups."
        )
    for name, x, dtype, size in (
        ("bias", options.bias, torch.float32, num_experts),
        ("slot_of_expert", slot_of_expert, torch.int32, num_experts),
        ("slot_mapping", slot_mapping, torch.int64, tokens),
    ):
        if x is not None and (
            x.dtype != dtype or x.numel() != size or x.device != logits.device or not x.is_contiguous()
        ):
            raise KernelError(f"{name} is {describe(x)}: expected {dtype} [{size}], contiguous, on {logits.device}.")
    device = logits.device
    weights = torch.empty(tokens, top_k, device=device)
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    slots = misses = None
    if slot_of_expert is not None:
        slots, misses = torch.empty(tokens, top_k, dtype=torch.int32, device=device), torch.empty_like(experts)
    score, group_score = choice("score", options.score, ROUTE_SCORES), options.group_score
    limit = choice("group_score", group_score, GROUP_SCORES)
    if group_score == "none":
        groups = 1
    if tokens:
        route_kernel[(tokens,)](
            logits,
            logits if options.bias is None else options.bias,
            logits if slot_of_expert is None else slot_of_expert,
            logits if slot_mapping is None else slot_mapping,
            weights,
            experts,
            experts if slots is None else slots,
            experts if misses is None else misses,
            *_request_arguments(request, experts),
            logits.stride(0),
            options.sum_offset,
            options.sum_minimum,
            options.scale,
            GROUPS=groups,
            GROUPS_PAD=triton.next_power_of_2(groups),
            SIZE=num_experts // groups,
            SIZE_PAD=triton.next_power_of_2(num_experts // groups),
            TOP_K=top_k,
            TOP_K_PAD=triton.next_power_of_2(top_k),
            TOPK_GROUPS=options.topk_groups,
            SCORE=score,
            LIMIT=limit,
            BIASED=options.bias is not None,
            NORMALIZE=options.normalize,
            LOOKS_UP=slot_of_expert is not None,
            PADDED=slot_mapping is not None,
            ASKS=request is not None,
            ALONE=tokens == 1,
            num_warps=1 if num_experts <= 512 else 4,
        )
    return Routed(weights, experts, slots, misses)


def _request_arguments(request: Request | None, otherwise: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    if request is None:
        return (*[otherwise] * 6, 0)
    box = request.chosen, request.experts, request.weights, request.requested
    return *box, request.arrivals, request.base, request.position


def router_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    box_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x W^T + bias`, exact products and sums in float32.

    Args:
        x: float32 `[tokens, hidden]`, rows contiguous.
        weight: float32 `[experts, hidden]`, contiguous.
        bias: float32 `[experts]`, or None.
        out: float32 `[tokens, experts]`, contiguous, or None to allocate it.
        box_hidden: float32 `[at least tokens, hidden]`, contiguous, where x is written as well, for a `Request` that
            follows; None: nowhere.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or x.stride(-1) != 1:
        raise KernelError(f"x is {describe(x)}: expected float32 [tokens, hidden], rows contiguous.")
    (tokens, hidden), num_experts = x.shape, weight.shape[0]
    for name, w, shape in (("weight", weight, (num_experts, hidden)), ("bias", bias, (num_experts,))):
        if w is not None and (w.dtype != torch.float32 or w.shape != shape or not w.is_contiguous()):
            raise KernelError(f"{name} is {describe(w)}: expected float32 {list(shape)}, contiguous.")
    if box_hidden is not None and (
        box_hidden.dtype != torch.float32
        or box_hidden.ndim != 2
        or box_hidden.shape[1] != hidden
        or len(box_hidden) < tokens
        or not box_hidden.is_contiguous()
    ):
        raise KernelError(f"box_hidden is {describe(box_hidden)}: expected float32 [{tokens} or more, {hidden}].")
    if out is None:
        out = torch.empty(tokens, num_experts, device=x.device)
    if out.dtype != torch.float32 or out.shape != (tokens, num_experts) or not out.is_contiguous():
        raise KernelError(f"out is {describe(out)}: expected float32 [{tokens}, {num_experts}], contiguous.")
    if tokens > _FEW_TOKENS:
        if box_hidden is not None:
            box_hidden[:tokens].copy_(x)
        return _exact_matmul(x, weight, bias, out)
    if tokens:
        _few_logits(x, weight, bias, out, box_hidden)
    return out


def _few_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    box_hidden: torch.Tensor | None,
) -> None:
    (tokens, hidden), num_experts = x.shape, weight.shape[0]
    pad, padded_tokens = triton.next_power_of_2(hidden), triton.next_power_of_2(tokens)
    whole = tokens <= _VERY_FEW_TOKENS and pad * padded_tokens <= 2 * _WHOLE_ROW
    rows = 2 if tokens > 1 or (whole and pad > 2048) else 1
    programs = triton.cdiv(num_experts, rows)
    arguments = (
        x,
        weight,
        weight if bias is None else bias,
        out,
        out if box_hidden is None else box_hidden,
        0 if box_hidden is None else tokens,
        tokens,
        x.stride(0),
        num_experts,
    )
    options = {
        "HIDDEN": hidden,
        "TOKENS": padded_tokens,
        "ROWS": rows,
        "PART": triton.next_power_of_2(triton.cdiv(hidden, programs)),
        "BIASED": bias is not None,
    }
    if whole:
        warps = 8 if pad <= 2048 else 16 if tokens > 1 else 32
        row_logits_kernel[(programs,)](*arguments, PAD=pad, num_warps=warps, **options)
    else:
        chunk = max(128, min(1024 if tokens > 2 else 2048, pad))
        logits_kernel[(programs,)](*arguments, CHUNK=chunk, num_warps=8 if hidden > 2048 else 4, **options)


def _exact_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """By the library of torch, whatever precision the process allows it elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        torch.mm(x, weight.t(), out=out)
    finally:
        torch.set_float32_matmul_precision(before)
    return out if bias is None else out.add_(bias)
