"""Makes a plan: applies rules to a stock model on the meta device and adds up what every module will take.

It reads shapes and formats only, never a weight. It does not know what a replaced module looks like inside, only which
kinds of modules have a Moesaic implementation and that the matrices of those are held packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesaic import _native
from moesaic.errors import PlanError, RuleError
from moesaic.placement.hardware import Hardware
from moesaic.placement.plan import Implementation, Placement, Plan
from moesaic.placement.roles import module_roles
from moesaic.placement.rules import KEEP, Rule, Rules
from moesaic.placement.table import format_bytes
from moesaic.quant import WeightFormat, get_format

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from moesaic.models import TensorRef, WeightMap

__all__ = ["make_plan"]

_FLOAT_BYTES = 4  # vectors, and everything that stays a torch tensor, are float32 on the CPU
# Blocks that get an entry even without tensors of their own, because the loader may replace them as a whole.
_BLOCK_ROLES = frozenset({"attention", "router", "mlp", "shared_experts", "experts"})
_PACKED_CLASSES = frozenset({"Linear", "Embedding"})
_COMFORT = 0.9  # share of the available memory above which a plan that fits is still worth a warning


def make_plan(model: PreTrainedModel, weight_map: WeightMap, rules: Rules, hardware: Hardware) -> Plan:
    """Place every module of a model.

    Args:
        model: the stock Hugging Face model on the meta device.
        weight_map: formats and shapes of the checkpoint's tensors.
        rules: which implementation, device and format each module gets.
        hardware: what the plan is made for.

    Raises:
        RuleError: a rule asks for what a module that it matches cannot do.
        PlanError: the model or its checkpoint holds something that cannot be placed.
    """
    return _Planner(model, weight_map, rules, hardware).plan()


@dataclass(frozen=True, slots=True)
class _Stack:
    """Equal tensors of one module (one for most, one per expert for experts) as the checkpoint holds them."""

    key: str
    refs: Sequence[TensorRef]
    packed: bool  # a matrix that a Moesaic implementation holds packed; anything else becomes float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.refs[0].shape

    @property
    def projection(self) -> str:
        return self.key.removesuffix("_proj")


class _Planner:
    """One run of `make_plan`."""

    def __init__(self, model: PreTrainedModel, weight_map: WeightMap, rules: Rules, hardware: Hardware) -> None:
        self._model, self._weight_map, self._rules, self._hardware = model, weight_map, rules, hardware
        self._roles = module_roles(model)
        self._used: set[Rule] = set()
        self._embedding_formats: dict[str, str] = {}
        self._kept: dict[tuple[Rule, str], list[str]] = {}  # (rule, format) -> tensors that cannot take that format

    def plan(self) -> Plan:
        entries: dict[str, Placement] = {}
        for name, module in self._model.named_modules():
            if self._is_unit(name, module):
                entries[name] = self._place(name, module)
        kv_bytes = sum(
            _kv_bytes(module, entries[name].implementation)
            for name, module in self._model.named_modules()
            if self._roles[name] == "attention" and name in entries
        )
        plan = Plan(self._rules.source, type(self._model).__name__, tuple(entries.values()), kv_bytes)
        return replace(plan, warnings=tuple(self._warnings(plan)))

    def _is_unit(self, name: str, module: nn.Module) -> bool:
        parent = name.rpartition(".")[0]
        if parent and name.endswith(".kv_b_proj") and self._weight_map.mla(parent) is not None:
            return False  # the attention's own entry has k_b and v_b instead
        role = self._roles[name]
        if role in _BLOCK_ROLES and self._roles[parent] != role:
            return True
        return next(_own_tensors(module), None) is not None

    def _place(self, name: str, module: Any) -> Placement:
        role, class_name = self._roles[name], type(module).__name__
        rule = self._rules.find(name, role, class_name)
        self._used.add(rule)
        implementation = self._implementation(rule, name, module)
        formats: dict[str, str] = {}
        nbytes = 0
        for stack in self._stacks(name, module, implementation):
            fmt = self._format(rule, name, stack) if stack.packed else get_format("F32")
            formats[stack.key] = fmt.name
            nbytes += len(stack.refs) * _nbytes(fmt, stack)
        per_token = nbytes
        if role == "experts":
            per_token = math.ceil(nbytes * self._active_share(name))
        elif role == "embedding":
            per_token = nbytes // int(module.weight.shape[0])  # one row
            self._embedding_formats = formats
        elif role == "lm_head" and self._is_tied(module) and formats == self._embedding_formats:
            nbytes = 0  # it shares the embedding's memory
        return Placement(name, role, class_name, implementation, "cpu", formats, nbytes, per_token)

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

    def _has_own_implementation(self, name: str, module: nn.Module) -> bool:
        role = self._roles[name]
        if role in ("experts", "router") or (role in _BLOCK_ROLES and next(module.children(), None) is not None):
            return True
        class_name = type(module).__name__
        return class_name in _PACKED_CLASSES or class_name.endswith("RMSNorm")

    def _stacks(self, name: str, module: nn.Module, implementation: Implementation) -> Iterator[_Stack]:
        """The tensors that the module owns, as the checkpoint holds them."""
        packed = implementation == "moesaic"
        if self._roles[name] == "experts":
            for key, refs in self._weight_map.experts(name).named().items():
                yield _Stack(key, refs, packed and not key.endswith("_bias"))
            return
        mla = self._weight_map.mla(name) if self._roles[name] == "attention" else None
        if mla is not None:
            yield from (_Stack("k_b", mla.k_b, packed), _Stack("v_b", mla.v_b, packed))
        packed = packed and (self._roles[name] == "router" or type(module).__name__ in _PACKED_CLASSES)
        for key, _ in _own_tensors(module):
            yield _Stack(key, (self._weight_map.parameter(f"{name}.{key}"),), packed and key == "weight")

    def _format(self, rule: Rule, name: str, stack: _Stack) -> WeightFormat:
        """The format in which a matrix is held."""
        if self._roles[name] == "router":
            return get_format("F32")  # small, and its choice flips on the smallest error
        stored = {ref.format.name for ref in stack.refs}
        wanted = rule.format_of(stack.projection if stack.key != "weight" else _projection(name))
        if wanted == KEEP:
            if len(stored) > 1:
                raise PlanError(
                    f"'{name}': the experts' '{stack.key}' is stored in several formats ({', '.join(sorted(stored))}): "
                    "choose one by a rule, for example 'match: {role: experts}' with 'format: Q8_0'."
                )
            return stack.refs[0].format
        fmt = get_format(wanted)
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

    def _warnings(self, plan: Plan) -> Iterator[str]:
        for rule in self._rules.rules:
            if rule not in self._used:
                where = f"{self._rules.source}:{rule.line}"
                yield f"{where}: the rule for {rule} places nothing: check its pattern and its order."
        for (rule, fmt), tensors in self._kept.items():
            block = get_format(fmt).block_size
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            yield (
                f"{self._rules.source}:{rule.line}: {tensors[0]}{more} cannot be held in {fmt}, whose blocks take "
                f"{block} columns at a time: kept in the file's format."
            )
        needed, available = plan.required_bytes(), self._hardware.dram_available
        if available * _COMFORT < needed <= available:
            yield f"the plan takes {needed / available:.0%} of the {format_bytes(available)} that are available."


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if key not in module._non_persistent_buffers_set:
            yield key, buffer


def _projection(name: str) -> str:
    """The last word of a name without "_proj": "gate" of "model.layers.0.mlp.gate_proj"."""
    return name.rpartition(".")[2].removesuffix("_proj")


def _nbytes(fmt: WeightFormat, stack: _Stack) -> int:
    if stack.packed:
        *leading, rows, cols = stack.shape
        return math.prod(leading) * int(_native.packed_nbytes(fmt.ggml_type, rows, cols))
    return math.prod(stack.shape) * _FLOAT_BYTES


def _kv_bytes(attention: Any, implementation: Implementation) -> int:
    """Bytes of cache per position: MLA's latent and rotary key, or keys and values; 0 for linear attention.

    The stock MLA caches the expanded keys and values of all heads.
    """
    if hasattr(attention, "kv_lora_rank"):
        if implementation == "moesaic":
            return int(attention.kv_lora_rank + attention.qk_rope_head_dim) * _FLOAT_BYTES
        heads = attention.config.num_attention_heads
        return int(heads * (attention.qk_head_dim + attention.v_head_dim)) * _FLOAT_BYTES
    projections = (getattr(attention, "k_proj", None), getattr(attention, "v_proj", None))
    return sum(int(p.weight.shape[0]) * _FLOAT_BYTES for p in projections if p is not None)
