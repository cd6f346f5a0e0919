"""Text with origins: every operation gives the text that `str` gives, and its characters keep their origins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

from dsv3_jax.data.traced import TEMPLATE, UNKNOWN, Traced, environment, origins_in, traced

TEXTS = strategies.text("ab \n<>Aßé", max_size=12)
OPERATIONS: list[Callable[[Any], Any]] = [
    lambda text: text.strip(),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("ab"),
    lambda text: text.split(),
    lambda text: text.split("a"),
    lambda text: text.split("a", 1),
    lambda text: text.split(None, 1),
    lambda text: text.rsplit("a", 1),
    lambda text: text.rsplit(None, 1),
    lambda text: text.splitlines(),
    lambda text: text.splitlines(True),
    lambda text: list(text.partition("a")),
    lambda text: list(text.rpartition("a")),
    lambda text: text.removeprefix("a"),
    lambda text: text.removesuffix("a"),
    lambda text: text.replace("a", "xy"),
    lambda text: text.replace("a", "", 1),
    lambda text: text[1:-1],
    lambda text: text[::-2],
    lambda text: list(text),
    lambda text: text + "z",
    lambda text: "z" + text,
    lambda text: text * 2,
    lambda text: 2 * text,
    lambda text: text.join(["p", "q"]),
    lambda text: text.lower(),
    lambda text: text.upper(),
    lambda text: text.title(),
]


def numbered(text: str) -> Traced:
    """Text in which every character has an origin of its own."""
    return Traced(text, "".join(chr(0x100 + i) for i in range(len(text))))


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(TEXTS, strategies.sampled_from(OPERATIONS))
def test_operations_are_those_of_str_and_keep_origins(text: str, operation: Callable[[Any], Any]) -> None:
    found, expected = operation(numbered(text)), operation(text)
    assert found == expected
    for part in found if isinstance(found, list) else [found]:
        assert isinstance(part, Traced)
        assert len(part.origins) == len(part)
        for character, origin in zip(str.__str__(part), part.origins, strict=True):
            if origin not in (TEMPLATE, UNKNOWN):
                assert text[ord(origin) - 0x100].upper()[:1] == character.upper()[:1]


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.lists(TEXTS, max_size=4), TEXTS)
def test_joining_keeps_the_origins_of_all(parts: list[str], between: str) -> None:
    joined = Traced(between, "-").join([Traced(part, str(i)) for i, part in enumerate(parts)])
    assert joined == between.join(parts)
    assert joined.origins == ("-" * len(between)).join(str(i) * len(part) for i, part in enumerate(parts))


def render(source: str, **variables: Any) -> tuple[str, str]:
    """Text and origins of a template whose variables have the origin "u"; the template's own is "t" and unknown is "?"."""
    text = environment().from_string(source).render(**traced(variables, "u"))
    return str.__str__(text), text.origins.replace(TEMPLATE, "t").replace(UNKNOWN, "?")


