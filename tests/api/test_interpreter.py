"""What processes of jaxserve's own do with the interpreter."""

import subprocess
import sys

PROGRAM = """
import gc, sys
from jaxserve.interpreter import keep_what_is_there, take_short_turns
before = gc.get_threshold()
take_short_turns()
keep_what_is_there()
assert sys.getswitchinterval() < 0.001
assert gc.get_freeze_count() > 1_000
assert gc.isenabled()
assert gc.get_threshold()[:2] == before[:2]
count = [0, 0, 0]
gc.callbacks.append(lambda phase, info: count.__setitem__(info["generation"], count[info["generation"]] + 1))
kept = [[] for _ in range(300_000)]
assert count[0] > 100, count
assert count[2] == 0, count
"""


def test_the_collector_leaves_alone_what_lives() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
