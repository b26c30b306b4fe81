"""Runs a load on an OpenAI-compatible server: reads and times the streamed answers, and sums them up."""

import asyncio
import collections
import contextlib
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxserve.bench.load import Request
from jaxserve.checks import check_choice, require

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ERRORS_LISTED = 5


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
        counted: the server told its counts.
        complete: the server said that it had finished.
        error: why the request failed, None if it did not.
    """

    sent: float
    input_tokens: int
    output_tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    latency: float = 0.0
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


@dataclass(frozen=True)
class Target:
    """The server, without /v1, and how it is asked. `timeout` is for a whole request, in seconds.

    Raises:
        ParameterError: a value is out of its range.
    """

    base_url: str
    endpoint: str = "completions"
    model: str = ""
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_choice("endpoint", self.endpoint, ENDPOINTS)
        require(self.timeout > 0, "timeout", self.timeout, "be above 0 seconds")
        url = re.fullmatch(r"https?://[^/\s]+\S*", self.base_url)
        require(url is not None, "base_url", self.base_url, "be an address such as http://127.0.0.1:8000")

    @property
    def options(self) -> dict[str, Any]:
        """Options of an HTTP client: no limit on connections, no waiting beside `timeout`, no proxy in between."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return {"base_url": self.base_url, "headers": headers, "timeout": None, "limits": limits, "trust_env": False}


@dataclass
class Record:
    """A run while it happens and after. `began` is a `time.perf_counter`, `seconds` how long the run took."""

    began: float = 0.0
    seconds: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0
    answers: list[Answer] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Counts a request as in flight."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1


async def run(
    target: Target,
    requests: Sequence[Request],
    times: Sequence[float],
    max_concurrency: int | None,
    record: Record,
    done: Callable[[Answer], object] = lambda answer: None,
) -> None:
    """Send the requests at their times, at most `max_concurrency` at once, and put the answers into `record`.

    A request that has to wait for others is late; its own times begin when it is sent. After an interruption `record`
    holds what was complete by then.
    """
    gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))

    async def one(http: httpx.AsyncClient, request: Request) -> None:
        async with gate, record.one():
            answer = await send(http, target, request, record.began)
        record.answers.append(answer)
        done(answer)

    async with httpx.AsyncClient(**target.options) as http:
        record.began = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for request, at in zip(requests, times, strict=True):
                    await asyncio.sleep(max(0.0, record.began + at - time.perf_counter()))
                    group.create_task(one(http, request))
        finally:
            record.seconds = time.perf_counter() - record.began


async def send(http: httpx.AsyncClient, target: Target, request: Request, began: float) -> Answer:
    """Send one request and read its answer; whatever goes wrong is the answer's error."""
    start = time.perf_counter()
    answer = Answer(start - began, request.prompt_len)
    try:
        async with asyncio.timeout(target.timeout):
            await stream(http, ENDPOINTS[target.endpoint], request, answer, start)
    except TimeoutError:
        answer.error = f"timed out: no complete answer within {target.timeout:g} s"
    except ServerError as error:
        answer.error = str(error)
    except Exception as error:  # a surprising answer or a broken connection must not end the run; it is listed
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def stream(http: httpx.AsyncClient, path: str, request: Request, answer: Answer, start: float) -> None:
    """Read a streamed answer as it comes.

    Raises:
        ServerError: another status than 200, an error event, or an end before the server said that it had finished.
    """
    parser = EventParser()
    async with http.stream("POST", path, content=request.body) as response:
        if response.status_code != 200:
            raise ServerError(refusal(response.status_code, await response.aread()))
        async for piece in response.aiter_bytes():
            now = time.perf_counter() - start
            for data in parser.feed(piece):
                answer.read(data, now)
        for data in parser.end():
            answer.read(data, time.perf_counter() - start)
    if not answer.complete:
        kind = response.headers.get("content-type", "no content type")
        raise ServerError(f"the answer ({kind}) ended before a finish_reason or [DONE]")


def refusal(status: int, body: bytes) -> str:
    """One line about an answer that is not 200."""
    try:
        text = message_of(json.loads(body))
    except ValueError:
        text = body.decode("utf-8", "replace")
    text = " ".join(text.split())
    return f"HTTP {status}: {text[:300] or '(empty answer)'}"


@dataclass(frozen=True)
class Server:
    """What a server tells about itself; None where it does not. `max_model_len` is its context in tokens."""

    model: str | None = None
    max_model_len: int | None = None
    owner: str | None = None


