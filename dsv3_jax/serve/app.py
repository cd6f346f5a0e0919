"""Endpoints of the server, its start and its shutdown."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import os
import re
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.infer import Engine
from dsv3_jax.serve.cli import ServeOptions
from dsv3_jax.serve.replies import DONE, JSON, Reply, event
from dsv3_jax.serve.requests import ApiError, GenerationRequest, ModelInfo, read_chat, read_completion
from dsv3_jax.serve.worker import DISCONNECTED, ActiveRequest, Service, check_name_and_key


def application(service: Service) -> Starlette:
    """Return the ASGI application, which starts the engine thread on startup and asks it to stop on shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        service.worker.stop(0)

    model_info = {
        "id": service.model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dsv3_jax",
        # vLLM's name, and what the page needs.
        "max_model_len": service.model.max_length,
        "chat_template": service.model.template is not None,
    }

    async def health(request: Request) -> Response:
        service.check_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.model.name:
            raise ApiError(404, f"The model `{name:.100}` does not exist; use {service.model.name}", "model", "model_not_found")
        return JSONResponse(model_info)

    routes = [
        Route("/", load_page(), methods=["GET"]),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", JSONResponse({"object": "list", "data": [model_info]}), methods=["GET"]),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", _Generation(service, read_completion), methods=["POST"]),
        Route("/v1/chat/completions", _Generation(service, read_chat), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(_Gate, service, {route.path for route in routes})],
        exception_handlers={ApiError: _on_error, HTTPException: _on_error, Exception: _on_error},
    )
    app.router.redirect_slashes = False  # For a client of an API, 404 is clearer than a redirect.
    return app


class _Generation:
    """Endpoint that answers a completion or a chat, whole or as a stream; `read` checks the body."""

    def __init__(self, service: Service, read: Callable[[Any, ModelInfo], GenerationRequest]) -> None:
        self._service, self._read = service, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, options = self._service, self._service.options
        service.check_ready()
        body = await _read_json(Request(scope, receive), options.max_body, options.read_timeout)
        # In a thread, since long texts take a while to encode.
        request = await asyncio.to_thread(self._read, body, service.model)
        reply = Reply(request, service.model.name, service.token_bytes)
        # The request is closed at any end of the stream, even before its first event.
        with contextlib.closing(service.admit(request, receive)) as active:
            await active.next_event()  # The engine has accepted the request.
            if request.stream:
                headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
                events = _events(active, reply, request.include_usage, scope)
                await StreamingResponse(events, media_type="text/event-stream", headers=headers)(scope, receive, send)
                return
            progress = [each async for each in active.progress()]
        response = Response(JSON.dump_json(reply.whole(progress, active.usage())), media_type="application/json")
        await response(scope, receive, send)


async def _read_json(request: Request, max_bytes: int, timeout: float) -> Any:
    """Return the parsed JSON of a body. ApiError: 415 wrong type, 413 too large, 408 too slow, 499 gone, 400 no JSON."""
    # This type makes a browser ask first, if the page of another site sends a request.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The content-type must be application/json; set this header and send JSON")
    too_large = ApiError(413, f"The body has more than {max_bytes} bytes; shorten it", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout:g} seconds; send it faster", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(DISCONNECTED, "The client closed the connection before its body arrived") from None
    try:
        return JSON.validate_json(body)
    except ValidationError as error:
        raise ApiError(400, error.errors()[0]["msg"], code="invalid_json") from None


async def _events(active: ActiveRequest, reply: Reply, include_usage: bool, scope: Scope) -> AsyncIterator[bytes]:
    """Yield a stream's events, then [DONE]; an ApiError becomes an event, and its status `scope["outcome"]`."""
    for chunk in reply.opening():
        yield event(chunk)
    try:
        async for progress in active.progress():
            step = reply.chunk(progress)
            if step is not None:
                yield event(step)
        if include_usage:
            yield event(reply.last_chunk(active.usage()))
    except ApiError as error:
        scope["outcome"] = error.status
        yield event(error.body)
    yield DONE


async def _on_error(request: Request, error: Exception) -> Response:
    """Return the JSON response to an ApiError, to a wrong path or method (HTTPException), or to any other error (500)."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path:.100}: {error.detail}"
        error = ApiError(error.status_code, message, headers=error.headers)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "Internal error; see the server's log", code="internal_error")
    return Response(JSON.dump_json(error.body), error.status, error.headers, "application/json")


class _Gate:
    """Middleware of all endpoints: answer 401 without the API key; count open requests, and ended ones by path and status."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome, status, is_complete = 500, 500, False

        async def watched_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        app = self._app
        if not self._is_allowed(scope):
            message = "The API key is missing or wrong; send it as a bearer token (on the page: Settings)"
            error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            app = await _on_error(Request(scope), error)
        self._service.open_requests += 1
        try:
            await app(scope, receive, watched_send)
            outcome = scope.get("outcome", status) if is_complete else DISCONNECTED
        except ClientDisconnect:
            outcome = DISCONNECTED
            raise
        finally:
            self._service.open_requests -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(outcome)).inc()

    def _is_allowed(self, scope: Scope) -> bool:
        key = self._service.api_key
        # The page asks for the key; load balancers ask for the health.
        if key is None or scope["path"] in ("/", "/health"):
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.encode())


