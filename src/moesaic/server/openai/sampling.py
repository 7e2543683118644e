"""How an answer is chosen: the fields that all of OpenAI's routes share, and those that open servers commonly add.

It knows no conversations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta

from moesaic.engine.serving.params import MAX_LOGPROBS, Grammar, SamplingParams
from moesaic.errors import RequestError
from moesaic.server.errors import ApiError
from moesaic.server.openai.formats import StructuredOutputs, named_grammars
from moesaic.server.openai.unsupported import UnsupportedSampling

__all__ = ["Count", "SamplingFields", "TokenId", "TopLogprobs", "make_params"]

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(UnsupportedSampling, kw_only=True):
    """Fields of a body that mean the same on every route; None leaves the choice to the model or to the default."""

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


_PLAIN = ("temperature", "top_p", "min_p", "repetition_penalty", "seed")
"""Fields of SamplingParams by the same name, in which None means the same."""
_DEFAULTED = ("presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos", "skip_special_tokens")
"""Fields in which None means the default of SamplingParams."""


def make_params(
    body: SamplingFields,
    *,
    n: int = 1,
    max_tokens: int | None = None,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    names: Mapping[str, str] | None = None,
) -> SamplingParams:
    """The parameters of a body.

    Args:
        body: decoded.
        n: answers.
        max_tokens: of each answer.
        logprobs: alternatives, or None for no logprobs.
        grammar: that the API's own field asks for.
        names: what the route calls parameters that have another name in SamplingParams, for errors.

    Raises:
        RequestError: a value is out of range.
        ApiError: several fields say what the text has to look like.
    """
    values: dict[str, Any] = {name: getattr(body, name) for name in _PLAIN}
    values |= {name: value for name in _DEFAULTED if (value := getattr(body, name)) is not None}
    try:
        return SamplingParams(
            n=n,
            max_tokens=max_tokens,
            top_k=None if body.top_k is None else max(body.top_k, 0),  # -1 is how vLLM writes "all"
            logit_bias=body.logit_bias or {},
            stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            logprobs=logprobs,
            grammar=_one_grammar(body, grammar, (names or {}).get("grammar", "response_format")),
            **values,
        )
    except RequestError as error:
        name = (names or {}).get(error.param or "")
        if name is None:
            raise
        raise RequestError(str(error).replace(str(error.param), name, 1), name) from None


def _one_grammar(body: SamplingFields, own: Grammar | None, name: str) -> Grammar | None:
    """The grammar that a body asks for, in whichever way it does."""
    asked = [] if own is None else [(name, own)]
    wanted = body.structured_outputs
    if wanted is not None:
        asked += named_grammars("structured_outputs.", wanted.json, wanted.regex, wanted.choice, wanted.grammar)
        if wanted.json_object:
            asked.append(("structured_outputs.json_object", Grammar("json_object")))
    asked += named_grammars("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if len(asked) > 1:
        first, second = asked[0][0], asked[1][0]
        raise ApiError(400, f"{first} and {second} are both given: expected one form for the text.", param=second)
    return asked[0][1] if asked else None
