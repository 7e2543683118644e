"""Placement: (model, checkpoint, rules, hardware) -> a plan, before anything is loaded.

It knows roles, formats, sizes and memory. It loads no weight and replaces no module. Names are imported on first use,
so that looking at the hardware needs neither torch nor the native extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.placement.hardware import Gpu, Hardware, detect_gpus, detect_hardware
    from moesaic.placement.plan import Placement, Plan
    from moesaic.placement.planner import make_plan
    from moesaic.placement.roles import ROLES, module_roles
    from moesaic.placement.rules import TEMPLATES, Rule, Rules, load_plan
    from moesaic.placement.vram import DEFAULT_CONTEXT, VramBudget

__all__ = [
    "DEFAULT_CONTEXT",
    "ROLES",
    "TEMPLATES",
    "Gpu",
    "Hardware",
    "Placement",
    "Plan",
    "Rule",
    "Rules",
    "VramBudget",
    "detect_gpus",
    "detect_hardware",
    "load_plan",
    "make_plan",
    "module_roles",
]

_HOMES = {
    "DEFAULT_CONTEXT": "vram",
    "ROLES": "roles",
    "TEMPLATES": "rules",
    "Gpu": "hardware",
    "Hardware": "hardware",
    "Placement": "plan",
    "Plan": "plan",
    "Rule": "rules",
    "Rules": "rules",
    "VramBudget": "vram",
    "detect_gpus": "hardware",
    "detect_hardware": "hardware",
    "load_plan": "rules",
    "make_plan": "planner",
    "module_roles": "roles",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic.placement' has no attribute '{name}'")
    return getattr(importlib.import_module(f"moesaic.placement.{_HOMES[name]}"), name)
