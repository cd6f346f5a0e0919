"""The fields of a JSON object, each taken once by name and type. null is as good as absent; what nobody took is refused."""

from __future__ import annotations

import json
import sys
from typing import Any

from dsv3_jax.serve.errors import refuse


class Fields:
    """An object of a request. Every method raises ApiError (400), naming the field."""

    def __init__(self, content: Any, where: str = "") -> None:
        """Takes a JSON value; `where` is its name, empty for the body itself."""
        if not isinstance(content, dict):
            raise refuse(f"{where or 'the body'} is {_shown(content)}; use a JSON object", where or None)
        self._left = {name: value for name, value in content.items() if value is not None}
        self._prefix = f"{where}." if where else ""

    def take(self, name: str) -> Any:
        """Whatever stands there, or None."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "use a string")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, value, "use true or false")
        return bool(value)

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # JSON knows no integers, and some clients write 1.0.
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, value, "use an integer")
        self._check_range(name, value, low, high)
        if abs(value) >= 2**64:
            raise self.wrong(name, value, "use one of 64 bits")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise self.wrong(name, value, "use a finite number")
        self._check_range(name, value, low, high)
        return float(value)

    def ignore(self, *names: str) -> None:
        """Fields that change nothing about the answer."""
        for name in names:
            self.take(name)

    def refuse(self, name: str, *neutral: Any) -> None:
        """A field of OpenAI's that is not supported: only its neutral values may stand there."""
        value = self.take(name)
        # 0 == False in Python, so types are compared too, but 0 and 0.0 are one number in JSON.
        if value is not None and not any(value == other and _kind(value) == _kind(other) for other in neutral):
            raise self.wrong(name, value, "this server does not support it, leave it out")

    def finish(self) -> None:
        """Refuses what is left."""
        if self._left:
            name = next(iter(self._left))
            raise refuse(f"{self._prefix}{name:.100} is not a field that this server knows; leave it out", self._prefix + name)

    def wrong(self, name: str, value: Any, remedy: str) -> Exception:
        """The error for a field."""
        return refuse(f"{self._prefix}{name} is {_shown(value)}; {remedy}", self._prefix + name)

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"in {low}..{high}" if high is not None else f"at least {low}"
            raise self.wrong(name, value, f"it must {'lie' if high is not None else 'be'} {bounds}")


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _shown(value: Any) -> str:
    """A value in few words, as JSON has it; repr of a huge integer would raise."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) > 10**30:
        return "an enormous integer"
    text = repr(value) if not isinstance(value, dict | list) or len(value) < 20 else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 100 else f"{text[:97]}..."
