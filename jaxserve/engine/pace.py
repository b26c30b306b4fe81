"""How long steps take, which decides what streams are spared and what they may wait for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

STREAM_SECONDS = 0.03  # what a stream may wait for several tokens at once: more often than that, nobody sees
STALL = 2.0  # steps with prompts between two decodes of a stream take at most so many times a launch of decodes
LEAST_TOKENS = 512  # of such a step: accelerators need most of the time for fewer, too
HOST_SHARE = 0.5  # of the time of a launch for the host's work, whose time varies
IDLE = 0.1  # of it: if the host waited no longer for the device, that may have been done any time before
FULL = 0.9  # of its tokens, from which on a program is as good as full
NEW_ROWS = 16  # sequences that may begin without a larger program, beside those that run
WEIGHT = 0.2  # of the newest step


@dataclass(frozen=True)
class StreamRules:
    """What streams bear.

    Attributes:
        decodes: of which they get the tokens at once, at most.
        most_tokens: of a step that computes prompts while a stream decodes, None for no limit.
    """

    decodes: int = 1
    most_tokens: int | None = None

    def budget(self, most: int, rows: int, free: int) -> int:
        """Tokens of a step with so many sequences and room for `free` more, which at least their program can hold."""
        return most if self.most_tokens is None else min(most, max(self.most_tokens, smallest_program(rows, free)))


FREE = StreamRules()


def smallest_program(rows: int, free: int) -> int:
    """Tokens of the smallest mixed step with so many sequences, of which a few more may begin if there is room.

    Programs for mixed steps have room for half as many sequences as tokens.
    """
    return 1 << (2 * (rows + min(free, NEW_ROWS)) - 1).bit_length()


def well_filled(wanted: int, rows: int, free: int) -> int:
    """The most tokens of a step with `rows` sequences and room for `free` more that could have `wanted`.

    Programs double in size and cost what they could hold. What fills the larger one badly waits for the next step,
    which the sequences that decode need anyway.
    """
    program = 1 << max(0, wanted - 1).bit_length()
    if wanted >= FULL * program or program <= LEAST_TOKENS:
        return program
    return max(program // 2, smallest_program(rows, free))


class Pace:
    """The time of a decode, and of a token of a prompt, from steps that followed one another on the device.

    Launching a small model's step takes the host longer than the step itself. Several decodes per launch hide that, but
    their tokens come together; as long as they come often enough, a stream is better off so: `decode_steps` of them,
    which are one program, or as many as leave the host enough time, one program after the other. And prompts beside
    streams are computed in pieces, so that no stream stalls while a crowd arrives ("stall-free batching" of
    Sarathi-Serve, arXiv:2403.02310, with the size of the pieces from what steps take here).
    """

    def __init__(self, decode_steps: int, clock: Callable[[], float] = time.monotonic):
        """`decode_steps` is the number of decodes in a launch."""
        self._decode_steps, self._clock = decode_steps, clock
        self._last: float | None = None
        self._seconds: float | None = None  # of a decode
        self._host_seconds = 0.0  # of the host's work for a launch
        self._hidden = 0  # decodes that one launch may have without taking any longer, as far as is known
        self._token_seconds: float | None = None  # of a token in a step with prompts

    @property
    def rules(self) -> StreamRules:
        """For the next step."""
        return StreamRules(self._decodes, self._most_tokens)

    @property
    def _decodes(self) -> int:
        """In a launch that is short enough for streams; one before a decode has been seen."""
        if self._seconds is None:
            return 1
        host = self._host_seconds
        most = max(self._hidden, int(max(STREAM_SECONDS, host) / self._seconds))
        if most >= self._decode_steps:
            return self._decode_steps
        return max(1, min(most, math.ceil(host / (HOST_SHARE * self._seconds))))

    @property
    def _most_tokens(self) -> int | None:
        """A power of two, as the sizes of programs are."""
        if self._token_seconds is None:
            return None
        launch = STREAM_SECONDS
        if self._seconds is not None:
            launch = self._seconds * self._decodes
        tokens = int(STALL * launch / self._token_seconds)
        return max(LEAST_TOKENS, 1 << max(0, tokens.bit_length() - 1))

    def step(self, decodes: int, tokens: int, waited: float = 0.0) -> None:
        """The results of a step are there, for which the host waited so many seconds.

        It was so many decodes in a row, or with 0 of prompts, that is `tokens`.
        """
        now = self._clock()
        if self._last is not None:
            seconds = max(now - self._last, 1e-6)
            self._host_seconds = _mean(self._host_seconds, max(0.0, seconds - waited))
            if decodes:
                self._hidden = decodes + 1 if waited < IDLE * seconds else 0
                self._seconds = _mean(self._seconds, seconds / decodes)
            elif tokens >= LEAST_TOKENS:  # smaller ones take about as long as a decode
                self._token_seconds = _mean(self._token_seconds, seconds / tokens)
        self._last = now

    def pause(self) -> None:
        """No step was under way: the time until the next results says nothing."""
        self._last = None


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
