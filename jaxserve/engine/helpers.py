"""Processes that trace and lower steps beside the engine, so that its own Python stays free for requests.

A helper reads one line of JSON per job from its standard input and answers with the length of the program on a line,
then the program; 0 says that it failed. The first line holds the recipe, and is answered with 0 once all is imported.
It ends as soon as its input does, whatever it is doing: then the engine's process is gone.
"""

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO

import jax

from jaxserve.batch import Bucket
from jaxserve.engine.tracing import Recipe, Tracer, read_bucket, write_bucket

logger = logging.getLogger(__name__)

# What a helper runs; a thread watches its input before the seconds that imports take.
START = """
import json, os, queue, sys, threading
lines = queue.SimpleQueue()
def read():
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)
threading.Thread(target=read, daemon=True).start()
sys.path[:] = json.loads(sys.argv[1])
from jaxserve.engine.helpers import main
main(iter(lines.get, None))
"""

Trace = Callable[[Bucket], bytes]


class Helper:
    """One process; it lives until `close`."""

    def __init__(self, recipe: Recipe):
        command = [sys.executable, "-c", START, json.dumps(sys.path)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
        self._say(recipe.dumps())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> bytes:
        assert self._process.stdout is not None
        header = self._process.stdout.readline()
        blob = self._process.stdout.read(int(header)) if header else b""
        if not header or len(blob) < int(header):
            raise RuntimeError("a helper process has ended")
        return blob

    def wait_ready(self) -> None:
        """Return when the helper has imported everything; raises `RuntimeError` or `OSError` if it ends instead."""
        self._hear()

    def __call__(self, bucket: Bucket) -> bytes:
        """The exported program; raises `RuntimeError` or `OSError` if the helper cannot make it."""
        self._say(json.dumps(write_bucket(bucket)))
        blob = self._hear()
        if not blob:
            raise RuntimeError(f"a helper process could not trace {bucket}")
        return blob

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it had not read yet
                    pipe.close()


class Tracers:
    """This process and its helpers, one job at a time each.

    As soon as a helper is there this process stops tracing, since it would take the time from the engine's own thread.
    """

    def __init__(self, local: Trace, recipe: Recipe, helpers: int):
        self._local = local
        self._idle: queue.SimpleQueue[Trace] = queue.SimpleQueue()
        self._idle.put(local)
        self._lock = threading.Lock()
        self._helping: set[Helper] = set()
        self._closed = False
        for _ in range(helpers):
            threading.Thread(target=self._start, args=(recipe,), daemon=True, name="helper").start()

    def _start(self, recipe: Recipe) -> None:
        try:
            helper = Helper(recipe)
            helper.wait_ready()
        except (OSError, RuntimeError, TypeError) as error:
            logger.debug("no helper process: %s", error)
            return
        with self._lock:
            if self._closed:
                helper.close()
                return
            self._helping.add(helper)
        self._idle.put(helper)

    def __call__(self, bucket: Bucket) -> bytes:
        """The exported program of a bucket, by whoever is free first."""
        tracer = self._idle.get()
        while self._retired(tracer):
            tracer = self._idle.get()
        try:
            return tracer(bucket)
        except (OSError, RuntimeError, ValueError) as error:  # the last for a pipe that was closed meanwhile
            if not isinstance(tracer, Helper):
                raise
            logger.debug("tracing %s here: %s", bucket, error)
            self._dismiss(tracer)
            return self._local(bucket)
        finally:
            if tracer is self._local or tracer in self._helping:
                self._idle.put(tracer)

    def _retired(self, tracer: Trace) -> bool:
        """Whether it may not work any more, or not while there are helpers."""
        with self._lock:
            return bool(self._helping) if tracer is self._local else tracer not in self._helping

    def _dismiss(self, helper: Helper) -> None:
        with self._lock:
            self._helping.discard(helper)
            if not self._helping:
                self._idle.put(self._local)
        helper.close()

    def rest(self) -> None:
        """Most is done: keep one helper, for steps that turn up later."""
        with self._lock:
            self._closed = True
            spare = list(self._helping)[1:]
            self._helping.difference_update(spare)
        for helper in spare:
            helper.close()

    def close(self) -> None:
        """End the helpers; what is asked for later is traced here."""
        self.rest()
        with self._lock:
            helpers = list(self._helping)
        for helper in helpers:
            self._dismiss(helper)


def serve(lines: Iterator[bytes], answers: BinaryIO) -> None:
    """A helper's life: as long as lines come."""

    def answer(blob: bytes) -> None:
        answers.write(f"{len(blob)}\n".encode() + blob)
        answers.flush()

    tracer = Tracer(Recipe.loads(next(lines).decode()))
    answer(b"")
    for line in lines:
        try:
            blob = tracer(read_bucket(json.loads(line)))
        except Exception:
            logger.exception("tracing failed")
            blob = b""
        answer(blob)


def main(lines: Iterator[bytes]) -> None:
    """What a helper process does with the lines of its input; whatever prints must not get between its answers."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    jax.config.update("jax_platforms", "cpu")
    with suppress(BrokenPipeError):
        serve(lines, answers)
