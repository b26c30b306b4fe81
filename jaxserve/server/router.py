"""The router: one endpoint in front of several servers.

A request goes to the replica that `router_affinity` chooses, and its answer comes back as it is. As long as no byte of
an answer has been sent, a connection that fails, a 503 or a 429 sends the request to the next replica, each at most
once. A replica that fails or says 503 is out until a check finds it well; 429 only means that it is full.
"""

import asyncio
import json
import logging
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from jaxserve.server.errors import ApiError
from jaxserve.server.middleware import Message, Receive, Send, answer, route_path
from jaxserve.server.router_affinity import prompt_blocks
from jaxserve.server.router_metrics import RouterMetrics
from jaxserve.server.router_replicas import Fleet, Replica, reason
from jaxserve.server.router_upstream import Answer, Headers, Upstream, UpstreamError, end_to_end

logger = logging.getLogger(__name__)

LARGEST_HELD = 1 << 20  # bytes of one event that has not ended
RANK = b"x-data-parallel-rank"
DONE = b"data: [DONE]\n\n"

WITH_PROMPT = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Incoming:
    """A request as the replicas get it: `target` is path and query, `rank` the replica it asks for."""

    method: str
    path: str
    target: str
    headers: Headers
    body: bytes | None
    rank: bytes


@dataclass
class Refusals:
    """What replicas said before one took the request.

    Attributes:
        last: the kind of the last refusal: connection, 503 or 429.
        failures: what went wrong, by replica.
        full: the last 429.
    """

    last: str = ""
    failures: dict[int, str] = field(default_factory=dict)
    full: tuple[Answer, bytes] | None = None


class Router:
    """Passes requests to the replicas of a fleet; an ASGI application."""

    def __init__(self, fleet: Fleet, upstream: Upstream, metrics_prefix: str):
        self.fleet, self.draining = fleet, False
        self.metrics = RouterMetrics(fleet, metrics_prefix)
        self._upstream = upstream

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            request = await read_request(scope, receive)
            if self.draining and request.method == "POST":
                raise ApiError(503, "the server is shutting down", retry_after=5)
            client = Client(receive, send)
            await client.unless_gone(self._pass(request, client.send))
        except ApiError as error:
            await answer(error, scope, send)

    async def _pass(self, request: Incoming, send: Send) -> None:
        """Try replicas until one takes the request, and pass its answer on; raises `ApiError` if none does."""
        blocks = prompt_blocks(request.body) if request.body and request.path in WITH_PROMPT else []
        tried: set[int] = set()
        refusals = Refusals()
        while True:
            if request.rank:
                chosen = None if tried else (self.fleet.pinned(request.rank), "pinned")
            else:
                chosen = self.fleet.pick(blocks, tried)
            if chosen is None:
                return await self._refuse(refusals, send)
            replica, choice = chosen
            if tried:
                self.metrics.retries.labels(refusals.last).inc()
            else:
                self.metrics.choices.labels(choice).inc()
            tried.add(replica.index)
            with replica.busy():
                if await self._try(replica, request, refusals, send):
                    return None

    async def _try(self, replica: Replica, request: Incoming, refusals: Refusals, send: Send) -> bool:
        """Pass a request to one replica; False if it did not take it, and nothing was sent to the client."""
        status = "failed"
        try:
            answer = await self._upstream.ask(
                request.method, replica.url + request.target, request.headers, request.body
            )
            status = str(answer.status)
            try:
                return await self._take(replica, answer, refusals, send)
            finally:
                await answer.close()
        except UpstreamError as error:
            self._failed(replica, str(error), refusals, "connection")
            return False
        except asyncio.CancelledError:
            status = "disconnected"
            raise
        finally:
            self.metrics.requests.labels(str(replica.index), status).inc()

    def _failed(self, replica: Replica, problem: str, refusals: Refusals, kind: str) -> None:
        self.fleet.report(replica, problem)
        refusals.failures[replica.index] = problem
        refusals.last = kind

    async def _take(self, replica: Replica, answer: Answer, refusals: Refusals, send: Send) -> bool:
        """Pass an answer on, unless it sends the request to the next replica (False)."""
        if answer.status == 503:
            self._failed(replica, f"it answers 503: {reason(await answer.read())}", refusals, "503")
            return False
        if answer.status == 429:
            refusals.full, refusals.last = (answer, await answer.read()), "429"
            return False
        if answer.header(b"content-type").startswith(b"text/event-stream"):
            await self._stream(replica, answer, send)
        else:
            await send_whole(answer, await answer.read(), send)
        return True

    async def _refuse(self, refusals: Refusals, send: Send) -> None:
        """Tell the client that no replica took its request."""
        if refusals.full is not None:
            return await send_whole(*refusals.full, send)
        problems = self.fleet.describe_problems(refusals.failures)
        raise ApiError(503, f"no healthy replica: {problems}", retry_after=1)

    async def _stream(self, replica: Replica, answer: Answer, send: Send) -> None:
        """Pass events on as they come. The head waits for the first bytes, so that until then another may take over.

        Only whole events are sent, so that one that breaks off in the middle can be followed by an error.
        """
        begun, ended, held = False, False, b""
        try:
            async for chunk in answer.chunks():
                if not begun:
                    await send_head(answer, send)
                    begun = True
                chunk = held + chunk if held else chunk  # noqa: PLW2901
                cut = whole_events(chunk)
                held = chunk[cut:]
                if cut:
                    ended = chunk.endswith(DONE)
                    await send_piece(chunk[:cut] if held else chunk, send)
        except UpstreamError as error:
            if not begun:
                raise
            self.fleet.report(replica, str(error))
            if not ended:
                self.metrics.broken.labels(str(replica.index)).inc()
                failure = ApiError(503, f"replica {replica.index}: {error}")
                held = b"data: " + json.dumps(failure.body()).encode() + b"\n\n" + DONE
        if not begun:
            await send_head(answer, send)
        await send({"type": "http.response.body", "body": held, "more_body": False})


