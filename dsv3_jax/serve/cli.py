"""Command line of infer.py: the flags of `InferFlags`, and those of the server."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from tyro.conf import FlagConversionOff

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import Bound, NonNegativeInt, PositiveInt, check, check_fields
from dsv3_jax.infer.cli import DEFAULT_MAX_BATCH, SAMPLING_FIELDS, InferFlags

_Seconds = Annotated[float, Bound(lambda value: value > 0, "it must be above 0 seconds")]

# ----------------------------------------------------------------------------------------------------------------------
# Address and limits of the server


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Address, limits and timeouts of a server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 means all addresses of this machine."""
    port: Annotated[int, Bound(lambda port: 0 <= port < 2**16, "it must lie in 0..65535")] = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """Name that clients ask for; None is that of the checkpoint's folder, or of the repository of a cached snapshot."""
    max_body: PositiveInt = 4 * 2**20
    """Largest body of a request, in bytes; a larger one is refused with status 413."""
    max_choices: PositiveInt = 128
    """Largest number of completions in a request, prompts times n; more are refused with status 400."""
    max_queue: NonNegativeInt = 256
    """Completions of all requests that may wait for a slot; beyond it requests are refused with status 429."""
    timeout: _Seconds = 600.0
    """Seconds a request may take, waiting included; it is then cancelled with status 504."""
    read_timeout: _Seconds = 30.0
    """Seconds a client may take to send the head of a request (then its connection is closed), and its body (then 408)."""
    drain_timeout: _Seconds = 60.0
    """Seconds for running requests to finish after SIGTERM; they are then cancelled with status 503."""
    warm_up: Annotated[bool, FlagConversionOff] = True
    """Compile the programs before the server listens; otherwise the first requests that need one wait for it."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Flags(ServeOptions, InferFlags):
    """Flags of infer.py: those of `InferFlags`, those of the server, and --serve."""

    serve: bool = False
    """Serve OpenAI's API and a chat page over HTTP, until SIGTERM."""

    def __post_init__(self) -> None:
        InferFlags.__post_init__(self)
        ServeOptions.__post_init__(self)
        remedy = "each request has its own sampling parameters" if self.serve else "it belongs to --serve"
        useless = SAMPLING_FIELDS if self.serve else [field.name for field in dataclasses.fields(ServeOptions)]
        for field in dataclasses.fields(self):
            given = field.name in useless and getattr(self, field.name) != field.default
            check(not given, f"--{field.name.replace('_', '-')} would change nothing; {remedy}, leave it out")

    def modes(self) -> dict[str, bool]:
        return super().modes() | {"serve": self.serve}

    @property
    def server(self) -> ServeOptions:
        """The fields of `ServeOptions` by themselves, without those of `InferFlags`."""
        return ServeOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ServeOptions)})

    def sizes(self, config: ModelConfig) -> dict[str, Any]:
        sizes = super().sizes(config)
        return sizes | {"max_batch": DEFAULT_MAX_BATCH} if self.serve and self.max_batch is None else sizes
