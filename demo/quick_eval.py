"""Accuracy on held-out questions by one forward pass.

Every question has one right answer, so greedy decoding gives it exactly when each of its tokens is the most likely one
after the right tokens before it. That needs no generation; `demo.evaluate` is the evaluation that generates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from demo.batches import encode_items
from demo.fast_forward import FastForward
from demo.held_out import held_out_items
from demo.items import LANGUAGES, Item
from demo.tasks import LONG_TASKS, TASKS

__all__ = ["quick_evaluate"]

_SHORT_LENGTH, _LONG_LENGTH = 256, 8192


@torch.no_grad()
def _correct(
    forward: FastForward,
    encoded: list[tuple[list[int], list[bool]]],
    num_rows: int,
    length: int,
    device: torch.device,
    quantize: bool,
) -> int:
    correct = 0
    for start in range(0, len(encoded), num_rows):
        group = encoded[start : start + num_rows]
        ids = np.zeros((num_rows, length), np.int64)
        answers = np.zeros((num_rows, length), bool)
        for row, (item_ids, item_answers) in enumerate(group):
            ids[row, : len(item_ids)] = item_ids
            answers[row, : len(item_ids)] = item_answers
        positions = torch.from_numpy(answers.ravel().nonzero()[0]).to(device)
        with torch.enable_grad():  # the graphs compiled for training serve here too
            states = forward(torch.from_numpy(ids).to(device), quantize).states.detach()
        right = forward.logits(states[positions - 1]).argmax(-1).cpu().numpy() == ids.ravel()[positions.cpu().numpy()]
        wrong_rows = np.unique((positions.cpu().numpy() // length)[~right])
        correct += len(group) - len(wrong_rows)
    return correct


def quick_evaluate(
    forward: FastForward, tokenizer_folder: Path, device: torch.device, num_tokens: int, num_items: int, quantize: bool
) -> dict[str, float]:
    """Accuracy in percent per "task/language"; retrieval tasks take an eighth of the items, spread over all lengths."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    report = {}
    for task in TASKS:
        is_long = task in LONG_TASKS
        count = max(1, num_items // 8) if is_long else num_items
        for language in LANGUAGES:
            items = held_out_items(task, language, count)
            first_only = [Item(i.task, i.language, i.key, i.turn) for i in items]
            encoded = encode_items(tokenizer, first_only)
            length = _LONG_LENGTH if is_long else _SHORT_LENGTH
            report[f"{task}/{language}"] = round(
                100 * _correct(forward, encoded, num_tokens // length, length, device, quantize) / count, 1
            )
    return report
