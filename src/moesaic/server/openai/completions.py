"""/v1/completions: texts and tokens gone on with, whole or in pieces; several prompts at once."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from moesaic.engine.serving.outputs import Chunk, RequestStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.server.bodies import read_body
from moesaic.server.errors import ApiError, error_body
from moesaic.server.names import require_model
from moesaic.server.openai.answers import completed, new_id
from moesaic.server.openai.completion_types import Completion, CompletionBody, CompletionChoice
from moesaic.server.openai.formats import format_grammar
from moesaic.server.openai.logprobs import CompletionLogprobs, Offsets
from moesaic.server.openai.merge import merged
from moesaic.server.openai.models import fingerprint, json_response
from moesaic.server.openai.sampling import make_params
from moesaic.server.openai.unsupported import refuse
from moesaic.server.openai.usage import make_usage
from moesaic.server.operation import Operation
from moesaic.server.sse import DONE, event, event_stream
from moesaic.server.state import Chat, ServerState, state_of
from moesaic.server.streams import closing, while_connected
from moesaic.server.timings import make_timings

__all__ = ["OPERATIONS"]

DEFAULT_TOKENS = 16
"""`max_tokens` where it is not given, as OpenAI's API has it."""
MAX_ANSWERS = 128
"""Most prompts times `n` of a request."""
Prompt = str | Sequence[int]


async def create(request: Request) -> Response:
    """Go on with one text or several."""
    state = state_of(request)
    body = await read_body(request, CompletionBody)
    require_model(state, body.model)
    refuse(body)
    asked = _Asked(state, body)
    if not body.stream:
        return json_response(await while_connected(request, asked.whole()))
    return await event_stream(request, asked.pieces(), lambda error: event(error_body(error, "openai")))


class _Asked:
    """A request on its way.

    Args:
        state: of the application.
        body: decoded, with nothing in it that is not supported.

    Raises:
        ApiError, RequestError: a field is wrong, or contradicts another.
    """

    def __init__(self, state: ServerState, body: CompletionBody) -> None:
        self.state, self.body = state, body
        self.prompts = _prompts(body)
        self.params = _params(body, len(self.prompts))
        self.before = [_text(state.chat, prompt) if body.echo else "" for prompt in self.prompts]
        self.stats: list[list[RequestStats]] = [[] for _ in self.prompts]
        self.begun: set[int] = set()  # answers
        self.ended = 0
        self.offsets = [Offsets() for _ in range(self.count)]
        self.answer = Completion(
            id=new_id("cmpl-"),
            created=int(time.time()),
            model=body.model,
            system_fingerprint=fingerprint(state),
            choices=[],
        )

    @property
    def count(self) -> int:
        """Of answers."""
        return len(self.prompts) * self.params.n

    async def whole(self) -> Completion:
        """All answers, when they are complete."""
        every = [CompletionChoice(index=index, text="") for index in range(self.count)]
        async with closing(self._chunks()) as chunks:
            async for prompt, chunk in chunks:
                piece = self._choice(prompt, chunk)
                _append(every[piece.index], piece)
        self._complete()
        self.answer.choices = every
        self.answer.usage, self.answer.timings = make_usage(self.stats), make_timings(self.stats)
        return self.answer

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Answers in pieces; counts and times with the last."""
        usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        self.answer.usage = None if usage else UNSET
        async with closing(self._chunks()) as chunks:
            async for prompt, chunk in chunks:
                piece = self._choice(prompt, chunk)
                if self.ended == self.count:
                    self.answer.timings = make_timings(self.stats)
                if piece.text or piece.logprobs is not None or piece.finish_reason is not None:
                    self.answer.choices = [piece]
                    yield event(self.answer)
        self._complete()
        if usage:
            self.answer.choices, self.answer.usage = [], make_usage(self.stats)
            yield event(self.answer)
        yield DONE

    def _complete(self) -> None:
        if self.ended < self.count:
            completed(None)

    def _chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """What comes of all prompts, each with the prompt's number."""
        return merged(
            [
                self.state.chat.complete(prompt, self.params, f"{self.answer.id}-{index}")
                for index, prompt in enumerate(self.prompts)
            ]
        )

    def _choice(self, prompt: int, chunk: Chunk) -> CompletionChoice:
        """A piece of an answer in the API's form."""
        index = prompt * self.params.n + chunk.index
        choice = CompletionChoice(index=index, text=chunk.text)
        if index not in self.begun:
            self.begun.add(index)
            choice.text = self.before[prompt] + chunk.text
        if self.params.logprobs is not None and chunk.logprobs:
            choice.logprobs = self.offsets[index].add(chunk.logprobs)
        if chunk.finish_reason is not None:
            reason = completed(chunk.finish_reason)
            choice.finish_reason = "length" if reason == "length" else "stop"
            choice.stop_reason = chunk.stop
            self.stats[prompt].append(chunk.stats or RequestStats())
            self.ended += 1
        return choice


def _append(whole: CompletionChoice, piece: CompletionChoice) -> None:
    """Append a piece to an answer."""
    whole.text += piece.text
    if piece.logprobs is not None:
        own = whole.logprobs = whole.logprobs or CompletionLogprobs([], [], [], [])
        own.tokens += piece.logprobs.tokens
        own.token_logprobs += piece.logprobs.token_logprobs
        own.top_logprobs += piece.logprobs.top_logprobs
        own.text_offset += piece.logprobs.text_offset
    if piece.finish_reason is not None:
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason


def _prompts(body: CompletionBody) -> list[Prompt]:
    """The prompts of a body, each a text or tokens."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    tokens = [each for each in body.prompt if isinstance(each, int)]
    if len(tokens) == len(body.prompt):
        return [tokens]
    several: list[Prompt] = [each for each in body.prompt if not isinstance(each, int)]
    if len({type(each) for each in body.prompt}) > 1:
        raise ApiError(400, "prompt mixes texts and tokens: expected one kind.", param="prompt")
    return several


def _params(body: CompletionBody, prompts: int) -> SamplingParams:
    """How answers are chosen."""
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, "best_of is not supported unless it equals n.", param="best_of", code="unsupported")
    if prompts * n > MAX_ANSWERS:
        raise ApiError(400, f"{prompts} prompts with {n} answers each: at most {MAX_ANSWERS} answers.", param="prompt")
    if body.echo and body.logprobs is not None:
        message = "echo with logprobs is not supported: the prompt's tokens have none."
        raise ApiError(400, message, param="echo", code="unsupported")
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    grammar = format_grammar(body.response_format)
    return make_params(body, n=n, max_tokens=limit, logprobs=body.logprobs, grammar=grammar)


def _text(chat: Chat, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else chat.decode(prompt)


OPERATIONS = (
    Operation(
        "POST",
        "/v1/completions",
        create,
        "Go on with a text",
        "openai",
        CompletionBody,
        Completion,
        "text/event-stream",
    ),
)
