"""A plan: where every module of a model goes, in which format, and what it costs in memory and per token.

A plan is data. It knows neither how it was made (`planner`) nor how it is carried out (`engine.loader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from moesaic.errors import PlanDoesNotFitError, PlanError
from moesaic.placement.hardware import Hardware
from moesaic.placement.table import render

__all__ = ["Placement", "Plan"]

Implementation = Literal["moesaic", "transformers"]

# Python, torch, the tokenizer and the activations of a prefill chunk, beside the weights and the cache.
_WORKING_BYTES = 512 * 1024**2
_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Placement:
    """What becomes of one module.

    Attributes:
        module: qualified name in the stock model.
        role: one of `roles.ROLES`.
        class_name: class of the stock module.
        implementation: who computes it.
        device: where its weights lie and where it is computed.
        formats: name of each tensor that the module owns -> its format after loading. Names are the parameter's own,
            or gate, up, down, gate_bias, up_bias, down_bias for experts and k_b, v_b for a split MLA projection.
        nbytes: bytes of these tensors in memory.
        bytes_per_token: bytes of them that computing one token reads.
    """

    module: str
    role: str
    class_name: str
    implementation: Implementation
    device: str
    formats: Mapping[str, str]
    nbytes: int
    bytes_per_token: int


@dataclass(frozen=True)
class Plan:
    """Placements of all modules of one model.

    Attributes:
        source: the placement file or template.
        model_class: class of the stock model.
        entries: one placement for every module that owns tensors, and for every block that may be replaced as a whole.
        kv_bytes_per_position: bytes of cache that one token of context takes, over all layers.
        warnings: what the user should know, one sentence each.
    """

    source: str
    model_class: str
    entries: tuple[Placement, ...]
    kv_bytes_per_position: int = 0
    warnings: tuple[str, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token of decode reads: of the experts only those that are active for a token."""
        return sum(entry.bytes_per_token for entry in self.entries)

    @cached_property
    def _by_module(self) -> dict[str, Placement]:
        return {entry.module: entry for entry in self.entries}

    def __contains__(self, module: object) -> bool:
        return module in self._by_module

    def of(self, module: str) -> Placement:
        """The placement of the module of this qualified name.

        Raises:
            PlanError: the plan has no entry for it.
        """
        entry = self._by_module.get(module)
        if entry is None:
            raise PlanError(
                f"'{module}': the plan '{self.source}' for {self.model_class} has no entry for this module."
            )
        return entry

    def required_bytes(self, context: int = _DEFAULT_CONTEXT) -> int:
        """Bytes of DRAM to run with a cache for `context` tokens."""
        return self.nbytes + context * self.kv_bytes_per_position + _WORKING_BYTES

    def check_fits(self, hardware: Hardware, context: int = _DEFAULT_CONTEXT) -> None:
        """Refuse a plan that this computer has no memory for, before anything is loaded.

        Raises:
            PlanDoesNotFitError: naming what is needed, what there is and the shortfall.
        """
        needed = self.required_bytes(context)
        shortfall = needed - hardware.dram_available
        if shortfall <= 0:
            return
        limit = "the container's limit of " if hardware.dram_limited else ""
        raise PlanDoesNotFitError(
            f"{self.model_class} does not fit: it needs {_gib(needed)} of DRAM (weights {_gib(self.nbytes)}, cache for "
            f"{context} tokens {_gib(context * self.kv_bytes_per_position)}, working memory {_gib(_WORKING_BYTES)}), "
            f"but {_gib(hardware.dram_available)} of {limit}{_gib(hardware.dram_total)} are available: "
            f"{_gib(shortfall)} too little. Use a file or a rule with a smaller format (Q4_K: 4.5 bits a weight, "
            f"Q2_K: 2.6), or free memory."
        )

    def check_fits_nodes(self, hardware: Hardware) -> None:
        """Refuse a plan whose even share of the weights is more than the DRAM of a memory node that holds one.

        Memory that is bound to a node cannot go elsewhere when that node is full: the system ends the process.

        Raises:
            PlanDoesNotFitError: naming the node, what it should hold and what it has.
        """
        nodes = [node for node in hardware.numa_nodes if node.cpus]
        share = self.nbytes // max(1, len(nodes))
        for node in nodes if len(nodes) > 1 else []:
            room = node.dram_total - _WORKING_BYTES
            if share > room:
                raise PlanDoesNotFitError(
                    f"{self.model_class} does not fit on NUMA node {node.node}: its share of the weights is "
                    f"{_gib(share)}, but it has {_gib(max(0, room))} of DRAM for them: {_gib(share - room)} too "
                    "little. Set MOESAIC_NUMA_NODES=1 to leave the division over nodes to the system (slower), or use "
                    "a smaller format."
                )

    def table(self) -> str:
        """The plan for people: one line per kind of module, totals, warnings."""
        return render(self)

    def to_json(self) -> str:
        """The plan for programs: a JSON object with totals, warnings and all entries; sizes in bytes."""
        totals = {
            "plan": self.source,
            "model": self.model_class,
            "nbytes": self.nbytes,
            "bytes_per_token": self.bytes_per_token,
            "kv_bytes_per_position": self.kv_bytes_per_position,
            "required_bytes": self.required_bytes(),
            "warnings": list(self.warnings),
        }
        entries = [asdict(entry) | {"formats": dict(entry.formats)} for entry in self.entries]
        return json.dumps(totals | {"entries": entries}, indent=2)


def _gib(count: int) -> str:
    return f"{count / 1024**3:.2f} GiB"
