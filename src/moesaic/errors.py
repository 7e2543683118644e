"""The exception tree of Moesaic.

    MoesaicError
    ├── ConfigError                a setting, option or environment variable has a bad value
    ├── ModelNotFoundError         MODEL names nothing that can be opened
    ├── CheckpointError            a model file is damaged, hostile or incomplete (names file and tensor)
    ├── UnsupportedFormatError     a weight format that we cannot read or write
    ├── QuantizationError          weights that the format asked for cannot hold
    ├── UnsupportedModelError      an architecture, or a feature of one, that we cannot run
    ├── TokenizerError             no tokenizer can be made for the model
    ├── PlanError                  a placement cannot be made
    │   ├── RuleError              a placement file is wrong (names file and line)
    │   └── PlanDoesNotFitError    the plan needs more memory than the machine has
    ├── KernelError                a native kernel was called wrongly or failed
    │   └── ExpertTimeoutError     the CPU and the GPU waited for each other too long
    └── GenerationError            a request cannot be answered
        ├── LogitsError            no next token can be chosen for an answer (names its row of the step)
        ├── RequestError           what it asks for is wrong or too much (names the parameter)
        │   └── ContextError       its prompt leaves no room for an answer in the context
        ├── OverloadedError        too many requests wait already; says when to come back
        ├── VramError              the GPU's memory does not suffice for a step; a smaller one may go
        └── EngineDeadError        the engine that would answer has ended

A message names the file, tensor or rule, what was found, what was expected, and what to do next. This module knows
nothing else of the package.
"""

from __future__ import annotations

import os

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "EngineDeadError",
    "ExpertTimeoutError",
    "GenerationError",
    "KernelError",
    "LogitsError",
    "ModelNotFoundError",
    "MoesaicError",
    "OverloadedError",
    "PlanDoesNotFitError",
    "PlanError",
    "QuantizationError",
    "RequestError",
    "RuleError",
    "TokenizerError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "VramError",
]


class MoesaicError(Exception):
    """Base of every error that Moesaic raises on purpose; the command line prints it without a traceback."""


class ConfigError(MoesaicError):
    """A setting, an option or an environment variable has a value that cannot be used."""


class ModelNotFoundError(MoesaicError):
    """MODEL names no file, folder, built-in model or hub repository that can be opened."""


class CheckpointError(MoesaicError):
    """A model file is damaged, hostile or incomplete.

    Args:
        file: the file in which the defect was found.
        message: what was found, what was expected and what to do.
        tensor: the tensor (or metadata key) concerned, if one is.
    """

    def __init__(self, file: str | os.PathLike[str], message: str, tensor: str | None = None) -> None:
        self.file = os.fspath(file)
        self.tensor = tensor
        where = self.file if tensor is None else f"{self.file}: '{tensor}'"
        super().__init__(f"{where}: {message}")


class UnsupportedFormatError(MoesaicError):
    """A weight format (quantisation type or dtype) that this version cannot read or write."""


class QuantizationError(MoesaicError):
    """Weights that the format asked for cannot hold: not finite, or too large for its scales."""


class UnsupportedModelError(MoesaicError):
    """An architecture, or a feature of one, that this version cannot run."""


class TokenizerError(MoesaicError):
    """No tokenizer can be made from what the model's files hold."""


class PlanError(MoesaicError):
    """A placement cannot be made."""


class RuleError(PlanError):
    """A placement file is wrong.

    Args:
        file: the YAML file.
        line: line in the file, counted from 1.
        message: what was found and what was expected.
    """

    def __init__(self, file: str | os.PathLike[str], line: int, message: str) -> None:
        self.file = os.fspath(file)
        self.line = line
        super().__init__(f"{self.file}:{line}: {message}")


class PlanDoesNotFitError(PlanError):
    """The plan needs more memory than the machine has; the message names the shortfall in GiB."""


class KernelError(MoesaicError):
    """A native kernel was called with shapes, types or pointers that it cannot take, or a worker failed."""


class ExpertTimeoutError(KernelError):
    """A step on the GPU and the experts on the CPU waited for each other too long; the step is lost, no more."""


class GenerationError(MoesaicError):
    """A request cannot be answered, for example because the prompt is longer than the context."""


class LogitsError(GenerationError):
    """No next token can be chosen for one answer of a step; nothing has changed for the others.

    Args:
        message: what was found.
        row: which answer of the step.
    """

    def __init__(self, message: str, row: int) -> None:
        self.row = row
        super().__init__(message)


class RequestError(GenerationError):
    """What a request asks for is wrong, or more than it can have.

    Args:
        message: what was found, what was expected.
        param: the parameter concerned, by its name in `SamplingParams` or in the request.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class ContextError(RequestError):
    """A prompt leaves no room for an answer in the context; programs shorten a conversation when they are told so.

    Args:
        tokens: of the prompt.
        context_length: most tokens of prompt and answer together.
        counted: whether these are all; else there are more.
    """

    def __init__(self, tokens: int, context_length: int, counted: bool = True) -> None:
        # Programs look for both beginnings: "prompt is too long", "maximum context length is N tokens".
        super().__init__(
            f"the prompt is too long: it has {'' if counted else 'more than '}{tokens} tokens, but the maximum context "
            f"length is {context_length} tokens for prompt and answer together: shorten it.",
            "prompt",
        )


class OverloadedError(GenerationError):
    """Too many requests wait already.

    Args:
        message: what is full.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class VramError(GenerationError):
    """The GPU's memory does not suffice for a step; a smaller one, or the same one later, may go."""


class EngineDeadError(GenerationError):
    """The engine has ended, by an error of its own or because it was closed; no request is answered any more."""
