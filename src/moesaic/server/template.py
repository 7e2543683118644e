"""A chat template as a program of limited time and size.

A template is code of the model's author, and hostile in the worst case. It runs in Jinja's immutable sandbox, with the
names and filters that transformers offers to templates; every call, attribute, loop and concatenation looks at a
deadline and at how much text there is. What remains is single operations of C on texts within the limit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from moesaic.errors import RequestError, TokenizerError

__all__ = ["ChatTemplate", "TemplateLimits"]


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """How much one rendering may take.

    Attributes:
        seconds: of time.
        characters: of any text in it.
        items: of any list in it.
    """

    seconds: float = 5.0
    characters: int = 32 << 20
    items: int = 1_000_000


class _TooMuchError(Exception):
    """A limit is reached."""


_deadline: ContextVar[float] = ContextVar("_deadline")
_written: ContextVar[int] = ContextVar("_written", default=0)
_WIDE = re.compile(r"\d{7,}")
_NUMBER_LIMIT = 1 << 17  # of widths, repetitions and exponents that a template passes


class ChatTemplate:
    """Renders conversations.

    Args:
        source: Jinja.
        limits: of one rendering.

    Raises:
        TokenizerError: it is no valid template.
    """

    def __init__(self, source: str, limits: TemplateLimits | None = None) -> None:
        self.source = source
        self._limits = limits or TemplateLimits()
        environment = _Environment(self._limits)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TokenizerError(f"the chat template is damaged: {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the template refuses it, fails, or takes too much time or room.
        """
        token = _deadline.set(time.monotonic() + self._limits.seconds)
        _written.set(0)
        try:
            return self._template.render(**variables)
        except _TooMuchError as error:
            raise RequestError(f"the chat template takes too much {error} for this conversation.", "messages") from None
        except _RefusedError as error:
            raise RequestError(f"the chat template refuses this conversation: {error}", "messages") from None
        except (Exception, RecursionError) as error:  # a template may raise anything
            message = f"the chat template cannot render this conversation ({type(error).__name__})."
            raise RequestError(message, "messages") from error
        finally:
            _deadline.reset(token)


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


def _tick() -> str:
    if time.monotonic() > _deadline.get(0.0):
        raise _TooMuchError("time")
    return ""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with limits."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.globals.pop("lipsum", None)
        self.filters.pop("sum")  # of lists it takes quadratic time, and no chat template adds up anything
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = self._limited(function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Checks().visit(tree)
        return tree

    def tick(self) -> str:
        """Called in every round of a loop."""
        return _tick()

    def noted(self, value: Any) -> Any:
        """Called for whatever is put out, also into a variable or a macro's result."""
        if isinstance(value, str):
            written = _written.get() + len(value)
            _written.set(written)
            self._check_size("", written // 4)  # it may be put out again and again on its way
        return value

    def joined(self, *parts: Any) -> str:
        """Called for `~`."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > self._limits.characters:
            raise _TooMuchError("text")
        return "".join(texts)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call in a template."""
        _tick()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        self._check_arguments(getattr(method, "__self__", None), args, kwargs)
        return self._checked(super().call(context, function, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`a.b`."""
        _tick()
        return self._checked(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`a[b]`."""
        _tick()
        return self._checked(super().getitem(obj, argument))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make much of little."""
        _tick()
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                self._check_size(left, len(left) + len(right))
        elif operator == "*" and (isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))):
            sequence, count = (left, right) if isinstance(left, (str, list, tuple)) else (right, left)
            self._check_size(sequence, len(sequence) * count if isinstance(count, int) else 0)
        elif operator in ("*", "**"):
            self._check_numbers(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_arguments(left, (left, right), {})
        return self._checked(super().call_binop(context, operator, left, right))

    def _check_numbers(self, operator: str, left: Any, right: Any) -> None:
        large = any(isinstance(number, int) and abs(number) > _NUMBER_LIMIT for number in (left, right))
        if large or (operator == "**" and isinstance(right, int) and right > 64):
            raise _TooMuchError("room")

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def filtered(*args: Any, **kwargs: Any) -> Any:
            _tick()
            text = next((arg for arg in args if isinstance(arg, str)), None)
            self._check_arguments(text, [arg for arg in args if arg is not text], kwargs)
            return self._checked(function(*args, **kwargs))

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(filtered, mark, getattr(function, mark))
        return filtered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What the sandbox allows, but for methods of texts whose results have no bound."""
        return attr not in ("translate", "expandtabs") and super().is_safe_attribute(obj, attr, value)

    def _check_arguments(self, text: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Widths of padding and format strings, and what a replacement or a separator is multiplied with."""
        values = [*args, *kwargs.values()]
        values += [item for value in values if isinstance(value, tuple) for item in value[:64]]
        numbers = [abs(value) for value in values if isinstance(value, int)]
        if any(number > _NUMBER_LIMIT for number in numbers):
            raise _TooMuchError("room")
        for value in values:
            if isinstance(value, (list, tuple)):
                self._check_size("", sum(len(item) for item in value if isinstance(item, str)))
        if isinstance(text, str):
            if ("%" in text or "{" in text) and len(text) < 10_000 and _WIDE.search(text):
                raise _TooMuchError("room")
            longest = max([*(len(value) for value in values if isinstance(value, str)), *numbers], default=0)
            count = max((len(value) for value in values if isinstance(value, (list, tuple, dict))), default=0)
            if min(longest, len(text)) > 64 and longest * len(text) > self._limits.characters * 64:
                raise _TooMuchError("room")
            self._check_size(text, len(text) * count)

    def _checked(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            self._check_size(value, len(value))
        return value

    def _check_size(self, kind: Any, size: int) -> None:
        if size > (self._limits.characters if isinstance(kind, str) else self._limits.items):
            raise _TooMuchError("text" if isinstance(kind, str) else "room")


class _Checks(NodeTransformer):
    """Puts a look at the deadline into every loop, and a look at the size into every concatenation."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_Output(self, node: nodes.Output, *args: Any, **kwargs: Any) -> nodes.Output:
        self.generic_visit(node)
        noted = nodes.EnvironmentAttribute("noted")
        node.nodes = [nodes.Call(noted, [self._constant(part)], [], None, None) for part in node.nodes]
        return node

    @staticmethod
    def _constant(part: nodes.Expr) -> nodes.Expr:
        return nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Call:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("joined"), list(node.nodes), [], None, None)
        call.set_lineno(node.lineno)
        return call


class _Generation(Extension):
    """`{% generation %}`, which marks what to train on and means nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: Any) -> NoReturn:
    raise _RefusedError(str(message)[:1000])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
