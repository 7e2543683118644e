"""Other forms of formats: the same values, to the bit, as `gguf.quants` gives the file's blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from tests.quant.own_formats import own_values, ternary_codes, ternary_weights
from tests.quant.test_dequantize import assert_same_bits

from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.quant import FORMATS, WRITABLE_FORMATS, dequantize, format_from_ggml, get_format, other_form, recode

FORMS = [fmt for fmt in FORMATS.values() if fmt.recodes is not None]


def test_iq1_has_other_forms_that_take_a_sixth_more() -> None:
    assert {fmt.name for fmt in FORMS} == {"IQ1_S_TERNARY", "IQ1_M_TERNARY"}
    for form, more in ((get_format("IQ1_S_TERNARY"), 58 / 50), (get_format("IQ1_M_TERNARY"), 64 / 56)):
        source = get_format(form.name.removesuffix("_TERNARY"))
        assert other_form(source) is form and form.recodes == source.ggml_type
        assert form.bits_per_weight == pytest.approx(more * source.bits_per_weight)
    assert other_form(get_format("Q4_K")) is None and other_form(FORMS[0]) is None


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_file_has_them(form: object) -> None:
    assert not form.in_gguf and form not in WRITABLE_FORMATS  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedFormatError, match="cannot be read"):
        format_from_ggml(form.ggml_type)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M"])
@pytest.mark.parametrize(("rows", "num_blocks"), [(1, 1), (5, 3), (300, 4)])
def test_values_of_random_blocks_stay_what_they_are(name: str, rows: int, num_blocks: int) -> None:
    source, cols = get_format(name), 256 * num_blocks
    form = other_form(source)
    assert form is not None
    raw = np.random.default_rng(rows).integers(0, 256, (rows, num_blocks * source.block_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32)
    assert_same_bits(dequantize(recode(raw, source, form, cols), form, cols), expected)


def test_every_entry_of_the_codebook() -> None:
    """Each of 2048 indices, in each of the four places that its high bits can have."""
    index = (np.arange(2048)[:, None] + np.arange(32)).reshape(-1, 32) % 2048
    raw = np.zeros((2048, 50), np.uint8)
    raw[:, :2] = np.array([1], np.float16).view(np.uint8)
    raw[:, 2:34] = index & 255
    high = (index >> 8).reshape(-1, 8, 4) << np.array([0, 3, 6, 9])
    raw[:, 34:] = high.sum(-1).astype(np.uint16).view(np.uint8)
    recoded = recode(raw, get_format("IQ1_S"), get_format("IQ1_S_TERNARY"), 256)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.IQ1_S)
    assert np.array_equal(ternary_weights(recoded), np.rint(expected - 0.125).astype(int))


def test_every_byte_in_every_place() -> None:
    """All 256 bytes mean five weights, and all 243 combinations of five have a byte."""
    form = get_format("IQ1_S_TERNARY")
    blocks = np.zeros((256, 58), np.uint8)
    blocks[:, :52] = np.arange(256)[:, None]
    blocks[:, 56:] = np.array([1], np.float16).view(np.uint8)
    assert_same_bits(dequantize(blocks, form, 256), own_values(blocks, form))
    codes = ternary_codes(np.arange(256))
    assert codes.min() == -1 and codes.max() == 1
    assert len(np.unique(codes, axis=0)) == 3**5


def test_rows_that_are_far_apart() -> None:
    source, form = get_format("IQ1_M"), get_format("IQ1_M_TERNARY")
    wide = np.random.default_rng(1).integers(0, 256, (18, 2 * 56 + 9), dtype=np.uint8)
    raw = wide[:, : 2 * 56]
    assert np.array_equal(recode(raw, source, form, 512), recode(np.ascontiguousarray(raw), source, form, 512))
    assert recode(raw[:0], source, form, 512).shape == (0, 128)


def test_wrong_arguments_are_refused() -> None:
    source, form = get_format("IQ1_S"), get_format("IQ1_S_TERNARY")
    with pytest.raises(KernelError, match="IQ1_S_TERNARY is no other form of IQ1_M"):
        recode(np.zeros((1, 56), np.uint8), get_format("IQ1_M"), form, 256)
    with pytest.raises(KernelError, match=r"uint8 \[rows, 50\].*got uint8 \[1, 58\]"):
        recode(np.zeros((1, 58), np.uint8), source, form, 256)
    with pytest.raises(UnsupportedFormatError, match="a row of 128"):
        recode(np.zeros((1, 25), np.uint8), source, form, 128)
