"""The whole command line of infer.py: what to complete, or to serve."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from jax.sharding import Mesh
from tyro.conf import arg

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.flags import BATCH_BY_DEFAULT, InferFlags
from dsv3_jax.serve.options import ServeOptions


@dataclasses.dataclass(frozen=True)
class Flags(InferFlags):
    """What infer.py is to do."""

    serve: bool = False
    """Answer HTTP requests as OpenAI's API does, and show a page to chat on, until SIGTERM."""
    server: Annotated[ServeOptions, arg(name="")] = dataclasses.field(default_factory=ServeOptions)
    """Where, and within which limits."""

    def modes(self) -> dict[str, bool]:
        return super().modes() | {"serve": self.serve}

    def engine_options(self, config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
        options = super().engine_options(config, mesh)
        return options | {"max_batch": BATCH_BY_DEFAULT} if self.serve and self.max_batch is None else options
