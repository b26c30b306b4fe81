"""`jaxserve bench serve`: the load, the reading of streams, and the command against a small server made for it."""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import math
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxserve.bench import load, serving
from jaxserve.bench.load import Lengths, arrival_times, make_requests
from jaxserve.checks import ParameterError
from jaxserve.cli import bench_serve, main, parse

MODEL = "fake/model"


@dataclass
class FakeServer:
    """Answers as the field `fake` of a request's body says, and keeps what it was asked.

    Fields of `fake`: `first` and `gap` (seconds before the first event and between events), `per_event` (tokens),
    `pieces` (bytes of a network write), `usage`, `done` (whether they are sent), `fail` (which error), `every` (which
    requests fail: one of so many).
    """

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    models: Any = field(default_factory=lambda: {"data": [{"id": MODEL, "max_model_len": 4096, "owned_by": "fake"}]})
    interrupt_at: int = -1

    async def list_models(self, request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer wrong":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        return JSONResponse(self.models)

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        fake = body.get("fake", {})
        number = len(self.bodies)
        if number == self.interrupt_at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        fail = fake.get("fail") if number % fake.get("every", 1) == 0 else None
        if fail == "status":
            return JSONResponse({"error": {"message": "out\nof memory", "code": 500}}, 500)
        if fail == "plain":
            return Response("Bad gateway", 502)
        if fail == "json":
            return JSONResponse({"choices": [{"text": "no stream"}]})
        chat = "messages" in body
        return StreamingResponse(self.stream(body, fake, fail, chat), media_type="text/event-stream")

    async def stream(
        self, body: dict[str, Any], fake: dict[str, Any], fail: str | None, chat: bool
    ) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async for data in self.events(body, fake, fail, chat):
                size = fake.get("pieces", len(data))
                for at in range(0, len(data), size):
                    yield data[at : at + size]
                    await asyncio.sleep(0.001 if size < len(data) else 0)
        finally:
            self.in_flight -= 1

    async def events(
        self, body: dict[str, Any], fake: dict[str, Any], fail: str | None, chat: bool
    ) -> AsyncIterator[bytes]:
        def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
            value = {"id": "x", "choices": [] if choice is None else [{"index": 0, "finish_reason": None} | choice]}
            return f"data: {json.dumps(value | more, ensure_ascii=False)}\n\n".encode()

        def text(some: str) -> dict[str, Any]:
            return {"delta": {"content": some}} if chat else {"text": some}

        if chat:
            yield event({"delta": {"role": "assistant", "content": ""}})
        await asyncio.sleep(fake.get("first", 0))
        if fail == "hang":
            await asyncio.sleep(30)
        left, per_event = body["max_tokens"], fake.get("per_event", 1)
        while left > 0:
            yield event(text(" né" * min(left, per_event)))
            left -= per_event
            if fail == "event":
                yield b'data: {"error": {"message": "the engine died", "code": 500}}\n\n'
                return
            if fail == "end":
                return
            if fail == "garbage":
                yield b"data: {not json\n\n"
                return
            if fail == "cut":
                raise ConnectionError
            if left > 0:
                await asyncio.sleep(fake.get("gap", 0))
        last = event(text("") | {"finish_reason": "length"})
        if fake.get("usage", True):
            length = 7 if chat else len(body["prompt"])
            usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"], "total_tokens": 0}
            last += b": a comment\n\n" + event(None, usage=usage)
        yield last + (b"data: [DONE]\n\n" if fake.get("done", True) else b"")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    """The server, on a free port, in a thread of this process."""
    fake = FakeServer()
    routes = [Route("/v1/models", fake.list_models)]
    routes += [Route(path, fake.generate, methods=["POST"]) for path in serving.ENDPOINTS.values()]
    listening = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    options: dict[str, Any] = {"log_level": "critical", "ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield fake
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.fixture
def fake(running: FakeServer) -> FakeServer:
    fresh = FakeServer(running.url)
    vars(running).update(vars(fresh))
    return running


def bench(fake: FakeServer, tmp_path: Path, *words: str, code: int = 0, **behaviour: Any) -> dict[str, Any]:
    """The JSON of a run of short requests whose answers come as `behaviour` says."""
    report = tmp_path / "report.json"
    fixed = ["--base-url", fake.url, "--output", str(report), "--extra-body", json.dumps({"fake": behaviour})]
    sizes = ["--input-len", "20", "--output-len", "10", "--num-prompts", "12", "--warmups", "0"]
    assert main(["bench", "serve", *fixed, *sizes, *words]) == code
    return json.loads(report.read_text())


# What is sent and when.


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 0.99), st.floats(0, 2), st.integers(0, 9))
def test_lengths_are_in_range_and_repeatable(given_len: int, output_len: int, ratio: float, sigma: float, seed: int):
    uniform = Lengths(given_len, output_len, "uniform", range_ratio=ratio).draw(np.random.default_rng(seed), 20)
    for pair in uniform:
        for length, mean in zip(pair, (given_len, output_len), strict=True):
            assert max(1, round(mean * (1 - ratio))) <= length <= round(mean * (1 + ratio))
    assert Lengths(given_len, output_len, "fixed").draw(np.random.default_rng(seed), 3) == [(given_len, output_len)] * 3
    spread = Lengths(given_len, output_len, sigma=sigma)
    drawn = spread.draw(np.random.default_rng(seed), 20)
    assert drawn == spread.draw(np.random.default_rng(seed), 20)
    assert all(min(pair) >= 1 and sum(pair) <= spread.most for pair in drawn)


