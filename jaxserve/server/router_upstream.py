"""How the router talks to replicas: the only file that knows the HTTP client library.

Bodies go through as bytes: nothing is decompressed, decoded or followed.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence

import aiohttp
from yarl import URL

CONNECT_SECONDS = 3.0
KEEP_SECONDS = 3.0  # an idle connection is kept; less than uvicorn's 5, so that the replica never closes one first
MIB = 1 << 20

# Of one connection, not of the message (RFC 9110, section 7.6.1), or written anew for each connection.
HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length", b"date", b"server",
})  # fmt: skip
# What aiohttp would add by itself.
NOT_ADDED = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")

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

    def __init__(self, response: aiohttp.ClientResponse):
        self._response = response
        self.status = response.status
        self.headers = end_to_end(response.raw_headers)

    def header(self, name: bytes) -> bytes:
        """The first header of this (lower-case) name, or nothing."""
        return next((value for own, value in self.headers if own == name), b"")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives; raises `UpstreamError` where it breaks off."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"the answer broke off: {describe(error)}") from error

    async def read(self) -> bytes:
        """The whole body; raises `UpstreamError`."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def close(self) -> None:
        """Free the connection; one with an unread answer is closed, which tells the replica to stop."""
        self._response.release()


class Upstream:
    """A pool of connections to the replicas; made inside a running event loop.

    Args:
        ca_certs: file with certificates of authorities to trust for https, instead of the system's.
    """

    def __init__(self, ca_certs: str | None = None):
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=KEEP_SECONDS,
            ssl=ssl.create_default_context(cafile=ca_certs),
            socket_factory=_make_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=NOT_ADDED,
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=CONNECT_SECONDS),
            read_bufsize=MIB,
        )

    async def ask(self, method: str, url: str, headers: Headers, body: bytes | None = None) -> Answer:
        """Send a request and wait for the head of its answer, without a time limit once connected.

        Raises:
            UpstreamError: there is no connection, or it ended before an answer began.
        """
        pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        target = URL(url, encoded=True)
        try:
            return Answer(await self._session.request(method, target, headers=pairs, data=body, allow_redirects=False))
        except (aiohttp.ClientError, OSError) as error:
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
        await self._session.close()


def describe(error: BaseException) -> str:
    """One line about what went wrong on a connection."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def _make_socket(address: tuple) -> socket.socket:
    """A socket on which small events leave at once, and which notices within about 35 s that a host has vanished."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    wanted = [("IPPROTO_TCP", "TCP_NODELAY", 1), ("SOL_SOCKET", "SO_KEEPALIVE", 1)]
    wanted += [("IPPROTO_TCP", f"TCP_KEEP{name}", value) for name, value in (("IDLE", 15), ("INTVL", 5), ("CNT", 4))]
    known = vars(socket)  # not every system has all of them
    for level, name, value in wanted:
        if name in known:
            made.setsockopt(known[level], known[name], value)
    return made
