"""Accuracy of a model on the demo's held-out questions, by greedy generation, per task and language.

    python -m demo.evaluate                                   # the shipped demo through Moesaic
    python -m demo.evaluate --model DIR --backend transformers  # a checkpoint in stock transformers, BF16
    python -m demo.evaluate --items 200 --json

An answer counts when it is the expected text, exactly. It knows models only through `generate()`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from demo.held_out import MAX_CONTEXT, held_out_items
from demo.items import LANGUAGES, Item, Language
from demo.tasks import LONG_TASKS, TASKS

__all__ = ["Accuracy", "evaluate", "load_model"]

_BATCH_TOKENS = 16384  # prompt tokens that are generated for at a time, padding included
_SPARE_TOKENS = 8  # how much longer than expected an answer may grow before it is cut off


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many questions of one task and language were answered right.

    Attributes:
        task: name of the task.
        language: language of the questions.
        num_items: questions asked.
        num_correct: answers equal to the expected one.
        failures: (prompt's last 200 characters, expected, got) of the first wrong answers.
    """

    task: str
    language: Language
    num_items: int
    num_correct: int
    failures: tuple[tuple[str, str, str], ...]

    @property
    def percent(self) -> float:
        """Share of right answers, in percent."""
        return 100 * self.num_correct / self.num_items


def load_model(model: str, backend: str, gguf: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from `moesaic`, or from stock `transformers` in the checkpoint's own dtype."""
    if backend == "moesaic":
        from moesaic import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(model, gguf=gguf, progress=False), AutoTokenizer.from_pretrained(
            model
        )
    import transformers

    stock = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    return stock, transformers.AutoTokenizer.from_pretrained(model)


def _batches(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Indices in groups of similar length, each of at most `_BATCH_TOKENS` padded tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[index] * (len(group) + 1) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[str]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.turn.prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for item in items
    ]
    limits = [len(tokenizer(item.turn.answer)["input_ids"]) + _SPARE_TOKENS for item in items]
    answers = [""] * len(items)
    for group in _batches([len(prompt) for prompt in prompts]):
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in group]}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **padded.to(model.device), max_new_tokens=max(limits[i] for i in group), do_sample=False
        )
        new = output[:, padded["input_ids"].shape[1] :]
        for index, text in zip(group, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[index] = text.strip()
    return answers


def evaluate(
    model: Any,
    tokenizer: Any,
    num_items: int,
    num_long_items: int,
    *,
    tasks: Iterable[str] = TASKS,
    languages: Iterable[Language] = LANGUAGES,
    max_context: int = MAX_CONTEXT,
    on_result: Callable[[Accuracy, float], None] | None = None,
) -> list[Accuracy]:
    """Ask held-out questions.

    Args:
        model: anything with `generate()`.
        tokenizer: its tokenizer, with chat template.
        num_items: questions per task and language.
        num_long_items: the same for the retrieval tasks, whose contexts go up to `max_context` tokens.
        tasks: which tasks.
        languages: which languages.
        max_context: longest context.
        on_result: called with each result and the seconds it took.
    """
    results = []
    for task in tasks:
        for language in languages:
            start = time.monotonic()
            count = num_long_items if task in LONG_TASKS else num_items
            items = held_out_items(task, language, count, max_context=max_context)
            answers = _answers(model, tokenizer, items)
            wrong = [
                (item.turn.prompt[-200:], item.turn.answer, answer)
                for item, answer in zip(items, answers, strict=True)
                if answer != item.turn.answer
            ]
            results.append(Accuracy(task, language, count, count - len(wrong), tuple(wrong[:5])))
            if on_result is not None:
                on_result(results[-1], time.monotonic() - start)
    return results


def _print_result(result: Accuracy, seconds: float) -> None:
    print(
        f"{result.task:12} {result.language}  {result.percent:6.1f}%  of {result.num_items:4}  {seconds:6.1f} s",
        flush=True,
    )


def main() -> None:
    """Evaluate the model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as for 'moesaic run', or a folder for transformers")
    parser.add_argument("--gguf", help="take the weights from this GGUF (backend moesaic)")
    parser.add_argument("--backend", choices=("moesaic", "transformers"), default="moesaic")
    parser.add_argument("--items", type=int, default=100, help="questions per task and language")
    parser.add_argument("--long-items", type=int, default=16, help="the same for lookup and passkey")
    parser.add_argument("--max-context", type=int, default=MAX_CONTEXT, help="longest context in tokens")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=tuple(TASKS))
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    parser.add_argument("--json", action="store_true", help="print one JSON list, wrong answers included")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, arguments.backend, arguments.gguf)
    results = evaluate(
        model,
        tokenizer,
        arguments.items,
        arguments.long_items,
        tasks=arguments.tasks,
        languages=arguments.languages,
        max_context=arguments.max_context,
        on_result=None if arguments.json else _print_result,
    )
    if arguments.json:
        json.dump([asdict(result) | {"percent": result.percent} for result in results], sys.stdout, ensure_ascii=False)
        print()


if __name__ == "__main__":
    main()
