"""Which implementation of a kernel a program gets: one rule for everything that has several.

A name from the config stands for itself; "auto" stands for what suits the platform that the program is lowered for. Nothing
falls back: a name that the platform cannot run is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax


class Choice(NamedTuple):
    """The implementations of one thing."""

    field: str
    """The config's field, for errors."""
    auto: Mapping[str, str]
    """By platform ("cpu", "gpu", "tpu"), what "auto" stands for."""
    anywhere: tuple[str, ...]
    """Implementations that run on every platform."""
    only_on: Mapping[str, str] = {}
    """Implementations for one platform, and which."""
    planned: tuple[str, ...] = ()
    """Names that are taken, of implementations that are not written yet."""

    def of(self, name: str, platform: str | None) -> str:
        """The implementation that `name` stands for on `platform`, or on JAX's default backend if that is None.

        Raises:
          NotImplementedError: for one that is planned.
          ValueError: for an unknown name or platform, and for an implementation that the platform cannot run.
        """
        platform, known = platform or jax.default_backend(), ("auto", *self.only_on, *self.anywhere)
        if name in self.planned:
            raise NotImplementedError(f"{self.field} {name!r} is not written yet; use one of {', '.join(known)}")
        if name not in known:
            raise ValueError(f"{self.field} is {name!r}; choose one of {', '.join(known)}")
        if name == "auto" and platform not in self.auto:
            raise ValueError(f"{self.field} 'auto' knows no platform {platform!r}; name one of {', '.join(self.anywhere)}")
        if self.only_on.get(name, platform) != platform:
            raise ValueError(
                f"{self.field} {name!r} runs on {self.only_on[name]} only, and this program is for {platform}; use 'auto' "
                f"or {' or '.join(map(repr, self.anywhere))}"
            )
        return self.auto[platform] if name == "auto" else name
