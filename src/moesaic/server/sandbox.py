"""Jinja's immutable sandbox, with limits of time and size: for programs of other people's.

Every call, attribute, round of a loop, concatenation and output looks at a deadline and at how much text there is;
operations of which a single one could make very much of little are looked at before they run. It does not know what is
rendered.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["LimitedEnvironment", "TooMuchError"]

_deadline: ContextVar[float] = ContextVar("_deadline", default=0.0)
_written: ContextVar[int] = ContextVar("_written", default=0)
_WIDE = re.compile(r"\d{6,}")
_DYNAMIC = re.compile(r"\*|:[^}]*\{")  # a width in a format that comes from a value
_NUMBER_LIMIT = 1 << 17
_PRODUCT_LIMIT = 1 << 31  # characters compared or written by one operation, in the worst case
_FORMATS = frozenset(("format", "format_map", "%"))
_WIDTHS = frozenset(("ljust", "rjust", "center", "zfill", "indent", "truncate", "batch", "slice", "tojson", "round"))
_PRODUCTS = _FORMATS | frozenset(("replace", "join", "indent"))
_UNBOUNDED = frozenset(("translate", "expandtabs", "to_bytes", "encode"))


class TooMuchError(Exception):
    """A limit is reached; the text says of what."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox.

    Args:
        characters: most of any text.
        items: most of any list.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, characters: int, items: int) -> None:
        self._characters, self._items = characters, items
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.globals.pop("lipsum", None)
        for name in ("sum", "wordwrap", "urlize"):  # slow for large values, and of no use to a chat template
            self.filters.pop(name)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Offer a filter to templates, within the limits."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # behind the environment or the context

        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            self._check_operation(name, args[first] if len(args) > first else None, args[first + 1 :], kwargs)
            return self._checked(function(*args, **kwargs))

        if first:
            filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        self.filters[name] = filtered

    def begin(self, seconds: float) -> None:
        """From now on in this context, for so long, something is rendered."""
        _deadline.set(time.monotonic() + seconds)
        _written.set(0)

    def tick(self) -> str:
        """Called in every round of a loop."""
        if time.monotonic() > _deadline.get():
            raise TooMuchError("time")
        return ""

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
        self._check_size("", sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call in a template."""
        self.tick()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        self._check_operation(getattr(method, "__name__", ""), getattr(method, "__self__", None), args, kwargs)
        return self._checked(super().call(context, function, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`a.b`."""
        self.tick()
        return self._checked(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`a[b]`."""
        self.tick()
        return self._checked(super().getitem(obj, argument))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What the sandbox allows, but for methods whose results have no bound."""
        return attr not in _UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make much of little."""
        self.tick()
        sequences = [each for each in (left, right) if isinstance(each, (str, list, tuple))]
        numbers = [each for each in (left, right) if isinstance(each, int)]
        if operator == "%" and isinstance(left, str):
            self._check_operation("%", left, right if isinstance(right, tuple) else (right,), {})
        elif operator == "+" and len(sequences) == 2:
            self._check_size(left, sum(map(len, sequences)))
        elif operator == "*" and sequences and numbers:
            self._check_size(sequences[0], len(sequences[0]) * numbers[0])
        elif operator in ("*", "**"):
            large = any(abs(number) > _NUMBER_LIMIT for number in numbers)
            if large or (operator == "**" and any(number > 64 for number in numbers[-1:])):
                raise TooMuchError("room")
        return self._checked(super().call_binop(context, operator, left, right))

    def _check_operation(self, name: str, subject: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Look at a method, filter or operator by its name: widths, formats, replacements and separators."""
        if name not in _PRODUCTS and name not in _WIDTHS:
            return
        values = [*args, *kwargs.values()]
        numbers = [abs(value) for value in values if isinstance(value, int)]
        is_format = name in _FORMATS and isinstance(subject, str)
        if is_format and _WIDE.search(subject):
            raise TooMuchError("room")
        if (name in _WIDTHS or (is_format and _DYNAMIC.search(subject))) and max(numbers, default=0) > _NUMBER_LIMIT:
            raise TooMuchError("room")
        if name in _PRODUCTS:
            sizes = [self._size(value) for value in (subject, *values)]
            product = 1
            for size in sizes[:2] if name != "replace" else (sizes[0], max(sizes[1:], default=0)):
                product *= size + 1
            if product > _PRODUCT_LIMIT or (name == "join" and product > 64 * self._characters):
                raise TooMuchError("room")
            self._check_size("", max(sizes))

    def _size(self, value: Any) -> int:
        """Of a text, or of the texts in a list, or a number that is a width."""
        if isinstance(value, (list, tuple)):
            return sum(len(item) if isinstance(item, str) else 1 for item in value)
        if isinstance(value, int):
            return min(abs(value), _NUMBER_LIMIT)
        return len(value) if isinstance(value, str) else 0

    def _checked(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            self._check_size(value, len(value))
        return value

    def _check_size(self, kind: Any, size: int) -> None:
        if size > (self._characters if isinstance(kind, str) else self._items):
            raise TooMuchError("text" if isinstance(kind, str) else "room")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Checks().visit(tree)
        return tree


class _Checks(NodeTransformer):
    """Puts calls of the environment's checks into loops, concatenations and outputs."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [])).set_lineno(node.lineno))
        return node

    def visit_Output(self, node: nodes.Output, *args: Any, **kwargs: Any) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            _call("noted", [nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part])
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Call:
        self.generic_visit(node)
        call = _call("joined", list(node.nodes))
        call.set_lineno(node.lineno)
        return call


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


class _Generation(Extension):
    """`{% generation %}`, which marks what to train on and means nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
