"""The model's side of a conversation: template and tokens in, events out.

`ChatService` is the only part of the server that knows how the model writes. It does not know HTTP, nor how an engine
computes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from moesaic.engine.serving.interface import EngineClient
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import ContextError, RequestError
from moesaic.server.answer import Answer
from moesaic.server.conversation import ChatRequest, Event
from moesaic.server.forcing import Thinking, answer_grammar
from moesaic.server.history import Turns, texts_of
from moesaic.server.parsers.base import Parser
from moesaic.server.parsers.detect import detect
from moesaic.server.parsers.harmony import CHANNELS, HarmonyParser
from moesaic.server.parsers.scanner import Scanner
from moesaic.server.parsers.values import renamed
from moesaic.server.prompt import Codec, Mask, Rename, blot_out
from moesaic.server.template import ChatTemplate, TemplateLimits

__all__ = ["ChatService"]

_OWN_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_WORD = re.compile(r"[A-Za-z0-9_.-]{0,32}")
_CHARACTERS = 16
"""A text of more characters for each token of the context is looked at from its beginning first."""
_TAILS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # no characters, by the Unicode standard


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A rendered conversation: its tokens, and whether its end is in the middle of thoughts."""

    ids: list[int]
    thinking: Thinking


class ChatService:
    """Conversations over an engine.

    Args:
        engine: computes.
        tokenizer: of transformers, a fast one, with the chat template.
        reasoning: the style of the model's thoughts, where the template does not tell it ("none": it has none).
        tools: the style of its calls, likewise.
        limits: of rendering.

    Raises:
        TokenizerError: the tokenizer cannot be served, or its template is damaged.
        ConfigError: there is no style of that name.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Any,
        *,
        reasoning: str | None = None,
        tools: str | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self._engine = engine
        sources = _templates_of(tokenizer)
        source = sources.get("default", "")
        whole = "".join(sources.values())
        styles = detect(whole, reasoning, tools)
        self._reasoning, self._style = styles.reasoning, styles.tools
        self._thought_markers = self._reasoning.markers if self._reasoning is not None else ()
        self._call_markers = self._style.markers if self._style is not None else ()
        self._template = ChatTemplate(source, limits) if source else None
        self._tools_template = ChatTemplate(sources["tool_use"], limits) if "tool_use" in sources else self._template
        self._codec = Codec(tokenizer, whole, (*self._thought_markers, *self._call_markers))
        self._names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self._turns: Turns | None = None
        if self._tools_template is not None:
            self._turns = Turns.of(self._tools_template, self._style, self._reasoning, self._names)

    @property
    def has_reasoning(self) -> bool:
        """Whether the model thinks before it answers."""
        return self._reasoning is not None

    @property
    def has_tools(self) -> bool:
        """Whether the model can be told of tools, and its calls are understood."""
        if self._turns is None or self._style is None:
            return False
        return self._turns.takes_tools or self._style.describes_tools

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncIterator[Event]:
        """Answer a conversation; closing the iterator cancels. Raises as `EngineClient.generate`."""
        prompt = await asyncio.to_thread(self._prompt, request, fitting=True)
        params = self._params(request, prompt)
        taken = frozenset(call.id for message in request.messages for call in message.tool_calls)
        style = self._style if _offers_tools(request) else None
        answers = [
            Answer(choice, self._parser(request, prompt, params), style, taken, request.parallel_tool_calls)
            for choice in range(params.n)
        ]
        async with aclosing(self._generate(prompt.ids, params, request_id)) as chunks:
            async for chunk in chunks:
                for event in answers[chunk.index].feed(chunk):
                    yield event

    async def complete(
        self, prompt: str | Sequence[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[Chunk]:
        """Go on with a text, in which names of special tokens are text, or with tokens."""
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._encode_fitting, prompt)
        else:
            ids = list(prompt)
            self._codec.check(ids)
        async with aclosing(self._generate(ids, params, request_id)) as chunks:
            async for chunk in chunks:
                yield chunk

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """Tokens of a conversation up to where the answer begins. Raises RequestError if the template refuses it."""
        return self._prompt(request).ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, in which names of special tokens are text."""
        return self._codec.plain(text, add_special_tokens)

    def _encode_fitting(self, text: str) -> list[int]:
        self._refuse_too_long(text)
        return self.encode(text)

    def _refuse_too_long(self, text: str) -> None:
        """Refuse a text far beyond the context by its beginning: millions of tokens take a minute."""
        context = self._engine.context_length
        if len(text) > _CHARACTERS * context and len(self._codec.usual(text[: _CHARACTERS * context])) > 2 * context:
            raise ContextError(2 * context, context, counted=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens. Raises RequestError for numbers that are no tokens."""
        return self._codec.decode(ids)

    def token_text(self, token_id: int) -> str:
        """Text of a token alone, with replacement characters where it is no whole character."""
        return self._codec.decode([token_id])

    def _generate(self, ids: list[int], params: SamplingParams, request_id: str) -> AsyncGenerator[Chunk, None]:
        """The engine's iterator; that it can be closed is part of the agreement, though not of the type."""
        return cast(AsyncGenerator[Chunk, None], self._engine.generate(ids, params, request_id=request_id))

    def _params(self, request: ChatRequest, prompt: _Prompt) -> SamplingParams:
        """The request's parameters, with what the parsers need and what forces calls."""
        params, special = request.params, self._codec.special
        grammar = answer_grammar(request, self._style, self._reasoning, prompt.thinking, special)
        markers = (*self._thought_markers, *(self._call_markers if _offers_tools(request) else ()))
        needed = any(token in marker for marker in markers for token in special)
        return replace(params, grammar=grammar, skip_special_tokens=params.skip_special_tokens and not needed)

    def _parser(self, request: ChatRequest, prompt: _Prompt, params: SamplingParams) -> Parser:
        special = self._codec.special
        markers = (*self._thought_markers, *self._call_markers)
        drop: list[str] = []
        if request.params.skip_special_tokens and not params.skip_special_tokens:
            drop = [token for token in special if not any(token in marker for marker in markers)]
        style = self._style if _offers_tools(request) else None
        if self._reasoning is CHANNELS:
            inside: Literal["analysis", "final"] | None = "analysis" if prompt.thinking == "open" else None
            if request.continue_last and inside is None:
                inside = "final"
            return HarmonyParser(style is not None, drop, inside)
        starts = (*style.openers, *style.noise) if style is not None else ()
        interrupts = [text for text in starts if any(token in text for token in special)]
        reasoning = self._reasoning if prompt.thinking != "never" else None
        tools = {tool.name: tool for tool in request.tools}
        return Scanner(reasoning, prompt.thinking == "open", style, tools, drop, interrupts)

    def _prompt(self, request: ChatRequest, fitting: bool = False) -> _Prompt:
        template = self._template if not _offers_tools(request) else self._tools_template
        if template is None or self._turns is None:
            raise RequestError("this model has no chat template: use completions of plain text.", "messages")
        self._check(request)
        texts = texts_of(request)
        mask = Mask(self._codec, texts)
        text = mask.plain_escapes(self._render(template, request, mask, texts))
        if fitting:
            self._refuse_too_long(text)
        blank = self._render(template, request, lambda part: blot_out(mask(part)), texts)
        if self._codec.controls(text) != self._codec.controls(blank):
            raise RequestError("a text of this conversation would become a special token of the model's.", "messages")
        return _Prompt(self._codec.rendered(text, mask), self._thinking(request, text))

    def _render(self, template: ChatTemplate, request: ChatRequest, rename: Rename, texts: Sequence[str]) -> str:
        """The text of a conversation, up to where the answer begins."""
        assert self._turns is not None
        tail = ""
        if request.continue_last:
            tail = next((each for each in _TAILS if not any(each in text for text in texts)), "")
        arguments = {name: _argument(value, rename) for name, value in request.template_arguments.items()}
        variables = {
            **self._names,
            **arguments,
            "messages": self._turns.messages(request, rename, tail),
            "tools": self._turns.tools(request, rename),
            "documents": None,
            "add_generation_prompt": not request.continue_last,
        }
        text = template.render(variables)
        if not request.continue_last:
            return text
        before, found, _ = text.rpartition(tail)
        if not tail or not found:
            raise RequestError("this model's chat template cannot go on with the last message.", "messages")
        return before

    def _check(self, request: ChatRequest) -> None:
        """Refuse what no template could render."""
        if not request.messages:
            raise RequestError("a conversation needs at least one message.", "messages")
        last = request.messages[-1]
        if request.continue_last and (last.role != "assistant" or last.tool_calls):
            raise RequestError("only an assistant's message without calls can be gone on with.", "messages")
        if _offers_tools(request) and not self.has_tools:
            raise RequestError("this model's chat template takes no tools, or none whose calls are known.", "tools")
        names = {tool.name for tool in request.tools}
        if len(names) != len(request.tools):
            raise RequestError("two tools have the same name.", "tools")
        choice = request.tool_choice
        if choice.mode == "named" and choice.name not in names:
            raise RequestError(f"tool_choice names {choice.name!r}, which is not among the tools.", "tool_choice")
        if choice.mode == "required" and not names:
            raise RequestError("tool_choice is 'required', but there are no tools.", "tool_choice")
        for name in request.template_arguments:
            if name in _OWN_ARGUMENTS or name in self._names or not name.isidentifier():
                raise RequestError(f"{name!r} cannot be given to the chat template.", "template_arguments")

    def _thinking(self, request: ChatRequest, text: str) -> Thinking:
        """Where the answer begins, seen from the model's thoughts."""
        if self._reasoning is None:
            return "never"
        if request.continue_last:
            last = request.messages[-1]
            return "never" if last.content or last.reasoning is None else "open"
        end = text.rstrip()
        if end.endswith(self._reasoning.opener):
            return "open"
        return "closed" if end.endswith(self._reasoning.closer) else "maybe"


def _offers_tools(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice.mode != "none"


def _argument(value: Any, rename: Rename) -> Any:
    """A value for the template: words as they are, since it may compare them, other texts as a client's."""
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    return renamed(value, rename)


def _templates_of(tokenizer: Any) -> dict[str, str]:
    """The sources of a tokenizer's templates by name; it may have one, several, or none."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, Mapping):
        return {str(name): source for name, source in template.items() if isinstance(source, str)}
    return {}
