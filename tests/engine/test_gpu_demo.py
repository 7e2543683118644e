"""The demo model as people load it, on a GPU: every plan gives the answers of the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from moesaic.engine.answer import Sampling
from moesaic.engine.auto import AutoModelForCausalLM, AutoTokenizer
from moesaic.engine.session import Session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [
    "What is 4821 + 377?",
    "What is 912 - 455?",
    "Sort: 31, 7, 250, 18",
    "How are you?",
    "把这些数字排序：31, 7, 250, 18",
]
TOLERANCE = 0.03
"""Of logits, largest difference over the largest: the CPU rounds activations to int8, the GPU its cache to bfloat16."""


def load(plan: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained("demo", plan=plan, vram="4GiB", progress=False)


def answers(model: PreTrainedModel) -> list[str]:
    session = Session(model, AutoTokenizer.from_pretrained("demo"))
    sampling = Sampling(max_tokens=40, temperature=0.0)
    found = []
    for prompt in PROMPTS:
        ids = session.encode_chat([{"role": "user", "content": prompt}])
        found.append(session.answer(ids, sampling).text)
    return found


@pytest.fixture(scope="module")
def on_cpu() -> tuple[list[str], torch.Tensor]:
    model = load("cpu")
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        return answers(model), model(ids).logits


@pytest.mark.parametrize("plan", ["hybrid", "gpu", "layers", "auto"])
def test_answers_are_those_of_the_cpu(plan: str, on_cpu: tuple[list[str], torch.Tensor]) -> None:
    model = load(plan)
    assert type(model).__mro__[1].__name__ == "GpuCausalLM"
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids).logits
    error = float((logits - on_cpu[1]).abs().max() / on_cpu[1].abs().max())
    assert error < TOLERANCE
    assert answers(model) == on_cpu[0]
