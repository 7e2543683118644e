"""Placement: (model, checkpoint, rules, hardware) -> a plan, before anything is loaded.

It knows roles, formats, sizes and memory. It loads no weight and replaces no module.
"""

from moesaic.placement.hardware import Hardware, detect_hardware
from moesaic.placement.plan import Placement, Plan
from moesaic.placement.planner import make_plan
from moesaic.placement.roles import ROLES, module_roles
from moesaic.placement.rules import TEMPLATES, Rule, Rules, load_plan

__all__ = [
    "ROLES",
    "TEMPLATES",
    "Hardware",
    "Placement",
    "Plan",
    "Rule",
    "Rules",
    "detect_hardware",
    "load_plan",
    "make_plan",
    "module_roles",
]
