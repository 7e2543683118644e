"""Which format each tensor of a quantised file gets: by rule, else by what its role tolerates.

Norms, routers and vectors are always F32: they are small and decide much. Without a rule, matrices take the format
asked for, except that the embedding and the head get at least Q6_K, as llama.cpp's do: every token passes them. Rows
that are no whole number of blocks fall back to a format with smaller blocks, never silently. It reads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moesaic.placement.rules import DEFAULT_RULE, KEEP, Rule
from moesaic.quant import WeightFormat, get_format

__all__ = ["FormatChoice", "choose_format", "may_be_quantized"]

_F32_ROLES = frozenset({"norm", "router"})
_PRECISE_ROLES = frozenset({"embedding", "lm_head"})
_LEAST_PRECISE = "Q6_K"
# Nearest format with blocks of 32 and no fewer bits, for rows that super-blocks of 256 do not divide.
_SMALLER_BLOCKS: Mapping[str, str] = MappingProxyType(
    {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
)
_SMALL_BLOCKS_OF_ATTENTION = "Q8_0"  # such rows are per-head halves of MLA's kv_b: small, and every score passes them
_NO_BLOCKS = "F16"
_SHORTEST_ROW = 32


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """A format and why it is not the one asked for.

    Attributes:
        format: what the tensor is written in.
        note: the reason, if rows did not fit the format wanted; else None.
    """

    format: WeightFormat
    note: str | None = None


def may_be_quantized(role: str, projection: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is worth quantising: norms, routers, vectors, single rows and short convolutions are not.

    Args: as for `choose_format`.
    """
    is_matrix = len(shape) >= 2 and shape[-2] > 1 and shape[-1] >= _SHORTEST_ROW and not projection.endswith("bias")
    return is_matrix and role not in _F32_ROLES


def choose_format(
    role: str, projection: str, shape: tuple[int, ...], source: WeightFormat, wanted: WeightFormat, rule: Rule
) -> FormatChoice:
    """Choose a tensor's format.

    Args:
        role: role of the module that it belongs to (`placement.ROLES`).
        projection: "gate", "up" or "down" for experts, else the parameter's own name.
        shape: row-major, K last.
        source: format in the checkpoint.
        wanted: format asked for the whole file.
        rule: the first rule that matches the module, or `DEFAULT_RULE`.
    """
    if not may_be_quantized(role, projection, shape):
        return FormatChoice(get_format("F32"))
    if rule is not DEFAULT_RULE:
        by_rule = rule.format_of(projection)
        return FormatChoice(source) if by_rule == KEEP else _fit(get_format(by_rule), role, shape[-1])
    least = get_format(_LEAST_PRECISE)
    if role in _PRECISE_ROLES and wanted.bits_per_weight < least.bits_per_weight:
        wanted = least
    return _fit(wanted, role, shape[-1])


def _fit(wanted: WeightFormat, role: str, cols: int) -> FormatChoice:
    """`wanted`, or the format that takes its place for rows of this length."""
    if cols % wanted.block_size == 0:
        return FormatChoice(wanted)
    name = _SMALL_BLOCKS_OF_ATTENTION if role == "attention" else _SMALLER_BLOCKS.get(wanted.name, _NO_BLOCKS)
    chosen = get_format(name if cols % get_format(name).block_size == 0 else _NO_BLOCKS)
    return FormatChoice(
        chosen, f"rows of {cols} weights are no multiple of {wanted.block_size}: {chosen.name} instead of {wanted.name}"
    )