def ask_server(target: Target) -> Server:
    """The model `target` names, else the server's first.

    Raises:
        ServerError: no server answers there, or it does not accept the key.
    """
    try:
        with httpx.Client(**target.options) as http:
            answer = http.get("/v1/models", timeout=min(target.timeout, 30.0))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        remedy = "start the server (for example: jaxserve serve), wait until it is ready, or correct --base-url"
        raise ServerError(f"no server answers at {target.base_url} ({reason}); {remedy}") from error
    if answer.status_code in (401, 403):
        raise ServerError(f"{target.base_url} wants a valid --api-key: {refusal(answer.status_code, answer.content)}")
    try:
        cards = {card["id"]: card for card in answer.json()["data"]}
        card = cards[target.model or next(iter(cards))]
        return Server(card["id"], card.get("max_model_len"), card.get("owned_by"))
    except (ValueError, LookupError, TypeError, StopIteration):  # not every server has this list
        return Server()


# Name in the report -> title, and the values of one answer in seconds.
METRICS: dict[str, tuple[str, Callable[[Answer], Sequence[float | None]]]] = {
    "time_to_first_token_ms": ("time to first token", lambda answer: [answer.time_to_first_token]),
    "time_per_output_token_ms": ("time per output token", lambda answer: [answer.time_per_output_token]),
    "inter_token_latency_ms": ("between events", lambda answer: answer.gaps()),
    "latency_ms": ("whole request", lambda answer: [answer.latency]),
}


def samples(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """All values of each metric in milliseconds, of the requests that succeeded."""
    good = [answer for answer in answers if answer.error is None]
    return {
        name: [1e3 * value for answer in good for value in read(answer) if value is not None]
        for name, (_, read) in METRICS.items()
    }


def statistics(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, percentiles and maximum; all None of no values."""
    shares = {"median": 50.0} | {f"p{share:g}": share for share in percentiles}
    if not values:
        return dict.fromkeys(["mean", *shares, "max"])
    found = dict(zip(shares, np.percentile(values, list(shares.values())).tolist(), strict=True))
    return {"mean": float(np.mean(values)), **found, "max": float(max(values))}


def report(record: Record, num_prompts: int, percentiles: Sequence[float]) -> dict[str, Any]:
    """Figures of a run as JSON values. Tokens are those of the requests that succeeded, rates are per second.

    `unfinished` counts requests that an interruption kept from being sent or answered, `without_usage` those whose
    tokens had to be counted here, as one for each event.
    """
    good = [answer for answer in record.answers if answer.error is None]
    errors = collections.Counter(answer.error for answer in record.answers if answer.error is not None)
    given, generated = sum(answer.input_tokens for answer in good), sum(answer.output_tokens for answer in good)
    events, seconds = sum(len(answer.token_times) for answer in good), max(record.seconds, 1e-9)
    return {
        "successful": len(good),
        "failed": len(record.answers) - len(good),
        "unfinished": num_prompts - len(record.answers),
        "seconds": record.seconds,
        "input_tokens": given,
        "output_tokens": generated,
        "requests_per_second": len(good) / seconds,
        "input_tokens_per_second": given / seconds,
        "output_tokens_per_second": generated / seconds,
        "total_tokens_per_second": (given + generated) / seconds,
        "tokens_per_event": generated / events if events else None,
        "most_in_flight": record.most_in_flight,
        "without_usage": sum(not answer.counted for answer in good),
        **{name: statistics(values, percentiles) for name, values in samples(record.answers).items()},
        "errors": [{"count": count, "message": text} for text, count in errors.most_common(ERRORS_LISTED)],
    }


def details(answer: Answer) -> dict[str, Any]:
    """One request as JSON values, times in milliseconds but `sent` in seconds since the run began."""
    return {
        "sent": answer.sent,
        "input_tokens": answer.input_tokens,
        "output_tokens": answer.output_tokens,
        "token_times_ms": [1e3 * value for value in answer.token_times],
        "latency_ms": 1e3 * answer.latency,
        "error": answer.error,
    }


def plot(answers: Sequence[Answer], title: str, path: str | Path) -> None:
    """Draw how the metrics are distributed; the suffix chooses the format.

    Needs matplotlib, which is imported here because nothing else does.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    for axes, (name, values) in zip(figure.subplots(2, 2).flat, samples(answers).items(), strict=True):
        axes.set_title(METRICS[name][0])
        axes.set_xlabel("ms")
        axes.grid(alpha=0.3)
        if not values:
            continue
        top = float(np.percentile(values, 99.5))  # the few above would leave no room for the rest
        axes.hist(np.minimum(values, top), bins=50, color="tab:blue", alpha=0.7)
        for share, style in ((50, "-"), (99, "--")):
            value = float(np.percentile(values, share))
            axes.axvline(value, color="tab:orange", linestyle=style, label=f"p{share}: {value:.1f} ms")
        axes.set_xlim(left=0)
        axes.legend()
    figure.savefig(path, dpi=150)
