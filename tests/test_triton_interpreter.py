"""The quicker interpreter of Triton: the same numbers, the same refusals, and nothing stays replaced after a launch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language
_ZEROS_HAVE_SIGNS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)  # 3.6 makes 0.0 of -0.0
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


@triton.jit
def _numbers_kernel(x_ptr, whole_ptr, out_ptr, whole_out_ptr):
    at = tl.arange(0, 4)
    x, whole = tl.load(x_ptr + at), tl.load(whole_ptr + at)
    tl.store(out_ptr + at, x * -0.0)
    tl.store(out_ptr + 4 + at, x * 0.0)
    tl.store(out_ptr + 8 + at, x.to(tl.float16) * 1.0 + 2049)
    tl.store(out_ptr + 12 + at, x + 2049)
    tl.store(out_ptr + 16 + at, whole / 2)
    tl.store(whole_out_ptr + at, whole + 0x7FFFFFFF)
    tl.store(whole_out_ptr + 4 + at, whole // 2)
    tl.store(whole_out_ptr + 8 + at, 2 - whole)


def test_numbers_beside_tensors_keep_their_sign_and_take_the_tensors_type() -> None:
    """Equal numbers are 0.0 and -0.0, and 2049 of each type; sums of integers wrap."""
    x = torch.tensor([1.0, -1.0, 3.0, 0.5])
    whole = torch.tensor([1, 2, 3, 5], dtype=torch.int32)
    out, whole_out = torch.zeros(20), torch.zeros(12, dtype=torch.int32)
    for _ in range(2):  # the second time they are there already
        _numbers_kernel[(1,)](x, whole, out.zero_(), whole_out.zero_())
        if _ZEROS_HAVE_SIGNS:
            assert torch.equal(torch.signbit(out[:8]), torch.cat([~torch.signbit(x), torch.signbit(x)]))
        assert torch.equal(out[8:12], (x.half() + torch.tensor(2049).half()).float())
        assert torch.equal(out[12:16], x + 2049)
        assert torch.equal(out[16:], whole.float() / 2)
        assert whole_out[:4].tolist() == [value + 0x7FFFFFFF - 2**32 for value in whole.tolist()]
        assert whole_out[4:8].tolist() == [0, 1, 1, 2] and whole_out[8:].tolist() == [1, 0, -1, -3]
