"""Replicas as child processes: start, wait until they are ready, restart what dies, end all."""

import asyncio
import collections
import contextlib
import logging
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxserve.server.router_replicas import Fleet, Replica

logger = logging.getLogger(__name__)

LAST_LINES = 5  # of a dead process' log, in messages
LONGEST_LINE = 1 << 20  # bytes
RESTARTS = 5  # in a row, each after a longer pause, until a process is given up
STEADY_SECONDS = 300.0  # of service after which a death counts as the first one again
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before restarts, doubled each time
KILL_SECONDS = 15.0  # from SIGTERM to SIGKILL
READY = re.compile(r"(?:INFO: )?ready at (http://127\.0\.0\.1:\d+)")
LEVELS = {"WARNING": logging.WARNING, "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL}


class ChildrenError(Exception):
    """The processes cannot do their work; the text holds their last words."""


@dataclass(frozen=True)
class Command:
    """How to start one replica: its words, and its whole environment.

    The process must listen on 127.0.0.1, log `ready at URL` on standard error, and end when its standard input does:
    then it never outlives this one, however this one ends.
    """

    words: Sequence[str]
    environment: Mapping[str, str]


class Child:
    """One replica's process, and those that follow it."""

    def __init__(self, command: Command, replica: Replica, fleet: Fleet):
        self.replica = replica
        self.ready = asyncio.Event()  # it was ready once
        self._command, self._fleet = command, fleet
        self._process: asyncio.subprocess.Process | None = None
        self._since = 0.0  # when the process that runs became ready, in the event loop's seconds; 0 if it did not
        self._stopping = False
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)

    async def live(self) -> None:
        """Keep a process running.

        Raises:
            ChildrenError: it ended before it was ready for the first time, or too often.
        """
        deaths = 0
        while True:
            code = await self._run()
            if self._stopping:
                return
            loop = asyncio.get_running_loop()
            steady = self._since and loop.time() - self._since >= STEADY_SECONDS
            deaths = 1 if steady else deaths + 1
            self._fleet.moved(self.replica, "", f"its process ended with {code}")  # clients read this
            problem = f"its process ended with {code}: {' | '.join(self._lines) or 'it said nothing'}"
            if not self.ready.is_set():
                raise ChildrenError(f"replica {self.replica.index} did not start; {problem}")
            if deaths > RESTARTS:
                raise ChildrenError(f"replica {self.replica.index} is given up after {RESTARTS} restarts; {problem}")
            pause = min(FIRST_PAUSE * 2 ** (deaths - 1), LONGEST_PAUSE)
            logger.error("replica %d: %s; restart %d in %g s", self.replica.index, problem, deaths, pause)
            await asyncio.sleep(pause)

    async def _run(self) -> int:
        """Start a process and follow its log to its end; returns the exit code."""
        self._since = 0.0
        self._lines.clear()
        process = await asyncio.create_subprocess_exec(
            *self._command.words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=dict(self._command.environment),
            limit=LONGEST_LINE,
            start_new_session=True,  # signals of the terminal go to the router alone, which passes them on in order
        )
        self._process = process
        if self._stopping:
            process.terminate()
        assert process.stderr is not None
        while not process.stderr.at_eof():
            with contextlib.suppress(ValueError):  # a line without an end
                raw = await process.stderr.readline()
                if raw.strip():
                    self._read(raw.decode("utf-8", "replace").rstrip())
        return await process.wait()

    def _read(self, line: str) -> None:
        """Pass a line of its log on."""
        found = READY.fullmatch(line)
        if found and not self._since:  # once only: later lines may repeat what clients wrote
            logger.info("replica %d listens at %s", self.replica.index, found[1])
            self._since = asyncio.get_running_loop().time()
            self.ready.set()
            self._fleet.moved(self.replica, found[1], "it is starting")
            return
        level, colon, text = line.partition(": ")
        known = bool(colon) and level in (*LEVELS, "INFO")
        logger.log(LEVELS.get(level, logging.INFO), "replica %d: %s", self.replica.index, text if known else line)
        self._lines.append(line)

    def signal(self, number: int) -> bool:
        """Send a signal, and start no other process; False if there is none now."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return False
        self._process.send_signal(number)
        return True


class Children:
    """All processes."""

    def __init__(self, commands: Sequence[Command], fleet: Fleet):
        self._children = [
            Child(command, replica, fleet) for command, replica in zip(commands, fleet.replicas, strict=False)
        ]
        self._lives: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all, and wait until all are ready.

        Raises:
            ChildrenError: one ended before that.
        """
        self._lives = [asyncio.create_task(child.live()) for child in self._children]
        waiting = {asyncio.create_task(child.ready.wait()) for child in self._children}
        try:
            while waiting:
                done, _ = await asyncio.wait({*waiting, *self._lives}, return_when=asyncio.FIRST_COMPLETED)
                for life in done.intersection(self._lives):
                    life.result()
                waiting -= done
                logger.info("%d of %d replicas are ready", len(self._children) - len(waiting), len(self._children))
        finally:
            for task in waiting:
                task.cancel()

    async def failed(self) -> None:
        """Wait until the last process has been given up, for ever if there are none.

        Raises:
            ChildrenError: what the last one died of.
        """
        if not self._lives:
            await asyncio.Event().wait()
        last = ChildrenError("all replicas have ended")
        for life in asyncio.as_completed(self._lives):
            try:
                await life
            except ChildrenError as error:
                logger.error("%s", error)
                last = error
        raise last

    async def stop(self) -> None:
        """End all, by force if they do not by themselves."""
        for child, life in zip(self._children, self._lives, strict=False):
            if not child.signal(signal.SIGTERM) and child.ready.is_set():
                life.cancel()  # it waits for a restart
        if self._lives:
            _, alive = await asyncio.wait(self._lives, timeout=KILL_SECONDS)
            if alive:
                self.kill()
                await asyncio.wait(alive, timeout=KILL_SECONDS)

    def kill(self) -> None:
        """End all by force."""
        for child in self._children:
            child.signal(signal.SIGKILL)
