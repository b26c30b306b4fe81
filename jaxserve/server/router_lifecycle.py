"""A router's life: listen, look at the replicas, pass requests, drain. With processes of its own, theirs too."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import uvicorn
import uvloop

from jaxserve.server.listen import Server, bind, unlink, url
from jaxserve.server.options import ServerOptions
from jaxserve.server.router import Router
from jaxserve.server.router_app import make_router_app
from jaxserve.server.router_children import Children, ChildrenError, Command
from jaxserve.server.router_replicas import CHECK_SECONDS, Fleet
from jaxserve.server.router_upstream import Upstream

logger = logging.getLogger(__name__)

LAST_WORDS = 0.2  # seconds for the last pieces of answers


@dataclass(frozen=True)
class Replicas:
    """What a router stands in front of: servers that run at `urls`, or `commands` that it starts itself.

    Attributes:
        key: for the router's own questions about queues.
        ca_certs: file with authorities to trust for https URLs, instead of the system's.
        check_seconds: between health checks.
    """

    urls: Sequence[str] = ()
    commands: Sequence[Command] = ()
    key: str | None = None
    ca_certs: str | None = None
    check_seconds: float = CHECK_SECONDS


class RouterLifecycle:
    """One router's life, in one event loop. Of `options`, keys and limits of queues are the replicas' business."""

    def __init__(self, replicas: Replicas, options: ServerOptions, place: str):
        self._replicas, self._options, self._place = replicas, options, place
        self._upstream = Upstream(replicas.ca_certs)
        urls = list(replicas.urls) or [""] * len(replicas.commands)
        self._fleet = Fleet(urls, self._upstream, key=replicas.key)
        self._children = Children(replicas.commands, self._fleet)
        self._router = Router(self._fleet, self._upstream, options.metrics_prefix)
        self._ending = asyncio.Event()

    async def run(self, sockets: Sequence[socket.socket]) -> int:
        """Route until a signal, or until all processes have been given up; returns the exit code."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal, number)
        tasks = [
            loop.create_task(self._fleet.watch(replica, self._replicas.check_seconds))
            for replica in self._fleet.replicas
        ]
        try:
            return await self._serve(list(sockets))
        except ChildrenError as error:
            logger.error("%s", error)
            return 1
        finally:
            for task in tasks:
                task.cancel()
            await self._children.stop()
            await self._upstream.close()

    async def _serve(self, sockets: list) -> int:
        starting = asyncio.create_task(self._start())
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():  # a signal during the start
            starting.cancel()
            return 0
        starting.result()
        server = Server(self._config(), self._say_ready)
        serving = asyncio.create_task(server.serve(sockets=sockets))
        failing = asyncio.create_task(self._children.failed())
        await asyncio.wait({serving, ending, failing}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            failing.cancel()
            await self._drain()
        server.should_exit = True
        await serving
        failing.cancel()
        if failing.done() and not failing.cancelled():
            failing.result()
        return 0 if server.started else 1

    async def _start(self) -> None:
        await self._children.start()
        await asyncio.gather(*map(self._fleet.check, self._fleet.replicas))
        for replica in self._fleet.replicas:
            if not replica.healthy:
                logger.warning("replica %d (%s) is not ready: %s", replica.index, replica.name, replica.problem)

    def _config(self) -> uvicorn.Config:
        options = self._options
        app = make_router_app(
            self._router,
            self._upstream,
            max_body_bytes=options.app.max_body_bytes,
            access_log=options.app.access_log,
        )
        return uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            root_path=options.root_path,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            ssl_ca_certs=options.ssl_ca_certs,
            timeout_graceful_shutdown=1,
        )

    def _say_ready(self) -> None:
        total, healthy = len(self._fleet.replicas), len(self._fleet.healthy)
        logger.info("%d of %d replicas take requests", healthy, total)
        logger.info("ready at %s", self._place)

    def _on_signal(self, number: int) -> None:
        if self._ending.is_set():
            logger.warning("second signal: ending at once")
            self._children.kill()
            os._exit(128 + number)
        name = signal.Signals(number).name
        logger.info("%s: no new requests; %d are running", name, self._fleet.in_flight)
        self.end()

    def end(self) -> None:
        """Take no new requests, let running ones finish, and return from `run`."""
        self._router.draining = True
        self._ending.set()

    async def _drain(self) -> None:
        """Let running requests finish; what is left then is ended by the replicas, if they are ours."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._options.shutdown_timeout
        while self._fleet.in_flight and loop.time() < end:
            await asyncio.sleep(0.05)
        await self._children.stop()
        await asyncio.sleep(LAST_WORDS)


def route(replicas: Replicas, options: ServerOptions) -> int:
    """Run a router; returns the exit code.

    Raises:
        OSError: the address cannot be used, or a file of certificates.
    """
    with bind(options) as bound, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(replicas, options, bound))
        finally:
            unlink(options)


async def _run(replicas: Replicas, options: ServerOptions, bound: socket.socket) -> int:
    return await RouterLifecycle(replicas, options, url(options, bound)).run([bound])
