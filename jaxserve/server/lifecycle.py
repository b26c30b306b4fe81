"""From a bound socket to the last answer: start-up, signals, draining, and what happens when the engine dies."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

import jax
import uvicorn

from jaxserve.config import EngineArgs
from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.engine.cache_writes import CacheWrites
from jaxserve.engine.errors import EngineDeadError
from jaxserve.engine.process import EngineProcess
from jaxserve.interpreter import keep_what_is_there, take_short_turns
from jaxserve.server.app import make_app
from jaxserve.server.ending import EarlyEnd
from jaxserve.server.listen import Server, url
from jaxserve.server.observe import EngineMetrics, log_stats
from jaxserve.server.options import ServerOptions
from jaxserve.server.service import Service

logger = logging.getLogger(__name__)

HEARTBEAT = 0.5  # seconds between looks at the engine
ABORT_SECONDS = 0.5  # from the end of the time that requests get until they end without the engine
CLOSE_SECONDS = 1.0  # for the engine to end by itself
LAST_WORDS = 1.0  # seconds that waiting clients have to read why the engine died


class Lifecycle:
    """One server's life, in one event loop."""

    def __init__(self, engine: AsyncLLMEngine, options: ServerOptions, bound: socket.socket):
        self._engine, self._options, self._bound = engine, options, bound
        self._service = Service(engine, options.limits, response_role=options.response_role)
        metrics = EngineMetrics(engine, options.metrics_prefix)
        config = uvicorn.Config(
            make_app(self._service, metrics, options.app),
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
        keep_what_is_there()
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
        await self._until_idle(self._options.shutdown_timeout)
        for key in self._engine.active_ids:
            await self._engine.abort(key)
        await self._until_idle(ABORT_SECONDS)
        self._service.end()
        await asyncio.sleep(0.1)  # the last outputs are on their way
        self._server.should_exit = True

    async def _until_idle(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self._engine.num_active and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

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


def serve(
    engine_args: EngineArgs,
    options: ServerOptions,
    bound: socket.socket,
    ending: EarlyEnd,
    prepare: Callable[[], object],
) -> int:
    """Load the model and serve it on a socket that `bind` made; returns the exit code.

    Signals are `ending`'s business until the model is there. The engine has a process of its own, which calls `prepare`
    first, unless the options say otherwise or this process has joined others that share the engine.

    Raises:
        ValueError: an argument, the model's files or the memory do not fit.
    """
    if not options.engine_process or jax.distributed.is_initialized():
        return _serve_here(engine_args, options, bound, ending)
    process = EngineProcess(engine_args, prepare)
    ending.first(process.join)
    try:
        process.wait_ready()
        life = Lifecycle(AsyncLLMEngine(process), options, bound)
        ending.release()
        return uvicorn_run(life)
    finally:
        process.join()


def _serve_here(engine_args: EngineArgs, options: ServerOptions, bound: socket.socket, ending: EarlyEnd) -> int:
    """Serve with the engine in a thread.

    When the server has ended while programs still compile, the process ends in here rather than wait for them.
    """
    with CacheWrites() as writes:
        ending.first(writes.close)
        engine = AsyncLLMEngine.from_engine_args(engine_args)
        try:
            life = Lifecycle(engine, options, bound)
            ending.release()
            code = uvicorn_run(life)
        except BaseException:
            engine.shutdown()
            raise
        closing = threading.Thread(target=engine.shutdown, daemon=True, name="shutdown")
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            logger.info("programs are still being compiled; ending without them")
            ending.leave(code)
        return code


def uvicorn_run(life: Lifecycle) -> int:
    """Run a server's life in an event loop of its own, uvloop's where it is installed."""
    take_short_turns()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(life.run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
