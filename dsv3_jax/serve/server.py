"""`serve`: the application on a socket, until a signal has drained it.

The first SIGTERM or Ctrl-C lets the running requests finish and takes no new ones, the second ends at once.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from types import FrameType

import uvicorn

from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.infer import Engine
from dsv3_jax.serve.app import application
from dsv3_jax.serve.connections import Connection, most_connections
from dsv3_jax.serve.options import ServeOptions
from dsv3_jax.serve.service import Service, require_name_and_key

KEY_VARIABLE = "DSV3_JAX_API_KEY"
_LAST_STEP = 5.0
"""Seconds that the engine's thread gets to end, once nothing waits for it."""
_LAST_WORD = 1
"""Seconds that clients get to hear that their requests are cut off."""
DEFAULT_OPTIONS = ServeOptions()


def serve(
    engine: Engine, model_name: str, template: ChatTemplate | None = None, options: ServeOptions = DEFAULT_OPTIONS
) -> int:
    """Serves an engine until SIGTERM or Ctrl-C; to be called from the main thread, which alone hears of signals.

    Clients have to send the environment's DSV3_JAX_API_KEY, if it is set.

    Args:
      engine: with a tokenizer.
      model_name: what clients ask for.
      template: how messages become a prompt; without one there are no chat completions.
      options: address and limits.

    Returns:
      The program's exit code: 0 once all requests have finished, 1 if some were cut off or the engine has failed.

    Raises:
      ValueError: if the engine has no tokenizer, the key is empty, or the address cannot be listened on.
    """
    service = Service(engine, model_name, template, options, os.environ.get(KEY_VARIABLE))
    if options.warm_up:
        engine.warm_up()
    with _listener(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {model_name} on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        if service.api_key is None and not host.startswith("127.") and host != "::1":
            print(f"warning: everyone who reaches this address is served; set {KEY_VARIABLE}", file=sys.stderr, flush=True)
        server = Server(service)
        server.run([listener])
    if not service.worker.stop(_LAST_STEP):
        # It compiles, or hangs, inside a program that cannot be interrupted, and tearing down around it would crash.
        sys.stderr.flush()
        os._exit(server.code)
    return server.code


def require_servable(model_name: str, options: ServeOptions) -> None:
    """Raises ValueError for what `serve` would refuse, before there is an engine: name, key or address."""
    require_name_and_key(model_name, os.environ.get(KEY_VARIABLE))
    _listener(options.host, options.port).close()


class Server(uvicorn.Server):
    """uvicorn's, which drains before it ends."""

    def __init__(self, service: Service) -> None:
        # Starlette needs no more of uvicorn than this; its log and its own lines stay out of the programs' output.
        super().__init__(
            uvicorn.Config(
                application(service),
                loop="asyncio",
                http=functools.partial(Connection, read_timeout=service.options.read_timeout, most=most_connections()),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=10,
            )
        )
        self._service = service
        self._deadline: float | None = None
        self.code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        if self._service.draining:
            self._cut_off()
        else:
            self._service.draining = True
            self._deadline = time.monotonic() + self._service.options.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether it is time to go."""
        if self._service.worker.failure is not None:
            self.code, self.should_exit = 1, True
        elif self._deadline is not None:
            if self._service.idle:
                self.should_exit = True
            elif time.monotonic() > self._deadline:
                self._cut_off()
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        """Has every request end with an error, and the server with them, whether they could be told or not."""
        self.code, self.should_exit = 1, True
        self._service.cut_off()
        self.config.timeout_graceful_shutdown = _LAST_WORD


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error}); use another --port or --host") from error
