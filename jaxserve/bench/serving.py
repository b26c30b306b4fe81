"""Runs a load on an OpenAI-compatible server: reads and times the streamed answers, and sums them up."""

import asyncio
import collections
import contextlib
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxserve.bench.load import Answer, EventParser, Request, ServerError, message_of
from jaxserve.checks import check_choice, require

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
ERRORS_LISTED = 5
# What a connection that breaks, or an answer that is not HTTP, ends in.
BROKEN = (OSError, EOFError, ValueError, LookupError, asyncio.LimitOverrunError)
IDLE_SECONDS = 1.0  # a connection idle for longer is not used again


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
        """Options of an HTTP client: no waiting beside `timeout`, no proxy in between."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return {"base_url": self.base_url, "headers": headers, "timeout": None, "trust_env": False}

    @property
    def shown(self) -> str:
        """Its address without a user's name and password."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)


@dataclass
class Connection:
    """An open connection; `used` is when its last answer ended."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: float = math.inf

    @property
    def fresh(self) -> bool:
        """Whether it can be used once more: servers close idle connections after seconds, just as a request comes."""
        return time.perf_counter() - self.used < IDLE_SECONDS and not self.reader.at_eof()


class Transport(httpx.AsyncBaseTransport):
    """HTTP/1.1 for many streams at once.

    httpx's own transport takes several times as long for each piece of an answer, and for each request a time that
    grows with the square of the connections: above a hundred streams it would measure itself.
    """

    def __init__(self) -> None:
        self._idle: list[Connection] = []
        self._tls = httpx.create_ssl_context(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connection = await self._connect(request.url)
        try:
            lines = [f"{request.method} {request.url.raw_path.decode()} HTTP/1.1".encode()]
            lines += [b"%b: %b" % header for header in request.headers.raw]
            connection.writer.write(b"\r\n".join([*lines, b"", await request.aread()]))
            await connection.writer.drain()
            status, headers = await read_head(connection.reader)
        except BaseException as error:
            connection.writer.close()
            if isinstance(error, BROKEN):
                raise httpx.RemoteProtocolError(f"no answer came: {error}") from error
            raise
        return httpx.Response(status, headers=headers, stream=Body(connection, dict(headers), self._idle))

    async def _connect(self, url: httpx.URL) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).fresh:
                return connection
            connection.writer.close()
        tls = self._tls if url.scheme == "https" else None
        try:
            return Connection(*await asyncio.open_connection(url.host, url.port or (443 if tls else 80), ssl=tls))
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error

    async def aclose(self) -> None:
        for connection in self._idle:
            connection.writer.close()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Status and headers, in lower case, of an answer; those that only say that one will come are skipped."""
    status = 100
    while status < 200:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
        status = int(first.split(b" ")[1])
    parts = (line.partition(b":") for line in lines)
    return status, [(name.strip().lower(), value.strip()) for name, _, value in parts]


class Body(httpx.AsyncByteStream):
    """The body of an answer. A connection whose body was read to its end goes back to the idle ones."""

    def __init__(self, connection: Connection, headers: dict[bytes, bytes], idle: list[Connection]) -> None:
        self._connection, self._headers, self._idle = connection, headers, idle
        self._complete = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reader, size = self._connection.reader, self._headers.get(b"content-length")
        kept = self._headers.get(b"connection", b"").lower() != b"close"
        try:
            if b"chunked" in self._headers.get(b"transfer-encoding", b"").lower():
                async for piece in chunks(reader):
                    yield piece
                self._complete = kept
            elif size is not None:
                yield await reader.readexactly(int(size))
                self._complete = kept
            else:
                while piece := await reader.read(2**16):
                    yield piece
        except BROKEN as error:
            raise httpx.RemoteProtocolError(f"the connection broke within the answer: {error}") from error

    async def aclose(self) -> None:
        if self._complete:
            self._connection.used = time.perf_counter()
            self._idle.append(self._connection)
        else:
            self._connection.writer.close()


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Pieces of a body whose lengths are sent in hexadecimal before each. RFC 9112, section 7.1."""
    while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    while (await reader.readuntil(b"\n")).strip():
        pass  # trailers


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
    http = httpx.AsyncClient(**target.options, transport=Transport())

    async def one(request: Request, at: float) -> None:
        async with gate, record.one():
            answer = await send(http, target, request, record.began + at)
        answer.sent = at + answer.late
        record.answers.append(answer)
        done(answer)

    record.began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for request, at in zip(requests, times, strict=True):
                await asyncio.sleep(max(0.0, record.began + at - time.perf_counter()))
                group.create_task(one(request, at))
    finally:
        record.seconds = time.perf_counter() - record.began
        await http.aclose()


async def send(http: httpx.AsyncClient, target: Target, request: Request, due: float) -> Answer:
    """Send a request that was `due` and read its answer; whatever goes wrong is the answer's error."""
    answer = Answer(request.prompt_len)
    try:
        built = http.build_request("POST", ENDPOINTS[target.endpoint], content=request.body)  # not the server's time
        answer.late = (start := time.perf_counter()) - due
        async with asyncio.timeout(target.timeout):
            await stream(http, built, answer, start)
    except TimeoutError:
        answer.error = f"timed out: no complete answer within {target.timeout:g} s"
    except ServerError as error:
        answer.error = str(error)
    except Exception as error:  # a surprising answer or a broken connection must not end the run; it is listed
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def stream(http: httpx.AsyncClient, request: httpx.Request, answer: Answer, start: float) -> None:
    """Read a streamed answer as it comes.

    Raises:
        ServerError: another status than 200, an error event, or an end before the server said that it had finished.
    """
    parser = EventParser()
    async with contextlib.aclosing(await http.send(request, stream=True)) as response:
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
        raise ServerError(f"no server answers at {target.shown} ({reason}); {remedy}") from error
    if answer.status_code in (401, 403):
        raise ServerError(f"{target.shown} wants a valid --api-key: {refusal(answer.status_code, answer.content)}")
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
        "sent_late_ms": statistics([1e3 * answer.late for answer in record.answers], percentiles),
        "errors": commonest([answer.error for answer in record.answers if answer.error is not None]),
    }


def commonest(errors: Sequence[str]) -> list[dict[str, Any]]:
    """The commonest messages; of those that differ in numbers only, the first stands for all."""
    kinds = [re.sub(r"\d+", "0", text) for text in errors]
    counts = collections.Counter(kinds).most_common(ERRORS_LISTED)
    return [{"count": count, "message": errors[kinds.index(kind)]} for kind, count in counts]


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
        axes.set_ylabel("events" if name == "inter_token_latency_ms" else "requests")
        axes.grid(alpha=0.3)
        if not values:
            continue
        top = float(np.percentile(values, 99.5))  # the few above would leave no room for the rest
        axes.hist(np.minimum(values, top), bins=50, range=(0.0, 1.001 * top), color="tab:blue", alpha=0.7)
        for share, style in ((50, "-"), (99, "--")):
            value = float(np.percentile(values, share))
            axes.axvline(value, color="tab:orange", linestyle=style, label=f"p{share}: {value:.1f} ms")
        axes.legend()
    figure.savefig(path, dpi=150)
