"""The whole command line of infer.py: what to complete, or to serve."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.flags import BATCH_BY_DEFAULT, InferFlags
from dsv3_jax.serve.options import ServeOptions


@dataclasses.dataclass(frozen=True)
class Flags(ServeOptions, InferFlags):
    """What infer.py is to do."""

    serve: bool = False
    """Answer HTTP requests as OpenAI's API does, and show a page to chat on, until SIGTERM."""

    def __post_init__(self) -> None:
        InferFlags.__post_init__(self)
        ServeOptions.__post_init__(self)

    def modes(self) -> dict[str, bool]:
        return super().modes() | {"serve": self.serve}

    @property
    def server(self) -> ServeOptions:
        """Where to serve, and within which limits."""
        return ServeOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ServeOptions)})

    def sizes(self, config: ModelConfig) -> dict[str, Any]:
        sizes = super().sizes(config)
        return sizes | {"max_batch": BATCH_BY_DEFAULT} if self.serve and self.max_batch is None else sizes
