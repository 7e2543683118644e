"""Rows in the order in which the next product reads them, and what is in such orders, to compare."""

from __future__ import annotations

import torch

from moesaic.kernels.triton.activations import Lanes, goes_by_thirds, to_lanes, to_thirds
from moesaic.kernels.triton.formats import DeviceFormat


def in_order(rows: torch.Tensor, form: DeviceFormat) -> Lanes:
    """As kernels are expected to write them."""
    return to_thirds(rows, form) if goes_by_thirds(form, *rows.shape) else to_lanes(rows, form)


def numbers(lanes: Lanes, form: DeviceFormat) -> torch.Tensor:
    """What is there of all tokens, sums included: float64, in any order."""
    if not lanes.thirds:
        return lanes.values[: lanes.num_tokens].double().flatten()
    items, size = form.num_items(lanes.cols), form.item * 3 * lanes.thirds // 2
    thirds = lanes.values[:items, :size].contiguous().view(torch.bfloat16)
    thirds = thirds.view(items, form.planes, 3, lanes.thirds, -1).double().sum(2) * 2.0**-80
    sums = lanes.values[:items, size:].reshape(items, form.third_sums, lanes.thirds)
    there = slice(lanes.num_tokens)
    return torch.cat([thirds[:, :, there].flatten(), sums[:, :, there].double().flatten()])
