"""The ranks of one machine as child processes: started together, their lines stamped, ended together.

One thread watches everything with a selector. Each child leads a process group of its own; a small guard process kills
these groups when the launcher dies without having done so, so that nothing stays behind.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_LINES = 30  # of a failed rank's standard error, shown again at the end
LONGEST_LINE = 64 * 1024  # bytes; longer ones are broken
POLL_SECONDS = 0.25
DRAIN_SECONDS = 2.0  # to read what a dead rank's own children may still hold open
PIPE_CODE = 141  # of a program whose reader left

# Reads process groups, one a line, until the launcher ends in whatever way, and kills what is left of them.
GUARD = """
import os, sys
for group in [int(line) for line in sys.stdin]:
    try:
        os.killpg(group, 9)
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Command:
    """What one rank runs: its words, and its whole environment."""

    rank: int
    argv: tuple[str, ...]
    variables: Mapping[str, str]


@dataclass(eq=False)
class Child:
    """A running rank."""

    rank: int
    process: subprocess.Popen
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    ended: float | None = None  # monotonic seconds when its end was seen

    @property
    def code(self) -> int | None:
        """Its exit code as a shell tells it (128 + signal), None while it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def signal(self, number: int) -> None:
        """Send a signal to its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass(eq=False)
class Stream:
    """One pipe of a rank, cut into lines."""

    child: Child
    pipe: IO[bytes]
    target: IO[bytes]
    is_error: bool
    pending: bytes = b""

    def feed(self, data: bytes) -> None:
        """Print whole lines; `data` empty ends the last one.

        Raises:
            BrokenPipeError: whoever read the output has left.
        """
        *lines, self.pending = (self.pending + data).split(b"\n")
        if self.pending and (not data or len(self.pending) > LONGEST_LINE):
            lines.append(self.pending)
            self.pending = b""
        stamp = b"[rank %d] " % self.child.rank
        shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]  # of a progress bar its last state
        if self.is_error:
            self.child.tail.extend(shown)
        if shown:
            self.target.write(b"".join(stamp + line + b"\n" for line in shown))
            self.target.flush()


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def run(commands: Sequence[Command], *, stop_seconds: float, shutdown_seconds: float | None = None) -> int:
    """Run all commands to their end; returns the exit code.

    It is 0 when all ended well, else that of the first rank that failed, whose last lines are then shown again. When
    one fails the others are asked to stop (SIGTERM) and killed after `stop_seconds`. Signals that this process gets
    go to all ranks; a second one kills them. Must be called on the main thread.

    Args:
        commands: one for each rank of this machine.
        stop_seconds: from the request to stop to the kill.
        shutdown_seconds: that the others may live after the first rank ended well; None is as long as they want.
    """
    return _Launcher(commands, stop_seconds, shutdown_seconds).run()


