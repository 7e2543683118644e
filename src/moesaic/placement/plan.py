"""A plan: where every module of a model goes, in which format, and what it costs in memory and per token.

A plan is data. It knows neither how it was made (`planner`) nor how it is carried out (`engine.loader`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from moesaic.errors import PlanError
from moesaic.placement import fits
from moesaic.placement.hardware import Hardware
from moesaic.placement.roles import layer_of
from moesaic.placement.rule import plan_name
from moesaic.placement.table import render
from moesaic.placement.vram import (
    DEFAULT_CONTEXT,
    NO_STEP,
    StepSizes,
    VramBudget,
    usable_gpu,
    vram_budget,
    vram_total,
)

__all__ = ["Device", "Implementation", "Placement", "Plan"]

Implementation = Literal["moesaic", "transformers"]
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Placement:
    """What becomes of one module.

    Attributes:
        module: qualified name in the stock model.
        role: one of `roles.ROLES`.
        class_name: class of the stock module.
        implementation: who computes it.
        device: where its weights lie and where it is computed: "cpu" or "gpu".
        formats: name of each tensor that the module owns -> its format after loading. Names are the parameter's own,
            or gate, up, down, gate_bias, up_bias, down_bias for experts and k_b, v_b for a split MLA projection.
        nbytes: bytes of these tensors in memory.
        bytes_per_token: bytes of them that computing one token reads.
        kv_bytes_per_position: bytes of cache per token of context, of an attention.
        state_bytes: bytes of recurrent state per sequence, of a linear attention.
        num_experts: of a block of experts.
        expert_bytes: the same block's bytes per expert, each tensor on a 64-byte boundary.
    """

    module: str
    role: str
    class_name: str
    implementation: Implementation
    device: Device
    formats: Mapping[str, str]
    nbytes: int
    bytes_per_token: int
    kv_bytes_per_position: int = 0
    state_bytes: int = 0
    num_experts: int = 0
    expert_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Placements of all modules of one model.

    Attributes:
        source: the placement file or template.
        model_class: class of the stock model.
        entries: one placement for every module that owns tensors, and for every block that may be replaced as a whole.
        warnings: what the user should know, one sentence each.
        notes: what was chosen and why, one sentence each.
        step: widths of a step's activations.
        vram: bytes of VRAM to use at most; None for what is free, less a margin.
        context: tokens of cache that the plan was made for.
        strategy: the template by which modules were placed whose rule names no device.
    """

    source: str
    model_class: str
    entries: tuple[Placement, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    step: StepSizes = NO_STEP
    vram: int | None = None
    context: int = DEFAULT_CONTEXT
    strategy: str = ""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights in memory, DRAM and VRAM."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token of decode reads: of the experts only those that are active for a token."""
        return sum(entry.bytes_per_token for entry in self.entries)

    @cached_property
    def kv_bytes_per_position(self) -> int:
        """Bytes of cache that one token of context takes, over all layers."""
        return sum(entry.kv_bytes_per_position for entry in self.entries)

    @cached_property
    def uses_gpu(self) -> bool:
        """Whether anything is placed on the GPU."""
        return any(entry.device == "gpu" for entry in self.entries)

    def nbytes_on(self, device: Device) -> int:
        """Bytes of the weights in DRAM ("cpu") or in VRAM ("gpu")."""
        return sum(entry.nbytes for entry in self.entries if entry.device == device)

    def bytes_per_token_on(self, device: Device) -> int:
        """Bytes of weights that one token of decode reads there."""
        return sum(entry.bytes_per_token for entry in self.entries if entry.device == device)

    def kv_bytes_on(self, device: Device) -> int:
        """Bytes of cache that one token of context takes there."""
        return sum(entry.kv_bytes_per_position for entry in self.entries if entry.device == device)

    def state_bytes_on(self, device: Device) -> int:
        """Bytes of recurrent states that one sequence takes there, whatever its length."""
        return sum(entry.state_bytes for entry in self.entries if entry.device == device)

    @cached_property
    def gpu_layers(self) -> frozenset[int]:
        """The decoder layers that are computed on the GPU, their routed experts perhaps not."""
        layers = (layer_of(entry.module) for entry in self.entries if entry.device == "gpu")
        return frozenset(layer for layer in layers if layer is not None)

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

    def pinned_bytes(self, context: int | None = None) -> int:
        """Bytes of pinned DRAM through which GPU and CPU hand over to each other; 0 without a GPU."""
        return self.step.mailbox_bytes(self._context(context)) if self.uses_gpu else 0

    def required_bytes(self, context: int | None = None) -> int:
        """Bytes of DRAM to load and to run with a cache for `context` tokens (None: the plan's own context)."""
        return fits.dram_needs(self, self._context(context)).total

    def vram_budget(self, hardware: Hardware, context: int | None = None) -> VramBudget | None:
        """How the VRAM is divided with a cache for `context` tokens; None if the plan uses no GPU.

        Raises:
            PlanError: this computer has no GPU or does not say how much memory it has, and `vram` is None.
        """
        if not self.uses_gpu:
            return None
        total, gpu = vram_total(hardware, self.vram, self.name), usable_gpu(hardware)
        fixed = "there is no GPU here that could move memory" if gpu is None else gpu.fixed_memory
        return vram_budget(self, total, self._context(context), fixed)

    def check_fits(self, hardware: Hardware, context: int | None = None) -> None:
        """Refuse a plan that this computer has no memory for, before anything is loaded.

        Args:
            hardware: the computer; with its GPUs, if the plan uses one.
            context: tokens of cache; the plan's own if None.

        Raises:
            PlanDoesNotFitError: naming what is needed, what there is and the shortfall, of DRAM and of VRAM.
            PlanError: the plan needs a GPU and there is none.
        """
        fits.check(self, hardware, self._context(context))

    def _context(self, context: int | None) -> int:
        return self.context if context is None else context

    @property
    def name(self) -> str:
        """What a person calls the plan: "hybrid" for the template, the path of any other file."""
        return plan_name(self.source)

    def check_fits_nodes(self, hardware: Hardware) -> None:
        """Refuse a plan whose even share of the weights is more than the DRAM of a memory node that holds one.

        Memory that is bound to a node cannot go elsewhere when that node is full: the system ends the process.

        Raises:
            PlanDoesNotFitError: naming the node, what it should hold and what it has.
        """
        fits.check_nodes(self, hardware)

    def table(self) -> str:
        """The plan for people: one line per kind of module, totals, warnings."""
        return render(self)

    def to_json(self, more: Mapping[str, object] | None = None) -> str:
        """The plan for programs: a JSON object with totals, warnings and all entries; sizes in bytes.

        Args:
            more: keys to add to the object, such as a budget.
        """
        totals = {
            "plan": self.source,
            "strategy": self.strategy,
            "model": self.model_class,
            "nbytes": self.nbytes,
            "bytes_per_token": self.bytes_per_token,
            "kv_bytes_per_position": self.kv_bytes_per_position,
            "required_bytes": self.required_bytes(),
            "context": self.context,
            "dram": self._totals("cpu") | {"pinned_bytes": self.pinned_bytes()},
            "vram": self._totals("gpu"),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }
        entries = [asdict(entry) | {"formats": dict(entry.formats)} for entry in self.entries]
        return json.dumps(totals | dict(more or {}) | {"entries": entries}, indent=2)

    def _totals(self, device: Device) -> dict[str, int]:
        return {
            "nbytes": self.nbytes_on(device),
            "bytes_per_token": self.bytes_per_token_on(device),
            "kv_bytes_per_position": self.kv_bytes_on(device),
            "state_bytes": self.state_bytes_on(device),
        }
