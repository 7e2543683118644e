"""Parameters of a request: what cannot be meant is refused before anything is computed, and names its parameter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "'hot': expected a number"),
        ("temperature", math.nan, "nan: expected at least 0 and at most 100"),
        ("temperature", -1, "at least 0"),
        ("top_p", math.inf, "at most 1"),
        ("top_k", 1.5, "1.5: expected a whole number"),
        ("max_tokens", "5", "'5': expected a whole number"),
        ("max_tokens", math.inf, "whole number"),
        ("max_tokens", -(10**400), "at least 0"),
        ("n", 1000, "at most 128"),
        ("seed", "x", "'x': expected a whole number"),
        ("stop", 5, "5: expected texts"),
        ("stop", [b"x"], "expected texts"),
        ("stop", "", "empty string"),
        ("stop_token_ids", 3, "expected numbers of tokens"),
        ("stop_token_ids", ["a"], "expected numbers of tokens"),
        ("logit_bias", {"x": 1.0}, "number for each number"),
        ("logit_bias", {1: math.nan}, "between -100 and 100"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert str(caught.value).startswith(name)


def test_what_programs_rightly_give() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    params = SamplingParams(n=np.int64(2), temperature=np.float32(0.5), top_k=0, seed=-1, max_tokens=10**400)  # type: ignore[arg-type]
    assert (params.n, float(params.temperature or 0)) == (2, 0.5)
    SamplingParams(stop=["a", "b"], stop_token_ids=[np.int32(1)], logit_bias={np.int64(3): 1})  # type: ignore[arg-type]
