"""Which implementation of a kernel a program gets: one rule for everything that has several.

A name from the config stands for itself; "auto" stands for what suits the machine that the program is lowered for, which is
printed at start. Nothing falls back: a name that the machine cannot run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Backends(NamedTuple):
    """The implementations of one thing."""

    field: str
    """The config's field, for errors."""
    auto: Mapping[str, str]
    """By platform ("cpu", "gpu", "tpu"), what "auto" stands for."""
    anywhere: tuple[str, ...]
    """Implementations that run on every platform."""
    only_on: Mapping[str, str | tuple[str, ...]] = {}
    """Implementations that do not, and the platform of each, or all of its platforms."""

    def resolve_backend(
        self, name: str, platform: str | None, refusals: Mapping[str, Callable[[], str | None]] | None = None
    ) -> str:
        """The implementation that `name` stands for on `platform`, or on JAX's default backend if that is None.

        Args:
          name: "auto", or an implementation.
          platform: "cpu", "gpu" or "tpu".
          refusals: of implementations that not every machine of a platform can run, or not with every model: why this one
            cannot, to be read after the name, or None. "auto" passes over these, to the first that runs anywhere.

        Raises:
          ValueError: for an unknown name or platform, and for an implementation that cannot run.
        """
        platform, known = platform or jax.default_backend(), ("auto", *self.only_on, *self.anywhere)
        if name not in known:
            raise ValueError(f"{self.field} is {name!r}; choose one of {', '.join(known)}")
        if name == "auto" and platform not in self.auto:
            raise ValueError(f"{self.field} 'auto' knows no platform {platform!r}; name one of {', '.join(self.anywhere)}")
        others = f"use 'auto' or {' or '.join(map(repr, self.anywhere))}"
        places = self.only_on.get(name, platform)
        places = (places,) if isinstance(places, str) else places
        if platform not in places:
            where = " or ".join(places)
            raise ValueError(f"{self.field} {name!r} runs on {where} only, and this program is for {platform}; {others}")
        chosen = self.auto[platform] if name == "auto" else name
        reason = refusals[chosen]() if refusals and chosen in refusals else None
        if reason is None:
            return chosen
        if name == "auto":
            return self.anywhere[0]
        raise ValueError(f"{self.field} {name!r} {reason}; {others}")
