"""The JSON of Ollama's API, as far as this server takes it.

Source: Ollama's API reference (docs/api.md). Fields that make no difference to the answer are not listed, and so are
accepted: keep_alive (the model stays), verbose. It does not know what conversations become of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from moesaic.server.timings import Timings

__all__ = [
    "ChatAnswer",
    "ChatBody",
    "Details",
    "Function",
    "FunctionCall",
    "GenerateAnswer",
    "GenerateBody",
    "Logprob",
    "ModelEntry",
    "ModelList",
    "Options",
    "OutputMessage",
    "RunningEntry",
    "RunningList",
    "ShowAnswer",
    "ShowBody",
    "Think",
    "TokenProbability",
    "ToolBody",
    "ToolCallBody",
    "Turn",
    "Version",
]

Think = bool | Literal["low", "medium", "high", "max"]
"""Whether, and how much, the model thinks first."""


class Options(Struct, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen, and how Ollama would use its hardware. All others are refused.

    Attributes:
        temperature: 0 always takes the likeliest token.
        top_k: keep so many of the likeliest tokens.
        top_p: keep the likeliest tokens that together have this probability.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        seed: for the same answer again; -1 draws one.
        num_predict: most tokens of the answer; -1 and -2: until the model stops or the context is full.
        stop: the answer ends before the first of these.
        repeat_penalty: for tokens in prompt or answer.
        presence_penalty: for tokens in the answer.
        frequency_penalty: once for every time that a token is in the answer.
        num_ctx: at most the context that is served, which does not become smaller by it.
        mirostat: refused unless 0.
        mirostat_tau: of mirostat.
        mirostat_eta: of mirostat.
        tfs_z: refused unless 1.
        typical_p: refused unless 1.
        num_keep: refused unless 0 or 4, Ollama's own: nothing is ever dropped from a context.
        repeat_last_n: refused unless -1, the whole context, or without penalties; 0 switches `repeat_penalty` off.
        penalize_newline: refused unless true.
        num_batch: ignored, as are the following ones.
        num_gpu: ignored.
        main_gpu: ignored.
        low_vram: ignored.
        f16_kv: ignored.
        use_mmap: ignored.
        use_mlock: ignored.
        numa: ignored.
        num_thread: ignored.
        num_gqa: ignored.
        vocab_only: refused unless false.
        logits_all: ignored.
        embedding_only: refused unless false.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    num_predict: Annotated[int, Meta(ge=-2)] | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    num_ctx: Annotated[int, Meta(ge=1)] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    tfs_z: float | None = None
    typical_p: float | None = None
    num_keep: int | None = None
    repeat_last_n: int | None = None
    penalize_newline: bool | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    numa: bool | None = None
    num_thread: int | None = None
    num_gqa: int | None = None
    vocab_only: bool | None = None
    logits_all: bool | None = None
    embedding_only: bool | None = None


class FunctionCall(Struct, kw_only=True):
    """What is called."""

    name: str
    arguments: dict[str, Any] = {}
    index: int | UnsetType | None = UNSET


class ToolCallBody(Struct, kw_only=True, omit_defaults=True):
    """A call that the model made."""

    function: FunctionCall
    id: str | None = None


class Turn(Struct, kw_only=True):
    """A turn of a conversation. Images are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[Any] | UnsetType | None = UNSET


class Function(Struct, kw_only=True):
    """What a tool is to the model."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern="^[A-Za-z0-9_-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolBody(Struct, kw_only=True):
    """A tool that may be called."""

    function: Function
    type: Literal["function"] | None = "function"


class _Body(Struct, kw_only=True):
    """What both ways to ask have."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: Think | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    truncate: bool | UnsetType | None = UNSET
    shift: bool | UnsetType | None = UNSET


class ChatBody(_Body, kw_only=True):
    """A conversation to go on with; none only asks whether the model is there. Streamed unless `stream` is false."""

    messages: list[Turn] | None = None
    tools: list[ToolBody] | None = None


class GenerateBody(_Body, kw_only=True):
    """A prompt to answer; none only asks whether the model is there. Streamed unless `stream` is false."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | UnsetType | None = UNSET
    template: str | UnsetType | None = UNSET
    images: list[Any] | UnsetType | None = UNSET
    context: list[int] | UnsetType | None = UNSET


class TokenProbability(Struct, kw_only=True):
    """A token and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TokenProbability, kw_only=True, omit_defaults=True):
    """A token that was chosen, and the likeliest ones at its place."""

    top_logprobs: list[TokenProbability] = []


class OutputMessage(Struct, kw_only=True, omit_defaults=True):
    """New text, thoughts and calls."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    thinking: str = ""
    tool_calls: list[ToolCallBody] = []


class _Answer(Struct, kw_only=True, omit_defaults=True):
    """A piece of an answer, or all of it; with the last, counts and times in ns, and `timings`, this server's own."""

    model: str
    created_at: str
    done: bool | None = None
    done_reason: Literal["stop", "length", "load"] | None = None
    logprobs: list[Logprob] = []
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    timings: Timings | UnsetType = UNSET


class ChatAnswer(_Answer, kw_only=True, omit_defaults=True):
    """Of `/api/chat`."""

    message: OutputMessage


class GenerateAnswer(_Answer, kw_only=True, omit_defaults=True):
    """Of `/api/generate`."""

    response: str | None = None
    thinking: str = ""


class Details(Struct, kw_only=True):
    """What kind of model it is."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(Struct, kw_only=True):
    """A name of the model."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class ModelList(Struct):
    """Of `/api/tags`."""

    models: list[ModelEntry]


class RunningEntry(Struct, kw_only=True):
    """The model in memory; `expires_at` is far away."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    context_length: int


class RunningList(Struct):
    """Of `/api/ps`."""

    models: list[RunningEntry]


class ShowBody(Struct):
    """Which model; `name` is the older way."""

    model: str | None = None
    name: str | None = None


class ShowAnswer(Struct, kw_only=True):
    """What is known of the model."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]
    modified_at: str


class Version(Struct):
    """Of `/api/version`."""

    version: str
    moesaic: str
