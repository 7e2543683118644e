"""One conversation with a loaded model: token ids in, streamed text and timings out.

Models that the serving engine runs all requests of in common steps are answered by its steps too; the others by the
model library's `generate()`. Between two answers what is computed is kept, so that a longer conversation only computes
what is new. This module knows tokenizers; it knows neither terminals nor how the model was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.engine.answer import Answer, Sampling
from moesaic.engine.generated_answers import GeneratedAnswers
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.stream_answers import StreamAnswers
from moesaic.engine.serving.text import encode_text
from moesaic.engine.serving.token_stream import token_stream_of
from moesaic.errors import GenerationError

__all__ = ["Session"]


class _Answers(Protocol):
    """Who computes answers, and keeps what was computed for the next one."""

    @property
    def max_positions(self) -> int | None:
        """Most tokens of prompt and answer that there is room for; None: no limit but the model's."""
        ...

    def answer(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        limit: int | None,
        on_text: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Answer:
        """As `Session.answer`, for at most `limit` tokens."""
        ...

    def forget(self) -> None:
        """As `Session.forget`."""
        ...


@dataclass(slots=True)
class Session:
    """A model, its tokenizer, and what they computed last."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    _answers: _Answers = field(init=False)

    def __post_init__(self) -> None:
        stream = token_stream_of(self.model)
        if stream is None:
            self._answers = GeneratedAnswers(self.model, self.tokenizer)
        else:
            defaults = GenerationDefaults.of(self.model.generation_config, self.tokenizer)
            self._answers = StreamAnswers(stream, self.tokenizer, defaults)

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, as the config and the cache allow; None if there is no limit."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        known = length if isinstance(length, int) and length > 0 else None
        room = self._answers.max_positions
        return known if room is None else min(room, known or room)

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of plain text, with the tokenizer's own special tokens around it."""
        return encode_text(self.tokenizer, text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins.

        Raises:
            GenerationError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise GenerationError("this model's tokenizer has no chat template: continue plain text with --raw.")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise GenerationError(f"the chat template refuses this conversation: {error}") from error
        return encode_text(self.tokenizer, text, add_special_tokens=False)

    def answer(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Generate the continuation of a prompt.

        Args:
            prompt_ids: the whole conversation so far; what is kept of it is not computed again.
            sampling: how tokens are chosen.
            on_text: called with each new piece of text.
            should_stop: asked after every token; the answer ends when it is true.

        Raises:
            GenerationError: the prompt is empty or leaves no room for an answer in the model's context.
        """
        room = self._room(len(prompt_ids))
        limit = sampling.max_tokens if room is None else min(room, sampling.max_tokens or room)
        return self._answers.answer(prompt_ids, sampling, limit, on_text, should_stop)

    def forget(self) -> None:
        """Give the memory of what is kept back."""
        self._answers.forget()

    def _room(self, prompt_tokens: int) -> int | None:
        if prompt_tokens == 0:
            raise GenerationError("the prompt is empty: nothing to continue.")
        if self.context_length is None:
            return None
        if prompt_tokens >= self.context_length:
            more = ", or load the model with a larger --context" if hasattr(self.model, "runner") else ""
            raise GenerationError(
                f"the prompt has {prompt_tokens} tokens, but the model's context is {self.context_length}: shorten it, "
                f"or start a new conversation (/reset){more}."
            )
        return self.context_length - prompt_tokens
