"""The endpoints."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
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
from dsv3_jax.serve.replies import DONE, Reply, encode, event
from dsv3_jax.serve.requests import ApiError, GenerationRequest, ModelInfo, read_chat, read_completion, refuse
from dsv3_jax.serve.worker import HUNG_UP, ActiveRequest, Service, check_name_and_key

# What needs no key: the page, which asks for one, and what a load balancer asks.
_OPEN = {"/", "/health"}


def application(service: Service) -> Starlette:
    """The ASGI application. The engine's thread begins with it, and is told to end with it; it may take its time to."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        service.worker.stop(0)

    page, headers = load_page()

    async def chat_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    async def health(request: Request) -> Response:
        service.check_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != service.served.name:
            raise ApiError(404, f"The model `{name:.100}` does not exist", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    routes = [
        Route("/", chat_page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", functools.partial(_answer, service, read_completion), methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(_answer, service, read_chat), methods=["POST"]),
    ]
    paths = {route.path for route in routes}
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(_Counted, service, paths), Middleware(_KeyRequired, service.api_key)],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_exception, Exception: _on_bug},
    )
    app.router.redirect_slashes = False  # A client of an API is better told that there is no such path.
    return app


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.served.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dsv3_jax",
        # vLLM's name for it, and what the page asks for.
        "max_model_len": service.served.max_length,
        "chat_template": service.served.template is not None,
    }


# Completions.


async def _answer(service: Service, read: Callable[[Any, ModelInfo], GenerationRequest], request: Request) -> Response:
    service.check_ready()
    body = await _body(request, service.options.max_body, service.options.read_timeout)
    # Long texts take a while to encode, which the others should not wait for.
    wanted = await asyncio.to_thread(read, body, service.served)
    running = await service.admit(wanted, request.receive)
    reply = Reply(wanted, service.served.name, service.token_bytes)
    if wanted.stream:
        return _Stream(_events(running, reply, wanted, request.scope), running)
    try:
        progress = [each async for each in running.progress()]
        return Response(encode(reply.whole(progress, running.usage)), media_type="application/json")
    finally:
        running.close()


async def _body(request: Request, most: int, timeout: float) -> Any:
    """The JSON of a request, never more than `most` bytes of it in memory."""
    # Only this type makes a browser ask before another site's page sends something here.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The content-type must be application/json")
    too_large = ApiError(413, f"The body has more than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"The request was not sent within {timeout:g} seconds", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(HUNG_UP, "The client has closed the connection") from None
    try:
        return json.loads(b"".join(parts), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise refuse(f"The body is not JSON ({error})", code="invalid_json") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


async def _events(running: ActiveRequest, reply: Reply, wanted: GenerationRequest, scope: Scope) -> AsyncIterator[bytes]:
    """The stream; an error ends it as an event of its own, since its status is long told."""
    for chunk in reply.opening():
        yield event(chunk)
    try:
        async for progress in running.progress():
            told = reply.chunk(progress)
            if told is not None:
                yield event(told)
        if wanted.include_usage:
            yield event(reply.last_chunk(running.usage))
    except ApiError as error:
        scope["outcome"] = error.status
        yield event(error.body)
    yield DONE


class _Stream(StreamingResponse):
    """Events as they come. The request is closed however the stream ends, be it before its first event."""

    def __init__(self, events: AsyncIterator[bytes], running: ActiveRequest) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False

        async def noted(message: Message) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await super().__call__(scope, receive, noted)
            if not complete:
                scope["outcome"] = HUNG_UP
        except (ClientDisconnect, OSError):
            scope["outcome"] = HUNG_UP
            raise
        except BaseException:
            scope["outcome"] = 500
            raise
        finally:
            self._running.close()


# Errors.


def _error(error: ApiError) -> Response:
    return Response(encode(error.body), error.status, error.headers, "application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """No such path, or no such method for it."""
    assert isinstance(error, HTTPException)
    response = _error(ApiError(error.status_code, f"{request.method} {request.url.path:.100}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(ApiError(500, "The server has made a mistake; its log says more", code="internal_error"))


# Around every endpoint.


class _Counted:
    """Counts requests by path and outcome."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.open_requests += 1
        try:
            await self._app(scope, receive, noted)
        finally:
            self._service.open_requests -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(scope.get("outcome", status))).inc()


class _KeyRequired:
    """Lets in who has the key, if there is one."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key is not None and scope["path"] not in _OPEN and not self._has_key(scope):
            message = "The API key is missing or wrong; send it as a bearer token (on the page: Settings)"
            error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            await _error(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        assert self._key is not None
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode())


# ----------------------------------------------------------------------------------------------------------------------
# `serve`: the application on a socket, until a signal has drained it.


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


def check_servable(model_name: str, options: ServeOptions) -> None:
    """Raises ValueError for what `serve` would refuse, before there is an engine: name, key or address."""
    check_name_and_key(model_name, os.environ.get(KEY_VARIABLE))
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


# ----------------------------------------------------------------------------------------------------------------------
# Connections that are not waited for without end, and no more of them than the process has descriptors for.


_OTHER_FILES = 32
"""Descriptors left for what else the program opens."""


def most_connections() -> int:
    """How many more descriptors this process may have, but for some."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(limit - len(os.listdir("/dev/fd")) - _OTHER_FILES, 1)


class Connection(H11Protocol):
    """uvicorn's, which by itself waits forever for the head of a request."""

    def __init__(self, *arguments: Any, read_timeout: float, most: int, **options: Any) -> None:
        """Args beyond uvicorn's: read_timeout: seconds for a head; most: connections, of all clients together."""
        super().__init__(*arguments, **options)
        self._read_timeout, self._most = read_timeout, most
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _time_head(self) -> None:
        """Runs the timer, from the end of what was before, until there is a request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._read_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


# ----------------------------------------------------------------------------------------------------------------------
# The chat page: one HTML file, and the headers that keep a browser from running or loading anything that is not in it.


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    text = resources.files("dsv3_jax.serve").joinpath("page.html").read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(text, "script"),
        "style-src": _hash(text, "style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _hash(text: str, tag: str) -> str:
    """The page's only script or style, by its hash."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
