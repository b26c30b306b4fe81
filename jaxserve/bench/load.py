"""Requests to a server and its answers: what is sent and when, and how a streamed answer is read and timed."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.bench.workload import LARGEST_TOKEN_ID
from jaxserve.checks import check_choice, check_float, check_int, require

DISTRIBUTIONS = ("lognormal", "uniform", "fixed")
SPECIAL_TOKENS = 300  # vocabularies with special tokens or single bytes in front have them below
TAIL = 8  # no length is more than so many times the mean, or a single request could last longer than all others
DRAWS = 100  # tries to draw lengths that fit, before giving up
# Short and frequent: one token each, with the blank before it, in practically every vocabulary.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years much where your way down "
    "should because long each just state those people too how little good world make very year still see own work men "
    "day get here old"
)


@dataclass(frozen=True)
class Lengths:
    """Random lengths of prompts and outputs in tokens, independent of each other.

    Attributes:
        input_len, output_len: the means.
        distribution: "lognormal" as in collections of real conversations, "uniform" or "fixed".
        sigma: standard deviation of the logarithm, for "lognormal"; 1 is about that of ShareGPT.
        range_ratio: half the width as a share of the mean, for "uniform".
        limit: most tokens of a prompt and its output together; longer pairs are drawn anew, which lowers the means,
            with the default by about a tenth.

    Raises:
        TypeError, ParameterError: a value is out of its range.
    """

    input_len: int = 220
    output_len: int = 190
    distribution: str = "lognormal"
    sigma: float = 1.0
    range_ratio: float = 0.5
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            require(check_int(name, getattr(self, name)) >= 1, name, getattr(self, name), "be 1 or more")
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        require(0 <= check_float("sigma", self.sigma) <= 4, "sigma", self.sigma, "be between 0 and 4")
        ratio = check_float("range_ratio", self.range_ratio)
        require(0 <= ratio < 1, "range_ratio", ratio, "be 0 or more and less than 1")
        shortest = self.input_len + self.output_len if self.distribution == "fixed" else 2
        rule = f"be at least {shortest}, the tokens of the shortest request"
        require(self.most >= shortest, "max_total_len", self.most, rule)

    @property
    def most(self) -> int:
        """`limit`; if there is none, 4 times the means, like the filter that ShareGPT is commonly used with."""
        return 4 * (self.input_len + self.output_len) if self.limit is None else check_int("max_total_len", self.limit)

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Prompt and output lengths of `count` requests.

        Raises:
            ParameterError: hardly any request fits the limit.
        """
        longest = TAIL * self.input_len, TAIL * self.output_len
        kept: list[tuple[int, int]] = []
        for _ in range(DRAWS):
            pairs = zip(self._some(rng, self.input_len, count), self._some(rng, self.output_len, count), strict=True)
            kept += [(a, b) for a, b in pairs if a + b <= self.most and a <= longest[0] and b <= longest[1]]
            if len(kept) >= count:
                return kept[:count]
        require(False, "max_total_len", self.most, f"leave room for lengths {self.input_len} and {self.output_len}")
        return kept

    def _some(self, rng: np.random.Generator, mean: int, count: int) -> list[int]:
        if self.distribution == "fixed":
            return [mean] * count
        if self.distribution == "uniform":
            low, high = max(1, round(mean * (1 - self.range_ratio))), round(mean * (1 + self.range_ratio))
            return rng.integers(low, high, count, endpoint=True).tolist()
        drawn = rng.lognormal(math.log(mean) - self.sigma**2 / 2, self.sigma, count)
        return np.maximum(1, np.rint(drawn)).astype(int).tolist()


def arrival_times(rng: np.random.Generator, count: int, rate: float, burstiness: float = 1.0) -> list[float]:
    """When requests are sent, in seconds after the first, which is sent at 0.

    The gaps are gamma distributed with mean 1 / `rate` and shape `burstiness`: 1 makes the arrivals a Poisson process,
    less makes bursts, more makes them regular. With an infinite rate all are sent at once.

    Raises:
        ParameterError: a value is not above 0.
    """
    require(rate > 0, "request_rate", rate, "be above 0 requests per second, or inf for all at once")
    require(0 < burstiness < math.inf, "burstiness", burstiness, "be above 0 and finite")
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), count)
    gaps[:1] = 0.0
    return np.cumsum(gaps).tolist()


