"""How the router talks to replicas: the only file that knows the HTTP client library.

Bodies go through as bytes: nothing is decompressed, decoded or followed. The transport of httpx is used without its
client, whose redirects, cookies and environment variables have no place in a proxy.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence

import httpx

CONNECT_SECONDS = 3.0
KEEP_SECONDS = 3.0  # an idle connection is kept; less than uvicorn's 5, so that the replica never closes one first
KEPT_CONNECTIONS = 256

# Of one connection, not of the message (RFC 9110, section 7.6.1), or written anew for each connection.
HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length", b"date", b"server",
})  # fmt: skip

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """A replica cannot be reached, or broke off; the text says how."""


def end_to_end(headers: Iterable[tuple[bytes, bytes]], drop: Sequence[bytes] = ()) -> Headers:
    """The headers that are meant for the other end, names in lower case; without those in `drop` too."""
    found = [(name.lower(), value) for name, value in headers]
    named = [value for name, value in found if name == b"connection"]
    own = {part.strip().lower() for value in named for part in value.split(b",")}
    return [(name, value) for name, value in found if name not in HOP_BY_HOP and name not in own and name not in drop]


class Answer:
    """A response whose body is still to come; `close` ends it at once, whatever was read.

    Attributes:
        status, headers: hop-by-hop headers and the body's length are gone.
    """

    def __init__(self, response: httpx.Response):
        self._response = response
        self.status = response.status_code
        self.headers = end_to_end(response.headers.raw)

    def header(self, name: bytes) -> bytes:
        """The first header of this (lower-case) name, or nothing."""
        return next((value for own, value in self.headers if own == name), b"")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; raises `UpstreamError` where it breaks off."""
        stream = self._response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        try:
            async for chunk in stream:
                yield chunk
        except (httpx.HTTPError, OSError) as error:
            raise UpstreamError(f"the answer broke off: {describe(error)}") from error

    async def read(self) -> bytes:
        """The whole body; raises `UpstreamError`."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def close(self) -> None:
        """Free the connection; one with an unread answer is closed, which tells the replica to stop."""
        await self._response.aclose()


class Upstream:
    """A pool of connections to the replicas.

    Args:
        ca_certs: file with certificates of authorities to trust for https, instead of the system's.
    """

    def __init__(self, ca_certs: str | None = None):
        context = ssl.create_default_context(cafile=ca_certs)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS, keepalive_expiry=KEEP_SECONDS
        )
        self._transport = httpx.AsyncHTTPTransport(
            verify=context, trust_env=False, limits=limits, socket_options=_socket_options()
        )

    async def ask(self, method: str, url: str, headers: Headers, body: bytes | None = None) -> Answer:
        """Send a request and wait for the head of its answer, without a time limit once connected.

        Raises:
            UpstreamError: there is no connection, or it ended before an answer began.
        """
        request = httpx.Request(method, url, headers=headers, content=body)
        request.extensions = {"timeout": {"connect": CONNECT_SECONDS, "read": None, "write": None, "pool": None}}
        try:
            return Answer(await self._transport.handle_async_request(request))
        except (httpx.HTTPError, OSError) as error:
            raise UpstreamError(describe(error)) from error

    async def fetch(self, url: str, headers: Headers, seconds: float, method: str = "GET") -> tuple[Answer, bytes]:
        """A whole answer within a time limit; raises `UpstreamError`."""
        try:
            async with asyncio.timeout(seconds):
                answer = await self.ask(method, url, headers)
                try:
                    return answer, await answer.read()
                finally:
                    await answer.close()
        except TimeoutError:
            raise UpstreamError(f"no answer within {seconds:g} s") from None

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()


def describe(error: BaseException) -> str:
    """One line about what went wrong on a connection."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _socket_options() -> list[tuple[int, int, int]]:
    """Small events leave at once, and a host that vanished is noticed within about 35 s, also while an answer waits."""
    wanted = [("IPPROTO_TCP", "TCP_NODELAY", 1), ("SOL_SOCKET", "SO_KEEPALIVE", 1)]
    wanted += [("IPPROTO_TCP", f"TCP_KEEP{name}", value) for name, value in (("IDLE", 15), ("INTVL", 5), ("CNT", 4))]
    known = vars(socket)  # not every system has all of them
    return [(known[level], known[name], value) for level, name, value in wanted if name in known]
