"""The socket that a server listens on, and uvicorn on top of it."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import uvicorn

from jaxserve.server.options import ServerOptions


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, and which says when it listens."""

    def __init__(self, config: uvicorn.Config, when_ready: Callable[[], None]):
        super().__init__(config)
        self._when_ready = when_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `Lifecycle`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._when_ready()


def bind(options: ServerOptions) -> socket.socket:
    """The listening socket, before anything expensive starts.

    Raises:
        OSError: the address is in use or not ours.
    """
    try:
        if options.uds is not None:
            found = socket.socket(socket.AF_UNIX)
            found.bind(options.uds)
            return found
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((options.host, options.port))
    except OSError as error:
        place = options.uds or f"{options.host}:{options.port}"
        raise OSError(f"cannot listen on {place}: {error.strerror}; choose another --host or --port") from error
    return found


def unlink(options: ServerOptions) -> None:
    """Remove the Unix socket that `bind` made, if it made one."""
    if options.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(options.uds)


def url(options: ServerOptions, bound: socket.socket) -> str:
    """Where clients find the server."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = bound.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if options.ssl_certfile else 'http'}://{shown}:{port}"
