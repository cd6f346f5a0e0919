"""The whole command line of infer.py: what to complete, or to serve."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import require
from dsv3_jax.infer.cli import BATCH_BY_DEFAULT, SAMPLED_BY, InferFlags
from dsv3_jax.serve.options import ServeOptions


@dataclasses.dataclass(frozen=True)
class Flags(ServeOptions, InferFlags):
    """What infer.py is to do."""

    serve: bool = False
    """Answer HTTP requests as OpenAI's API does, and show a page to chat on, until SIGTERM."""

    def __post_init__(self) -> None:
        InferFlags.__post_init__(self)
        ServeOptions.__post_init__(self)
        remedy = "each request says how it is drawn" if self.serve else "it belongs to --serve"
        useless = SAMPLED_BY if self.serve else [field.name for field in dataclasses.fields(ServeOptions)]
        for field in dataclasses.fields(self):
            given = field.name in useless and getattr(self, field.name) != field.default
            require(not given, f"--{field.name.replace('_', '-')} would change nothing; {remedy}, leave it out")

    def modes(self) -> dict[str, bool]:
        return super().modes() | {"serve": self.serve}

    @property
    def server(self) -> ServeOptions:
        """Where to serve, and within which limits."""
        return ServeOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ServeOptions)})

    def sizes(self, config: ModelConfig) -> dict[str, Any]:
        sizes = super().sizes(config)
        return sizes | {"max_batch": BATCH_BY_DEFAULT} if self.serve and self.max_batch is None else sizes
