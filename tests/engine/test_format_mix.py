"""What formats a synthetic model's matrices have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.subjects import prepare_synthetic
from moesaic.errors import UnsupportedFormatError
from moesaic.placement import load_plan


def test_one_format_for_all_but_routers() -> None:
    mix = FormatMix.parse("Q4_K")
    assert mix.of("model.layers.3.mlp.experts.7.up_proj.weight", (64, 256)).name == "Q4_K"
    assert mix.of("model.layers.3.self_attn.q_proj.weight", (64, 256)).name == "Q4_K"
    assert mix.of("model.layers.3.mlp.gate.weight", (8, 256)).name == "F32"


def test_a_mix_of_two() -> None:
    as_in_the_file = replace(load_plan("cpu"), ternary="never")
    formats = {
        name: formats
        for name, formats in (
            (entry.role, set(entry.formats.values()))
            for entry in prepare_synthetic("deepseek-v3", FormatMix.parse("IQ1_S+Q6_K"), 1, as_in_the_file).plan.entries
        )
        if formats
    }
    assert formats["experts"] == {"IQ1_S"}
    assert formats["shared_experts"] == formats["lm_head"] == {"Q6_K"}
    assert formats["router"] == {"F32"}


@pytest.mark.parametrize("text", ["Q4_K+", "+Q4_K", "Q4_K+nothing", ""])
def test_refused(text: str) -> None:
    with pytest.raises(UnsupportedFormatError):
        FormatMix.parse(text)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError):
        FormatMix.parse("Q8_0+Q4_K").of("model.layers.0.self_attn.q_proj.weight", (64, 96))
