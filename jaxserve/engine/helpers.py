"""Processes that trace, lower and compile steps beside the engine, so that its own Python stays free for requests.

A helper reads one line of JSON per job from its standard input and answers with the length of the program on a line,
then the program; 0 says that it failed. The first line holds recipe and settings, and is answered with 0 once all is
imported. It ends as soon as its input does, whatever it is doing: then the engine's process is gone.

With the programs' device at hand a helper compiles them as well, into the cache where the engine's process finds them:
a process compiles its GPU kernels one at a time, several processes do not.
"""

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import BinaryIO

import jax

from jaxserve.batch import Bucket
from jaxserve.engine.cache_writes import SECONDS, CacheWrites
from jaxserve.engine.step_compiler import StepCompiler
from jaxserve.engine.tracing import EXPORT_PLATFORM, SETTINGS, Recipe, Tracer, read_bucket, write_bucket
from sharding.mesh import make_mesh

logger = logging.getLogger(__name__)

# What a helper runs; a thread watches its input before the seconds that imports take.
START = """
import json, os, queue, sys, threading
lines, endings = queue.SimpleQueue(), []
def read():
    for line in sys.stdin.buffer:
        lines.put(line)
    for end in endings:
        end()
    os._exit(0)
threading.Thread(target=read, daemon=True).start()
sys.path[:] = json.loads(sys.argv[1])
from jaxserve.engine.helpers import main
main(iter(lines.get, None), endings.append)
"""

Trace = Callable[[Bucket], bytes]


@dataclass(frozen=True)
class Compilation:
    """How helpers compile what they have traced.

    Attributes:
        cache: folder of compiled programs.
        min_seconds: that a compilation takes if its program is to be kept.
        device: id of the only device that jax has here.
        options: of the XLA compiler.
    """

    cache: str
    min_seconds: float
    device: int
    options: Mapping[str, str | bool]


class Helper:
    """One process; it lives until `close`."""

    def __init__(self, recipe: Recipe, compilation: Compilation | None = None):
        """Without `compilation` it needs no device and only traces."""
        command = [sys.executable, "-c", START, json.dumps(sys.path)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
        settings = {name: getattr(jax.config, name) for name in SETTINGS}  # which whoever uses us may have changed
        self._say(json.dumps([recipe.dumps(), settings, None if compilation is None else asdict(compilation)]))

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
        """End the process, whatever it is doing; what it writes into the cache it may finish."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # what it had not read yet
            self._process.stdin.close()
        try:
            self._process.wait(2 * SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # not before: a thread that reads keeps it until the process has ended


class Tracers:
    """This process and its helpers, one job at a time each.

    As soon as a helper is there this process stops tracing, since it would take the time from the engine's own thread.
    """

    def __init__(self, local: Trace, recipe: Recipe, helpers: int, compilation: Compilation | None = None):
        """Helpers are started for the first step to be traced; with `compilation` they take memory on the device."""
        self._local, self._recipe = local, recipe
        self._compilation = compilation
        self._idle: queue.SimpleQueue[Trace] = queue.SimpleQueue()
        self._idle.put(local)
        self._lock = threading.Lock()
        self._helping: set[Helper] = set()
        self.helpers = helpers  # that there may be at first
        self._most = self._missing = helpers  # that may help, and of these that have not been started

    def _start(self, compilation: Compilation | None) -> None:
        helper = None
        try:
            helper = Helper(self._recipe, compilation)
            helper.wait_ready()
        except (OSError, RuntimeError, TypeError) as error:
            logger.debug("no helper process: %s", error)
            if helper is not None:
                helper.close()
            if compilation is not None:
                self._start(None)  # which needs no device
            return
        with self._lock:
            welcome = len(self._helping) < self._most and compilation in (None, self._compilation)
            if welcome:
                self._helping.add(helper)
        if welcome:
            self._idle.put(helper)
        else:
            helper.close()

    def __call__(self, bucket: Bucket) -> bytes:
        """The exported program of a bucket, by whoever is free first."""
        with self._lock:
            missing, self._missing = self._missing, 0
            compilation = self._compilation
        for _ in range(missing):
            threading.Thread(target=self._start, args=(compilation,), daemon=True, name="helper").start()
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
        """Most is done: keep at most one helper, for steps that turn up later, and none that has device memory."""
        with self._lock:
            kept = [] if self._compilation is not None else list(self._helping)[:1]
            spare = self._helping.difference(kept)
            self._compilation, self._most = None, min(self._most, 1)
            self._missing = self._most - len(kept)
        for helper in spare:
            self._dismiss(helper)

    def close(self) -> None:
        """End the helpers; what is asked for later is traced here."""
        with self._lock:
            self._most = self._missing = 0
            helpers = list(self._helping)
        for helper in helpers:
            self._dismiss(helper)


class Maker:
    """What a helper with a device does with a bucket: it traces and compiles the step."""

    def __init__(self, recipe: Recipe, compilation: Compilation):
        """Raises `RuntimeError` or `StopIteration` if the device cannot be had."""
        jax.config.update("jax_pjrt_client_create_options", {"preallocate": False})  # it runs nothing there
        jax.config.update("jax_compilation_cache_dir", compilation.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", compilation.min_seconds)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        device = next(device for device in jax.devices() if device.id == compilation.device)
        self._trace = Tracer(recipe)
        model = recipe.plan(make_mesh(devices=[device]))
        self._compiler = StepCompiler.of(recipe, model, self._trace, None, compilation.options)

    def __call__(self, bucket: Bucket) -> bytes:
        """The exported program. That it could not be compiled is no failure: the engine will try, and say so."""
        blob = self._trace(bucket)
        try:
            self._compiler.compile(bucket, blob)
        except Exception:
            logger.exception("compiling failed")
        return blob


def serve(lines: Iterator[bytes], answers: BinaryIO) -> None:
    """A helper's life: as long as lines come."""

    def answer(blob: bytes) -> None:
        answers.write(f"{len(blob)}\n".encode() + blob)
        answers.flush()

    text, settings, facts = json.loads(next(lines))
    for name, value in settings.items():
        jax.config.update(name, value)
    recipe = Recipe.loads(text)
    platform = "cpu" if facts is None else recipe.device[2]
    jax.config.update("jax_platforms", EXPORT_PLATFORM.get(platform, platform))
    make = Tracer(recipe) if facts is None else Maker(recipe, Compilation(**facts))
    answer(b"")
    for line in lines:
        try:
            blob = make(read_bucket(json.loads(line)))
        except Exception:
            logger.exception("tracing failed")
            blob = b""
        answer(blob)


def main(lines: Iterator[bytes], at_end: Callable[[Callable[[], object]], object]) -> None:
    """What a helper process does with the lines of its input, whose end is the end, but for what `at_end` gets.

    Whatever prints must not get between its answers.
    """
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    with ExitStack() as stack:
        stack.enter_context(suppress(BrokenPipeError))
        at_end(stack.enter_context(CacheWrites()).close)
        serve(lines, answers)
