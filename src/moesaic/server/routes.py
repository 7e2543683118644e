"""Which routes there are: the one list of all APIs' modules."""

from __future__ import annotations

from dataclasses import replace

from moesaic.server.anthropic import messages
from moesaic.server.ollama import chat as ollama_chat
from moesaic.server.ollama import generate as ollama_generate
from moesaic.server.ollama import models as ollama_models
from moesaic.server.openai import chat, completions, models, responses
from moesaic.server.operation import Operation
from moesaic.server.options import ServerOptions
from moesaic.server.plain import description, health, home, metrics, tokens

__all__ = ["all_operations"]

_MODULES = (
    models,
    chat,
    completions,
    responses,
    messages,
    ollama_chat,
    ollama_generate,
    ollama_models,
    tokens,
    home,
    health,
    metrics,
    description,
)


def all_operations(options: ServerOptions) -> list[Operation]:
    """Everything that the server answers, as the options have it."""
    operations = [operation for module in _MODULES for operation in module.OPERATIONS]
    if options.public_metrics:
        operations = [replace(each, public=each.public or each.path == "/metrics") for each in operations]
    return operations
