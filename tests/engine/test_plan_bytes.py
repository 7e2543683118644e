"""The bytes of a plan are those that the loaded model holds."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from tests.tiny_models import save_tiny

from moesaic.engine.loader import load, prepare
from moesaic.kernels import PackedTensor
from moesaic.placement.rules import parse_rules

RULES = parse_rules("rules:\n  - match: {role: [experts, attention]}\n    format: Q4_K\n", "q4_k.yaml")


def packed_tensors() -> dict[int, int]:
    """Address -> bytes of every packed tensor that is alive."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is PackedTensor]
    return {tensor.data.data_ptr(): tensor.nbytes for tensor in alive}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next"])
@pytest.mark.parametrize("rules", ["auto", RULES], ids=["auto", "Q4_K"])
def test_a_plan_tells_what_the_model_holds(family: str, rules: object, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    prepared = prepare(str(tmp_path), plan=rules)  # type: ignore[arg-type]
    others = packed_tensors()
    model = load(prepared, progress=False)
    packed = sum(size for address, size in packed_tensors().items() if address not in others)
    floats = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    # Rotary frequencies are in no plan, and some routers are held without padding: thousandths of a tiny model.
    assert packed + sum(floats.values()) == pytest.approx(prepared.plan.nbytes, rel=0.02)
