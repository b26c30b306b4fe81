"""Which threads are writing into jax's cache of compiled programs, so that a process does not end in the middle.

jax writes an entry in place, and never again once there is a file: half of one would be found, and fail, for ever.
"""

import threading
from pathlib import Path
from typing import Any

import jax

from jaxserve.engine.tracing import remove_unfinished

BEGIN = "/jax/compilation_cache/cache_misses"  # a thread has compiled a program and writes it next
SECONDS = 1.0  # that a write may take when the process ends
END = "/jax/core/compile/backend_compile_duration"  # it is done with that, too


class CacheWrites:
    """In a `with`, watches the events that jax reports in the threads that compile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writing: set[int] = set()  # thread ids
        self._closed = False

    def __enter__(self) -> "CacheWrites":
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(self, *details: object) -> None:
        jax.monitoring.unregister_event_listener(self._on_event)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_event(self, event: str, **facts: Any) -> None:
        if event == BEGIN:
            with self._changed:
                self._changed.wait_for(lambda: not self._closed)
                self._writing.add(threading.get_ident())

    def _on_duration(self, event: str, duration_secs: float, **facts: Any) -> None:
        if event == END:
            with self._changed:
                self._writing.discard(threading.get_ident())
                self._changed.notify_all()

    def close(self, seconds: float = SECONDS) -> bool:
        """Let nobody begin to write, and wait for those who have, at most so long; whether all were done.

        A thread that begins after this waits for ever: the process must end.
        """
        with self._changed:
            self._closed = True
            done = self._changed.wait_for(lambda: not self._writing, seconds)
        if (cache := jax.config.jax_compilation_cache_dir) is not None:
            remove_unfinished(Path(cache))
        return done
