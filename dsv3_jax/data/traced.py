"""Text that carries the origin of each of its characters, and Jinja templates that keep it.

A rendered chat template must tell the special tokens that it writes itself from those that a message spells. Marks around the
spellings would be seen by the template, which trims, splits and measures; here the template sees the text as it is. Each
character of `Traced` has an origin, one character too: `TEMPLATE`, `UNKNOWN`, or one that the caller chose. String operations
and Jinja's filters carry origins along. One that cannot be followed gives text of the origin `UNKNOWN`, never `TEMPLATE`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, SupportsIndex

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context

TEMPLATE, UNKNOWN = "\0", "\1"
FIRST_ORIGIN = 2
"""Code of the first character that a caller may choose for an origin."""

_plain = str.__str__  # The text without origins, for the operations of `str`.


class Traced(str):
    """Text with an origin for each character."""

    origins: str
    """As long as the text."""

    def __new__(cls, text: str, origins: str) -> Traced:
        """Return `text` with its origins, one for all of it or one per character."""
        self = super().__new__(cls, text)
        self.origins = origins * len(text) if len(origins) == 1 else origins
        assert len(self.origins) == len(text)
        return self

    @staticmethod
    def of(text: str) -> Traced:
        """Return the text itself if it is traced, else as text of a template."""
        return text if isinstance(text, Traced) else Traced(str(text), TEMPLATE)

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(_plain(self) + _plain(other), self.origins + Traced.of(other).origins)

    def __radd__(self, other: str) -> Traced:
        return Traced.of(other) + self if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> Traced:
        return Traced(_plain(self) * count, self.origins * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Traced:
        return _filled(lambda form, values: form % values, self, values)

    def __getitem__(self, index: SupportsIndex | slice) -> Traced:
        return Traced(_plain(self)[index], self.origins[index])

    def __iter__(self) -> Iterator[str]:
        return map(Traced, _plain(self), self.origins)

    def join(self, items: Iterable[str]) -> Traced:
        """Return the items with this text between them."""
        parts: list[Traced] = []
        for item in items:
            if not isinstance(item, str):
                raise TypeError(f"sequence item {len(parts)}: expected str instance, {type(item).__name__} found")
            parts.append(Traced.of(item))
        return Traced(_plain(self).join(map(_plain, parts)), self.origins.join(part.origins for part in parts))

    def lstrip(self, characters: str | None = None) -> Traced:
        return self[len(self) - len(_plain(self).lstrip(characters)) :]

    def rstrip(self, characters: str | None = None) -> Traced:
        return self[: len(_plain(self).rstrip(characters))]

    def strip(self, characters: str | None = None) -> Traced:
        return self.lstrip(characters).rstrip(characters)

    def removeprefix(self, prefix: str) -> Traced:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Traced:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def _parts(self, parts: Iterable[str]) -> list[Traced]:
        """Return texts that occur in this one in order, with their origins."""
        found, start = [], 0
        for part in parts:
            start = self.index(part, start)
            found.append(self[start : start + len(part)])
            start += len(part)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._between(_plain(self).split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Traced]:  # type: ignore[override]
        return self._between(_plain(self).rsplit(sep, maxsplit), sep)

    def _between(self, parts: list[str], separator: str | None) -> list[Traced]:
        """Return the parts of a split at `separator`, with their origins."""
        if separator is None:
            return self._parts(parts)
        found, start = [], 0
        for part in parts:
            found.append(self[start : start + len(part)])
            start += len(part) + len(separator)
        return found

    def splitlines(self, keepends: bool = False) -> list[Traced]:  # type: ignore[override]
        return self._parts(_plain(self).splitlines(keepends))

    def partition(self, separator: str) -> tuple[Traced, Traced, Traced]:
        first = len(_plain(self).partition(separator)[0])
        return self[:first], self[first : first + len(separator)], self[first + len(separator) :]

    def rpartition(self, separator: str) -> tuple[Traced, Traced, Traced]:
        at = self.rfind(separator)
        first = max(at, 0)
        return self[:first], self[first : first + len(separator) * (at >= 0)], self[first + len(separator) * (at >= 0) :]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Traced:
        if not old:
            return _blended(_plain(self).replace(old, new, count), self, new)
        return Traced.of(new).join(self.split(old, count))

    def format(self, *values: Any, **named: Any) -> Traced:
        vformat = sandbox.SandboxedFormatter(environment()).vformat
        return _filled(lambda form, values: vformat(form, *values), self, (values, named))

    def format_map(self, named: Mapping[str, Any]) -> Traced:  # type: ignore[override]
        return self.format(**named)


def _mapped(name: str) -> Callable[..., Traced]:
    """Return a method that keeps the origins if the result has the same length."""

    def method(self: Traced, *arguments: Any, **named: Any) -> Traced:
        text = getattr(_plain(self), name)(*arguments, **named)
        return Traced(text, self.origins) if len(text) == len(self) else _blended(text, self, arguments, named)

    return method


for _name in (
    *("lower", "upper", "title", "capitalize", "casefold", "swapcase", "translate"),
    *("expandtabs", "zfill", "ljust", "rjust", "center"),
):
    setattr(Traced, _name, _mapped(_name))


def origins_in(value: Any) -> set[str]:
    """Return the origins in a value, except `TEMPLATE`; it may be nested. What cannot be looked into has `UNKNOWN` ones."""
    if isinstance(value, str):
        return set(value.origins) - {TEMPLATE} if isinstance(value, Traced) else set()
    if isinstance(value, Mapping):
        return set().union(*map(origins_in, value.keys()), *map(origins_in, value.values()))
    if isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
        return set().union(*map(origins_in, value))
    # Numbers and the like, and what Jinja itself passes to filters.
    is_known = value is None or isinstance(value, int | float | jinja2.Undefined | Context | EvalContext | jinja2.Environment)
    return set() if is_known else {UNKNOWN}


def _blended(text: str, *values: Any) -> Traced:
    """Return text that an operation made of values, in a way that cannot be followed: of one origin for all."""
    origins = origins_in(values)
    return Traced(_plain(text), TEMPLATE if not origins else origins.pop() if len(origins) == 1 else UNKNOWN)


def traced(value: Any, origin: str) -> Any:
    """Return a nested value whose texts have this origin."""
    if isinstance(value, str):
        return Traced(value, origin)
    if isinstance(value, Mapping):
        return {traced(key, origin): traced(item, origin) for key, item in value.items()}
    return [traced(item, origin) for item in value] if isinstance(value, list | tuple) else value


def _filled(fill: Callable[[str, Any], str], form: str, values: Any) -> Traced:
    """Return a format string, filled: its own text keeps its origin, values theirs.

    Each text among the values is replaced by a number between noncharacters, and put back after filling.
    """
    texts: list[Traced] = []

    def hide(value: Any) -> Any:
        if isinstance(value, Traced):
            texts.append(value)
            return f"\ufdd0{len(texts) - 1}\ufdd1"
        if isinstance(value, Mapping):
            return {_plain(key) if isinstance(key, str) else key: hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(hide, value))
        if origins_in(value):
            raise TypeError("a value with texts that cannot be replaced")
        return value

    exact, form = fill(_plain(form), values), Traced.of(form)
    own = form.origins[:1] if len(set(form.origins)) == 1 else UNKNOWN
    try:
        parts = re.split("\ufdd0([0-9]+)\ufdd1", fill(_plain(form), hide(values)))
        filled = [texts[int(part)] if i % 2 else Traced(part, own) for i, part in enumerate(parts)]
    except (ValueError, TypeError, IndexError):
        return _blended(exact, form, values)
    found = Traced("", TEMPLATE).join(filled)
    # A field that measures or cuts its value sees the number.
    return found if found == exact else _blended(exact, form, values)


# ----------------------------------------------------------------------------------------------------------------------
# Jinja, as transformers sets it up for chat templates, with the origins of texts


def _own(value: Any) -> Any:
    """Return a text of the template as traced text, so that operations on it keep the origins of their arguments."""
    return Traced.of(value) if type(value) is str else value


def _shown(value: Any) -> Any:
    """Return a value as the template writes it."""
    return value if isinstance(value, str | jinja2.Undefined) else _blended(str(value), value)


# Filters that do nothing to texts but what `Traced` follows, or give back what they were given.
_FOLLOWED = {
    *("trim", "replace", "upper", "lower", "capitalize", "default", "d", "first", "last", "min", "max", "random", "attr"),
    *("string", "join", "sum", "format"),
}


def _following(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose texts carry their origins; of one that is not known, all that its arguments have."""

    @functools.wraps(function)
    def follow(*arguments: Any, **named: Any) -> Any:
        given = [*map(_own, arguments)], {name: _own(value) for name, value in named.items()}
        result = function(*given[0], **given[1])
        is_followed = isinstance(result, Traced) and name in _FOLLOWED
        return _blended(result, *given) if isinstance(result, str) and not is_followed else result

    return follow


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Traced:
    """Jinja's filter, with the origins of all parts."""
    items = value if attribute is None else map(make_attrgetter(environment(), attribute), value)
    return Traced.of(d).join(Traced.of(_shown(item)) for item in items)


