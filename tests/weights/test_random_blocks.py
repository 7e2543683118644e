"""Random blocks of every format: finite weights of the deviation asked for, the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.quant import FORMATS, WeightFormat, dequantize
from moesaic.weights.random_blocks import random_blocks


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
def test_deviation(fmt: WeightFormat) -> None:
    blocks = random_blocks(fmt, 512, 0.02, np.random.default_rng(0))
    assert blocks.shape == (512, fmt.block_bytes)
    values = dequantize(blocks, fmt, fmt.block_size)
    assert 0.01 < values.std() < 0.04
    assert abs(values.mean()) < 0.005
    np.testing.assert_array_equal(blocks, random_blocks(fmt, len(blocks), 0.02, np.random.default_rng(0)))