@pytest.mark.parametrize(
    ("source", "text", "origins"),
    [
        ("<{{ m.x }}>", "<ab>", "tuut"),
        ("{{ '<' + m.x }}{{ '<' ~ m.x ~ 3 }}", "<ab<ab3", "tuutuut"),
        ("{{ '%s<' % m.x }}{{ '<{}'.format(m.x) }}", "ab<<ab", "uuttuu"),
        ("{{ '<%(k)s>' % {'k': m.x} }}{{ '<{k}>'.format_map({'k': m.x}) }}", "<ab><ab>", "tuuttuut"),
        ("{{ (' <' + m.x + ' ') | trim }}", "<ab", "tuu"),
        ("{{ ['<', m.x] | join(',') }}{{ ','.join([m.x] * 2) }}", "<,abab,ab", "ttuuuutuu"),
        ("{{ [m] | map(attribute='x') | map('upper') | join('-') }}", "AB", "uu"),
        ("{% set y %}<{{ m.x }}{% endset %}{{ y }}", "<ab", "tuu"),
        ("{% macro f(x) %}<{{ x }}{% endmacro %}{{ f(m.x) }}", "<ab", "tuu"),
        ("{% for c in m.x %}{{ c }},{% endfor %}{{ m.x[-1] }}{{ m.x | last }}", "a,b,bb", "ututuu"),
        ("{{ m.x | replace('a', '<') }}{{ 'zz' | replace('z', m.x) }}", "<bababab"[:6], "tuuuuu"),
        ("{{ m.x | length }}{{ m.x | default('') }}{{ no | default('<') }}", "2ab<", "tuut"),
        ("{% set n = namespace(t='<') %}{% set n.t = n.t + m.x %}{{ n.t }}", "<ab", "tuu"),
        ("{{ m | tojson }}", '{"x": "ab"}', "u" * 11),
        ("{{ m }}{{ [m.x] }}", "{'x': 'ab'}['ab']", "u" * 17),
        ("{{ '%r' % m.x }}{{ m.x | pprint }}", "'ab''ab'", "u" * 8),
        ("{{ m.x | string }}{{ m.x ~ '' }}{{ none }}{{ no }}", "ababNone", "uuuutttt"),
        ("{{ '{0.__class__}'.format(m) }}", "", ""),
        # What Jinja's own filters make of plain texts is not the template's.
        ("{{ m.x | indent(2, first=true) }}{{ m.x | urlencode }}{{ m.x | title }}", "  ababAb", "u" * 8),
        ("{{ [m] | map(attribute='x') | join }}{{ m.x | map('upper') | join }}", "abAB", "uuuu"),
        ("{{ m.values() }}{{ m.items() | string }}", "dict_values(['ab'])dict_items([('x', 'ab')])", "u" * 44),
        ("{{ '%s' % m.values() }}", "dict_values(['ab'])", "u" * 19),
        ("{{ namespace(y=m.x) | string | length > 0 }}", "True", "tttt"),
        ("{{ '%.1s<' % m.x }}{{ '%4s' % m.x }}{{ '{:>3}'.format(m.x) }}", "a<  ab ab", "u" * 9),
        ("{{ '{0[0]}'.format(m.x) }}{{ '%c' % m.x[0] }}", "aa", "uu"),
        ("{{ m.x.split(sep='a') | join('<') }}{{ m.x.rsplit(sep='a', maxsplit=1)[1] }}", "<bb", "tuu"),
        ("{{ m.x.expandtabs(tabsize=4) }}{{ m.get('y', '<') }}", "ab<", "uut"),
    ],
)
def test_templates_keep_origins(source: str, text: str, origins: str) -> None:
    assert render(source, m={"x": "ab"}) == (text, origins)


def test_a_longer_text_has_the_origin_of_what_it_was_made_of() -> None:
    assert Traced("İ", "u").lower() == "i̇"
    assert Traced("İ", "u").lower().origins == "uu"
    assert Traced("İa", "uv").lower().origins == 3 * UNKNOWN


def test_padding_has_the_origin_of_the_text() -> None:
    assert Traced("ab", "u").center(5, "*") == "**ab*"
    assert Traced("ab", "u").center(5, "*").origins == "u" * 5


def test_what_cannot_be_followed_is_never_the_templates() -> None:
    text = environment().from_string("{{ [a, b] | tojson }}").render(a=Traced("x", "a"), b=Traced("y", "b"))
    assert {*text.origins} == {UNKNOWN}
    generator = (
        environment().from_string("{{ [a] | map('upper') }}{% set n = namespace(y=a) %}{{ n }}").render(a=Traced("x", "a"))
    )
    assert TEMPLATE not in generator.origins
    with pytest.raises(ValueError, match="encodes text to bytes"):
        render("{{ m.x.encode() }}", m={"x": "ab"})
    assert origins_in({"k": ["x", Traced("y", "b")], Traced("z", "a"): 3}) == {"a", "b"}