async def read_request(scope: Any, receive: Receive) -> Incoming:
    """A request out of ASGI's pieces; raises `ApiError` 400 or 404 if its path is none of a server's.

    The path is written anew from its decoded form, without steps up or down that a server might follow.
    """
    path = route_path(scope)
    if any(part in (".", "..") for part in path.replace("\\", "/").split("/")):
        raise ApiError(404, "the path must not hold . or .. steps")
    query = scope["query_string"].decode("latin-1")
    target = quote(path, safe="/:@!$&'()*+,;=~-._") + (f"?{quote(query, safe=_QUERY)}" if query else "")
    body = None
    if scope["method"] == "POST":
        message: Message = await receive()  # the middleware has put it together
        body = message.get("body", b"")
    rank = next((value for name, value in scope["headers"] if name == RANK), b"")
    return Incoming(scope["method"], path, target, end_to_end(scope["headers"], (RANK,)), body, rank)


_QUERY = "%/?:@!$&'()*+,;=~-._[]"


def whole_events(chunk: bytes) -> int:
    """Bytes up to the end of the last whole event; all of them if that is too far away."""
    if chunk.endswith(b"\n\n") or len(chunk) > LARGEST_HELD:
        return len(chunk)
    line_feeds, returns = chunk.rfind(b"\n\n"), chunk.rfind(b"\r\n\r\n")
    return max(line_feeds + 2 if line_feeds >= 0 else 0, returns + 4 if returns >= 0 else 0)


async def send_head(answer: Answer, send: Send) -> None:
    """The status and headers of a stream."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})


async def send_piece(body: bytes, send: Send) -> None:
    """A part of a stream."""
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def send_whole(answer: Answer, body: bytes, send: Send) -> None:
    """A whole answer."""
    headers = [*answer.headers, (b"content-length", b"%d" % len(body))]
    if answer.status == 204:
        headers.pop()
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Client:
    """The other end of a request.

    Attributes:
        answered: the last byte of an answer is on its way; from here on the server reports the client as gone.
    """

    def __init__(self, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self.answered = False

    async def send(self, message: Message) -> None:
        """Send a piece of an answer."""
        self.answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def unless_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, which is cancelled when the client leaves before it is answered."""
        task, watcher = asyncio.create_task(work), asyncio.create_task(self._gone())
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() or self.answered:
                await task
        finally:
            watcher.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
