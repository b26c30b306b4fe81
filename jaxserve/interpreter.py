"""Settings of the Python interpreter for processes that do one thing for hours: servers, engines, load generators."""

import gc
import sys

TURN_SECONDS = 5e-4  # of threads that share an interpreter with an engine or a server; Python's own are 5 ms
FULL_COLLECTIONS = 1_000  # one after so many smaller ones, instead of 10: 512 streams stood still for 0.1 s at each


def take_short_turns() -> None:
    """Let threads change places often: one with an engine, or with its reports, beside an event loop."""
    sys.setswitchinterval(TURN_SECONDS)


def keep_what_is_there() -> None:
    """Call at the end of the start-up: the garbage collector does not look at what is there any more.

    And rarely at all of what came later. Requests leave no cycles of objects behind, which are all it could find.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTIONS)
