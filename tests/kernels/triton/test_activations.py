"""The orders in which products read activations: complete, and the same where kernels write single columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tests.kernels.triton.conftest import DEVICE

from moesaic.kernels.triton.activations import lanes_size, operands_shape, to_lanes, to_operands
from moesaic.kernels.triton.expert_kernels import lane_place, operand_place
from moesaic.kernels.triton.formats import device_format, supported_formats
from moesaic.quant import FORMATS

COLS = 512


@triton.jit
def places_kernel(lanes, operands, out, num_tokens, token, F: tl.constexpr, COLS: tl.constexpr):
    k = tl.arange(0, COLS)
    tl.store(out + k, tl.load(lanes + lane_place(k, F)))
    tl.store(out + COLS + k, tl.load(operands + operand_place(k, token, num_tokens, F)))


@pytest.mark.parametrize("fmt", supported_formats())
def test_single_columns_lie_where_whole_rows_have_them(fmt):
    form = device_format(FORMATS[fmt], COLS)
    x = torch.arange(3 * COLS, dtype=torch.float32, device=DEVICE).view(3, COLS)
    lanes, operands = to_lanes(x, form).values, to_operands(x, form, torch.float32)
    out = torch.empty(2, COLS, device=DEVICE)
    places_kernel[(1,)](lanes[1], operands, out, 3, 1, form, COLS)
    assert torch.equal(out[0], x[1]) and torch.equal(out[1], x[1])


@pytest.mark.parametrize("fmt", supported_formats())
def test_what_pads_rows_is_zero_and_sums_are_those_of_the_groups(fmt):
    cols = 256 if FORMATS[fmt].block_size > 1 else 40
    form = device_format(FORMATS[fmt], cols)
    x = torch.ones(2, cols, device=DEVICE)
    few = form.lanes
    lanes = to_lanes(x, form).values[0].view(-1, few.item + few.num_sums, 8).cpu().numpy()
    assert lanes[:, : few.item].sum() == cols and lanes.size == lanes_size(form, cols)
    if few.num_sums:
        assert set(np.unique(lanes[:, few.item :])) <= {0, few.item // few.num_sums}
        assert lanes[:, few.item :].sum() == cols / few.item * few.num_sums * (few.item // few.num_sums)
    operands = to_operands(x, form, torch.float32)
    assert tuple(operands.shape) == operands_shape(form, 2, cols)
    assert float(operands[:, :, 0].sum()) == cols
