"""Addition and subtraction of numbers of up to four digits.

The answer repeats the question as an equation, which also brings the operands next to the result.
"""

from __future__ import annotations

from random import Random

from demo.items import Accept, Item, Language, Turn, draw_until, pick, vary

__all__ = ["MAX_DIGITS", "addition", "subtraction"]

MAX_DIGITS = 4
_DIGITS_CUMULATIVE = (0.08, 0.25, 0.55, 1.0)  # most operands are long: those are the hard ones

_ADDITION: dict[Language, tuple[str, ...]] = {
    "en": (
        "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a} + {b} = ?", "{a}+{b}=?", "What is {a} + {b}?", "what is {a}+{b}?",
        "What is {a} plus {b}?", "Add {a} and {b}.", "add {a} and {b}", "Calculate {a} + {b}.", "calculate {a} + {b}",
        "How much is {a} plus {b}?", "Please compute {a} + {b}.", "What is the sum of {a} and {b}?",
        "Can you add {a} and {b}?", "{a} plus {b}",
    ),
    "zh": (
        "{a} + {b}", "{a}+{b}=", "{a}+{b}=?", "{a} + {b} 等于多少？", "{a}+{b}等于多少？", "{a}加{b}等于几？",
        "{a}加{b}等于多少？",
        "计算 {a} + {b}", "计算{a}+{b}。", "请算一下{a}加{b}。", "{a}与{b}的和是多少？", "{a}加上{b}是多少？",
        "请计算 {a} + {b}。",
        "帮我算{a}加{b}",
    ),
}  # fmt: skip

_SUBTRACTION: dict[Language, tuple[str, ...]] = {
    "en": (
        "{a} - {b}", "{a}-{b}", "{a} - {b} =", "{a} - {b} = ?", "{a}-{b}=?", "What is {a} - {b}?", "what is {a}-{b}?",
        "What is {a} minus {b}?", "Subtract {b} from {a}.", "subtract {b} from {a}", "Calculate {a} - {b}.",
        "calculate {a} - {b}", "How much is {a} minus {b}?", "Please compute {a} - {b}.",
        "What is the difference of {a} and {b}?", "Can you take {b} away from {a}?", "{a} minus {b}",
    ),
    "zh": (
        "{a} - {b}", "{a}-{b}=", "{a}-{b}=?", "{a} - {b} 等于多少？", "{a}-{b}等于多少？", "{a}减{b}等于几？",
        "{a}减{b}等于多少？",
        "计算 {a} - {b}", "计算{a}-{b}。", "请算一下{a}减{b}。", "{a}与{b}的差是多少？", "{a}减去{b}是多少？",
        "请计算 {a} - {b}。",
        "帮我算{a}减{b}",
    ),
}  # fmt: skip


def _number(rng: Random) -> int:
    roll = rng.random()
    digits = next(i + 1 for i, bound in enumerate(_DIGITS_CUMULATIVE) if roll < bound)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    return low + int(rng.random() * (10**digits - low))


def addition(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """A sum of two numbers; the key ignores their order, so that 5 + 7 gives nothing away about 7 + 5."""

    def draw() -> tuple[str, tuple[int, int]]:
        a, b = _number(rng), _number(rng)
        return f"addition:{min(a, b)},{max(a, b)}", (a, b)

    key, (a, b) = draw_until(draw, accept)
    prompt = vary(rng, pick(rng, _ADDITION[language])).format(a=a, b=b)
    return Item("addition", language, key, Turn(prompt, f"{a} + {b} = {a + b}"))


def subtraction(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """A difference of two numbers, negative in one case of eight."""

    def draw() -> tuple[str, tuple[int, int]]:
        a, b = _number(rng), _number(rng)
        if a < b and rng.random() < 0.75:
            a, b = b, a
        return f"subtraction:{a},{b}", (a, b)

    key, (a, b) = draw_until(draw, accept)
    prompt = vary(rng, pick(rng, _SUBTRACTION[language])).format(a=a, b=b)
    return Item("subtraction", language, key, Turn(prompt, f"{a} - {b} = {a - b}"))
