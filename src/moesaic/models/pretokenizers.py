r"""How byte-level BPE tokenizers split text before merging, by the name that GGUF files give it (`tokenizer.ggml.pre`).

The names are llama.cpp's; the patterns are those of the models' published tokenizer.json files. It knows no vocabulary.
A pattern marked inexact covers the rule that llama.cpp has for the name, where the original does more (normalises,
treats some scripts apart, or merges by rank instead of by list).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "name_of_patterns"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split.

    Attributes:
        patterns: regular expressions applied one after the other; each match becomes a piece of its own.
        nfc: whether text is first brought into Unicode's normal form C.
        ignore_merges: whether a piece that is a token as a whole is taken without merging.
        exact: whether this is all that the original does.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    exact: bool = True


_APOSTROPHES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN35 = _APOSTROPHES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_APOSTROPHES}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_APOSTROPHES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_NOT_HAN_UPPER, _NOT_HAN_LOWER = _UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_NOT_HAN_UPPER}*{_NOT_HAN_LOWER}+{_APOSTROPHES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NOT_HAN_UPPER}+{_NOT_HAN_LOWER}*{_APOSTROPHES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _TAIL,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_STARCODER = (r"\p{N}", _GPT2)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def _table() -> dict[str, PreTokenizer]:
    """Rules by name; names of one rule stand together, the first of them is the one that we write."""
    rules: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
        (("gpt-2", "mpt", "gigachat", "exaone4"), PreTokenizer((_GPT2,))),
        (("olmo",), PreTokenizer((_GPT2,), nfc=True)),
        (
            ("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "lfm2"),
            PreTokenizer((_LLAMA3,), ignore_merges=True),
        ),
        (("dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
        (("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), PreTokenizer((_QWEN2,), nfc=True)),
        (("solar-open", "grok-2"), PreTokenizer((_QWEN2,))),
        (("qwen35",), PreTokenizer((_QWEN35,), nfc=True)),
        (("gpt-4o", "llama4", "kanana2"), PreTokenizer((_GPT4O,))),
        (("minimax-m2",), PreTokenizer((_GPT4O,), exact=False)),
        (("tekken",), PreTokenizer((_TEKKEN,), ignore_merges=True)),
        (("starcoder", "refact", "command-r", "smollm", "codeshell"), PreTokenizer(_STARCODER)),
        (("bailingmoe", "bailingmoe2", "llada-moe"), PreTokenizer((_BAILING,), nfc=True)),
        (("deepseek-v3", "hunyuan-dense", "joyai-llm"), PreTokenizer(_DEEPSEEK3, exact=False)),
        (("deepseek-coder",), PreTokenizer(_DEEPSEEK_CODER, exact=False)),
        (("kimi-k2",), PreTokenizer((_KIMI,), exact=False)),
        (("glm4", "glm5"), PreTokenizer((_LLAMA3,), ignore_merges=True, exact=False)),
        (("chatglm-bpe",), PreTokenizer((_LLAMA3,), exact=False)),
    )
    return {name: rule for names, rule in rules for name in names}


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(_table())
"""Every rule that is known here, by name."""


def name_of_patterns(patterns: tuple[str, ...], nfc: bool, ignore_merges: bool) -> str | None:
    """The name under which a tokenizer's rule is known in GGUF files; None if it is not."""
    same = [name for name, rule in PRE_TOKENIZERS.items() if rule.patterns == patterns]
    for name in same:
        rule = PRE_TOKENIZERS[name]
        if (rule.nfc, rule.ignore_merges) == (nfc, ignore_merges):
            return name
    return same[0] if same else None
