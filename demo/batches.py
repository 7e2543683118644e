"""Rows of conversations for training: what a row is made of, and worker processes that keep making them.

A row is one conversation of several turns, filled up with padding; the loss covers the answers alone. It does not know
the model.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from demo.items import LANGUAGES, Item, Language, accept_split
from demo.tasks import LONG_TASKS, TASKS

__all__ = ["BUCKETS", "Batch", "BatchStream", "Bucket", "encode_items", "rows_of"]

PAD_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID = range(5)

_SHORT_TASKS = tuple(task for task in TASKS if task not in LONG_TASKS)
_SHORT_WEIGHTS = (0.22, 0.24, 0.12, 0.12, 0.17, 0.13)
_LANGUAGE_SWITCH = 0.1
_SYSTEM_SHARE = 0.1
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful AI assistant.", "You are Moesaic demo.", "Answer briefly.",
    "Be concise.", "你是一个有用的助手。", "请简短回答。",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of one length.

    Attributes:
        name: name of the bucket.
        length: tokens per row.
        long_share: share of the questions that come from the retrieval tasks.
        max_context: largest `size` given to those, in tokens.
        num_workers: processes that make such rows.
    """

    name: str
    length: int
    long_share: float
    max_context: int
    num_workers: int


BUCKETS = {
    "short": Bucket("short", 256, 0.08, 120, 7),
    "medium": Bucket("medium", 1024, 0.35, 850, 3),
    "long": Bucket("long", 8192, 0.75, 7700, 4),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """ids and answers, both [num_rows, length]; `answers` marks the tokens that the model must predict."""

    ids: np.ndarray  # int16
    answers: np.ndarray  # bool


def _draw_item(rng: Random, bucket: Bucket, language: Language) -> Item:
    accept = accept_split(held_out=False)
    if rng.random() >= bucket.long_share:
        return TASKS[rng.choices(_SHORT_TASKS, _SHORT_WEIGHTS)[0]](rng, language, accept, 0)
    smallest = 30
    size = int(smallest * (bucket.max_context / smallest) ** rng.random())
    if bucket.length > 4096 and rng.random() < 0.5:  # half of the long rows' contexts are really long
        size = int(rng.uniform(2000, bucket.max_context))
    return TASKS[LONG_TASKS[int(rng.random() * len(LONG_TASKS))]](rng, language, accept, size)


def encode_items(tokenizer: Tokenizer, items: list[Item]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each item's turns, as the chat template writes them, and which of them are answers."""
    turns = [(item.turn, *item.follow_ups) for item in items]
    flat = [text for group in turns for turn in group for text in (turn.prompt, turn.answer)]
    encoded = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    result = []
    for group in turns:
        ids: list[int] = []
        answers: list[bool] = []
        for _ in group:
            prompt, answer = next(encoded).ids, next(encoded).ids
            ids += [USER_ID, *prompt, END_ID, ASSISTANT_ID, *answer, END_ID]
            answers += [False] * (len(prompt) + 3) + [True] * (len(answer) + 1)
        result.append((ids, answers))
    return result


def _item_stream(rng: Random, bucket: Bucket, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    num_items = max(16, 32768 // bucket.length)
    language: Language = "en"
    while True:
        items = []
        for _ in range(num_items):
            if rng.random() < _LANGUAGE_SWITCH:
                language = LANGUAGES[int(rng.random() * 2)]
            items.append(_draw_item(rng, bucket, language))
        yield from encode_items(tokenizer, items)


def rows_of(bucket: Bucket, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless rows (ids int16 [length], answers bool [length]) of training questions."""
    rng = Random(seed)
    systems = [[SYSTEM_ID, *tokenizer.encode(text).ids, END_ID] for text in _SYSTEM_PROMPTS]
    ids: list[int] = []
    answers: list[bool] = []
    for item_ids, item_answers in _item_stream(rng, bucket, tokenizer):
        if len(item_ids) + 32 > bucket.length:
            continue
        if len(ids) + len(item_ids) > bucket.length:
            padding = bucket.length - len(ids)
            yield np.array(ids + [PAD_ID] * padding, np.int16), np.array(answers + [False] * padding, bool)
            ids, answers = [], []
        if not ids and rng.random() < _SYSTEM_SHARE:
            ids = list(systems[int(rng.random() * len(systems))])
            answers = [False] * len(ids)
        ids += item_ids
        answers += item_answers


def _work(bucket: Bucket, num_rows: int, tokenizer_file: str, seed: int, queue: Queue[Batch]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = rows_of(bucket, Tokenizer.from_file(tokenizer_file), seed)
    while True:
        drawn = [next(rows) for _ in range(num_rows)]
        queue.put(Batch(np.stack([ids for ids, _ in drawn]), np.stack([answers for _, answers in drawn])))


class BatchStream:
    """Batches of one bucket from worker processes, in an order that depends on the seed alone.

    Args:
        bucket: what the rows are like.
        num_tokens: tokens per batch, a multiple of the bucket's row length.
        tokenizer_folder: holds tokenizer.json.
        seed: seed of the data.
    """

    def __init__(self, bucket: Bucket, num_tokens: int, tokenizer_folder: Path, seed: int) -> None:
        context = multiprocessing.get_context("fork")  # start streams before the process touches the GPU
        self._queues: list[Queue[Batch]] = [context.Queue(maxsize=12) for _ in range(bucket.num_workers)]
        self._next = 0
        tokenizer_file = str(tokenizer_folder / "tokenizer.json")
        for worker, queue in enumerate(self._queues):
            worker_seed = seed * 1000 + bucket.length + worker
            arguments = (bucket, num_tokens // bucket.length, tokenizer_file, worker_seed, queue)
            context.Process(target=_work, args=arguments, daemon=True).start()

    def next(self) -> Batch:
        """The next batch; waits for the worker whose turn it is."""
        batch = self._queues[self._next].get()
        self._next = (self._next + 1) % len(self._queues)
        return batch
