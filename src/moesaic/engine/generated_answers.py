"""Answers by the model library's `generate()`: for models that run on no paged cache of the CPU, stock ones included.

Between two answers the cache is kept. This module knows tokenizers, and not how the model was loaded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from moesaic.engine.answer import Answer, Sampling
from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache

__all__ = ["GeneratedAnswers"]

# Where neither the caller nor the model's generation_config says anything.
_DEFAULT_TEMPERATURE = 0.7
_DEFAULT_TOP_P = 0.95
# Longer prompts are computed in pieces: activations stay small, while every piece still reads all weights only once.
_PREFILL_CHUNK = 2048


class GeneratedAnswers:
    """A model, its tokenizer, and the cache of what they computed last.

    Args:
        model: with a `generate()`.
        tokenizer: the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._cache: Any | None = None
        self._cached_ids: list[int] = []

    @property
    def max_positions(self) -> int | None:
        """Most tokens of prompt and answer that there is room for; None: no limit but the model's."""
        runner = getattr(self._model, "runner", None)
        return None if runner is None else int(runner.max_positions)

    def answer(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        limit: int | None,
        on_text: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Answer:
        """As `Session.answer`, for at most `limit` tokens."""
        config = _generation_config(self._model.generation_config, self._tokenizer, sampling)
        config.max_new_tokens = limit if limit is not None else 1 << 31
        config.max_length = None
        answer = Answer(prompt_tokens=len(prompt_ids), seed=_seed(config, sampling.seed))
        cache, answer.cached_tokens = self._take_cache(prompt_ids)
        streamer = _Streamer(self._tokenizer, len(prompt_ids), on_text)
        input_ids = torch.tensor([list(prompt_ids)], dtype=torch.int64)
        try:
            self._prefill(input_ids[:, answer.cached_tokens :], cache)
            self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                **{CACHE_ARGUMENT: cache},
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(should_stop)]),
            )
            self._cache, self._cached_ids = cache, [*prompt_ids, *streamer.ids][: cache.get_seq_length()]
        except KeyboardInterrupt:  # in the middle of a forward: the layers' caches differ in length and are dropped
            answer.finish_reason = "interrupted"
        streamer.fill(answer)
        if answer.finish_reason != "interrupted":
            answer.finish_reason = self._finish_reason(streamer.ids, config, should_stop)
        return answer

    def forget(self) -> None:
        """Give the cache's memory back."""
        self._cache, self._cached_ids = None, []

    def _prefill(self, new_ids: torch.Tensor, cache: Any) -> None:
        """Compute all pieces of a long prompt but the last, which is left to `generate()`.

        A model on a GPU cuts prompts itself, into pieces as large as its memory allows: experts on their way to it pass
        once for each. The `prefill_chunk_size` of `generate()` would feed what the cache holds again: transformers 5.17
        forgets that it is there.

        Args:
            new_ids: int64 `[1, num_tokens]`, what the cache does not hold.
            cache: grows by the pieces.
        """
        if hasattr(self._model, "runner"):
            return
        pieces = torch.split(new_ids, _PREFILL_CHUNK, dim=1)
        with torch.no_grad():
            for piece in pieces[:-1]:
                self._model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})

    def _take_cache(self, prompt_ids: Sequence[int]) -> tuple[Any, int]:
        """A cache cut to the prefix that it shares with the prompt, and the length of that prefix."""
        cache, cached_ids = self._cache, self._cached_ids
        self.forget()  # whatever happens below, a cache that is in use is not kept as a valid one
        shared = 0
        while shared < min(len(cached_ids), len(prompt_ids) - 1) and cached_ids[shared] == prompt_ids[shared]:
            shared += 1
        if cache is None or shared == 0:
            return self._new_cache(), 0
        if shared < cache.get_seq_length():
            if any(cache.is_sliding) or any(cache.is_linear):  # these layers no longer have what came before
                return self._new_cache(), 0
            cache.crop(shared - cache.get_seq_length())
        return cache, shared

    def _new_cache(self) -> Any:
        """An empty cache of the kind that the model runs on."""
        if hasattr(self._model, "new_cache"):
            return self._model.new_cache()
        return GrowingCache(self._model.config)  # a stock model

    def _finish_reason(
        self, ids: Sequence[int], config: GenerationConfig, should_stop: Callable[[], bool]
    ) -> Literal["stop", "length", "interrupted"]:
        if ids and ids[-1] in _stop_ids(config):
            return "stop"
        return "interrupted" if should_stop() else "length"


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation when the caller says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._should_stop(), dtype=torch.bool, device=input_ids.device)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Turns tokens into text while they come, and takes the times."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._prompt_tokens_left = prompt_tokens
        self._pending_from = 0  # first token whose text has not been handed out
        self._started = self._first = self._last = time.perf_counter()
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_tokens_left:  # generate() hands the prompt over first
            self._prompt_tokens_left = 0
            return
        self._last = time.perf_counter()
        if not self.ids:
            self._first = self._last
        self.ids.extend(value.flatten().tolist())
        self._flush(final=False)

    def end(self) -> None:
        self._flush(final=True)

    def fill(self, answer: Answer) -> None:
        """Write down what was generated and how long it took."""
        self._flush(final=True)
        answer.text, answer.generated_tokens = self.text, len(self.ids)
        if self.ids:
            answer.prefill_seconds = self._first - self._started
            answer.decode_seconds = self._last - self._first

    def _flush(self, final: bool) -> None:
        """Hand out the text of pending tokens, unless it ends within a character.

        A token's text can depend on the one before it (leading spaces), so the last handed-out token is decoded again.
        """
        context = max(0, self._pending_from - 1)
        before = self._decode(self.ids[context : self._pending_from])
        text = self._decode(self.ids[context:])
        if text.endswith("�") and not final:
            return
        new = text[len(before) :]
        self._pending_from = len(self.ids)
        if new:
            self.text += new
            self._on_text(new)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


def _generation_config(
    stored: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> GenerationConfig:
    """The model's own generation config, overruled by what the caller asks for."""
    values = {} if stored is None else stored.to_diff_dict()
    asked = sampling.asked()
    if asked:
        values |= asked
        values["do_sample"] = values.get("temperature", 1.0) > 0
    elif values.get("do_sample") is None and values.get("temperature") is None:
        values |= {"do_sample": True, "temperature": _DEFAULT_TEMPERATURE, "top_p": _DEFAULT_TOP_P}
    if not values.get("do_sample"):
        values = {key: value for key, value in values.items() if key not in ("temperature", "top_p", "top_k", "min_p")}
    config = GenerationConfig.from_dict(values)
    stops = dict.fromkeys([*_stop_ids(config), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    config.eos_token_id = list(stops) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    return config


def _stop_ids(config: GenerationConfig) -> list[int]:
    stops = config.eos_token_id
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list | tuple) else [int(stops)]


def _seed(config: GenerationConfig, seed: int | None) -> int | None:
    if not config.do_sample:
        return None
    seed = secrets.randbits(31) if seed is None else seed
    set_seed(seed)
    return seed
