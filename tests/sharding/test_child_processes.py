"""The local launcher with shell commands for ranks: lines, failures, signals, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Signal handlers need the main thread of a process of their own.
MAIN = """
import os, sys
from sharding.processes import Command, run
commands = [Command(rank, ("bash", "-c", script), dict(os.environ)) for rank, script in enumerate(sys.argv[1:])]
sys.exit(run(commands, stop_seconds=1.0, shutdown_seconds=1.0))
"""


def start(*scripts: str, **options) -> subprocess.Popen:
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", MAIN, *scripts]
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, **({"stdin": -3} | options))


def launch(*scripts: str, timeout: float = 15.0) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of standard output and of standard error."""
    process = start(*scripts)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out.splitlines(), err.splitlines()


def test_lines_are_stamped_and_never_mixed():
    script = "for i in $(seq 300); do echo -n part; echo of $i; done; echo problem >&2; printf '1%%\\r2%%\\r\\nend'"
    code, out, err = launch(script, script)
    assert code == 0
    for rank in range(2):
        lines = [f"[rank {rank}] partof {i}" for i in range(1, 301)] + [f"[rank {rank}] 2%", f"[rank {rank}] end"]
        assert [line for line in out if line.startswith(f"[rank {rank}]")] == lines
    assert len(out) == 604
    assert sorted(err) == ["[rank 0] problem", "[rank 1] problem"]


def test_a_failed_rank_ends_all_and_speaks_last():
    begun = time.monotonic()
    code, _, err = launch("trap '' TERM; echo noise >&2; sleep 50", "sleep 0.3; echo 'Error: boom' >&2; exit 3")
    assert code == 3
    assert time.monotonic() - begun < 10
    assert err[-2:] == [
        "launch: rank 1 failed with exit code 3; the other ranks on this host were stopped. It said last:",
        "[rank 1] Error: boom",
    ]


def test_a_killed_rank_is_named():
    code, _, err = launch("sleep 50", "kill -9 $$")
    assert code == 137
    assert err == ["launch: rank 1 was killed by SIGKILL; the other ranks on this host were stopped"]


def test_ranks_that_outlive_the_leader_are_stopped():
    code, out, err = launch("echo done", "sleep 50")
    assert (code, out) == (1, ["[rank 0] done"])
    assert "rank 0 ended well, but rank 1 did not within 1 s" in err[-1]


def test_a_program_that_is_not_there_ends_the_others():
    main = MAIN.replace('"bash"', '"bash" if rank == 0 else "/no/such/program"')
    ended = subprocess.run(
        [sys.executable, "-c", main, "sleep 50", ""], capture_output=True, text=True, cwd=ROOT, timeout=15, check=False
    )
    assert ended.returncode == 1
    assert "/no/such/program" in ended.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, 8)])
def test_signals_reach_all_ranks(number: int, code: int):
    script = "trap 'echo int; exit 7' INT; trap 'echo term; exit 8' TERM; echo up; while :; do sleep 0.05; done"
    process = start(script, script)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} == {"[rank 0] up\n", "[rank 1] up\n"}
    process.send_signal(number)
    out, _ = process.communicate(timeout=15)
    assert process.returncode == code
    assert len(out.splitlines()) == 2


def running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left(number: int):
    """Also not the processes that a rank started itself, nor after a launcher that could not clean up."""
    process = start("trap '' TERM; sleep 50 & echo $$; sleep 50", "trap '' TERM; echo $$; sleep 50")
    assert process.stdout is not None
    groups = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    assert all(map(running, groups))
    process.send_signal(number)
    process.communicate(timeout=15)
    deadline = time.monotonic() + 5
    while any(map(running, groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, groups))


def test_a_reader_that_leaves_ends_the_ranks():
    with start("yes", "yes") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=15) == 141


def test_rank_0_reads_what_is_piped_in():
    process = start("cat", "cat", stdin=subprocess.PIPE)
    out, _ = process.communicate("hello\n", timeout=15)
    assert out == "[rank 0] hello\n"