def test_lognormal_lengths_have_the_mean_and_a_long_tail():
    drawn = np.array(Lengths(200, 100, limit=100_000).draw(np.random.default_rng(0), 20_000))
    # The longest half per cent is missing, and with it 5% of the mean.
    assert drawn.mean(axis=0) == pytest.approx([190, 95], rel=0.05)
    assert np.median(drawn, axis=0) == pytest.approx(np.array([200, 100]) / math.sqrt(math.e), rel=0.05)
    assert drawn.max(axis=0) == pytest.approx([1600, 800], rel=0.05)
    usual = np.array(Lengths(200, 100).draw(np.random.default_rng(0), 20_000))
    assert usual.mean(axis=0) == pytest.approx([180, 90], rel=0.07)
    assert usual.sum(axis=1).max() <= 1200


@pytest.mark.parametrize(("rate", "burstiness"), [(0.5, 1.0), (40.0, 0.3), (40.0, 10.0)])
def test_arrivals_have_the_rate_and_the_spread(rate: float, burstiness: float):
    times = arrival_times(np.random.default_rng(0), 20_000, rate, burstiness)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)  # 1 for a Poisson process


def test_arrivals_at_an_infinite_rate_are_at_once():
    assert arrival_times(np.random.default_rng(0), 3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("vocab_size", [2, 500, 10_000])
def test_prompts_have_the_lengths(vocab_size: int):
    lengths = [(5, 2), (1, 9)]
    rng = np.random.default_rng(0)
    for request, (prompt_len, _) in zip(
        make_requests(rng, lengths, endpoint="completions", vocab_size=vocab_size, fields={"max_tokens": 4, "x": None}),
        lengths,
        strict=True,
    ):
        body = json.loads(request.body)
        assert len(body["prompt"]) == prompt_len == request.prompt_len
        assert all(0 < token < vocab_size for token in body["prompt"])
        assert (body["max_tokens"], body["x"], body["stream_options"]) == (4, None, {"include_usage": True})
    chat = make_requests(rng, lengths, endpoint="chat", fields={})
    for request, (prompt_len, output_len) in zip(chat, lengths, strict=True):
        body = json.loads(request.body)
        assert len(body["messages"][0]["content"].split()) == prompt_len
        assert body["max_tokens"] == output_len


# Reading a stream.

STREAM = ": hello\r\ndata: one\n\ndata:two\rdata:  né\r\revent: x\nid: 3\n\r\ndata: {}\r\n\r\n\ndata: last\n"
EVENTS = ["one", "two\n né", "{}", "last"]


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=30))
def test_events_however_they_are_cut(cuts: list[int]):
    parser, data = load.EventParser(), STREAM.encode()
    edges = sorted({0, len(data), *cuts})
    found = [event for low, high in itertools.pairwise(edges) for event in parser.feed(data[low:high])]
    assert found + parser.end() == EVENTS
    assert parser.end() == []


