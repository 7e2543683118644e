"""Ollama's options and format as sampling parameters.

It does not know what is asked.
"""

from __future__ import annotations

from typing import Any

import msgspec

from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.server.bodies import refuse_unsupported
from moesaic.server.errors import ApiError
from moesaic.server.ollama.schema import Options

__all__ = ["sampling_params"]

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "mirostat": (None, 0),
    "tfs_z": (None, 1.0),
    "typical_p": (None, 1.0),
    "num_keep": (None, 0, 4),
    "penalize_newline": (None, True),
    "vocab_only": (None, False),
    "embedding_only": (None, False),
}


def sampling_params(
    options: Options | None,
    format: str | dict[str, Any] | None,
    logprobs: int | None,
    context_length: int,
) -> SamplingParams:
    """How a request is answered.

    Args:
        options: of the request.
        format: "" and None are any text, "json" an object, a schema what keeps to it.
        logprobs: so many alternatives to each token, or None.
        context_length: that is served.

    Raises:
        ApiError: 400 naming the option that is unsupported or too much.
        RequestError: `stop` holds an empty string.
    """
    options = options or Options()
    try:
        refuse_unsupported(options, _HARMLESS)
    except ApiError as error:
        raise ApiError(400, f"options.{error.message}", param=f"options.{error.param}", code=error.code) from None
    if options.num_ctx is not None and options.num_ctx > context_length:
        raise _wrong("num_ctx", f"expected at most {context_length}, the context that is served")
    stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    limit = options.num_predict
    return SamplingParams(
        max_tokens=None if limit is None or limit < 0 else limit,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=_repetition_penalty(options),
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        seed=None if options.seed == -1 else options.seed,
        stop=stop,
        logprobs=logprobs,
        grammar=_grammar(format),
    )


def _wrong(option: str, expected: str) -> ApiError:
    return ApiError(400, f"options.{option}: {expected}.", param=f"options.{option}")


def _repetition_penalty(options: Options) -> float | None:
    penalised = options.repeat_penalty not in (None, 1.0) or options.presence_penalty or options.frequency_penalty
    if options.repeat_last_n in (None, -1) or not penalised:
        return options.repeat_penalty
    if options.repeat_last_n == 0 and not (options.presence_penalty or options.frequency_penalty):
        return 1.0
    raise _wrong("repeat_last_n", "penalties of this server see the whole context: expected -1, or none of them")


def _grammar(format: str | dict[str, Any] | None) -> Grammar | None:
    if format is None or format == "":
        return None
    if isinstance(format, dict):
        return Grammar("json_schema", msgspec.json.encode(format).decode())
    if format == "json":
        return Grammar("json_object")
    raise ApiError(400, "format: expected 'json' or a JSON schema.", param="format")