class _Launcher:
    def __init__(self, commands: Sequence[Command], stop_seconds: float, shutdown_seconds: float | None) -> None:
        self.commands = commands
        self.stop_seconds = stop_seconds
        self.shutdown_seconds = shutdown_seconds
        self.children: list[Child] = []
        self.failed: Child | None = None
        self.overdue: list[int] = []
        self.stopping: float | None = None  # monotonic seconds of the request to stop
        self.received: list[int] = []  # signals of the user
        self.reader_left = False

    def run(self) -> int:
        with selectors.DefaultSelector() as selector, _signals_into(self.received, selector), _guard() as guard:
            try:
                for command in self.commands:
                    self._start(command, selector)
                    guard.write(b"%d\n" % self.children[-1].process.pid)
                while any(child.ended is None for child in self.children):
                    self._turn(selector)
            finally:
                self._kill_all()
                self._drain(selector)
        return self._report()

    def _start(self, command: Command, selector: selectors.BaseSelector) -> None:
        child = Child(command.rank, _spawn(command))
        self.children.append(child)
        for name, is_error in (("stdout", False), ("stderr", True)):
            pipe = child.process.stdout if name == "stdout" else child.process.stderr
            target = sys.stderr.buffer if is_error else sys.stdout.buffer
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, Stream(child, pipe, target, is_error))

    def _turn(self, selector: selectors.BaseSelector) -> None:
        """Print what came, see who ended, and do what follows from it."""
        for key, _ in selector.select(POLL_SECONDS):
            if isinstance(key.data, Stream):
                self._read(key.data, selector)
            else:
                key.data()  # the signal pipe
        seen = len(self.received)
        now = time.monotonic()
        for child in self.children:
            if child.ended is None and child.code is not None:
                child.ended = now
                if child.code != 0 and self.stopping is None:
                    self.failed = child
        self._act(seen, now)

    def _act(self, num_signals: int, now: float) -> None:
        if num_signals > 1:
            self._signal_all(signal.SIGKILL)
        elif num_signals and self.stopping is None:
            self._stop(self.received[0], now)
        elif self.stopping is None and (self.failed is not None or self.reader_left):
            self._stop(signal.SIGTERM, now)
        elif self.stopping is None and self.shutdown_seconds is not None:
            first = self.children[0].ended
            if first is not None and now - first > self.shutdown_seconds:
                self.overdue = [child.rank for child in self.children if child.ended is None]
                self._stop(signal.SIGTERM, now)
        if self.stopping is not None and now - self.stopping > self.stop_seconds:
            self._signal_all(signal.SIGKILL)

    def _read(self, stream: Stream, selector: selectors.BaseSelector) -> None:
        try:
            data = os.read(stream.pipe.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return
        try:
            stream.feed(data)
        except BrokenPipeError:
            self.reader_left = True
        if not data:
            selector.unregister(stream.pipe)
            stream.pipe.close()

    def _stop(self, number: int, now: float) -> None:
        self.stopping = now
        self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for child in self.children:
            if child.ended is None:
                child.signal(number)

    def _kill_all(self) -> None:
        """The groups of all ranks, for what they may have left, and those that still run after an error here."""
        for child in self.children:
            child.signal(signal.SIGKILL)
            child.process.wait()

    def _drain(self, selector: selectors.BaseSelector) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            streams = [key.data for key in selector.get_map().values() if isinstance(key.data, Stream)]
            if not streams:
                return
            for key, _ in selector.select(0.05):
                if isinstance(key.data, Stream):
                    self._read(key.data, selector)

    def _report(self) -> int:
        """Say who failed, last of all; the exit code."""
        if self.failed is not None and not self.received:
            self._print_failure(self.failed)
            return self.failed.code or 1
        if self.overdue:
            others = ", ".join(map(str, self.overdue))
            _say(f"launch: rank {self.children[0].rank} ended well, but rank {others} did not within "
                 f"{self.shutdown_seconds:g} s and was stopped")  # fmt: skip
            return 1
        if self.reader_left:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to complain about at exit
            return PIPE_CODE
        return next((child.code for child in self.children if child.code), 0)

    def _print_failure(self, child: Child) -> None:
        code = child.process.poll() or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        stopped = "; the other ranks on this host were stopped" if len(self.children) > 1 else ""
        _say(f"launch: rank {child.rank} {how}{stopped}" + (". It said last:" if child.tail else ""))
        for line in child.tail:
            _say(f"[rank {child.rank}] " + line.decode(errors="replace"))


def _spawn(command: Command) -> subprocess.Popen:
    return subprocess.Popen(
        command.argv,
        env=command.variables,
        stdin=_stdin(command.rank),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )


@contextlib.contextmanager
def _guard() -> Iterator[IO[bytes]]:
    """The input of a guard process, which takes process groups; it ends with the body."""
    guard = subprocess.Popen(
        [sys.executable, "-ISc", GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        yield guard.stdin
    finally:
        guard.kill()  # before its input ends, so that it kills nothing
        guard.wait()
        guard.stdin.close()


def _stdin(rank: int) -> int | None:
    """Rank 0 reads a pipe or file that was given; a terminal belongs to the launcher."""
    return None if rank == 0 and not os.isatty(0) else subprocess.DEVNULL


@contextlib.contextmanager
def _signals_into(received: list[int], selector: selectors.BaseSelector) -> Iterator[None]:
    """While the body runs, signals are noted in `received` and wake the selector."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in FORWARDED}
    child_handler = signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the selector
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    selector.register(reader, selectors.EVENT_READ, lambda: reader.recv(4096))
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in (before | {signal.SIGCHLD: child_handler}).items():
            signal.signal(number, handler)
        reader.close()
        writer.close()


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)