def test_tokens_of_events_without_usage_are_counted():
    answer = load.Answer(5)
    choices: list[dict[str, Any]] = [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"content": "a"}},
        {"delta": {"content": ""}},  # half of a character
        {"delta": {"reasoning_content": "b"}},
        {"delta": {"role": "assistant", "content": "c"}, "finish_reason": None},
        {"delta": {}, "finish_reason": "stop"},
    ]
    for at, choice in enumerate(choices):
        assert not answer.complete
        answer.read(json.dumps({"choices": [choice], "usage": None}), float(at))
    assert answer.complete
    assert answer.token_times == [1.0, 2.0, 3.0, 4.0]
    assert (answer.input_tokens, answer.output_tokens, answer.counted) == (5, 4, False)
    assert (answer.time_to_first_token, answer.latency, answer.gaps()) == (1.0, 5.0, [1.0, 1.0, 1.0])
    answer.read('{"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 7}}', 9.0)
    assert (answer.input_tokens, answer.output_tokens, answer.counted) == (6, 7, True)
    assert answer.time_per_output_token == 0.5
    assert answer.latency == 5.0


def test_statistics():
    found = serving.statistics([float(i) for i in range(101)], [90.0, 99.9])
    assert found == {"mean": 50.0, "median": 50.0, "p90": 90.0, "p99.9": pytest.approx(99.9), "max": 100.0}
    assert serving.statistics([], [90.0]) == {"mean": None, "median": None, "p90": None, "max": None}


def test_messages_that_differ_in_numbers_are_one():
    errors = [*(f"HTTP 400: token {i} is too large" for i in range(3)), "gone", *("gone" for _ in range(4))]
    assert serving.commonest(errors) == [
        {"count": 5, "message": "gone"},
        {"count": 3, "message": "HTTP 400: token 0 is too large"},
    ]
    assert serving.commonest([]) == []
    assert len(serving.commonest(list("abcdefgh"))) == serving.ERRORS_LISTED


# HTTP, against bytes.

ANSWERS = {
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc": "abc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:0\r\n\r\n": "",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\na\r\n\r\n00A\r\n0123456789\r\n0\r\nx: y\r\n\r\n": (
        "a\r\n0123456789"
    ),
    b"HTTP/1.0 200\r\n\r\nuntil the end": "until the end",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab": "ab",
}
BROKEN_ANSWERS = (
    b"",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 20",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nlong\r\n",
)


def exchange(answers: Sequence[bytes], ends: bool = False, pause: float = 0.0) -> tuple[list[str], int]:
    """Bodies that a server's answers give, and the connections it took; `ends` closes one after each answer."""
    connections, left = [], iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, StopAsyncIteration):
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"POST /prefix/v1/x?y=1 HTTP/1.1\r\n")
                assert b"host: 127.0.0.1:" in head.lower()
                assert await reader.readexactly(4) == b"body"
                writer.write(answer := next(left))
                if ends or answer.startswith((b"HTTP/1.0", b"HTTP/1.1 200 OK\r\nConnection: close")):
                    break
        writer.close()

    async def ask() -> list[str]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/prefix"
        async with server, httpx.AsyncClient(base_url=url, transport=serving.Transport()) as http:
            texts = []
            for _ in answers:
                texts.append((await http.post("/v1/x?y=1", content=b"body")).text)
                await asyncio.sleep(pause)
            return texts

    return asyncio.run(ask()), len(connections)


def test_answers_are_read_and_connections_used_again():
    texts, connections = exchange(list(ANSWERS))
    assert texts == list(ANSWERS.values())
    assert connections == 2  # the fourth answer ends the first one


