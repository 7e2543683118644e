"""Grammars: whatever is drawn under them has their form; what cannot be used is refused with a reason."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.serving.tokenizers_for_tests import demo_tokenizer, sentencepiece_like, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from moesaic.engine.serving.grammar import GrammarMatcher, GrammarVocabulary, compile_grammar
from moesaic.engine.serving.grammar_checks import check_grammar
from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.engine.serving.sampler import RequestSampler, sample
from moesaic.engine.serving.text import Detokenizer
from moesaic.errors import GenerationError, LogitsError, RequestError, TokenizerError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerBase:
    return demo_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(demo: PreTrainedTokenizerBase) -> GrammarVocabulary:
    """Rows of the logits are padded, as they often are; two tokens end an answer."""
    return GrammarVocabulary(demo, 3328, [1, 0])


def draw(tokenizer: PreTrainedTokenizerBase, vocabulary: GrammarVocabulary, grammar: Grammar, seed: int) -> str | None:
    """Text of random tokens under a grammar; None if it is not complete after 400."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=1.0, grammar=grammar)
    matcher = compile_grammar(grammar, vocabulary).matcher()
    sampler = RequestSampler(params, {}, vocabulary.vocab_size, [], seed, matcher)
    detokenizer, text = Detokenizer(tokenizer, params), ""
    for _ in range(400):
        rows = torch.randn(1, vocabulary.vocab_size, generator=generator) * 2
        [token], _ = sample(rows, [sampler])
        if token in vocabulary.source.eos_ids:
            assert matcher.is_complete
            sampler.accept(token)
            assert matcher.is_finished
            break
        sampler.accept(token)
        text += detokenizer.push([token])
        if matcher.is_finished:
            assert matcher.is_complete
            break
    return text + detokenizer.finish() if matcher.is_complete else None


