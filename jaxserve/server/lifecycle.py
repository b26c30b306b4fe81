"""From a bound socket to the last answer: start-up, signals, draining, and what happens when the engine dies."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import uvicorn

from jaxserve.config import EngineArgs
from jaxserve.engine.async_engine import AsyncLLMEngine, EngineDeadError
from jaxserve.server.app import AppOptions, make_app
from jaxserve.server.observe import log_stats, make_registry
from jaxserve.server.service import Limits, Service

logger = logging.getLogger(__name__)

HEARTBEAT = 0.5  # seconds between looks at the engine
LAST_WORDS = 1.0  # seconds that waiting clients have to read why the engine died


@dataclass(frozen=True)
class ServerOptions:
    """Everything about the server that is not about the engine.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        uds: path of a Unix socket to listen on instead.
        ssl_keyfile, ssl_certfile, ssl_ca_certs: files for TLS.
        root_path: under which a proxy serves this.
        shutdown_timeout: seconds that running requests may take after the first SIGTERM.
        metrics_prefix: of Prometheus names.
        response_role: of chat answers.
    """

    app: AppOptions
    limits: Limits
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    root_path: str = ""
    shutdown_timeout: float = 0.0
    metrics_prefix: str = "jaxserve"
    response_role: str = "assistant"


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


def url(options: ServerOptions, bound: socket.socket) -> str:
    """Where clients find the server."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = bound.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if options.ssl_certfile else 'http'}://{shown}:{port}"


class Lifecycle:
    """One server's life, in one event loop."""

    def __init__(self, engine: AsyncLLMEngine, options: ServerOptions, bound: socket.socket):
        self._engine, self._options, self._bound = engine, options, bound
        self._service = Service(engine, options.limits, response_role=options.response_role)
        registry = make_registry(engine, options.metrics_prefix)
        config = uvicorn.Config(
            make_app(self._service, registry, options.app),
            log_config=None,
            access_log=False,
            root_path=options.root_path,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_ca_certs=options.ssl_ca_certs,
            timeout_graceful_shutdown=1,
        )
        self._server = Server(config, self._say_ready)
        self._failure: BaseException | None = None
        self._drain: asyncio.Task | None = None

    def _say_ready(self) -> None:
        gc.collect()
        gc.freeze()  # what start-up made stays; looking through it again and again costs milliseconds
        logger.info("ready at %s", url(self._options, self._bound))

    async def run(self) -> int:
        """Serve until a signal or the engine's end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        others = [asyncio.create_task(self._watch())]
        if self._engine.config.log_stats:
            others.append(asyncio.create_task(log_stats(self._engine)))
        try:
            await self._server.serve(sockets=[self._bound])
        finally:
            for task in others:
                task.cancel()
        if self._failure is not None:
            logger.error("the server ends: %s", self._failure)
            return 1
        return 0 if self._server.started else 1

    def _on_signal(self, number: int) -> None:
        if self._drain is not None:
            logger.warning("second signal: ending at once")
            os._exit(128 + number)
        name = signal.Signals(number).name
        logger.info("%s: no new requests; %d are running", name, self._engine.num_active)
        self._service.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._finish_running())

    async def _finish_running(self) -> None:
        end = asyncio.get_running_loop().time() + self._options.shutdown_timeout
        while self._engine.num_active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        for key in self._engine.active_ids:
            await self._engine.abort(key)
        await asyncio.sleep(0.1)  # the last outputs are on their way
        self._server.should_exit = True

    async def _watch(self) -> None:
        """End the server soon after the engine has died, so that whoever starts servers can start another."""
        while True:
            await asyncio.sleep(HEARTBEAT)
            try:
                await self._engine.check_health()
            except EngineDeadError as error:
                self._failure = error
                self._service.draining = True
                await asyncio.sleep(LAST_WORDS)
                self._server.should_exit = True
                return


def serve(engine_args: EngineArgs, options: ServerOptions) -> int:
    """Load the model and serve it; returns the exit code.

    Raises:
        OSError: the address cannot be used; this is found out first.
        ValueError: an argument, the model's files or the memory do not fit.
    """
    with bind(options) as bound:
        engine = AsyncLLMEngine.from_engine_args(engine_args)
        try:
            return uvicorn_run(Lifecycle(engine, options, bound))
        finally:
            engine.shutdown()
            if options.uds is not None:
                with contextlib.suppress(OSError):
                    os.unlink(options.uds)


def uvicorn_run(life: Lifecycle) -> int:
    """Run a server's life in an event loop of its own, uvloop's where it is installed."""
    # The engine's thread shares the interpreter with the event loop; Python's 5 ms turns are longer than its steps.
    sys.setswitchinterval(5e-4)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(life.run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def read_keys(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """API keys from the command line and from files with one on each line.

    Raises:
        ValueError: a file holds none, or a key is empty.
    """
    keys = list(given)
    for name in files:
        with open(name, encoding="utf-8") as file:
            found = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{name} holds no API key")
        keys += found
    if any(not key.strip() for key in keys):
        raise ValueError("an API key is empty")
    return keys
