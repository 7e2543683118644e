"""The quicker interpreter of Triton: the same numbers, the same refusals, and nothing stays replaced after a launch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def _scaled(values, scale):
    return values * scale[:, None] + 1


@triton.jit
def _sums_kernel(x_ptr, scale_ptr, out_ptr, rows: tl.constexpr, cols: tl.constexpr):
    row = tl.arange(0, rows)
    col = tl.program_id(0) * cols + tl.arange(0, cols)
    values = tl.load(x_ptr + row[:, None] * 16 + col[None, :], mask=col[None, :] < 16, other=0).to(tl.float32)
    wide = _scaled(values, tl.load(scale_ptr + row).to(tl.float32))
    tl.store(out_ptr + col, tl.sum(wide, axis=0).to(tl.bfloat16), mask=col < 16)


@triton.jit
def _wrong_kernel(out_ptr):
    tl.store(out_ptr + tl.arange(0, 8), tl.arange(0, 8) + tl.arange(0, 4))


def test_numbers_of_mixed_types_and_shapes() -> None:
    x = torch.arange(-64, 64, dtype=torch.int8).view(8, 16)
    scale = torch.arange(8, dtype=torch.float16)
    out = torch.zeros(16, dtype=torch.bfloat16)
    _sums_kernel[(4,)](x, scale, out, rows=8, cols=4)
    expected = (x.float() * scale.float()[:, None] + 1).sum(0)
    assert torch.equal(out, expected.bfloat16())


def test_shapes_that_do_not_fit_are_refused_and_all_is_as_it_was() -> None:
    before = tl.load, tl.core.load, tl.sum, tl.tensor.__add__, tl.core.reduce
    out = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(Exception, match="incompatible dimensions"):
        _wrong_kernel[(1,)](out)
    assert (tl.load, tl.core.load, tl.sum, tl.tensor.__add__, tl.core.reduce) == before
    assert not out.any()
