"""Chooses the device of every module: rules first, a strategy for what they leave open, then what one GPU can run.

Layers are computed one after the other, so those on the GPU are the first ones, and a layer lies on one device as a
whole, apart from its routed experts. This module knows neither shapes nor files; what a choice takes, a trial plan
says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moesaic.errors import PlanDoesNotFitError, PlanError, RuleError
from moesaic.placement import fits
from moesaic.placement.hardware import Hardware
from moesaic.placement.plan import Device, Placement, Plan
from moesaic.placement.roles import layer_of
from moesaic.placement.rule import Rule, Rules
from moesaic.placement.rules import load_plan
from moesaic.placement.vram import usable_gpu

__all__ = ["Choice", "Devices", "Trial", "Unit", "choose"]

Devices = Mapping[str, Device]
Trial = Callable[[Devices], Plan]
"""Makes the plan of a choice of devices."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A module that is placed as a whole.

    Attributes:
        cpu: what it is on the CPU.
        gpu: what it is on the GPU.
        rule: the first rule that matches it.
        obstacle: why it cannot be on the GPU, as the end of a sentence; "" if it can.
    """

    cpu: Placement
    gpu: Placement
    rule: Rule
    obstacle: str

    @property
    def name(self) -> str:
        """Qualified name."""
        return self.cpu.module

    @property
    def is_experts(self) -> bool:
        """Whether these are routed experts, which may lie elsewhere than their layer."""
        return self.cpu.role == "experts"


@dataclass(frozen=True, slots=True)
class Choice:
    """Where modules go.

    Attributes:
        plan: all of it.
        strategy: the template by which modules were placed whose rule names no device.
        notes: what the user should know about the choice.
    """

    plan: Plan
    strategy: str
    notes: tuple[str, ...] = ()


def choose(units: Sequence[Unit], rules: Rules, hardware: Hardware, trial: Trial) -> Choice:
    """Choose devices.

    Raises:
        RuleError: a rule puts a module on the GPU that cannot be there.
        PlanError: the devices are no arrangement that can be run, or a GPU is needed and there is none.
        PlanDoesNotFitError: the strategy is `layers` and not even one layer fits.
    """
    return _Chooser(units, rules, hardware, trial).choose()


class _Chooser:
    """One run of `choose`."""

    def __init__(self, units: Sequence[Unit], rules: Rules, hardware: Hardware, trial: Trial) -> None:
        self._units, self._rules, self._hardware, self._trial = units, rules, hardware, trial
        self._num_layers = 1 + max((layer for unit in units if (layer := layer_of(unit.name)) is not None), default=-1)

    def choose(self) -> Choice:
        if all(unit.rule.device != "auto" for unit in self._units):
            return Choice(self._plan(lambda unit: "cpu"), self._rules.name)
        if self._rules.strategy == "auto":
            return self._auto()
        if self._rules.strategy == "layers":
            return self._layers()
        return Choice(self._plan(_of_template(self._rules.strategy)), self._rules.strategy)

    def _auto(self) -> Choice:
        """Everything on the GPU if it fits, else all but the experts if that fits, else the CPU."""
        reason = ""
        if usable_gpu(self._hardware) is None:
            reason = self._hardware.gpus[0].problem if self._hardware.gpus else ""
        else:
            for template in ("gpu", "hybrid"):
                try:
                    plan = self._plan(_of_template(template))
                except PlanError as error:
                    reason = str(error)
                    continue
                problem = self._vram_problem(plan)
                if problem is None:
                    return Choice(plan, template)
                reason = f"as '{template}' {problem}"
        notes = (f"the GPU is not used: {reason}",) if reason else ()
        return Choice(self._plan(_of_template("cpu")), "cpu", notes)

    def _layers(self) -> Choice:
        """As many of the first layers as fit; what follows the last layer goes with it."""
        plan = None
        for num_on_gpu in range(self._num_layers, 0, -1):
            plan = self._plan(self._first_layers(num_on_gpu))
            if self._vram_problem(plan) is None:
                return Choice(plan, "layers")
        problem = "it has no layers." if plan is None else self._vram_problem(plan)
        name = self._units[0].cpu.class_name if plan is None else plan.model_class
        raise PlanDoesNotFitError(f"{name} does not fit as 'layers': with one layer on the GPU {problem}")

    def _first_layers(self, num_on_gpu: int) -> Callable[[Unit], Device]:
        on_gpu = _of_template("gpu")

        def device(unit: Unit) -> Device:
            layer = layer_of(unit.name)
            position = self._num_layers - 1 if layer is None else layer
            return on_gpu(unit) if position < num_on_gpu else "cpu"

        return device

    def _vram_problem(self, plan: Plan) -> str | None:
        budget = plan.vram_budget(self._hardware)
        return None if budget is None else fits.vram_problem(plan, budget)

    def _plan(self, otherwise: Callable[[Unit], Device]) -> Plan:
        """The plan with the rules' devices, and `otherwise` where they name none."""
        devices = {unit.name: _fixed(unit) or otherwise(unit) for unit in self._units}
        plan = self._trial(devices)
        if plan.uses_gpu:
            plan.vram_budget(self._hardware)  # raises where there is no GPU
            self._check_units(devices)
            _check_chain(list(self._chain(devices)), self._rules.name)
        return plan

    def _check_units(self, devices: Devices) -> None:
        for unit in self._units:
            if devices[unit.name] == "gpu" and unit.obstacle:
                message = f"'{unit.name}' ({unit.cpu.class_name}) cannot be on the GPU: {unit.obstacle}."
                if unit.rule.device == "gpu" and self._rules.name == self._rules.source:  # a user's own file
                    raise RuleError(self._rules.source, unit.rule.line, message)
                raise PlanError(f"plan '{self._rules.name}': {message}")

    def _chain(self, devices: Devices) -> Iterator[tuple[str, str, Device]]:
        """What is computed one after the other: (place in words, module, device), without routed experts."""
        by_layer: list[list[Unit]] = [[] for _ in range(self._num_layers)]
        behind: list[Unit] = []
        for unit in self._units:
            layer = layer_of(unit.name)
            if unit.cpu.role == "embedding":
                continue
            if layer is None:
                behind.append(unit)
            elif unit.is_experts:
                if devices[unit.name] == "gpu":
                    by_layer[layer].append(unit)  # experts on the GPU need their layer there
            else:
                by_layer[layer].append(unit)
        for layer, units in enumerate(by_layer):
            yield from ((f"layer {layer}", unit.name, devices[unit.name]) for unit in units)
        yield from (("the part behind the last layer", unit.name, devices[unit.name]) for unit in behind)


def _check_chain(chain: list[tuple[str, str, Device]], plan: str) -> None:
    """Refuse devices that are not first GPU, then CPU, changing between two layers only."""
    for (place, module, device), (next_place, next_module, next_device) in pairwise(chain):
        if device == next_device or (device == "gpu" and place != next_place):
            continue
        raise PlanError(
            f"plan '{plan}': '{module}' is on the {device.upper()} and '{next_module}' on the {next_device.upper()}: a "
            "layer lies on one device, apart from its routed experts, and the layers on the GPU are the first ones."
        )


def _fixed(unit: Unit) -> Device | None:
    """The device that a rule names."""
    device = unit.rule.device
    return "cpu" if device == "cpu" else "gpu" if device == "gpu" else None


def _of_template(name: str) -> Callable[[Unit], Device]:
    """Devices as a template's rules name them."""
    rules = load_plan(name)

    def device(unit: Unit) -> Device:
        found = rules.find(unit.name, unit.cpu.role, unit.cpu.class_name).device
        return "gpu" if found == "gpu" else "cpu"

    return device
