"""Formats of a synthetic model's matrices: one for all, or one for routed experts and another for the rest.

Published files of few bits are mixes: what every token passes keeps four bits and more, and only routed experts have
one or two. A bench of such a model with few bits everywhere would flatter whoever reads the rest from slow memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.quant import WeightFormat, get_format

__all__ = ["FormatMix"]

_ROUTED = ".experts."  # in the names of their tensors; shared experts have other names in all architectures
_ROUTERS = (".gate.weight", ".router.weight")


@dataclass(frozen=True, slots=True)
class FormatMix:
    """Which format a matrix has.

    Attributes:
        experts: of routed experts.
        others: of all other matrices but routers, which are F32.
    """

    experts: WeightFormat
    others: WeightFormat

    @staticmethod
    def parse(text: str) -> FormatMix:
        """`Q4_K`, or `IQ1_S+Q4_K`: routed experts in the first, the rest in the second.

        Raises:
            UnsupportedFormatError: there is no such format.
        """
        experts, plus, others = text.partition("+")
        return FormatMix(get_format(experts), get_format(others if plus else experts))

    def of(self, name: str, shape: tuple[int, ...]) -> WeightFormat:
        """The format of a tensor of the model library's name and row-major shape.

        Raises:
            UnsupportedFormatError: its rows are no whole number of the format's blocks.
        """
        if name.endswith(_ROUTERS):
            return get_format("F32")
        chosen = self.experts if _ROUTED in name else self.others
        chosen.row_bytes(shape[-1])
        return chosen
