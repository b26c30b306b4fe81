"""Compilation ahead of time: order, waiting, substitutes, late ones."""

import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import pytest

from jaxserve.batch import Bucket, Level
from jaxserve.engine.programs import Programs


class Compiler:
    """Compiles when it is allowed to: `allow` a bucket, or set `all_allowed`."""

    def __init__(self) -> None:
        self.gates: dict[Bucket, threading.Event] = {}
        self.compiled: list[Bucket] = []

    def allow(self, bucket: Bucket) -> None:
        self.gates.setdefault(bucket, threading.Event()).set()

    def __call__(self, bucket: Bucket):
        assert self.gates.setdefault(bucket, threading.Event()).wait(10)
        self.compiled.append(bucket)
        if bucket.tokens == 17:
            raise RuntimeError("no room for seventeen")
        program = Mock(spec=jax.stages.Compiled, bucket=bucket)
        program.memory_analysis.return_value = SimpleNamespace(temp_size_in_bytes=bucket.tokens)
        return program


SMALL, LARGE, MIXED = Bucket(4, 4), Bucket(64, 64), Bucket(64, 32, Level.SAMPLE, 1024)


@pytest.fixture
def compiler():
    compiler = Compiler()
    yield compiler
    for gate in list(compiler.gates.values()):
        gate.set()


def soon(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_in_the_background_mode_any_program_that_covers_serves_while_the_right_one_compiles(compiler):
    programs = Programs(compiler, threads=3, background=True)
    programs.warm_up([LARGE, MIXED])
    compiler.allow(MIXED)  # covers no decode
    chosen: list[Bucket] = []
    thread = threading.Thread(target=lambda: chosen.append(programs.choose(SMALL)))
    thread.start()
    soon(lambda: compiler.compiled == [MIXED])
    assert not chosen
    compiler.allow(LARGE)
    thread.join(10)
    assert chosen == [LARGE]
    soon(lambda: programs.counts.warm)
    assert programs.choose(SMALL) == LARGE  # without waiting, however large
    compiler.allow(SMALL)
    soon(lambda: programs.choose(SMALL) == SMALL)
    assert programs.counts.total == 3
    assert programs.counts.after_warmup == 0  # nobody waited for it
    compiler.allow(Bucket(128, 128))
    assert programs.choose(Bucket(128, 128)) == Bucket(128, 128)  # nothing covers it
    programs.get(Bucket(128, 128))
    assert programs.counts.after_warmup == 1
    programs.close()


def test_a_step_waits_for_what_is_on_its_way_and_covers_it(compiler):
    programs = Programs(compiler, threads=2)
    programs.warm_up([Bucket(8, 8)])
    chosen: list[Bucket] = []
    thread = threading.Thread(target=lambda: chosen.append(programs.choose(SMALL)))
    thread.start()
    compiler.allow(Bucket(8, 8))
    thread.join(10)
    assert chosen == [Bucket(8, 8)]
    assert programs.counts.total == 1
    programs.close()


def test_after_the_warmup_large_substitutes_are_refused_and_compilations_counted(compiler):
    programs = Programs(compiler, threads=2)
    for bucket in (SMALL, LARGE, Bucket(32, 32), Bucket(2, 2), Bucket(8, 8, steps=8)):
        compiler.allow(bucket)
    programs.warm_up([LARGE])
    assert programs.wait([LARGE], show_progress=False) == 64
    soon(lambda: programs.counts.warm)
    assert programs.choose(Bucket(32, 32)) == LARGE
    assert programs.choose(SMALL) == SMALL  # 16 times smaller: compile it
    assert programs.get(SMALL).bucket == SMALL
    assert programs.counts.after_warmup == 1
    assert programs.choose(Bucket(2, 2)) == SMALL
    programs.close()


def test_a_program_that_is_needed_now_goes_before_what_is_queued(compiler):
    programs = Programs(compiler, threads=1)
    programs.warm_up([LARGE, MIXED, SMALL])
    compiler.allow(SMALL)
    assert programs.get(SMALL).bucket == SMALL  # the only thread still waits for LARGE
    assert compiler.compiled == [SMALL]
    compiler.allow(LARGE)
    compiler.allow(MIXED)
    assert programs.wait([LARGE, MIXED, SMALL], show_progress=False) == 64
    assert programs.counts.total == 3
    programs.close()


def test_a_failed_compilation_reaches_who_waits_and_nothing_else(compiler, caplog):
    programs, bad = Programs(compiler, threads=2), Bucket(17, 17)
    compiler.allow(bad)
    programs.warm_up([bad, LARGE])
    with pytest.raises(RuntimeError, match="seventeen"):
        programs.wait([bad], show_progress=False)
    soon(lambda: any("seventeen" in message for message in caplog.messages))
    compiler.allow(LARGE)
    programs.wait([LARGE], show_progress=False)
    assert programs.choose(bad) == LARGE
    programs.close()


def test_closing_drops_what_is_queued(compiler):
    programs = Programs(compiler, threads=1)
    programs.warm_up([LARGE, MIXED])
    soon(lambda: LARGE in compiler.gates)
    compiler.allow(LARGE)
    compiler.allow(MIXED)
    programs.close()
    assert compiler.compiled in ([LARGE], [LARGE, MIXED])


def test_the_rest_of_the_warmup_waits_for_the_first_programs(compiler):
    rested: list[int] = []
    programs = Programs(compiler, threads=2, background=True, when_warm=lambda: rested.append(programs.counts.total))
    programs.warm_up([LARGE], then=[MIXED, SMALL])
    soon(lambda: LARGE in compiler.gates)
    time.sleep(0.02)
    assert list(compiler.gates) == [LARGE]
    compiler.allow(LARGE)
    soon(lambda: {MIXED, SMALL} <= compiler.gates.keys())
    assert not programs.counts.warm
    compiler.allow(MIXED)
    compiler.allow(SMALL)
    soon(lambda: rested)
    assert rested == [3]
    assert programs.counts.warm
    programs.close()


def test_what_a_step_wants_is_compiled_before_the_rest(compiler):
    programs = Programs(compiler, threads=1, background=True)
    programs.warm_up([LARGE], then=[MIXED, Bucket(8, 8), SMALL])
    compiler.allow(LARGE)
    soon(lambda: MIXED in compiler.gates)
    assert programs.choose(SMALL) == LARGE
    assert programs.choose(SMALL) == LARGE  # moves up once
    for bucket in (MIXED, SMALL, Bucket(8, 8)):
        compiler.allow(bucket)
    soon(lambda: programs.counts.warm)
    assert compiler.compiled == [LARGE, MIXED, SMALL, Bucket(8, 8)]
    assert programs.counts.total == 4
    programs.close()
