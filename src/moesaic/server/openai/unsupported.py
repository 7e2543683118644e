"""Fields that would change the answer and are not supported: declared as such in the types of bodies, refused by name.

A field is declared with one of the types below; its values that ask for nothing are in the type, so that the OpenAPI
description has them too.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from msgspec import UNSET, Meta, Struct, UnsetType

from moesaic.server.bodies import refuse_unsupported
from moesaic.server.errors import ApiError

__all__ = [
    "OnlyAuto",
    "OnlyDisabled",
    "OnlyEmpty",
    "OnlyFalse",
    "OnlyMedium",
    "OnlyNull",
    "OnlyOne",
    "OnlyStandard",
    "OnlyText",
    "OnlyTrue",
    "OnlyZero",
    "UnsupportedSampling",
    "refuse",
]

_WHY = "Not supported; only values that ask for nothing are accepted."


def _only(*harmless: Any) -> Meta:
    return Meta(description=_WHY, extra_json_schema={"enum": [None, *harmless]})


OnlyNull = Annotated[Any, _only()]
OnlyFalse = Annotated[Any, _only(False)]
OnlyTrue = Annotated[Any, _only(True)]
OnlyZero = Annotated[Any, _only(0, 0.0, False)]
OnlyOne = Annotated[Any, _only(1, 1.0)]
OnlyEmpty = Annotated[Any, _only("", [], {})]
OnlyText = Annotated[Any, _only(["text"])]
OnlyAuto = Annotated[Any, _only("auto")]
OnlyDisabled = Annotated[Any, _only("disabled")]
OnlyMedium = Annotated[Any, _only("medium")]
OnlyStandard = Annotated[Any, _only("standard")]


class UnsupportedSampling(Struct, kw_only=True):
    """Ways of other servers to choose tokens, which change the answer."""

    logits_processors: OnlyEmpty | UnsetType = UNSET
    bad_words: OnlyEmpty | UnsetType = UNSET
    allowed_token_ids: OnlyEmpty | UnsetType = UNSET
    use_beam_search: OnlyFalse | UnsetType = UNSET
    length_penalty: OnlyOne | UnsetType = UNSET
    prompt_logprobs: OnlyNull | UnsetType = UNSET
    truncate_prompt_tokens: OnlyNull | UnsetType = UNSET
    include_stop_str_in_output: OnlyFalse | UnsetType = UNSET
    typical_p: OnlyOne | UnsetType = UNSET
    tfs_z: OnlyOne | UnsetType = UNSET
    top_a: OnlyZero | UnsetType = UNSET
    top_n_sigma: OnlyNull | UnsetType = UNSET
    mirostat: OnlyZero | UnsetType = UNSET
    dynatemp_range: OnlyZero | UnsetType = UNSET
    xtc_probability: OnlyZero | UnsetType = UNSET
    dry_multiplier: OnlyZero | UnsetType = UNSET
    repeat_penalty: OnlyOne | UnsetType = UNSET
    grammar: OnlyEmpty | UnsetType = UNSET
    json_schema: OnlyEmpty | UnsetType = UNSET
    lora: OnlyEmpty | UnsetType = UNSET


@cache
def _harmless(kind: type[Struct]) -> dict[str, tuple[Any, ...]]:
    """Of each unsupported field of a type, the values that ask for nothing."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            for meta in getattr(part, "__metadata__", ()):
                if isinstance(meta, Meta) and meta.description == _WHY and meta.extra_json_schema is not None:
                    found[name] = tuple(meta.extra_json_schema["enum"])
    return found


def refuse(body: Struct, where: str = "") -> None:
    """Refuse the unsupported fields of a body, as their types say.

    Args:
        body: decoded.
        where: it is in the whole body, such as "messages[0]".

    Raises:
        ApiError: 400 naming the first field that asks for something.
    """
    try:
        refuse_unsupported(body, _harmless(type(body)))
    except ApiError as error:
        if not where:
            raise
        message = f"{where}.{error.message}"
        raise ApiError(error.status, message, param=f"{where}.{error.param}", code=error.code) from None