def test_a_connection_that_the_server_closed_or_left_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch):
    answer = next(iter(ANSWERS))
    assert exchange([answer] * 3, ends=True, pause=0.1) == (["abc"] * 3, 3)
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.0)
    assert exchange([answer] * 3) == (["abc"] * 3, 3)


@pytest.mark.parametrize("answer", BROKEN_ANSWERS)
def test_broken_answers_are_protocol_errors(answer: bytes):
    with pytest.raises(httpx.RemoteProtocolError):
        exchange([answer], ends=True)


# The command.


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_counts_are_exact(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], endpoint: str):
    words = ["--endpoint", endpoint, "--warmups", "2", "--ignore-eos", "--seed", "3", "--api-key", "secret"]
    found = bench(fake, tmp_path, *words, "--details", per_event=3)
    assert len(fake.bodies) == 14
    counted = fake.bodies[2:]
    prompts = [len(body["prompt"]) if endpoint == "completions" else 7 for body in counted]
    outputs = [body["max_tokens"] for body in counted]
    assert (found["successful"], found["failed"], found["unfinished"], found["errors"]) == (12, 0, 0, [])
    assert (found["input_tokens"], found["output_tokens"]) == (sum(prompts), sum(outputs))
    assert found["tokens_per_event"] == pytest.approx(sum(outputs) / sum(math.ceil(n / 3) for n in outputs))
    assert found["requests_per_second"] == pytest.approx(12 / found["seconds"])
    assert found["total_tokens_per_second"] == pytest.approx((sum(prompts) + sum(outputs)) / found["seconds"])
    assert sorted(answer["output_tokens"] for answer in found["answers"]) == sorted(outputs)
    assert {body["model"] for body in fake.bodies} == {MODEL} == {found["model"]}
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in fake.bodies)
    assert set(fake.keys) == {"Bearer secret"}
    assert "secret" not in json.dumps(found)
    assert found["server"] == {"url": fake.url, "owner": "fake", "max_model_len": 4096}
    assert found["arguments"]["lengths"] == "lognormal"
    assert found["arguments"]["request_rate"] == "inf"
    shown = capsys.readouterr().out
    assert MODEL in shown
    assert [line.split()[-1] for line in shown.splitlines() if line.startswith("output tokens ")] == [str(sum(outputs))]


def test_the_same_seed_sends_the_same_requests(fake: FakeServer, tmp_path: Path):
    sent = []
    for seed in ("5", "5", "6"):
        fake.bodies.clear()
        bench(fake, tmp_path, "--seed", seed, "--max-concurrency", "1")
        sent.append([(body["prompt"], body["max_tokens"]) for body in fake.bodies])
    assert sent[0] == sent[1] != sent[2]


def test_times_are_those_of_the_server(fake: FakeServer, tmp_path: Path):
    words = ["--lengths", "fixed", "--output-len", "6", "--num-prompts", "8", "--percentiles", "50,99.5"]
    found = bench(fake, tmp_path, *words, first=0.3, gap=0.06, per_event=2)
    assert list(found["latency_ms"]) == ["mean", "median", "p50", "p99.5", "max"]
    first, gap = found["time_to_first_token_ms"]["median"], found["inter_token_latency_ms"]["median"]
    assert 290 < first < 1000
    assert 55 < gap < 250
    # Three events of two tokens: two gaps, shared by the five tokens after the first.
    assert found["time_per_output_token_ms"]["median"] == pytest.approx(2 * gap / 5, rel=0.5)
    assert first < found["latency_ms"]["median"] < 1e3 * found["seconds"]
    assert found["latency_ms"]["median"] > 400


def test_events_in_small_pieces(fake: FakeServer, tmp_path: Path):
    found = bench(fake, tmp_path, "--num-prompts", "2", "--output-len", "4", "--max-total-len", "60", pieces=11)
    assert found["successful"] == 2
    assert found["output_tokens"] == sum(body["max_tokens"] for body in fake.bodies)
    assert found["tokens_per_event"] == 1.0


