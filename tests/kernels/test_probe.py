"""The yardsticks: they answer, refuse what makes no sense, and count operations per instruction set."""

from __future__ import annotations

import pytest

from moesaic import kernels
from moesaic.errors import KernelError
from moesaic.quant import FORMATS, get_format


@pytest.mark.parametrize("threads", [1, 3])
def test_the_median_is_at_most_the_best(threads: int) -> None:
    before = kernels.num_threads()
    kernels.set_num_threads(threads)
    try:
        rates = kernels.read_bandwidth(1 << 22, 0.01)
    finally:
        kernels.set_num_threads(before)
    assert 0 < rates.median <= rates.best


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 1.0), (1 << 20, 0.0), (1 << 20, float("nan"))])
def test_nothing_to_read_is_refused(num_bytes: int, seconds: float) -> None:
    with pytest.raises(KernelError, match="expected positive numbers"):
        kernels.read_bandwidth(num_bytes, seconds)


@pytest.mark.parametrize("kind", ["fma_f32", "dot_i8"])
def test_peaks_of_every_instruction_set(kind: str, each_isa: str) -> None:
    rates = kernels.peak_ops(kind, 0.01)  # type: ignore[arg-type]
    assert 0 < rates.median <= rates.best


def test_only_amx_has_tiles(each_isa: str) -> None:
    quantised, bf16, f32 = (kernels.tiles_from(get_format(name).ggml_type) for name in ("Q4_K", "BF16", "F32"))
    if each_isa == "amx":
        assert quantised is not None
        assert bf16 is not None
        assert f32 is None
        assert kernels.peak_ops("tile_bf16", 0.01).median > kernels.peak_ops("fma_f32", 0.01).median
        return
    assert all(kernels.tiles_from(fmt.ggml_type) is None for fmt in FORMATS.values())
    with pytest.raises(KernelError, match=f"{each_isa} has no tiles of bfloat16"):
        kernels.peak_ops("tile_bf16", 0.01)


def test_an_unknown_peak_is_refused() -> None:
    with pytest.raises(KernelError, match="expected one of fma_f32, dot_i8, tile_bf16"):
        kernels.peak_ops("fma_f64")  # type: ignore[arg-type]
