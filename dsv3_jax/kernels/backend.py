"""Choice among the implementations of a kernel: the same rule for experts, attention and cache.

A name from the config stands for itself; "auto" stands for the best one on the platform that the program is lowered for, and
is printed at start. Nothing falls back: a name that the machine cannot run is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Backends(NamedTuple):
    """The implementations of a kernel."""

    field: str
    """The config's field, for errors."""
    auto: Mapping[str, str]
    """Meaning of "auto", by platform ("cpu", "gpu", "tpu")."""
    anywhere: tuple[str, ...]
    """Implementations that run on every platform."""
    only_on: Mapping[str, str | tuple[str, ...]] = {}
    """Implementations that do not, with the platform or platforms of each."""

    def resolve_backend(
        self, name: str, platform: str | None, reasons: Mapping[str, Callable[[], str | None]] | None = None
    ) -> str:
        """Return the implementation that `name` stands for on `platform`, or on JAX's default backend if that is None.

        Args:
          name: "auto", or an implementation.
          platform: "cpu", "gpu" or "tpu".
          reasons: for implementations that some machines or models of a platform do not support: functions that return why,
            to be read after the name, or None. "auto" replaces these by the first that runs anywhere.

        Raises:
          ValueError: for an unknown name or platform, and for an implementation that cannot run.
        """
        platform, known = platform or jax.default_backend(), ("auto", *self.only_on, *self.anywhere)
        if name not in known:
            raise ValueError(f"{self.field} is {name!r}; choose one of {', '.join(known)}")
        if name == "auto" and platform not in self.auto:
            raise ValueError(f"{self.field} 'auto' knows no platform {platform!r}; name one of {', '.join(self.anywhere)}")
        others = f"use 'auto' or {' or '.join(map(repr, self.anywhere))}"
        platforms = self.only_on.get(name, platform)
        platforms = (platforms,) if isinstance(platforms, str) else platforms
        if platform not in platforms:
            where = " or ".join(platforms)
            raise ValueError(f"{self.field} {name!r} runs on {where} only, and this program is for {platform}; {others}")
        chosen = self.auto[platform] if name == "auto" else name
        reason = reasons[chosen]() if reasons and chosen in reasons else None
        if reason is None:
            return chosen
        if name == "auto":
            return self.anywhere[0]
        raise ValueError(f"{self.field} {name!r} {reason}; {others}")