def follows_schema(value: Any) -> bool:
    """SCHEMA, by hand."""
    return (
        isinstance(value, dict)
        and {"name", "age"} <= value.keys() <= {"name", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(value.get("tags", [])) <= 3
        and all(tag in ("a", "b", 3) for tag in value.get("tags", []))
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_schema(demo: PreTrainedTokenizerBase, vocabulary: GrammarVocabulary, seed: int) -> None:
    text = draw(demo, vocabulary, Grammar("json_schema", json.dumps(SCHEMA)), seed)
    assert text is not None
    assert follows_schema(json.loads(text)), text


@pytest.mark.parametrize("size", [259, 300])
def test_a_schema_byte_by_byte(size: int) -> None:
    tiny = tiny_tokenizer()
    for seed in range(5):
        text = draw(tiny, GrammarVocabulary(tiny, size), Grammar("json_schema", json.dumps(SCHEMA)), seed)
        assert text is not None
        assert follows_schema(json.loads(text)), text


def test_a_schema_with_sentencepiece() -> None:
    tokenizer = sentencepiece_like("strip")
    done = [
        draw(tokenizer, GrammarVocabulary(tokenizer, 272), Grammar("json_schema", json.dumps(SCHEMA)), seed)
        for seed in range(8)
    ]
    assert all(text is None or follows_schema(json.loads(text)) for text in done)
    assert any(done)


def test_any_json_object(demo: PreTrainedTokenizerBase, vocabulary: GrammarVocabulary) -> None:
    texts = [draw(demo, vocabulary, Grammar("json_object"), seed) for seed in range(8)]
    done = [text for text in texts if text is not None]
    assert done
    assert all(isinstance(json.loads(text), dict) for text in done)


@pytest.mark.parametrize("seed", range(4))
def test_a_regex_and_a_lark_grammar(demo: PreTrainedTokenizerBase, vocabulary: GrammarVocabulary, seed: int) -> None:
    text = draw(demo, vocabulary, Grammar("regex", r"(yes|no): [0-9]{2,4}(\.5)?"), seed)
    assert text is not None
    assert re.fullmatch(r"(yes|no): [0-9]{2,4}(\.5)?", text)
    lark = 'start: "<call>" call "</call>"\ncall: %json {"type": "object", "required": ["x"], "properties": {"x": ' + (
        '{"type": "boolean"}}, "additionalProperties": false}'
    )
    text = draw(demo, vocabulary, Grammar("lark", lark), seed)
    assert text is not None
    assert json.loads(text.removeprefix("<call>").removesuffix("</call>"))["x"] in (True, False)


def allowed(matcher: GrammarMatcher, size: int) -> list[int]:
    row = np.zeros(size, np.float32)
    matcher.mask_(row)
    return np.flatnonzero(row == 0).tolist()


def test_the_end_is_allowed_when_complete_and_only_the_end_when_finished() -> None:
    tiny = tiny_tokenizer()
    a, b, c = tiny.convert_tokens_to_ids(["a", "b", "c"])
    matcher = compile_grammar(Grammar("regex", "ab|abc"), GrammarVocabulary(tiny, 300)).matcher()
    states = []
    for token in (a, b, c, None):
        states.append((allowed(matcher, 300), matcher.is_complete, matcher.is_finished))
        if token is not None:
            matcher.accept(token)
    end = tiny.eos_token_id
    assert states == [([a], False, False), ([b], False, False), ([end, c], True, False), ([end], True, True)]


def test_copies_go_their_own_way() -> None:
    tiny = tiny_tokenizer()
    a, b = tiny.convert_tokens_to_ids(["a", "b"])
    compiled = compile_grammar(Grammar("regex", "(a|b)b"), GrammarVocabulary(tiny, 259))
    first = compiled.matcher()
    first.accept(a)
    second = first.copy()
    first.accept(b)
    assert (allowed(first, 259), allowed(second, 259)) == ([tiny.eos_token_id], [b])
    assert allowed(compiled.matcher(), 259) == [a, b]


def test_fewer_logits_than_tokens() -> None:
    """Tokens without a row cannot come; if there is no other, that answer ends with an error, and only that one."""
    tiny = tiny_tokenizer()
    a = tiny.convert_tokens_to_ids("a")
    compiled = compile_grammar(Grammar("regex", "(a|é)é"), GrammarVocabulary(tiny, a + 1))
    sampler = RequestSampler(SamplingParams(temperature=1.0), {}, a + 1, [], 0, compiled.matcher())
    [token], _ = sample(torch.zeros(1, a + 1), [sampler])
    assert token == a
    sampler.accept(a)
    with pytest.raises(LogitsError, match="no token is allowed"):
        sample(torch.zeros(1, a + 1), [sampler])


def test_a_token_that_is_not_allowed() -> None:
    tiny = tiny_tokenizer()
    matcher = compile_grammar(Grammar("regex", "ab"), GrammarVocabulary(tiny, 259)).matcher()
    with pytest.raises(GenerationError, match="the grammar cannot go on"):
        matcher.accept(tiny.convert_tokens_to_ids("z"))
    assert not matcher.is_finished
    sampler = RequestSampler(SamplingParams(), {}, 259, [], 0, matcher)
    with pytest.raises(LogitsError, match="the grammar cannot go on") as caught:
        sample(torch.zeros(2, 259), [RequestSampler(SamplingParams(), {}, 259, [], 0), sampler])
    assert caught.value.row == 1


def test_blanks_do_not_go_on_for_ever() -> None:
    tiny = tiny_tokenizer()
    space = tiny.convert_tokens_to_ids("Ġ")
    matcher = compile_grammar(Grammar("json_object"), GrammarVocabulary(tiny, 259)).matcher()
    matcher.accept(tiny.convert_tokens_to_ids("{"))
    for _ in range(80):
        matcher.accept(space)
    assert space not in allowed(matcher, 259)


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", '{"$ref": "https://example.org/s.json"}', "refers to 'https://example.org/s.json'"),
        ("json_schema", '{"items": [{"$ref": "file:///etc/passwd"}]}', "only references within it"),
        ("json_schema", '{"$ref": "other.json"}', "only references within it"),
        ("json_schema", '{"a": ', "no JSON"),
        ("json_schema", "[]", "neither an object"),
        ("json_schema", '"string"', "neither an object"),
        ("json_schema", nested(64), "nested too deeply"),
        ("json_schema", nested(10_000), "nested too deeply"),
        ("json_schema", json.dumps({"enum": list(range(20_001))}), "too large"),
        ("json_schema", " " * 131_073, "131073 bytes"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "#"}', "cannot be used"),
        ("json_schema", '{"pattern": "(?=x)"}', "look-around"),
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "a{1000000}", "too many expressions"),
        ("lark", "start: nobody", "unknown name"),
        ("lark", "", "cannot be used"),
    ],
)
def test_what_is_refused(vocabulary: GrammarVocabulary, kind: Any, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        compile_grammar(Grammar(kind, text), vocabulary)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        nested(63),
        '{"const": {"$ref": "https://example.org"}}',
        '{"properties": {"$ref": {"type": "string"}}}',
        '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}',
        "true",
    ],
)
def test_what_is_not_refused_by_the_checks(schema: str) -> None:
    check_grammar(Grammar("json_schema", schema))


def test_tokenizers_that_cannot() -> None:
    tiny = tiny_tokenizer()
    tiny.eos_token = None
    with pytest.raises(TokenizerError, match="a token that ends an answer"):
        GrammarVocabulary(tiny, 259)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        GrammarVocabulary(object(), 259)
