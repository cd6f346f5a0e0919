"""Choice among the implementations of a kernel: one rule for experts, exchange of rows, attention and cache.

"auto" stands for the best implementation on the platform that the program is lowered for, or for one that runs anywhere if
that one does not support the machine or the model. Any other name stands for itself: if it cannot run, that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax


class Backends(NamedTuple):
    """Names that a config field may hold: the implementations of a kernel, and the platforms that run them."""

    field: str
    """Name of the config field, for error messages."""
    auto: Mapping[str, str]
    """Implementation that "auto" stands for, by platform ("cpu", "gpu", "tpu")."""
    anywhere: tuple[str, ...]
    """Implementations that run on every platform."""
    only_on: Mapping[str, str | tuple[str, ...]] = {}
    """Implementations that run on some platforms only: the platform or platforms of each."""

    def resolve_backend(
        self, name: str, platform: str | None, reasons: Mapping[str, Callable[[], str | None]] | None = None
    ) -> str:
        """Return the implementation that `name` stands for on `platform`, or on JAX's default backend if that is None.

        Args:
          name: "auto", or an implementation.
          platform: "cpu", "gpu" or "tpu".
          reasons: by implementation, a function that returns None if this machine and model support it, else the reason why
            not, as a predicate ("takes bfloat16"). With a reason, "auto" gives the first of `anywhere`.

        Raises:
          ValueError: for an unknown name, for "auto" on an unknown platform, and for a named implementation that cannot run.
        """
        platform, known = platform or jax.default_backend(), ("auto", *self.only_on, *self.anywhere)
        if name not in known:
            raise ValueError(f"{self.field} is {name!r}; choose one of {', '.join(known)}")
        if name == "auto" and platform not in self.auto:
            raise ValueError(f"{self.field} 'auto' has no choice on platform {platform!r}; use {' or '.join(self.anywhere)}")
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
        raise ValueError(f"{self.field} {name!r} cannot be used here: it {reason}; {others}")
