"""What a signal does while a model loads: nothing is lost by ending, so the process ends, whatever its threads are at.

Python runs signal handlers on the main thread between two instructions, which may be minutes away inside a compiler.
Its own handler in C, however, writes a byte at once (`signal.set_wakeup_fd`), and a thread can wait for that.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class EarlyEnd:
    """In a `with`, and until `release`, the first SIGTERM or SIGINT ends this process with exit code 0.

    A second one does not wait for the actions of the first. Only the main thread can set this up; in another one it
    does nothing.
    """

    def __init__(self, before: str = "the server was ready"):
        """`before` says in the log what the signal came before."""
        self._before = before
        self._actions: list[Callable[[], object]] = []
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._handlers: dict[signal.Signals, Any] = {}  # those that were there before
        self._wakeup: int | None = None  # the file descriptor that was

    def first(self, action: Callable[[], object]) -> None:
        """Do this before the process ends; it must not take longer than about a second."""
        self._actions.append(action)

    def __enter__(self) -> "EarlyEnd":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _nothing) for number in NUMBERS}
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._watcher.start()
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        if self._handlers:
            self._watcher.join()
        self._reader.close()

    def release(self, handler: Callable[[int, Any], object] | signal.Handlers | None = None) -> None:
        """Stop watching. Until something else handles signals `handler` does; None still ends the process."""
        for number in self._handlers:
            signal.signal(number, self._on_signal if handler is None else handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup = None
        self._writer.close()

    def _watch(self) -> None:
        number = self._next()
        if number is None:
            return
        self._say(number)
        threading.Thread(target=self.leave, args=(0,), daemon=True).start()
        if (second := self._next()) is not None:
            logger.warning("second signal: ending at once")
            os._exit(128 + second)

    def _next(self) -> int | None:
        """The next signal, None when nobody watches any more."""
        while data := self._reader.recv(1):
            if data[0] in NUMBERS:
                return data[0]
        return None

    def _on_signal(self, number: int, frame: object) -> None:
        self._say(number)
        self.leave(0)

    def _say(self, number: int) -> None:
        logger.warning("%s before %s: ending", signal.Signals(number).name, self._before)

    def leave(self, code: int) -> None:
        """End the process without waiting for its threads."""
        for action in self._actions:
            with contextlib.suppress(Exception):
                action()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _nothing(number: int, frame: object) -> None:
    """A handler in Python, so that the one in C writes its byte."""
