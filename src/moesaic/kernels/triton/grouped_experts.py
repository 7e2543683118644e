"""Routed experts on a GPU for the many tokens of a chunk: pairs of a token and an expert, sorted by expert.

Pairs are sorted and activations converted once; then they are multiplied with experts in as many calls as it takes for
these to arrive, and summed up once. This module knows neither which experts lie where nor how they get there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.activations import operands_shape, to_operands
from moesaic.kernels.triton.experts import (
    ExpertLayout,
    MatrixLayout,
    bias_of,
    check_arena,
    check_choices,
    same_order,
    units_of,
)
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.grouped_kernels import (
    bring_kernel,
    grouped_down_kernel,
    grouped_sum_kernel,
    grouped_up_kernel,
)
from moesaic.kernels.triton.linear import operand_dtype, precision_of, tile_shape, tile_tokens
from moesaic.kernels.triton.views import WeightViews, grid_of, views_of

__all__ = ["ExpertBlocks", "ExpertPairs", "bring"]


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Experts of one call: their slots, and the blocks that their pairs are multiplied in.

    Attributes:
        table: int32 `[num_experts]`, the slot of each expert, -1: not in this call.
        first: int32 `[num_experts + 1]`, the first block of each expert; the last element is the number of blocks.
        most: at least as many as there are blocks.
    """

    table: torch.Tensor
    first: torch.Tensor
    most: int

    @staticmethod
    def counts(num_pairs: np.ndarray, size: int) -> np.ndarray:
        """The same as `first`, made on the CPU.

        Args:
            num_pairs: `[..., num_experts]`, pairs of each expert, 0 for those that are not in a call.
            size: pairs of a block.

        Returns:
            int32 `[..., num_experts + 1]`.
        """
        first = np.zeros((*num_pairs.shape[:-1], num_pairs.shape[-1] + 1), np.int32)
        np.cumsum(-(-num_pairs // size), axis=-1, out=first[..., 1:])
        return first


class ExpertPairs:
    """The tokens of a chunk and their experts, ready for products with any of these; and these products.

    Weights and activations are multiplied as bfloat16, float32 matrices exactly. Nothing waits for the device.

    Args:
        x: float32 `[tokens, hidden]`, rows any distance apart.
        experts: int32 or int64 `[tokens, top_k]`; numbers that are no expert's stand for none.
        weights: float32 `[tokens, top_k]`.
        num_experts: of the layer.
        layout: of its experts; where they are may differ from call to call, formats and shapes may not.

    Attributes:
        num_experts: of the layer.
        block_size: pairs of a block.

    Raises:
        KernelError: a tensor is not as described.
    """

    def __init__(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, num_experts: int, layout: ExpertLayout
    ) -> None:
        choices = {"experts": (experts, (torch.int32, torch.int64)), "weights": (weights, (torch.float32,))}
        check_choices(x, x.device, layout.hidden, choices)
        self.num_experts = num_experts
        self._num_tokens, self._top_k = experts.shape
        self._num_pairs = experts.numel()
        self._experts, self._weights, self._layout = experts, weights, layout
        gate, up, down = layout.gate or layout.up, layout.up.form, layout.down.form
        per_expert = -(-self._num_pairs // num_experts)
        types = [operand_dtype(part.form) for part in (gate, layout.up, layout.down)]
        self.block_size = min(tile_tokens(per_expert, dtype) for dtype in types)
        if self._num_pairs == 0:
            return
        keys = experts.view(-1).to(torch.int32)
        keys = torch.where((keys < 0) | (keys >= num_experts), num_experts, keys)
        keys, self._order = torch.sort(keys, stable=True)
        numbers = torch.arange(num_experts + 1, dtype=torch.int32, device=x.device)
        self._starts = torch.searchsorted(keys, numbers, out_int32=True)
        self._up_x = self._gate_x = to_operands(x, up, operand_dtype(up))
        if not same_order(gate.form, up) or operand_dtype(gate.form) != self._up_x.dtype:
            self._gate_x = to_operands(x, gate.form, operand_dtype(gate.form))
        shape = operands_shape(down, self._num_pairs, layout.intermediate)
        is_full = shape[0] * shape[1] * shape[3] == layout.intermediate
        make: Any = torch.empty if is_full else torch.zeros  # columns behind the last are multiplied too
        self._inner: torch.Tensor = make(shape, dtype=operand_dtype(down), device=x.device)
        self._products = torch.empty(self._num_pairs, layout.hidden, dtype=torch.float32, device=x.device)

    def blocks(self, table: torch.Tensor) -> ExpertBlocks:
        """Blocks of the experts that have slots.

        Args:
            table: int32 `[num_experts]`, the slot of each expert, or -1.

        Raises:
            KernelError: it is not so.
        """
        self._check_table(table)
        first = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=table.device)
        if self._num_pairs == 0:
            return ExpertBlocks(table, first, 0)
        size = self.block_size
        counts = (self._starts[1:] - self._starts[:-1] + (size - 1)) // size
        torch.cumsum(torch.where(table >= 0, counts, 0), 0, dtype=torch.int32, out=first[1:])
        most = min(self._num_pairs, self._num_pairs // size + min(self.num_experts, self._num_pairs))
        return ExpertBlocks(table, first, most)

    def multiply(self, arena: torch.Tensor, layout: ExpertLayout, num_slots: int, blocks: ExpertBlocks) -> None:
        """Products of some experts' pairs.

        Args:
            arena: uint8, aligned to 64 bytes.
            layout: where slots are in it.
            num_slots: how many it has; tables have no larger numbers.
            blocks: which experts.

        Raises:
            KernelError: the arena has not so many slots.
        """
        check_arena(arena, layout, num_slots)
        if blocks.most == 0:
            return
        views = views_of(arena)
        self._multiply_up(views, layout, blocks)
        self._multiply_down(views, layout.down, blocks)

    def sum(self, table: torch.Tensor, out: torch.Tensor | None = None, accumulate: bool = False) -> torch.Tensor:
        """Weighted sum of the products of each token.

        Args:
            table: int32 `[num_experts]`, not negative for experts that were multiplied.
            out: float32 `[tokens, hidden]`.
            accumulate: add to `out` instead of overwriting it.

        Returns:
            float32 `[tokens, hidden]`.
        """
        self._check_table(table)
        hidden = self._layout.hidden
        if out is None:
            out = torch.empty(self._num_tokens, hidden, dtype=torch.float32, device=table.device)
        if self._num_pairs:
            grouped_sum_kernel[(triton.cdiv(hidden, 512), self._num_tokens)](
                self._products, self._experts, table, out, out.stride(0), hidden, self.num_experts, self._top_k,
                accumulate,
            )  # fmt: skip
        return out

    def _multiply_up(self, views: WeightViews, layout: ExpertLayout, blocks: ExpertBlocks) -> None:
        """The activated inner values of each pair in the order of experts, as `operands` of down's format."""
        gate, up, down = layout.gate or layout.up, layout.up, layout.down.form
        gate_offset, gate_stride, gate_panel, gate_items = units_of(gate, gate.form)
        up_offset, up_stride, up_panel, up_items = units_of(up, up.form)
        gate_bias, has_gate_bias = bias_of(layout.gate, self._weights)
        up_bias, has_up_bias = bias_of(up, self._weights)
        num_rows, warps, stages = tile_shape(self.block_size, gate.form, up.form)
        grouped_up_kernel[(triton.cdiv(layout.intermediate, num_rows), blocks.most)](
            self._gate_x, self._up_x, self._order, self._starts, blocks.first, blocks.table, views.words, views.halves,
            views.bytes, grid_of(gate.form, views), grid_of(up.form, views), MAGIC, gate_bias, up_bias, self._inner,
            self._num_tokens, self._num_pairs, self.num_experts, gate_offset, up_offset, gate_stride, up_stride,
            gate_panel, up_panel, gate_items, up_items, up.rows, up.cols, layout.activation.alpha,
            layout.activation.limit, self._top_k, None if layout.gate is None else gate.form, up.form, down,
            layout.activation.name, has_gate_bias, has_up_bias, self.block_size, num_rows,
            precision_of(self._gate_x.dtype), precision_of(self._up_x.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _multiply_down(self, views: WeightViews, down: MatrixLayout, blocks: ExpertBlocks) -> None:
        """Down of each pair times its weight, to the pair's place."""
        form = down.form
        offset, stride, panel, items = units_of(down, form)
        bias, has_bias = bias_of(down, self._weights)
        num_rows, warps, stages = tile_shape(self.block_size, form)
        grouped_down_kernel[(triton.cdiv(down.rows, num_rows), blocks.most)](
            self._inner, self._order, self._starts, blocks.first, blocks.table, self._weights, views.words,
            views.halves, views.bytes, grid_of(form, views), MAGIC, bias, self._products, self._num_pairs,
            self.num_experts, offset, stride, panel, items, down.rows, down.cols, form, has_bias, self.block_size,
            num_rows, precision_of(self._inner.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _check_table(self, table: torch.Tensor) -> None:
        if table.dtype != torch.int32 or table.shape != (self.num_experts,) or not table.is_contiguous():
            raise KernelError(f"The table is {describe(table)}: expected int32 [{self.num_experts}], contiguous.")


def bring(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copy a little memory to the GPU without a copy engine, which may be busy with something large.

    Args:
        source: int32, contiguous, page-locked.
        out: int32, contiguous, as large, on the GPU.
    """
    bring_kernel[(triton.cdiv(source.numel(), 1024),)](source, out, source.numel(), 1024)