class _CodeGenerator(CodeGenerator):
    """Compiler of templates in which `~` keeps origins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.finalize, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(lambda parts: Traced("", TEMPLATE).join(map(str, parts)))
    intercepted_binops = frozenset({"+", "*", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return super().call_binop(context, operator, _own(left), _own(right))

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        of = getattr(function, "__self__", None)
        if isinstance(of, str) and function.__name__ == "encode":
            raise ValueError("the template encodes text to bytes, whose special tokens could not be told from its own")
        if type(of) is str:
            function = getattr(Traced.of(of), function.__name__)
        result = super().call(context, function, *arguments, **named)
        return _blended(result, arguments, named) if type(result) is str else result

    def wrap_str_format(self, value: Any) -> Any:
        of = getattr(value, "__self__", None)
        is_format = isinstance(of, str) and value.__name__ in ("format", "format_map")
        return getattr(Traced.of(of or ""), value.__name__) if is_format else None


class _GenerationBlocks(ext.Extension):
    """`{% generation %}`, with which some templates enclose the assistant's words; the content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Return the environment that compiles chat templates; it cannot change anything."""
    extensions = [_GenerationBlocks, ext.loopcontrols]
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_shown)
    own = {"tojson": _to_json, "join": _join, "string": lambda value: Traced.of(_shown(value))}
    made.filters = {name: _following(name, function) for name, function in (made.filters | own).items()}
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made
