"""What templates of every style read: which names are options, who wants content parts, who wants JSON as text."""

from __future__ import annotations

import pytest

from cuplama.text.chat_template import chat_template

VARIABLES = {
    "{{ messages }}{{ bos_token }}{{ raise_exception('x') }}{{ strftime_now('%Y') }}{{ range(3) }}": set(),
    "{% if not date_string is defined %}{% set date_string = '1' %}{% endif %}{{ date_string }}": {"date_string"},
    "{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}{{ tools }}": {"custom_tools", "tools"},
    "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{% for m in messages %}{{ loop.index }}{% endfor %}": set(),
    "{% macro f(x, y=z) %}{{ x }}{{ q }}{{ caller() }}{{ varargs }}{% endmacro %}{{ f(1) }}": {"z", "q"},
    "{% set a = a | default(1) %}{% generation %}{{ a }}{% endgeneration %}": {"a"},
    "{% if add_generation_prompt and enable_thinking is defined %}{% endif %}": {
        "add_generation_prompt",
        "enable_thinking",
    },
}


@pytest.mark.parametrize(("source", "names"), VARIABLES.items())
def test_variables(source: str, names: set[str]) -> None:
    assert chat_template(source).reading.variables == names


M = "{% for m in messages %}"
LOOPS = {
    M + "{% for part in m.content %}{% endfor %}{% endfor %}": True,
    M + "{% for part in m['content'] %}{% endfor %}{% endfor %}": True,
    M + "{% set c = m.content %}{% set d = c %}{% for part in d %}{% endfor %}{% endfor %}": True,
    M + "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{% endfor %}{% endfor %}": True,
    M + "{{ m.content | map(attribute='text') | join }}{% endfor %}": True,
    "{% macro f(x, c) %}{% for part in c %}{% endfor %}{% endmacro %}" + M + "{{ f(1, m.content) }}{% endfor %}": True,
    M + "{{ m.content | trim }}{% endfor %}": False,
    M + "{% for line in m.content.split('x') %}{% endfor %}{% for t in m.tools %}{% endfor %}{% endfor %}": False,
    M + "{% for k in other %}{% endfor %}{% endfor %}": False,
}


@pytest.mark.parametrize(("source", "loops"), LOOPS.items())
def test_loops_over_content(source: str, loops: bool) -> None:
    assert chat_template(source).reading.loops_over_content is loops


def test_content_tested_for_string() -> None:
    for test in ("m.content is string", "m['content'] is not string", "(m.content | trim) is string"):
        assert chat_template(M + f"{{% if {test} %}}{{% endif %}}{{% endfor %}}").reading.tests_content_for_string
    assert not chat_template(M + "{{ m.role is string }}{% endfor %}").reading.tests_content_for_string


CALL = M + "{% for call in m.tool_calls %}"
ARGUMENTS = {
    "{{ call.arguments | tojson }}": False,
    "{% for k, v in call.arguments | items %}{{ k }}{% endfor %}": False,
    "{% for k in call.arguments %}{{ call.arguments[k] }}{% endfor %}": False,
    "{{ call.function | tojson }}": False,
    "{{ 'x' + call.arguments | tojson }}": False,
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}": True,
    "{{ '```json' + call['function']['arguments'] + '```' }}": True,
    "{% set a = call.function.arguments %}{{ 'x' ~ a }}": True,
    "<call>{{ call.arguments }}</call>": True,
}


@pytest.mark.parametrize(("source", "text"), ARGUMENTS.items())
def test_arguments_as_text(source: str, text: bool) -> None:
    assert chat_template(CALL + source + "{% endfor %}{% endfor %}").reading.wants_arguments_as_text is text


def test_a_template_is_compiled_once() -> None:
    assert chat_template("{{ messages }}") is chat_template("{{ messages }}")
