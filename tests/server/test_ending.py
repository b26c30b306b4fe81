"""Signals before a server is ready, and while programs compile: the process and all it started end soon."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import serve

from jaxserve.engine.tracing import UNFINISHED

pytestmark = pytest.mark.usefixtures("quick_compilation")
HERE = "--disable-frontend-multiprocessing"  # where the engine is replaced by something else
SOON = 3.0  # seconds, on a busy machine; it takes a tenth on an idle one

# A process that is `jaxserve serve` up to the engine: the main thread is deep inside C, another one writes a program.
BUSY = """
import hashlib, sys, threading, time
import jax
from jaxserve.cli import main
from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.engine.cache_writes import BEGIN, END

def write():
    jax.monitoring.record_event(BEGIN)
    with open(sys.argv[1], "w") as file:
        file.write("half ")
        file.flush()
        print("loading", file=sys.stderr, flush=True)
        time.sleep(float(sys.argv[2]))
        file.write("whole")
    jax.monitoring.record_event_duration_secs(END, 1.0)
    time.sleep(100)

def load(args):
    threading.Thread(target=write, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

AsyncLLMEngine.from_engine_args = load
sys.exit(main(sys.argv[3:]))
"""

# A server whose programs are never ready.
SLOW = """
import hashlib, sys
from jaxserve.cli import main
from jaxserve.engine.step_compiler import StepCompiler

def compile(self, bucket):
    print("compiling", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

StepCompiler.__call__ = compile
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def started(*words: str, until: str, times: int = 1) -> Iterator[tuple[subprocess.Popen, Callable[[], list[str]]]]:
    """A process that has written lines with `until` on standard error, and what it wrote when it has ended."""
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    seen = threading.Semaphore(0)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if until in line:
                seen.release()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def rest() -> list[str]:
        reader.join(SOON)  # it ends when the last process that holds the pipe has ended
        assert not reader.is_alive(), lines
        return lines

    try:
        for _ in range(times):
            assert seen.acquire(timeout=60), lines
        yield process, rest
    finally:
        process.kill()
        process.wait()
        reader.join(SOON)
        assert process.stderr is not None
        process.stderr.close()


def ends(process: subprocess.Popen, number: int) -> tuple[int, float]:
    """The exit code after a signal, and the seconds it took."""
    start = time.monotonic()
    process.send_signal(number)
    return process.wait(30), time.monotonic() - start


@pytest.fixture
def busy(tmp_path: Path) -> Sequence[str]:
    """The words of a busy process, whose file is `entry`; the last but three is how long it writes."""
    (tmp_path / "busy.py").write_text(BUSY)
    return [str(tmp_path / "busy.py"), str(tmp_path / "entry")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whatever_the_main_thread_does(number: int, busy: Sequence[str], tmp_path: Path):
    """It ends at once, but for the file that is being written."""
    place = tmp_path / "socket"
    with started(*busy, "0.3", "serve", "x", HERE, "--uds", str(place), until="loading") as (process, rest):
        assert place.exists()
        code, seconds = ends(process, number)
        assert (code, seconds < SOON) == (0, True)
        assert rest()[-1] == f"WARNING: {signal.Signals(number).name} before the server was ready: ending"
    assert (tmp_path / "entry").read_text() == "half whole"
    assert not place.exists()


def test_a_second_signal_waits_for_nothing(busy: Sequence[str]):
    with started(*busy, "30", "serve", "x", HERE, "--port", "0", until="loading") as (process, rest):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        code, seconds = ends(process, signal.SIGTERM)
        assert (code, seconds < 0.7) == (128 + signal.SIGTERM, True)
        assert rest()[-1] == "WARNING: second signal: ending at once"


def test_a_write_that_hangs_is_given_up(busy: Sequence[str]):
    with started(*busy, "30", "serve", "x", HERE, "--port", "0", until="loading") as (process, _):
        code, seconds = ends(process, signal.SIGTERM)
        assert (code, seconds < 1 + SOON) == (0, True)


def test_a_model_that_compiles(quick_flags: list[str], tmp_path: Path):
    """The real thing: nothing half-written stays, and no traceback."""
    flags = [*quick_flags, "--port", "0", "--warmup", "full", "--compilation-cache-dir", str(tmp_path / "cache")]
    with started("-m", "jaxserve", "serve", *flags, until="top_k_top_p_floor: ") as (process, rest):
        code, seconds = ends(process, signal.SIGTERM)
        assert (code, seconds < SOON) == (0, True)
        lines = rest()
    assert lines[-1].endswith("WARNING: SIGTERM before the server was ready: ending")
    assert not any("Traceback" in line for line in lines)
    assert not list((tmp_path / "cache").rglob(f"{UNFINISHED}*"))


def test_ending_while_a_request_waits_for_its_program(quick_flags: list[str], tmp_path: Path):
    """The engine's own thread compiles and cannot end the request; its client is told nevertheless."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), "serve", HERE, "--port", "0", *quick_flags]
    with serve(command=command) as live, live.http() as http:
        body = {"prompt": "x", "max_tokens": 1, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            while "compiling" not in live.lines:
                time.sleep(0.02)
            code, seconds = ends(live.process, signal.SIGTERM)
            assert (code, seconds < 2 + SOON) == (0, True)
            events = [line for line in stream.iter_lines() if line]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 503
    assert events[-1] == "data: [DONE]"
    assert not any("Traceback" in line for line in live.lines)


def test_replicas_that_are_not_ready(quick_flags: list[str]):
    flags = [*quick_flags, "--port", "0", "--replicas", "2", "--warmup", "full"]
    with started("-m", "jaxserve", "serve", *flags, until="GiB of weights", times=2) as (process, rest):
        code, seconds = ends(process, signal.SIGTERM)
        assert (code, seconds < SOON) == (0, True)
        assert sum("SIGTERM before the server was ready" in line for line in rest()) == 2


def test_ranks_that_load(quick_flags: list[str], tmp_path: Path):
    """Two processes of one engine, of which the second only follows."""
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("{axes: {model: 2}, platform: cpu, processes_per_host: 2}")
    words = ["-m", "jaxserve", "launch", "--mesh", str(mesh), "--", "serve", "--port", "0", *quick_flags]
    with started(*words, "--warmup", "full", until="top_k_top_p_floor: ") as (process, rest):
        code, seconds = ends(process, signal.SIGTERM)
        assert (code, seconds < SOON) == (0, True)
        lines = rest()
    assert any("[rank 0]" in line and "SIGTERM before the server was ready" in line for line in lines)
    assert any("[rank 1]" in line and "SIGTERM before the model was loaded" in line for line in lines)
