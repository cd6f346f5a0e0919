"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3_jax.serve.errors import ApiError, refuse
from dsv3_jax.serve.page import load_page
from dsv3_jax.serve.replies import DONE, Reply, encode, event
from dsv3_jax.serve.requests import Served, Wanted, read_chat, read_completion
from dsv3_jax.serve.service import HUNG_UP, Running, Service

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


async def _answer(service: Service, read: Callable[[Any, Served], Wanted], request: Request) -> Response:
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


async def _events(running: Running, reply: Reply, wanted: Wanted, scope: Scope) -> AsyncIterator[bytes]:
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

    def __init__(self, events: AsyncIterator[bytes], running: Running) -> None:
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