@dataclass(frozen=True)
class Request:
    """What is sent: the JSON text of the body, and the length of its prompt in tokens, for chat in words."""

    body: bytes
    prompt_len: int


def make_requests(
    rng: np.random.Generator,
    lengths: Sequence[tuple[int, int]],
    *,
    endpoint: str,
    vocab_size: int = LARGEST_TOKEN_ID,
    fields: dict[str, Any],
) -> list[Request]:
    """Random prompts of these lengths: token ids for completions, words for chat. `fields` are the rest of the body.

    Raises:
        ParameterError: `vocab_size` is below 2.
    """
    require(check_int("vocab_size", vocab_size) >= 2, "vocab_size", vocab_size, "be 2 or more")
    words, low = WORDS.split(), min(SPECIAL_TOKENS, vocab_size // 2)
    made = []
    for prompt_len, output_len in lengths:
        if endpoint == "chat":
            content = " ".join(words[i] for i in rng.integers(len(words), size=prompt_len))
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        else:
            prompt = {"prompt": rng.integers(low, vocab_size, prompt_len).tolist()}
        body = {"max_tokens": output_len, "stream": True, "stream_options": {"include_usage": True}} | prompt | fields
        made.append(Request(json.dumps(body).encode(), prompt_len))
    return made


class EventParser:
    """Server-sent events out of pieces of bytes, however the network cut or joined them.

    Lines end with LF, CR LF or CR, and an empty line ends an event. Fields other than `data` are of no use here.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """

    # A CR at the very end stays in the buffer: its LF may be in the next piece.
    _LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that this piece completes."""
        *lines, self._rest = self._LINE_END.split(self._rest + piece)
        return [data for line in lines if (data := self._line(line)) is not None]

    def end(self) -> list[str]:
        """The data of a last event that no empty line follows."""
        return self.feed(b"\n\n")

    def _line(self, line: bytes) -> str | None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        lines, self._data = self._data, []
        return b"\n".join(lines).decode("utf-8", "replace") if lines else None


@dataclass
class Answer:
    """One request and what came back. Times are in seconds since it was sent, `sent` itself since the run began.

    Attributes:
        input_tokens, output_tokens: as the server counts them, else as sent and one for each event.
        token_times: when events with tokens came; an event may carry several tokens.
        latency: when the last event before the usage came.
        late: how long after its time it was sent, because of a limit on requests in flight or a busy client.
        counted: the server told its counts.
        complete: the server said that it had finished.
        error: why the request failed, None if it did not.
    """

    input_tokens: int
    output_tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    latency: float = 0.0
    sent: float = 0.0
    late: float = 0.0
    counted: bool = False
    complete: bool = False
    error: str | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def time_per_output_token(self) -> float | None:
        """Mean time of the tokens after those of the first event; None if there are none."""
        if len(self.token_times) < 2 or self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    def gaps(self) -> list[float]:
        """Times between events with tokens."""
        return [late - early for early, late in itertools.pairwise(self.token_times)]

    def read(self, data: str, now: float) -> None:
        """Take in one event.

        Raises:
            ServerError: it reports an error, or is nothing that the API knows.
        """
        if data == "[DONE]":
            self.complete = True
            return
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            raise ServerError(f"an event is not JSON: {data[:200]}") from error
        if not isinstance(event, dict) or event.get("error") or event.get("object") == "error":
            raise ServerError(f"error event: {message_of(event)}")
        for choice in (event.get("choices") or [])[:1]:
            self.latency = now
            self.complete |= choice.get("finish_reason") is not None
            if carries_tokens(choice):
                self.token_times.append(now)
        usage = event.get("usage") or {}
        if {"prompt_tokens", "completion_tokens"} <= usage.keys():
            self.input_tokens, self.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            self.counted = True
        elif not self.counted:
            self.output_tokens = len(self.token_times)


def carries_tokens(choice: dict[str, Any]) -> bool:
    """Whether an event's choice holds tokens. An empty text can: half of a character, or a special token."""
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    if choice.get("text") or any(delta.get(name) for name in names):
        return True
    return choice.get("finish_reason") is None and "role" not in delta  # neither the announcement nor the end


def message_of(body: Any) -> str:
    """The message in a server's JSON about an error."""
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(name):
            return message_of(body[name])
    return body if isinstance(body, str) else json.dumps(body)


class ServerError(OSError):
    """The server cannot be reached, refused a request or broke off an answer."""