def test_a_server_without_usage_and_done(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = bench(fake, tmp_path, usage=False, done=False)
    assert (found["successful"], found["without_usage"]) == (12, 12)
    assert found["output_tokens"] == sum(body["max_tokens"] for body in fake.bodies)
    assert "12 answers without usage" in capsys.readouterr().out


FAILURES = {
    "status": "HTTP 500: out of memory",
    "plain": "HTTP 502: Bad gateway",
    "event": "error event: the engine died",
    "garbage": "an event is not JSON: {not json",
    "end": "the answer (text/event-stream; charset=utf-8) ended before a finish_reason or [DONE]",
    "json": "the answer (application/json) ended before a finish_reason or [DONE]",
    "cut": "RemoteProtocolError: ",
}


@pytest.mark.parametrize("fail", FAILURES)
def test_failures_are_counted_and_listed(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: str
):
    found = bench(fake, tmp_path, fail=fail, every=3)
    assert (found["successful"], found["failed"]) == (8, 4)
    assert [error["count"] for error in found["errors"]] == [4]
    assert found["errors"][0]["message"].startswith(FAILURES[fail])
    assert f"failed 4x: {FAILURES[fail]}" in capsys.readouterr().out
    assert found["output_tokens"] == sum(body["max_tokens"] for i, body in enumerate(fake.bodies, 1) if i % 3)


def test_slow_requests_time_out(fake: FakeServer, tmp_path: Path):
    found = bench(fake, tmp_path, "--timeout", "1.5", fail="hang", every=4)
    assert (found["successful"], found["failed"]) == (9, 3)
    assert found["errors"] == [{"count": 3, "message": "timed out: no complete answer within 1.5 s"}]
    assert 1.4 < found["seconds"] < 10


def test_nothing_succeeds(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "picture.png"
    words = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    found = bench(fake, tmp_path, *words, code=1, fail="status")
    assert (found["successful"], found["failed"], found["latency_ms"]["mean"]) == (0, 12, None)
    report = tmp_path / "report.json"
    report.unlink()
    words = ["--base-url", fake.url, "--output", str(report), "--extra-body", '{"fake": {"fail": "status"}}']
    assert main(["bench", "serve", *words]) == 1
    assert "a warm-up request failed: HTTP 500: out of memory" in capsys.readouterr().err
    assert not report.exists()


def test_the_limit_of_concurrency_holds(fake: FakeServer, tmp_path: Path):
    found = bench(fake, tmp_path, "--max-concurrency", "3", first=0.02)
    assert (fake.most_in_flight, found["most_in_flight"], found["successful"]) == (3, 3, 12)
    assert found["sent_late_ms"]["max"] > 3 * 20 * 0.9  # the last three wait for three rounds of others
    found = bench(fake, tmp_path, first=0.5)
    assert min(fake.most_in_flight, found["most_in_flight"]) > 3


def test_requests_arrive_at_the_rate(fake: FakeServer, tmp_path: Path):
    found = bench(fake, tmp_path, "--request-rate", "30", "--burstiness", "50", "--details", "--num-prompts", "31")
    sent = sorted(answer["sent"] for answer in found["answers"])
    assert sent[0] < 0.5
    assert 0.8 < sent[-1] < 3
    assert np.diff(sent).max() < 1
    assert 0 <= found["sent_late_ms"]["median"] < 500
    assert found["arguments"]["request_rate"] == 30.0


def test_an_interruption_reports_what_is_done(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fake.interrupt_at = 6
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
    try:
        found = bench(fake, tmp_path, "--max-concurrency", "1", first=0.05, code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found["successful"], found["failed"], found["unfinished"]) == (5, 0, 7)
    assert found["output_tokens"] == sum(body["max_tokens"] for body in fake.bodies[:5])
    assert "unfinished requests                7" in capsys.readouterr().out


def test_the_picture_and_json_on_standard_output(fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    words = ["--num-prompts", "5", "--output", "-", "--plot", str(picture), "--random-range-ratio", "0.2"]
    assert main(["bench", "serve", "--base-url", f"{fake.url}/v1/", "--model", "mine", *words]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "time to first token" in shown.err
    assert found["arguments"]["lengths"] == "uniform"
    assert found["server"]["url"] == fake.url
    assert {body["model"] for body in fake.bodies} == {"mine"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["bench", "serve", *words]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


MISTAKES = {
    "--num-prompts 0": "--num-prompts must be 1 or more, got 0",
    "--max-concurrency 0": "--max-concurrency must be 1 or more, got 0",
    "--warmups -1": "--warmups must be 0 or more, got -1",
    "--seed -1": "--seed must be 0 or more, got -1",
    "--request-rate 0": "request_rate must be above 0 requests per second, or inf for all at once, got 0.0",
    "--request-rate nan": "request_rate must be above 0",
    "--request-rate fast": "'fast' is not a number",
    "--request-rate 1 --burstiness 0": "burstiness must be above 0 and finite, got 0.0",
    "--timeout 0": "timeout must be above 0 seconds, got 0.0",
    "--input-len 0": "input_len must be 1 or more, got 0",
    "--lengths fixed --input-len 9 --output-len 3 --max-total-len 11": "max_total_len must be at least 12",
    "--lengths uniform --random-range-ratio 0 --max-total-len 11": "leave room for lengths 220 and 190, got 11",
    "--random-range-ratio 1": "range_ratio must be 0 or more and less than 1, got 1.0",
    "--random-range-ratio 0.5 --lengths fixed": "--random-range-ratio is for --lengths uniform",
    "--length-sigma 5": "sigma must be between 0 and 4, got 5.0",
    "--extra-body [1]": "must be a JSON object",
    "--percentiles 50,100": "percentiles must be above 0 and below 100, got 50,100",
    "--endpoint embeddings": "invalid choice: 'embeddings'",
    "--base-url localhost:8000": "base_url must be an address such as http://127.0.0.1:8000",
    "--output no/such/folder/r.json": "--output must be in a folder that exists",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_names_the_value_and_the_limit(line: str, capsys: pytest.CaptureFixture[str]):
    assert MISTAKES[line] in said(capsys, 2, *line.split())


def test_a_bad_vocabulary_is_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    words = ["--base-url", fake.url, "--vocab-size", "1"]
    assert "vocab_size must be 2 or more, got 1" in said(capsys, 2, *words)


def test_no_server(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    shown = said(capsys, 1, "--base-url", url)
    assert f"no server answers at {url}" in shown
    assert "jaxserve serve" in shown


def test_what_the_server_says_about_itself(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    assert "wants a valid --api-key: HTTP 401: no such key" in said(
        capsys, 1, "--base-url", fake.url, "--api-key", "wrong"
    )
    fake.models = {"data": [{"id": MODEL, "max_model_len": 100}]}
    assert "context of 100 tokens; use --max-total-len 100" in said(capsys, 2, "--base-url", fake.url)
    assert "use --max-total-len 36" in said(capsys, 2, "--base-url", fake.url, "--endpoint", "chat")
    for nothing in ({"data": []}, {}, [], None, {"data": [{}]}):
        fake.models = nothing
        assert "name one with --model" in said(capsys, 2, "--base-url", fake.url)


def test_plotting_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "jaxserve[plot]"' in said(capsys, 1, "--plot", "x.png")


def test_results_hold_no_option_that_was_not_chosen_for_them(fake: FakeServer, tmp_path: Path):
    """A new option is in one of both lists, or this fails."""
    address = fake.url.replace("//", "//user:password@")
    found = bench(fake, tmp_path, "--base-url", address, "--extra-body", '{"top_k": 3, "fake": {}}')
    assert found["arguments"].keys() == set(bench_serve.SAVED)
    assert found["arguments"]["extra_body"]["top_k"] == 3
    assert "password" not in json.dumps(found)
    others = {"api_key", "base_url", "model", "output", "details", "plot", "run", "words", "verbose", "debug"}
    assert set(vars(parse(["bench", "serve"]))) == others | set(bench_serve.SAVED)


def test_the_target_hides_its_key():
    assert "secret" not in repr(serving.Target("http://x", api_key="secret"))
    with pytest.raises(ParameterError, match="endpoint"):
        serving.Target("http://x", "embeddings")
