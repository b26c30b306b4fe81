"""How long decodes take, which decides whether streams may get several tokens at a time."""

import time
from collections.abc import Callable

STREAM_SECONDS = 0.03  # what a stream may wait for several tokens at once: more often than that, nobody sees
WEIGHT = 0.2  # of the newest step


class Pace:
    """The time of a decode, from steps that followed one another on the device.

    Launching a small model's step takes the host longer than the step itself. Several decodes per launch hide that, but
    their tokens come together; as long as they come often enough, a stream is better off so.
    """

    def __init__(self, decode_steps: int, clock: Callable[[], float] = time.monotonic):
        """`decode_steps` is the number of decodes in a launch."""
        self._decode_steps, self._clock = decode_steps, clock
        self._last: float | None = None
        self._seconds: float | None = None

    @property
    def streams_wait(self) -> bool:
        """Whether a launch of several decodes is short enough for streams; not before a decode has been seen."""
        return self._seconds is not None and self._seconds * self._decode_steps <= STREAM_SECONDS

    def step(self, decodes: int) -> None:
        """The results of a step of so many decodes are there; 0 stands for a step with prompts."""
        now = self._clock()
        if decodes and self._last is not None:
            seconds = (now - self._last) / decodes
            self._seconds = seconds if self._seconds is None else self._seconds + WEIGHT * (seconds - self._seconds)
        self._last = now

    def pause(self) -> None:
        """No step was under way: the time until the next results says nothing."""
        self._last = None
