"""Templates from outside: what fails in them is told with its line, and nothing in them lasts or grows for ever."""

import re
import time

import pytest

from stepjax.errors import TokenError
from stepjax.processing import templates

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"


def render(template, is_chat=True, **variables):
    return templates.render(template, variables, name="the template 't'", is_chat=is_chat)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "cannot render: line 1: ZeroDivisionError: division by zero"),
        ("one\n{{ x.y.z }}", "cannot render: line 2: UndefinedError: 'str object' has no attribute 'y'"),
        ("{{ x + 1 }}", "cannot render: line 1: TypeError"),
        ("{{ {}['a'].b }}\n", "cannot render: line 1: UndefinedError"),
        ("{{ x.__class__.__mro__ }}", "cannot render: line 1: SecurityError"),
        ("\n{% if %}", "cannot render: line 2: TemplateSyntaxError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render: line 1: RecursionError"),
        ("{{" + "(" * 5000, "cannot render: .*RecursionError"),
        ("{{ x | nothing }}", "cannot render: line 1: TemplateAssertionError: No filter named 'nothing'"),
        ("{{ range(10 ** 9) }}", "cannot render: line 1: OverflowError"),
        ("{{ raise_exception('no system turns') }}", "refuses the conversation: no system turns"),
    ],
)
def test_failures_are_told_with_their_line(template, reason):
    with pytest.raises(TokenError, match=f"^the template 't' {reason}"):
        render(template, x="text")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS.replace("BODY", ""), "takes more than 0.3 seconds"),
        (LOOPS.replace("BODY", "{{ 'x' * 1000 }}"), "writes more than 8388608 characters"),
        ("{{ 7 ** (7 ** 12) }}", "takes more than 0.3 seconds"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "takes more than",
        ),
        ("{{ 'a' * 10 ** 10 }}", "takes more than 512 MiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "takes more than 512 MiB of memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "takes more than 512 MiB of memory"),
        ("{{ 'a' | center(10 ** 10) }}", "takes more than 512 MiB of memory"),
        ("{{ [1] * 10 ** 10 }}", "takes more than 512 MiB of memory"),
        ("{{ lipsum(n=10 ** 7) }}", "takes more than"),
    ],
)
def test_nothing_lasts_or_grows_for_ever(template, reason, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(TokenError, match=f"^the template 't' .*{re.escape(reason)}"):
        render(template)
    assert time.monotonic() - begin < 20  # of a busy machine
    assert render("{{ x }}", x="as before") == "as before"


def test_chat_templates_are_rendered_as_transformers_does():
    assert render("{% if 1 %}\n  {% for c in x %}\n{{ c }}{% break %}\n{% endfor %}\n{% endif %}\n", x="ab") == "a"
    assert render("{% generation %}{{ x }}{% endgeneration %}", x="said") == "said"
    assert render("{{ x | tojson }}", x={"b": "<ä>", "a": None}) == '{"b": "<ä>", "a": null}'
    assert render("{{ x | tojson(indent=1, sort_keys=true) }}", x={"b": 1, "a": 2}) == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ strftime_now('%Y') }}").isdigit()
    assert render("{{ nothing }}") == ""
    assert render("{{ x }}", x=[render, "a"]) == "['<function>', 'a']"
    assert render("{{ x }}", x="\ud800") == "\ud800"


def test_other_templates_are_jinjas():
    assert render("{% if 1 %}\n  x\n{% endif %}\n", is_chat=False) == "\n  x\n"
    with pytest.raises(TokenError, match="'nothing' is undefined"):
        render("{{ nothing }}", is_chat=False)


def test_variables_must_be_json():
    with pytest.raises(TokenError, match="as JSON: keys must be"):
        render("", x={(1, 2): 3})
