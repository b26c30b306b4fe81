"""What every request passes: keys, size limit, access log and counts. Plain ASGI, so that streams are not touched."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from jaxserve.server.errors import ApiError

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready", "/ping")  # need no key
BEGIN_AT_ONCE = 4  # requests, in one turn of the event loop
QUIET = ("/health", "/ready", "/ping", "/metrics", "/load")  # asked every few seconds: not in the access log


class Keys:
    """A set of API keys, compared in constant time."""

    def __init__(self, keys: Collection[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, header: bytes) -> bool:
        """Whether an `Authorization` header holds one of the keys."""
        scheme, _, key = header.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(found, digest) for digest in self._digests]  # all of them, match or not
        return scheme.lower() == b"bearer" and any(matches)


class Authenticate:
    """401 without a key, on every route but the open ones; admin routes have keys of their own, or do not exist."""

    def __init__(self, app: App, *, keys: Keys, admin_keys: Keys, admin_routes: Collection[str]):
        self._app, self._keys, self._admin_keys, self._admin = app, keys, admin_keys, frozenset(admin_routes)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in OPEN or scope["method"] == "OPTIONS":
            return await self._app(scope, receive, send)
        admin = route_path(scope) in self._admin
        if admin and not self._admin_keys:
            return await answer(
                ApiError(404, "admin routes are off; start the server with --admin-api-key"), scope, send
            )
        keys = self._admin_keys if admin else self._keys
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if keys and not keys.accept(header):
            kind = "admin key" if admin else "API key"
            message = f"a valid {kind} is needed in the header 'Authorization: Bearer KEY'"
            return await answer(ApiError(401, message), scope, send)
        return await self._app(scope, receive, send)


class LimitBody:
    """413 for bodies above a number of bytes, before they are read and while they come."""

    def __init__(self, app: App, *, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        size = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if size.isdigit() and int(size) > self._most:
            return await self._refuse(int(size), scope, send)
        pieces, read = [], 0
        if scope["method"] in ("POST", "PUT", "PATCH"):
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return None  # gone already
                read += len(message.get("body", b""))
                if read > self._most:
                    return await self._refuse(read, scope, send)
                pieces.append(message.get("body", b""))
                more = message.get("more_body", False)
        body: list[Message] = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}] if pieces else []

        async def replay() -> Message:
            return body.pop() if body else await receive()

        return await self._app(scope, replay, send)

    async def _refuse(self, size: int, scope: MutableMapping[str, Any], send: Send) -> None:
        message = f"the body has {size:,} bytes or more, the limit is {self._most:,} (--max-body-mb)"
        await answer(ApiError(413, message), scope, send)


class Turns:
    """Lets a few requests begin in each turn of the event loop, so that a crowd does not hold up everybody's events.

    Reading and checking each keeps the loop busy.
    """

    def __init__(self, app: App):
        self._app = app
        self._begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            loop = asyncio.get_running_loop()
            if self._begun == BEGIN_AT_ONCE:
                self._waiting.append(loop.create_future())
                await self._waiting[-1]
            else:
                if not self._begun:
                    loop.call_soon(self._turn)
                self._begun += 1
        return await self._app(scope, receive, send)

    def _turn(self) -> None:
        """The next turn: those who wait come first."""
        self._begun = 0
        while self._waiting and self._begun < BEGIN_AT_ONCE:
            future = self._waiting.popleft()
            if not future.done():  # its client may have left
                future.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._turn)


class Observe:
    """Counts and times answers, writes the access log, and turns whatever escapes into a 500 of ours."""

    def __init__(self, app: App, *, registry: CollectorRegistry, access_log: bool):
        self._app, self._log = app, access_log
        labels = ["handler", "method", "status"]
        self._count = Counter("http_requests", "Answers by route and status.", labels, registry=registry)
        self._seconds = Histogram(
            "http_request_duration_seconds", "Until the answer ended.", labels[:2], registry=registry
        )

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await answer(ApiError(500, f"{type(error).__name__}: {error}"), scope, note)
        finally:
            self._finish(scope, status, time.perf_counter() - start)
        return None

    def _finish(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # of unknown paths there are any number
        shown = str(status) if status else "disconnected"
        self._count.labels(route, scope["method"], shown).inc()
        self._seconds.labels(route, scope["method"]).observe(seconds)
        if self._log and route_path(scope) not in QUIET:
            host, port = scope.get("client") or ("-", 0)
            # As it came, so escaped: a line break in it would forge lines of the log.
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            logger.info('%s:%s "%s %s" %s %.3f s', host, port, scope["method"], path, shown, seconds)


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path that routes are compared with: uvicorn puts --root-path before it."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


async def answer(error: ApiError, scope: MutableMapping[str, Any], send: Send) -> None:
    """Send an error."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
