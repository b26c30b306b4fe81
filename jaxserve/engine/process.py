"""An engine in a process of its own, so that nothing its callers do takes the interpreter from its steps.

The two have a pair of sockets, which nobody else can reach. The first message says what to load, commands follow; the
first answer is the engine's configuration, reports follow. The engine's process ends as soon as its socket does,
whatever it is doing: then whoever started it is gone.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxserve.config import EngineArgs, EngineConfig
from jaxserve.engine.cache_writes import CacheWrites
from jaxserve.engine.engine import LLMEngine
from jaxserve.engine.errors import EngineDeadError
from jaxserve.engine.loop import Add, Command, EngineLoop, Queue, Report
from jaxserve.engine.setup import load_tokenizer_of
from jaxserve.interpreter import keep_what_is_there, take_short_turns
from jaxserve.text import Tokenizer
from jaxserve.types import CompletionOutput, RequestOutput

logger = logging.getLogger(__name__)

START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from jaxserve.engine.process import main
main(int(sys.argv[2]))
"""
FEW_OUTPUTS, FEW_TOKENS = 4, 128  # of a report that is sent at once
END_SECONDS = 1.5  # for the process to end by itself, what it writes into the compilation cache included


class EngineProcess:
    """The process, as an `EngineLink`; `wait_ready` comes first."""

    config: EngineConfig
    tokenizer: Tokenizer | None

    def __init__(self, args: EngineArgs, prepare: Callable[[], object]):
        """Start to load; the process calls `prepare`, a function of a module, before anything else."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._args = args
        self._socket = Connection(ours.detach())
        self._lock = threading.Lock()  # one message after the other
        self._prompts: dict[int, tuple[str, str | None, list[int]]] = {}  # what outputs repeat: id, text and tokens
        self._closed = False
        self._send((args, prepare))

    def wait_ready(self) -> None:
        """Return when the engine is ready and its tokenizer here as well.

        Raises:
            Exception: what loading raised.
            EngineDeadError: the process has ended.
        """
        files = self._args.model, self._args.tokenizer
        local = all(name is None or Path(name).exists() for name in files)  # else the process downloads them first
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
            early = pool.submit(load_tokenizer_of, self._args) if local else None
            self.config = self._first_answer()
            self.tokenizer = load_tokenizer_of(self._args) if early is None else early.result()

    def _first_answer(self) -> EngineConfig:
        try:
            answer = self._socket.recv()
        except (OSError, EOFError):
            if self._closed:
                threading.Event().wait()  # for ever: whoever called `join` ends this process
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def start(self, report: Callable[[Report], object]) -> None:
        """Begin to report, from a thread of this process."""
        threading.Thread(target=self._read, args=(report,), daemon=True, name="engine reports").start()

    def put(self, command: Command) -> None:
        """Send a command; nothing happens once the process has ended."""
        if isinstance(command, Add):
            request = command.request
            self._prompts[command.number] = request.request_id, request.prompt, request.prompt_token_ids.tolist()
        self._send(command)

    def join(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._socket.fileno())) as own:
                own.shutdown(socket.SHUT_RDWR)  # unlike closing, this wakes the thread that reads
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # it has ended, as the reports say
            self._socket.send(message)

    def _read(self, report: Callable[[Report], object]) -> None:
        last = Queue()
        try:
            while True:
                found = unpack(self._socket.recv(), self._prompts)
                last = found.queue
                report(found)
        except (OSError, EOFError):
            report(Report(last, dead=self._ended()))
        except Exception as error:
            report(Report(last, dead=EngineDeadError(f"a report of the engine cannot be read: {error!r}")))

    def _ended(self) -> EngineDeadError:
        if self._closed:
            return EngineDeadError("the engine has been shut down")
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return EngineDeadError("the engine's process has closed its socket")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return EngineDeadError(f"the engine's process has ended unexpectedly ({how})")


def pack(report: Report) -> tuple[Any, ...]:
    """A report without what the other side knows, as plain tuples, which are quicker to send than outputs."""
    outputs = [(number, item if isinstance(item, Exception) else _row(item)) for number, item in report.outputs]
    dead = None if report.dead is None else str(report.dead)
    return report.queue, outputs, report.results, dead


def _row(output: RequestOutput) -> tuple[Any, ...]:
    completions = [
        (one.index, one.text, one.token_ids, one.cumulative_logprob, one.logprobs, one.finish_reason, one.stop_reason)
        for one in output.outputs
    ]
    stats = output.metrics if output.finished else None  # they change until then
    return completions, output.finished, output.prompt_logprobs, stats, output.num_cached_tokens, output.error


def is_small(report: Report) -> bool:
    """Whether it is nothing but some tokens of a few streams, and so takes some microseconds and kilobytes to send."""
    if report.results or len(report.outputs) > FEW_OUTPUTS:
        return False
    left = FEW_TOKENS
    for _, output in report.outputs:
        if isinstance(output, Exception) or output.prompt_logprobs is not None:
            return False
        for one in output.outputs:
            left -= len(one.token_ids)
            if left < 0 or one.logprobs is not None:
                return False
    return True


def unpack(packed: tuple[Any, ...], prompts: dict[int, tuple[str, str | None, list[int]]]) -> Report:
    """The report that `pack` packed; prompts of requests that have ended are removed."""
    state, rows, results, dead = packed
    outputs: list[tuple[int, RequestOutput | Exception]] = []
    for number, item in rows:
        if isinstance(item, Exception):
            outputs.append((number, item))
            del prompts[number]
            continue
        completions, finished, *rest = item
        made = [CompletionOutput(*completion) for completion in completions]
        outputs.append((number, RequestOutput(*prompts[number], made, finished, *rest)))
        if finished:
            del prompts[number]
    return Report(state, outputs, results, None if dead is None else EngineDeadError(dead))


def main(descriptor: int) -> None:
    """What the engine's process does. Signals are the business of the process that started it."""
    _ignore_signals()
    connection = Connection(descriptor)
    with CacheWrites() as writes, contextlib.suppress(EOFError, OSError):  # the other side has gone
        args, prepare = connection.recv()
        prepare()
        commands = _Commands(connection, writes)
        try:
            engine = LLMEngine.from_engine_args(args)
        except BaseException as error:
            connection.send(_portable(error))
            commands.wait_end()
        _ignore_signals()  # XLA has taken SIGTERM meanwhile
        take_short_turns()
        keep_what_is_there()
        config = engine.config
        plain = replace(config, kernels=dict(config.kernels), default_sampling=dict(config.default_sampling))
        connection.send(plain)  # views of dicts cannot be sent
        loop = EngineLoop(engine)
        loop.start(_Reports(connection).put)
        commands.give(loop.put)
        commands.wait_end()


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _portable(error: BaseException) -> Exception:
    """An exception for the other side: itself where that is sure to work, or one that says the same."""
    if isinstance(error, Exception) and type(error).__module__.partition(".")[0] in ("builtins", "jaxserve"):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


