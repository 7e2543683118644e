"""The table of formats against the constants of the gguf package."""

from __future__ import annotations

import gguf
import pytest

from moesaic.errors import UnsupportedFormatError
from moesaic.quant import FORMATS, format_from_ggml, format_from_safetensors_dtype, get_format

ISSUE_FORMATS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def test_the_formats_of_the_first_release_are_there() -> None:
    assert set(ISSUE_FORMATS) <= set(FORMATS)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.in_gguf])
def test_numbers_and_sizes_are_those_of_gguf(name: str) -> None:
    fmt = FORMATS[name]
    ggml_type = gguf.GGMLQuantizationType[name]
    assert fmt.ggml_type == ggml_type
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]
    assert fmt.is_quantized == (name not in {"F32", "F16", "BF16"})
    assert format_from_ggml(int(ggml_type)) is fmt
    assert get_format(name.lower()) is fmt


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if not fmt.in_gguf])
def test_formats_of_safetensors_have_numbers_that_gguf_has_not(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.ggml_type >= 1000 and fmt.is_quantized
    assert fmt.ggml_type not in {int(known) for known in gguf.GGMLQuantizationType}
    with pytest.raises(UnsupportedFormatError, match=f"ggml type {fmt.ggml_type} cannot be read"):
        format_from_ggml(fmt.ggml_type)


def test_sizes_of_published_layouts() -> None:
    assert get_format("FP8").nbytes(2, 256) == 2 * (256 + 2 * 4)
    assert get_format("INT4_32_BF16").row_bytes(7168) == 7168 // 32 * 18
    assert get_format("UINT4_128_F16").row_bytes(256) == 2 * 67
    assert not get_format("FP8").rounds_activations and get_format("INT4_64_F16").rounds_activations


def test_sizes_of_rows_and_matrices() -> None:
    q4_k = get_format("Q4_K")
    assert q4_k.row_bytes(512) == 288
    assert q4_k.nbytes(3, 512) == 864
    assert q4_k.bits_per_weight == 4.5
    with pytest.raises(UnsupportedFormatError, match="Q4_K stores blocks of 256 weights: a row of 288"):
        q4_k.row_bytes(288)


def test_unknown_names_and_numbers_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"'Q4_K_M' is no weight format: expected one of .*Q4_K"):
        get_format("Q4_K_M")
    with pytest.raises(UnsupportedFormatError, match=r"'Q9' is no weight format: expected one of Q8_0\."):
        get_format("Q9", [get_format("Q8_0")])
    with pytest.raises(UnsupportedFormatError, match="ggml type 26 cannot be read"):  # I32
        format_from_ggml(26)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_safetensors_dtypes(dtype: str) -> None:
    assert format_from_safetensors_dtype(dtype).name == dtype


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "Q4_K", ""])
def test_other_safetensors_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedFormatError, match="expected one of F32"):
        format_from_safetensors_dtype(dtype)
