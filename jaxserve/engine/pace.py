"""How long steps take, which decides what streams are spared and what they may wait for."""

import time
from collections.abc import Callable
from dataclasses import dataclass

STREAM_SECONDS = 0.03  # what a stream may wait for several tokens at once: more often than that, nobody sees
STALL = 2.0  # steps with prompts between two decodes of a stream take at most so many times a launch of decodes
LEAST_TOKENS = 512  # of such a step: accelerators need most of the time for fewer, too
NEW_ROWS = 16  # sequences that may begin without a larger program, beside those that run
WEIGHT = 0.2  # of the newest step


@dataclass(frozen=True)
class StreamRules:
    """What streams bear.

    Attributes:
        wait: whether they get the tokens of several decodes at once.
        most_tokens: of a step that computes prompts while a stream decodes, None for no limit.
    """

    wait: bool = False
    most_tokens: int | None = None

    def budget(self, most: int, rows: int, free: int) -> int:
        """Tokens of a step with so many sequences and room for `free` more: at least what their smallest program holds.

        Programs for mixed steps have room for half as many sequences as tokens; a few more may begin.
        """
        if self.most_tokens is None:
            return most
        return min(most, max(self.most_tokens, 1 << (2 * (rows + min(free, NEW_ROWS)) - 1).bit_length()))


FREE = StreamRules()


class Pace:
    """The time of a decode, and of a token of a prompt, from steps that followed one another on the device.

    Launching a small model's step takes the host longer than the step itself. Several decodes per launch hide that, but
    their tokens come together; as long as they come often enough, a stream is better off so. And prompts beside streams
    are computed in pieces, so that no stream stalls while a crowd arrives ("stall-free batching" of Sarathi-Serve,
    arXiv:2403.02310, with the size of the pieces from what steps take here).
    """

    def __init__(self, decode_steps: int, clock: Callable[[], float] = time.monotonic):
        """`decode_steps` is the number of decodes in a launch."""
        self._decode_steps, self._clock = decode_steps, clock
        self._last: float | None = None
        self._seconds: float | None = None  # of a decode
        self._token_seconds: float | None = None  # of a token in a step with prompts

    @property
    def rules(self) -> StreamRules:
        """For the next step."""
        return StreamRules(self._wait, self._most_tokens)

    @property
    def _wait(self) -> bool:
        """Whether a launch of several decodes is short enough for streams; not before a decode has been seen."""
        return self._seconds is not None and self._seconds * self._decode_steps <= STREAM_SECONDS

    @property
    def _most_tokens(self) -> int | None:
        """A power of two, as the sizes of programs are."""
        if self._token_seconds is None:
            return None
        launch = STREAM_SECONDS
        if self._seconds is not None:
            launch = self._seconds * (self._decode_steps if self._wait else 1)
        tokens = int(STALL * launch / self._token_seconds)
        return max(LEAST_TOKENS, 1 << max(0, tokens.bit_length() - 1))

    def step(self, decodes: int, tokens: int) -> None:
        """The results of a step are there: of so many decodes in a row, or with 0 of prompts, that is `tokens`."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last
            if decodes:
                self._seconds = _mean(self._seconds, seconds / decodes)
            elif tokens >= LEAST_TOKENS:  # smaller ones take about as long as a decode
                self._token_seconds = _mean(self._token_seconds, max(seconds, 1e-6) / tokens)
        self._last = now

    def pause(self) -> None:
        """No step was under way: the time until the next results says nothing."""
        self._last = None


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
