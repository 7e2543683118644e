"""Only `csrc/isa/` may know a processor; anything else that does is named here, with what it needs it for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "csrc"

# Intrinsics and their headers, predefined macros of processors and their extensions, assembly.
PROCESSOR = re.compile(
    r"\w*intrin\.h|cpuid\.h|arm_\w+\.h|__builtin_(?:ia32|cpu|aarch64|neon)_\w*|\b_mm\d*_\w+|\b__m(?:128|256|512)\w*"
    r"|\b__(?:x86_64|i386|amd64|aarch64|arm|loongarch\w*|riscv)__|\b__(?:AVX|SSE|FMA|ARM|AMX)\w*|\basm\b|\b__asm__\b"
)

ALLOWED = {
    # Which instruction sets this processor has; everything is inside #if defined(__x86_64__).
    "cpu.cpp": {"__x86_64__", "cpuid.h", "__builtin_cpu_init", "__builtin_cpu_supports"},
}


def code_of(text: str) -> str:
    """The text without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def processor_words(text: str) -> set[str]:
    return set(PROCESSOR.findall(code_of(text)))


def sources() -> list[str]:
    files = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.suffix in {".h", ".cpp"})
    return sorted(str(path) for path in files if path.parts[0] != "isa")


@pytest.mark.parametrize("name", sources())
def test_nothing_outside_isa_knows_a_processor(name: str) -> None:
    found = processor_words((SOURCE / name).read_text(encoding="utf-8"))
    assert found <= ALLOWED.get(name, set()), f"csrc/{name}: move this into csrc/isa/"


def test_every_exception_is_still_needed() -> None:
    for name, words in ALLOWED.items():
        assert processor_words((SOURCE / name).read_text(encoding="utf-8")) == words


@pytest.mark.parametrize(
    "text",
    [
        "#include <immintrin.h>",
        "#include <arm_neon.h>",
        "#if defined(__x86_64__)",
        "#ifdef __AVX2__",
        "__builtin_ia32_pause();",
        "__m256i x = _mm256_setzero_si256();",
        'asm volatile("yield");',
    ],
)
def test_the_check_sees_a_processor(text: str) -> None:
    assert processor_words(text)


def test_the_check_skips_comments() -> None:
    assert not processor_words("// faster than _mm_add_ps\nint x; /* __x86_64__ */")
