"""Weight formats, and turning float rows into their blocks and back."""

from moesaic.quant.formats import FORMATS, WeightFormat, format_from_ggml, format_from_safetensors_dtype, get_format
from moesaic.quant.quantize import WRITABLE_FORMATS, dequantize, quantize, why_not_writable
from moesaic.quant.recode import other_form, recode

__all__ = [
    "FORMATS",
    "WRITABLE_FORMATS",
    "WeightFormat",
    "dequantize",
    "format_from_ggml",
    "format_from_safetensors_dtype",
    "get_format",
    "other_form",
    "quantize",
    "recode",
    "why_not_writable",
]