class _Reports:
    """Sends reports; most in a thread, so that neither a crowd's nor a server that is slow to read holds up a step.

    What a few streams wait for is sent at once where the socket has room, which on Linux is most of its buffer: a
    thread would have to wait for its turn at the interpreter, which prepares the next step meanwhile.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._room = select.poll()
        self._room.register(connection, select.POLLOUT)
        self._waiting: queue.Queue[Report] = queue.Queue()
        threading.Thread(target=self._write, daemon=True, name="reports").start()

    def put(self, report: Report) -> None:
        """Send it after those before; one thread calls this."""
        if is_small(report) and not self._waiting.unfinished_tasks and self._room.poll(0):
            self._send(report)
        else:
            self._waiting.put(report)

    def _write(self) -> None:
        while self._send(self._waiting.get()):
            self._waiting.task_done()

    def _send(self, report: Report) -> bool:
        """False if nobody listens any more, and this process ends."""
        try:
            self._connection.send(pack(report))
        except OSError:
            return False
        except Exception:
            logger.exception("a report could not be sent")
            os._exit(1)  # or everybody would wait for ever
        return True


class _Commands:
    """Reads commands in a thread, from the beginning, since the end of the socket is the end of this process."""

    def __init__(self, connection: Connection, writes: CacheWrites):
        self._connection, self._writes = connection, writes
        self._take: Callable[[Command], object] | None = None
        self._given = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True, name="commands")
        self._thread.start()

    def give(self, take: Callable[[Command], object]) -> None:
        """Pass commands on from now on; nobody sends any before the engine is ready."""
        self._take = take
        self._given.set()

    def wait_end(self) -> None:
        """Wait until the process ends."""
        self._thread.join()

    def _read(self) -> None:
        try:
            while True:
                command: Command = self._connection.recv()
                self._given.wait()
                assert self._take is not None
                self._take(command)
        except (OSError, EOFError):
            self._writes.close()
            os._exit(0)