# ----------------------------------------------------------------------------------------------------------------------
# Start and graceful shutdown


KEY_VARIABLE = "DSV3_JAX_API_KEY"
_THREAD_TIMEOUT = 5.0
"""Seconds to wait for the engine thread after the server's end; then the process exits without it."""
_CUT_OFF_TIMEOUT = 1
"""Seconds for clients to receive the error of their cancelled requests, before connections are closed."""


def serve(
    engine: Engine,
    model_name: str,
    template: ChatTemplate | None = None,
    options: ServeOptions | None = None,
    switches: Mapping[str, Any] | None = None,
) -> int:
    """Serve an engine until SIGTERM or Ctrl-C and the drain after it; for the main thread, which alone receives signals.

    Clients must send the environment's DSV3_JAX_API_KEY, if it is set. The address is printed on stderr.

    Args:
      engine: with a tokenizer.
      model_name: the name that clients ask for.
      template: turns messages into a prompt; without it there are no chat completions.
      options: address and limits; None is the default ones.
      switches: variables of the template for all requests, such as {"thinking": True}.

    Returns:
      Exit status: 0 if all requests finished, else 1. If the engine thread does not stop, the process exits here instead.

    Raises:
      ValueError: if the engine has no tokenizer, the key is empty, or the address cannot be listened on.
    """
    options = ServeOptions() if options is None else options
    service = Service(engine, model_name, template, options, os.environ.get(KEY_VARIABLE), switches)
    if options.warm_up:
        engine.warm_up()
    with _listener(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {model_name} on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        if service.api_key is None and not host.startswith("127.") and host != "::1":
            print(f"warning: without an API key everyone may use this address; set {KEY_VARIABLE}", file=sys.stderr, flush=True)
        server = Server(service)
        server.run([listener])
    if not service.worker.stop(_THREAD_TIMEOUT):
        # The thread is inside a compilation or a hanging program; a normal exit would crash it.
        sys.stderr.flush()
        os._exit(server.code)
    return server.code


def check_servable(model_name: str, options: ServeOptions) -> None:
    """Raise ValueError if the name or the environment's API key is empty, or a trial socket cannot listen on the address."""
    check_name_and_key(model_name, os.environ.get(KEY_VARIABLE))
    _listener(options.host, options.port).close()


class Server(uvicorn.Server):
    """uvicorn's server that, after a signal, refuses new requests, and exits once the running ones end or time is up."""

    def __init__(self, service: Service) -> None:
        # uvicorn's own log stays out of the program's output.
        super().__init__(
            uvicorn.Config(
                application(service),
                loop="asyncio",
                http=functools.partial(Connection, service.options.read_timeout, most_connections()),  # type: ignore[arg-type]
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
        """Refuse new requests and start the drain at the first signal; cancel all requests at the second."""
        if self._service.draining:
            self._cut_off()
        else:
            self._service.draining = True
            self._deadline = time.monotonic() + self._service.options.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Let the server exit (return True) if the engine failed or the drain is over; cancel requests that outlast it."""
        if self._service.worker.failure is not None:
            self.code, self.should_exit = 1, True
        elif self._deadline is not None:
            if self._service.open_requests == 0:
                self.should_exit = True
            elif time.monotonic() > self._deadline:
                self._cut_off()
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        """Send all active requests an error, and let the server exit within a second, with status 1."""
        self.code, self.should_exit = 1, True
        self._service.cut_off()
        self.config.timeout_graceful_shutdown = _CUT_OFF_TIMEOUT


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error}); use another --port or --host") from error


# ----------------------------------------------------------------------------------------------------------------------
# Limits on connections: seconds for the head of a request, number within the process's file descriptors


def most_connections() -> int:
    """Return the number of file descriptors left to this process, less 32 for other files; at least 1."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit - len(os.listdir("/dev/fd")) - 32, 1)


class Connection(H11Protocol):
    """uvicorn's connection, closed if a request's head takes too long, or at once if there are too many."""

    def __init__(self, read_timeout: float, max_connections: int, *arguments: Any, **options: Any) -> None:
        """Args, apart from uvicorn's: read_timeout: seconds for a head; max_connections: of all clients together."""
        super().__init__(*arguments, **options)
        self._read_timeout, self._max_connections = read_timeout, max_connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
        self._update_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._update_timer()

    def _update_timer(self) -> None:
        """Start the timer that closes the connection while it waits for a request's head; else cancel it."""
        is_waiting = (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if is_waiting and self._timer is None:
            self._timer = self.loop.call_later(self._read_timeout, self.transport.close)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None


# ----------------------------------------------------------------------------------------------------------------------
# Chat page: one HTML file, with headers that forbid the browser all other content


def load_page() -> Response:
    """Return page.html as a response, with headers that allow only its own script and style."""
    text = resources.files("dsv3_jax.serve").joinpath("page.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(text, 'script')}; style-src {_hash(text, 'style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(text, media_type="text/html", headers=headers)


def _hash(text: str, tag: str) -> str:
    """Return the Content-Security-Policy source ('sha256-...') of the content of the page's only element `tag`."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
