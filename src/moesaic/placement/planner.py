"""Makes a plan: applies rules to a stock model on the meta device and adds up what every module will take.

It reads shapes and formats only, never a weight. It does not know what a replaced module looks like inside, only which
kinds of modules have a Moesaic implementation and that the matrices of those are held packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moesaic.errors import PlanError, RuleError
from moesaic.modules import FAMILIES, is_delta_net
from moesaic.modules.rotary import MOVING_ROPES, rope_type_of
from moesaic.modules.split import why_no_tail
from moesaic.placement.forms import COMFORT, choose_forms
from moesaic.placement.hardware import Hardware
from moesaic.placement.measures import cache_bytes, own_tensors, state_bytes, step_sizes
from moesaic.placement.plan import Device, Implementation, Placement, Plan
from moesaic.placement.roles import module_roles
from moesaic.placement.rules import KEEP, Rule, Rules
from moesaic.placement.stacks import Stack, is_kv_b, projection_of, stack_bytes
from moesaic.placement.strategies import Choice, Devices, Unit, choose
from moesaic.placement.units import format_bytes
from moesaic.placement.vram import DEFAULT_CONTEXT, StepSizes
from moesaic.quant import WeightFormat, get_format, other_form, why_not_writable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from moesaic.models import WeightMap

__all__ = ["make_plan"]

# Blocks that get an entry even without tensors of their own, because the loader may replace them as a whole.
_BLOCK_ROLES = frozenset({"attention", "router", "mlp", "shared_experts", "experts"})
_PACKED_CLASSES = frozenset({"Linear", "Embedding"})
# Whose matrices may be held in another form than the file's: those that every token multiplies on the CPU.
_ROLES_WITH_FORMS = frozenset({"attention", "mlp", "shared_experts", "experts"})
_SLOT_ALIGNMENT = 64  # bytes between the tensors of one expert


def make_plan(
    model: PreTrainedModel,
    weight_map: WeightMap,
    rules: Rules,
    hardware: Hardware,
    *,
    vram: int | None = None,
    context: int = DEFAULT_CONTEXT,
) -> Plan:
    """Place every module of a model.

    Args:
        model: the stock Hugging Face model on the meta device.
        weight_map: formats and shapes of the checkpoint's tensors.
        rules: which implementation, device and format each module gets.
        hardware: what the plan is made for; with its GPUs, if one is to be used.
        vram: bytes of VRAM to use at most; what is free, less a margin, if None.
        context: tokens of cache to leave room for.

    Raises:
        RuleError: a rule asks for what a module that it matches cannot do.
        PlanError: the model or its checkpoint holds something that cannot be placed, or there is no GPU for the plan.
    """
    return _Planner(model, weight_map, rules, hardware, vram, context).plan()


class _Planner:
    """One run of `make_plan`."""

    def __init__(
        self,
        model: PreTrainedModel,
        weight_map: WeightMap,
        rules: Rules,
        hardware: Hardware,
        vram: int | None,
        context: int,
    ) -> None:
        self._model, self._weight_map, self._rules, self._hardware = model, weight_map, rules, hardware
        self._vram, self._context = vram, context
        self._roles = module_roles(model)
        self._embedding_formats: dict[str, str] = {}
        self._forms: dict[str, Placement] = {}  # modules on the CPU in another form than the file's
        self._kept: dict[tuple[Rule, str], list[str]] = {}  # (rule, format) -> tensors that cannot take that format

    def plan(self) -> Plan:
        modules = [(name, module) for name, module in self._model.named_modules() if self._is_unit(name, module)]
        units = [self._unit(name, module) for name, module in modules]
        step = self._step_sizes(units)

        def trial(devices: Devices) -> Plan:
            entries = tuple(unit.gpu if devices[unit.name] == "gpu" else unit.cpu for unit in units)
            source, model_class = self._rules.source, type(self._model).__name__
            return Plan(source, model_class, entries, step=step, vram=self._vram, context=self._context)

        choice = choose(units, self._rules, self._hardware, trial)
        self._check_split(choice.plan)
        plan = choose_forms(choice.plan, self._forms, self._rules.ternary, self._hardware)
        warnings = tuple(self._warnings(choice, plan, units))
        return replace(plan, strategy=choice.strategy, warnings=warnings)

    def _check_split(self, plan: Plan) -> None:
        """Refuse a split whose last layers could not follow those on the GPU, which loading would find out late."""
        num_on_gpu, config = len(plan.gpu_layers), self._model.config
        if 0 < num_on_gpu < config.get_text_config().num_hidden_layers:
            problem = why_no_tail(config, num_on_gpu)
            if problem:
                raise PlanError(
                    f"plan '{plan.name}' puts {num_on_gpu} layers of {plan.model_class} on the GPU: {problem}."
                )

    def _is_unit(self, name: str, module: nn.Module) -> bool:
        parent = name.rpartition(".")[0]
        if parent and name.endswith(".kv_b_proj") and self._weight_map.mla(parent) is not None:
            return False  # the attention's own entry has k_b and v_b instead
        role = self._roles[name]
        if role in _BLOCK_ROLES and self._roles[parent] != role:
            return True
        return next(own_tensors(module), None) is not None

    def _unit(self, name: str, module: Any) -> Unit:
        """A module as it would be on each device."""
        role, class_name = self._roles[name], type(module).__name__
        rule = self._rules.find(name, role, class_name)
        implementation = self._implementation(rule, name, module)
        stacks = list(self._stacks(name, module, implementation))
        formats = {
            stack.key: self._format(rule, name, stack) if stack.packed else get_format("F32") for stack in stacks
        }
        cpu = self._place(name, module, implementation, "cpu", stacks, formats)
        forms = {key: fmt if is_kv_b(name, key) else other_form(fmt) or fmt for key, fmt in formats.items()}
        if forms != formats and role in _ROLES_WITH_FORMS:
            self._forms[name] = self._place(name, module, implementation, "cpu", stacks, forms)
        gpu_formats = {key: get_format("BF16") if is_kv_b(name, key) else fmt for key, fmt in formats.items()}
        on_gpu = self._implementation_on_gpu(name, implementation, rule)
        gpu = self._place(name, module, on_gpu, "gpu", stacks, gpu_formats)
        if role == "embedding":
            self._embedding_formats = dict(cpu.formats)
        elif role == "lm_head" and self._is_tied(module) and dict(cpu.formats) == self._embedding_formats:
            cpu = replace(cpu, nbytes=0)  # it shares the embedding's memory
        return Unit(cpu, gpu, rule, self._obstacle(role, on_gpu))

    def _place(
        self,
        name: str,
        module: Any,
        implementation: Implementation,
        device: Device,
        stacks: Sequence[Stack],
        formats: Mapping[str, WeightFormat],
    ) -> Placement:
        role = self._roles[name]
        nbytes = per_token = sum(len(stack.refs) * stack_bytes(formats[stack.key], stack) for stack in stacks)
        num_experts = expert_bytes = 0
        if role == "experts":
            per_token = math.ceil(nbytes * self._active_share(name))
            num_experts = len(stacks[0].refs)
            sizes = (stack_bytes(formats[stack.key], stack) for stack in stacks)
            expert_bytes = sum(math.ceil(size / _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT for size in sizes)
        elif role == "embedding":
            per_token = nbytes // int(module.weight.shape[0])  # one row
        is_block = role == "attention" and self._roles[name.rpartition(".")[0]] != role
        return Placement(
            module=name,
            role=role,
            class_name=type(module).__name__,
            implementation=implementation,
            device=device,
            formats={key: fmt.name for key, fmt in formats.items()},
            nbytes=nbytes,
            bytes_per_token=per_token,
            kv_bytes_per_position=cache_bytes(module, implementation, device) if is_block else 0,
            state_bytes=state_bytes(module) if is_block else 0,
            num_experts=num_experts,
            expert_bytes=expert_bytes,
        )

    def _obstacle(self, role: str, implementation: Implementation) -> str:
        """Why a module cannot be on the GPU, "" if it can."""
        if role == "embedding":
            return "the embedding stays in DRAM, a token reads one row of it"
        if implementation == "transformers":
            return "it is computed by transformers, which runs on the CPU only"
        return self._model_obstacle

    @cached_property
    def _model_obstacle(self) -> str:
        """Why nothing of the model can be on the GPU, "" if it can."""
        config = self._model.config
        if config.model_type not in FAMILIES:
            return f"there is no forward of '{config.model_type}' for the GPU"
        rope = rope_type_of(getattr(self._model.get_decoder(), "rotary_emb", None))
        moves = rope in MOVING_ROPES  # the table of angles on the GPU is made once
        return f"rotary angles of type '{rope}' change with the length" if moves else ""

    def _step_sizes(self, units: Sequence[Unit]) -> StepSizes:
        """Widths of a step, with the widest experts."""
        top_k = intermediate = 0
        for unit in units:
            if unit.is_experts:
                refs = self._weight_map.experts(unit.name)
                top_k = max(top_k, round(self._active_share(unit.name) * refs.num_experts))
                intermediate = max(intermediate, refs.up[0].shape[0])
        return step_sizes(self._model, self._roles, top_k, intermediate)

    def _implementation(self, rule: Rule, name: str, module: nn.Module) -> Implementation:
        if rule.implementation == "transformers":
            return "transformers"
        if self._has_own_implementation(name, module):
            return "moesaic"
        if rule.implementation is None:
            return "transformers"
        raise RuleError(
            self._rules.source,
            rule.line,
            f"'{name}' ({type(module).__name__}) has no Moesaic implementation: leave 'implementation' out to use one "
            "where there is one, or write 'transformers'.",
        )

    def _implementation_on_gpu(self, name: str, implementation: Implementation, rule: Rule) -> Implementation:
        """Linear attention, whose inner parts the CPU leaves to transformers, has a forward of its own on a GPU."""
        parent = name.rpartition(".")[0]
        inside = self._roles.get(parent) == "attention" and is_delta_net(self._model.get_submodule(parent))
        return "moesaic" if inside and rule.implementation != "transformers" else implementation

    def _has_own_implementation(self, name: str, module: nn.Module) -> bool:
        role = self._roles[name]
        if role in ("experts", "router") or (role in _BLOCK_ROLES and next(module.children(), None) is not None):
            return True
        class_name = type(module).__name__
        return class_name in _PACKED_CLASSES or class_name.endswith("RMSNorm")

    def _stacks(self, name: str, module: nn.Module, implementation: Implementation) -> Iterator[Stack]:
        """The tensors that the module owns, as the checkpoint holds them."""
        packed = implementation == "moesaic"
        if self._roles[name] == "experts":
            for key, refs in self._weight_map.experts(name).named().items():
                yield Stack(key, refs, packed and not key.endswith("_bias"))
            return
        mla = self._weight_map.mla(name) if self._roles[name] == "attention" else None
        if mla is not None:
            yield from (Stack("k_b", mla.k_b, packed), Stack("v_b", mla.v_b, packed))
        packed = packed and (self._roles[name] == "router" or type(module).__name__ in _PACKED_CLASSES)
        for key, _ in own_tensors(module):
            yield Stack(key, (self._weight_map.parameter(f"{name}.{key}"),), packed and key == "weight")

    def _format(self, rule: Rule, name: str, stack: Stack) -> WeightFormat:
        """The format in which a matrix is held."""
        if self._roles[name] == "router":
            return get_format("F32")  # small, and its choice flips on the smallest error
        stored = {ref.format.name for ref in stack.refs}
        wanted = rule.format_of(stack.projection if stack.key != "weight" else projection_of(name))
        if wanted == KEEP:
            if len(stored) > 1:
                raise PlanError(
                    f"'{name}': the experts' '{stack.key}' is stored in several formats ({', '.join(sorted(stored))}): "
                    "choose one by a rule, for example 'match: {role: experts}' with 'format: Q8_0'."
                )
            return stack.refs[0].format
        fmt = get_format(wanted)
        problem = "" if stored == {wanted} else why_not_writable(fmt)
        if problem:
            held = ", ".join(sorted(stored))
            raise RuleError(self._rules.source, rule.line, f"'{name}.{stack.key}' is stored as {held}, and {problem}.")
        if stack.shape[-1] % fmt.block_size and stored != {wanted}:
            self._kept.setdefault((rule, wanted), []).append(f"{name}.{stack.key}")
            return stack.refs[0].format
        return fmt

    def _is_tied(self, head: nn.Module) -> bool:
        return head.weight is self._model.get_input_embeddings().weight

    def _active_share(self, name: str) -> float:
        """Share of a MoE block's routed experts that one token uses."""
        config = self._model.config.get_text_config()
        active = getattr(config, "num_experts_per_tok", None)
        if isinstance(active, list | tuple):  # one number per layer
            active = active[int(next(part for part in name.split(".") if part.isdecimal()))]
        if not isinstance(active, int) or active < 1:
            raise PlanError(f"'{name}': the config's num_experts_per_tok is {active}: expected a positive number.")
        return min(1.0, active / self._weight_map.experts(name).num_experts)

    def _warnings(self, choice: Choice, plan: Plan, units: Sequence[Unit]) -> Iterator[str]:
        yield from choice.notes
        used = {unit.rule for unit in units}
        for rule in self._rules.rules:
            if rule not in used:
                where = f"{self._rules.source}:{rule.line}"
                yield f"{where}: the rule for {rule} places nothing: check its pattern and its order."
        for (rule, fmt), tensors in self._kept.items():
            block = get_format(fmt).block_size
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            yield (
                f"{self._rules.source}:{rule.line}: {tensors[0]}{more} cannot be held in {fmt}, whose blocks take "
                f"{block} columns at a time: kept in the file's format."
            )
        if self._vram is not None and not plan.uses_gpu:
            is_missed = self._rules.may_use_gpu and not self._hardware.gpus
            found = "no GPU was found" if is_missed else "nothing is placed on a GPU"
            yield f"--vram has no effect: {found}."
        needed, available = plan.required_bytes(), self._hardware.dram_available
        if available * COMFORT < needed <= available:
            yield f"the plan takes {needed / available:.0%} of the {format_bytes(available)} that are available."
