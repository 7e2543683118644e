from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moesaic.errors import RequestError, TokenizerError
from moesaic.server.template import ChatTemplate, TemplateLimits

LIMITS = TemplateLimits(seconds=0.5, characters=1 << 20, items=100_000)
TEN = "{% set l = [1,2,3,4,5,6,7,8,9,0] %}"
HOSTILE = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops of literals": TEN + "{% for a in l %}" * 9 + "{% endfor %}" * 9,
    "output": "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    "output into a variable": "{% set a %}{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
    "repetition": "{{ 'a' * n }}",
    "repeated list": "{{ [1] * n }}",
    "doubling with ~": "{% set s = namespace(s='a') %}{% for i in range(99) %}{% set s.s = s.s ~ s.s %}{% endfor %}",
    "doubling with +": "{% set s = namespace(s='a') %}{% for i in range(99) %}{% set s.s = s.s + s.s %}{% endfor %}",
    "doubling of lists": "{% set s = namespace(s=[1]) %}{% for i in range(99) %}{% set s.s = s.s + s.s %}{% endfor %}",
    "doubling line by line": "{% set a = 'x' %}" + "{% set a = a ~ a %}" * 60,
    "recursion": "{% macro m(s) %}{{ m(s) }}{% endmacro %}{{ m('a') }}",
    "growing recursion": "{% macro m(s) %}{{ m(s ~ s) }}{% endmacro %}{{ m('a') }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "products": "{% set s = namespace(n=9) %}{% for i in range(999) %}{% set s.n = s.n * s.n %}{% endfor %}",
    "format filter": "{{ '%0999999999d' | format(1) }}",
    "format method": "{{ '{:>9999999999}'.format('') }}",
    "format operator": "{{ '%0999999999d' % 1 }}",
    "format width": "{{ '%0*d' % (n, 1) }}",
    "center": "{{ 'a' | center(n) }}",
    "ljust": "{{ 'a'.ljust(n) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "translate": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "replace filter": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "join": "{{ ('x' * 100000) | list | join('y' * 100000) }}",
    "join of long texts": "{{ ''.join(['x' * 100000] * 10000) }}",
    "JSON": "{{ [1] | tojson(indent=n) }}",
    "nested width": "{{ '{:{}}'.format('', n) }}",
    "zfill": "{{ '1'.zfill(n) }}",
    "bytes": "{{ (1).to_bytes(n, 'big') }}",
    "bytes of text": "{{ 'a'.encode() * n }}",
    "format of long texts": "{{ ('{0}' * 100000).format('y' * 100000) }}",
    "long lists": "{% set s = namespace(s=[]) %}{% for i in range(999) %}{% set s.s = s.s + [1] * 999 %}{% endfor %}",
    "batch": "{{ [1] | batch(n, 'x') | list }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "mutation": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "nonsense": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], LIMITS)
    begin = time.monotonic()
    with pytest.raises(RequestError, match="the chat template") as caught:
        template.render({"messages": [], "n": 10**10})
    assert time.monotonic() - begin < 5
    assert caught.value.param == "messages"
    assert "Traceback" not in str(caught.value)


def test_a_refusal_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('only two roles') }}")
    with pytest.raises(RequestError, match="refuses this conversation: only two roles"):
        template.render({})


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ a | no_such_filter }}", "{{ '" + "{% if a %}" * 3, "{% if " + "(" * 5000]
)
def test_damaged_templates(source: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template is damaged"):
        ChatTemplate(source)


MESSAGES = [
    {"role": "system", "content": "Be <good>.", "extra": ["a", {"b": None}]},
    {"role": "user", "content": " 'ä' \n"},
    {"role": "assistant", "content": "x</think>y"},
]
HARMLESS = {
    "loops": "{% for m in messages %}{{ loop.index0 }}{{ m.role }}{% if loop.last %}!{% endif %}{% endfor %}",
    "trimming": "{%- for m in messages %}\n  {%- if m.role %}\n{{ m['content'] | trim }}\n  {%- endif %}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'ä' | tojson(ensure_ascii=True) }}",
    "strings": "{{ messages[2].content.split('</think>')[-1] ~ 1 ~ none }}{{ 'a%s' % 'b' }}{{ '%s' | format(2) }}",
    "macros": "{% macro m(a, context='c') %}<{{ a }}{{ context }}>{% endmacro %}{{ m('x') + m('y', context='z') }}",
    "namespaces": "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 2 * 3 %}{% endfor %}{{ n.a }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}"
    "{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "tests": "{{ messages[0].extra is iterable and messages is not mapping }}{{ x is defined }}{{ tools is none }}",
    "recursive": "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }};{% endfor %}",
    "names": "{{ bos_token }}{{ strftime_now('%Y') }}{{ dict(a=1).a }}{{ (range(3) | list)[1:] }}",
    "blocks": "{% set a %}<{{ messages[0].content }}>{% endset %}{{ a }}{% filter upper %}b{% endfilter %}",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_templates_give_what_transformers_gives(name: str) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "tools": None, "documents": None, "add_generation_prompt": True}
    options = {key: value for key, value in variables.items() if key not in ("tools", "documents")}
    rendered, _ = render_jinja_template([MESSAGES], chat_template=HARMLESS[name], **options)
    assert ChatTemplate(HARMLESS[name]).render({**variables, "messages": MESSAGES}) == rendered[0]


@pytest.mark.parametrize("text", ["{12345678}", "%d 12345678", "{:9999999}", "x" * 1_000_000, "< " * 100_000])
def test_texts_of_clients_are_no_formats(text: str) -> None:
    source = (
        "{% macro m(a) %}{{ a }}{% endmacro %}{% set n = namespace(a=text, b=number) %}"
        "{{ m(number) }}{{ m(n.a) | length }}"
        "{{ text | trim | replace('<think>', '') | length }}{{ text.strip().split('</think>')[-1] | length }}"
        "{{ text.startswith(text) }}{{ [text, text] | join(', ') | length }}"
        "{{ ('%s %d' % (text, number)) | length }}"
        "{{ 'a{}b'.format(text) | length }}{{ number | tojson }}{{ {'a': text} | tojson | length }}{{ text ~ number }}"
    )
    rendered = ChatTemplate(source).render({"text": text, "number": 123_456_789})
    assert rendered.endswith(text + "123456789")


def test_limits_hold_for_every_rendering_anew() -> None:
    template = ChatTemplate("{% for i in range(9) %}{{ 'x' * 100000 }}{% endfor %}", LIMITS)
    for _ in range(5):
        assert len(template.render({})) == 900_000
