"""The demo model inside the package: what the file is, and that it answers right on every instruction set.

Questions and greedy decoding are fixed, so the accuracies are too, up to the rounding of each instruction set's sums.
"""

from __future__ import annotations

import gguf
import pytest
from demo.evaluate import Accuracy, evaluate, load_model
from demo.items import LANGUAGES
from demo.tasks import LONG_TASKS, TASKS

from moesaic import _native
from moesaic.weights.resolve import resolve

_NUM_ITEMS = {"generic": (4, 1)}  # plain C++ is ten times slower
_DEFAULT_NUM_ITEMS = (32, 2)  # of short contexts, of long ones
_MAX_CONTEXT = 500  # a context of 8,192 takes minutes on two cores: `make eval-demo` measures that
_MAX_BYTES = 20_000_000


def _wrong(results: list[Accuracy]) -> dict[str, object]:
    return {f"{r.task}/{r.language}": r.failures for r in results if r.num_correct < r.num_items}


@pytest.fixture(scope="module")
def demo() -> tuple[object, object]:
    return load_model("demo", "moesaic")


def test_the_file_is_a_small_deepseek2_gguf_that_carries_its_tokenizer() -> None:
    path = resolve("demo").checkpoint
    assert path.stat().st_size <= _MAX_BYTES
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deepseek2"
    assert fields["deepseek2.context_length"] == 8192
    assert fields["deepseek2.expert_count"] == 16 and fields["deepseek2.expert_used_count"] == 4
    assert fields["deepseek2.expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert fields["tokenizer.ggml.pre"] == "qwen2" and "assistant" in fields["tokenizer.chat_template"]
    assert len(fields["tokenizer.ggml.tokens"]) == fields["deepseek2.vocab_size"]
    quantised = {tensor.tensor_type.name for tensor in reader.tensors if "exps" in tensor.name}
    assert quantised == {"Q4_K"}


@pytest.mark.slow
@pytest.mark.parametrize("isa", _native.isas())
def test_accuracy_on_every_instruction_set(demo: tuple[object, object], isa: str) -> None:
    before = _native.active_isa()
    _native.set_isa(isa)
    try:
        tasks = [task for task in TASKS if task not in LONG_TASKS]
        short, long = _NUM_ITEMS.get(isa, _DEFAULT_NUM_ITEMS)
        results = evaluate(*demo, short, 0, tasks=tasks)
        results += evaluate(*demo, 0, long, tasks=LONG_TASKS, max_context=_MAX_CONTEXT)
    finally:
        _native.set_isa(before)
    assert len(results) == len(TASKS) * len(LANGUAGES)
    assert all(r.num_correct >= 0.75 * r.num_items for r in results), _wrong(results)
    correct, asked = (sum(getattr(r, name) for r in results) for name in ("num_correct", "num_items"))
    assert correct >= 0.97 * asked, _wrong(results)


def test_the_evaluation_counts_wrong_answers(demo: tuple[object, object]) -> None:
    model, tokenizer = demo

    class Truncated:
        device = model.device

        def generate(self, max_new_tokens: int, **inputs: object) -> object:
            return model.generate(max_new_tokens=2, **inputs)

    (result,) = evaluate(Truncated(), tokenizer, 3, 0, tasks=["small_talk"], languages=["en"])
    assert result.num_items == 3 and result.num_correct == 0 and len(result.failures) == 3
