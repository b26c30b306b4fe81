"""The router in front of small servers that behave as each test wants, and of real ones."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from live import KEY, Live, serve, warm

from jaxserve.cli.flags import UsageError
from jaxserve.cli.router import parse_url
from jaxserve.cli.serve import cuda_devices, replica_words, split_devices
from jaxserve.server import router_replicas
from jaxserve.server.router_affinity import BLOCK, MOST_BLOCKS, Affinity, prompt_blocks
from jaxserve.server.router_lifecycle import Replicas, RouterLifecycle
from jaxserve.server.router_metrics import MergedMetrics

PAGE = """# HELP jaxserve:generation_tokens_total tokens
# TYPE jaxserve:generation_tokens_total counter
jaxserve:generation_tokens_total{{engine="0"}} {tokens}
# TYPE jaxserve:kv_cache_usage_perc gauge
jaxserve:kv_cache_usage_perc{{engine="0"}} {usage}
# TYPE jaxserve:time_to_first_token_seconds histogram
jaxserve:time_to_first_token_seconds_bucket{{le="0.1"}} {fast}
jaxserve:time_to_first_token_seconds_bucket{{le="+Inf"}} {tokens}
jaxserve:time_to_first_token_seconds_count {tokens}
jaxserve:time_to_first_token_seconds_sum 1.5
# TYPE http_requests_total counter
http_requests_total{{handler="/load",method="GET",status="200"}} 1e9
"""


@dataclass
class Fake:
    """A replica that does what its fields say.

    Attributes:
        status: of answers to posts; `retry_after` goes with it.
        ready: status of /ready.
        events: of a stream; `dies_after` breaks the connection after so many, `gap` is in seconds.
        seen: (method, path and query, headers, body) of each request but the health checks.
        left: streams whose reader went away.
        checks: times that /ready was asked.
    """

    status: int = 200
    ready: int = 200
    retry_after: int = 7
    events: int = 3
    dies_after: int | None = None
    partial: bytes = b""
    gap: float = 0.0
    load: dict[str, int] = field(default_factory=lambda: {"server_load": 0, "waiting": 0})
    page: str = PAGE.format(tokens=10, usage=0.5, fast=4)
    key: str | None = None
    knows: str = ""
    seen: list[tuple[str, str, dict[bytes, bytes], bytes]] = field(default_factory=list)
    left: int = 0
    checks: int = 0
    url: str = ""
    server: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path, headers = scope["path"], dict(scope["headers"])
        target = scope["raw_path"].decode() + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
        if path not in ("/ready", "/load"):
            self.seen.append((scope["method"], target, headers, body))
        known = {"/metrics": self.page, "/load": self.load, f"/abort/{self.knows}": {"aborted": True}}
        if path == "/ready":
            self.checks += 1
            await self.reply(send, self.ready, {"error": {"message": "the server is shutting down"}})
        elif self.key is not None and headers.get(b"authorization") != f"Bearer {self.key}".encode():
            await self.reply(send, 401, {"error": {"message": "no key"}})
        elif path in known or path.startswith("/abort"):
            await self.reply(send, 200, known.get(path, {"aborted": False}))
        elif scope["method"] == "GET" or self.status != 200:
            await self.reply(send, self.status, {"error": {"message": f"status {self.status}"}, "from": self.url})
        elif json.loads(body).get("stream"):
            await self.stream(receive, send)
        else:
            await asyncio.sleep(self.gap)
            if self.dies_after is not None:
                self.die()
            await self.reply(send, 200, {"from": self.url})

    def die(self) -> None:
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    async def reply(self, send: Any, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"x-secret"), (b"x-secret", b"1")]
        if status in (429, 503):
            headers.append((b"retry-after", str(self.retry_after).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stream(self, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"cmpl-1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.create_task(receive())
        for number in range(self.events):
            if self.dies_after == number:
                if self.partial:
                    await send({"type": "http.response.body", "body": self.partial, "more_body": True})
                await asyncio.sleep(0.05)
                self.die()
                return
            event = f'data: {{"number": {number}, "from": "{self.url}"}}\n\n'
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await asyncio.sleep(self.gap)
            if gone.done():
                self.left += 1
                return
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        gone.cancel()

    @property
    def posts(self) -> int:
        return sum(method == "POST" for method, *_ in self.seen)


class Quiet(uvicorn.Server):
    """A server for a thread, without signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def running(*fakes: Fake, port: int = 0) -> Iterator[None]:
    """Start replicas, each in a thread of its own."""
    with contextlib.ExitStack() as stack:
        for fake in fakes:
            bound = stack.enter_context(socket.socket())
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", port))
            bound.listen()
            fake.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            config = uvicorn.Config(fake, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
            fake.server = Quiet(config)
            thread = threading.Thread(target=fake.server.run, kwargs={"sockets": [bound]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, fake.server, "should_exit", True)
        yield


def options(**fields: Any) -> Any:
    from jaxserve.server.middleware import Keys
    from jaxserve.server.options import AppOptions, Limits, ServerOptions

    app = AppOptions(Keys([]), Keys([]), max_body_bytes=100_000)
    return ServerOptions(app, Limits(), **fields)


@contextlib.contextmanager
def routed(*urls: str, key: str | None = None) -> Iterator[httpx.Client]:
    """A router in a thread, checking its replicas often."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        place = f"http://127.0.0.1:{bound.getsockname()[1]}"
        end: list[Any] = []

        async def main() -> int:
            life = RouterLifecycle(Replicas(list(urls), key=key, check_seconds=0.1), options(), place)
            end.append((asyncio.get_running_loop(), life))
            return await life.run([bound])

        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(asyncio.run(main())))
        thread.start()
        try:
            with httpx.Client(base_url=place, timeout=20, headers={"Authorization": f"Bearer {KEY}"}) as http:
                wait(lambda: http.get("/load"))
                yield http
        finally:
            loop, life = end[0]
            loop.call_soon_threadsafe(life.end)
            thread.join()
        assert codes == [0]


def wait(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def prompt(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": text, **fields}


def post(http: httpx.Client, body: Any, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json=body, **fields)


def status_of(http: httpx.Client, request: str, host: str = "here") -> int:
    """The status of a request that httpx would not write like this."""
    port = http.base_url.port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())
        return int(connection.recv(65536).split()[1])


def events(response: httpx.Response) -> list[Any]:
    found = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def sample(http: httpx.Client, line: str) -> float:
    values = [row.split()[-1] for row in http.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    assert len(values) == 1, http.get("/metrics").text
    return float(values[0])


def test_a_request_and_its_answer_go_through_unchanged():
    with running(fake := Fake(key=KEY)), routed(fake.url) as http:
        body = b'{"prompt": "caf\xc3\xa9",  "x": 1}'
        headers = {
            "Content-Type": "application/json",
            "X-Request-Id": "7",
            "TE": "trailers",
            "Proxy-Authorization": "p",
        }
        answer = http.post("/v1/completions?a=%20b&c=1", content=body, headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"from": fake.url})
        assert "x-secret" not in answer.headers
        assert len(answer.headers.get_list("date")) == 1
        method, target, seen, got = fake.seen[-1]
        assert (method, target, got) == ("POST", "/v1/completions?a=%20b&c=1", body)
        assert seen[b"authorization"] == f"Bearer {KEY}".encode()
        assert seen[b"x-request-id"] == b"7"
        assert not {b"te", b"proxy-authorization"} & seen.keys()
        assert seen[b"host"] == fake.url.removeprefix("http://").encode()
        refused = post(http, prompt("x"), headers={"Authorization": "Bearer wrong"})
        assert refused.status_code == 401
        stream = post(http, prompt("x", stream=True))
        assert [event if event == "[DONE]" else event["number"] for event in events(stream)] == [0, 1, 2, "[DONE]"]
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["x-request-id"] == "cmpl-1"


def test_only_known_routes_of_known_replicas_are_passed():
    with running(fake := Fake(), other := Fake()), routed(fake.url) as http:
        before = len(fake.seen)
        for path in ("/", "/reset_prefix_cache", "/start_profile", "/docs", "/v1/%2e%2e/reset_prefix_cache",
                     "/v1/../docs", "/v1/..%5cdocs", f"/{other.url}/v1/models", f"//{other.url[7:]}/v1"):  # fmt: skip
            assert status_of(http, f"GET {path}") == 404
            assert status_of(http, f"POST {path}") == 404
        assert status_of(http, f"CONNECT {other.url[7:]}") in (400, 404)
        assert status_of(http, "DELETE /v1/models/m") == 405
        assert fake.seen[before:] == []
        assert http.get("/docs").json()["error"]["type"] == "NotFoundError"
        # Whatever a request names as its host, it goes to the replica, or nowhere.
        assert status_of(http, f"GET {other.url}/v1/models", other.url[7:]) in (200, 400, 404)
        assert http.get("/v1/models", headers={"Host": other.url[7:]}).json()["from"] == fake.url
        assert other.seen == []
        large = post(http, prompt("x" * 100_001))
        assert (large.status_code, large.json()["error"]["type"]) == (413, "RequestTooLargeError")
        http.get("/v1/models/a.b..c%2Fd")
        assert fake.seen[-1][1] == "/v1/models/a.b..c/d"


def test_a_replica_that_fails_is_out_and_comes_back():
    broken = Fake()
    with running(good := Fake(), broken), routed(good.url, broken.url) as http:
        port = int(broken.url.rpartition(":")[2])
        broken.server.should_exit = True
        wait(lambda: not broken.server.servers or not any(server.is_serving() for server in broken.server.servers))
        for number in range(6):
            assert post(http, prompt(f"{number}")).json() == {"from": good.url}
        assert sample(http, "jaxserve:router_healthy_replicas") == 1
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        with running(back := Fake(), port=port):
            wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
            wait(lambda: post(http, prompt("x")).json() == {"from": back.url})


def test_checks_of_a_broken_replica_become_rarer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router_replicas, "FIRST_RECHECK", 0.02)
    with running(fake := Fake(ready=503)), routed(fake.url) as http:
        time.sleep(1.5)
        assert 2 <= fake.checks <= 9  # after 0.02, 0.04, ... 0.64 s, not each 0.1 s
        fake.ready = 200
        wait(lambda: http.get("/health").status_code == 200)


def test_no_replica_at_all():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with routed(url) as http:
        for answer in (post(http, prompt("x")), http.get("/health"), http.get("/ready")):
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert error["type"] == "ServiceUnavailableError"
            assert f"no healthy replica: {url}: " in error["message"]
        assert sample(http, "jaxserve:router_healthy_replicas") == 0
        assert http.get("/load").json() == {"server_load": 0, "waiting": 0}


def test_a_503_goes_to_the_next_replica_and_a_draining_one_gets_nothing_more():
    with running(draining := Fake(), good := Fake()), routed(draining.url, good.url) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        draining.status = draining.ready = 503
        for number in range(5):
            assert post(http, prompt(f"{number}")).json() == {"from": good.url}
        assert draining.posts <= 1
        good.status = good.ready = 503
        answer = post(http, prompt("x"))
        assert answer.status_code == 503
        assert "no healthy replica" in answer.json()["error"]["message"]
        assert draining.url in answer.json()["error"]["message"]
        draining.status = draining.ready = 200
        wait(lambda: post(http, prompt("x")).status_code == 200)


def test_429_comes_through_only_if_all_say_so():
    with running(*(fakes := [Fake(status=429), Fake(), Fake(status=429)])), routed(*(f.url for f in fakes)) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 3)
        for number in range(9):
            assert post(http, prompt(f"{number}")).json() == {"from": fakes[1].url}
        fakes[1].status = 429
        before = [fake.posts for fake in fakes]
        answer = post(http, prompt("x"))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert [fake.posts for fake in fakes] == [count + 1 for count in before]
        assert sample(http, "jaxserve:router_healthy_replicas") == 3
        fakes[1].status = 400  # what is the client's fault is not tried again
        assert post(http, prompt("x")).status_code in (400, 429)


def test_retries_end_when_the_client_has_seen_a_byte():
    """A replica that dies before its first byte costs nothing; later its stream ends with an error, once."""
    with running(good := Fake(), bad := Fake()), routed(good.url, bad.url) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        bad.dies_after = 0
        pin = {"X-data-parallel-rank": "1"}
        for stream in (True, False):
            wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
            found = [post(http, prompt(f"{number}", stream=stream)) for number in range(4)]
            assert all(answer.status_code == 200 and bad.url not in answer.text for answer in found)
        assert bad.posts >= 1
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        assert post(http, prompt("x"), headers=pin).status_code == 503
        bad.dies_after, bad.partial = 2, b'data: {"number": 2, "text": "ha'
        before = good.posts
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        found = events(post(http, prompt("x", stream=True), headers=pin))
        assert [event.get("number") for event in found[:2]] == [0, 1]
        assert found[2]["error"]["type"] == "ServiceUnavailableError"
        assert "the answer broke off" in found[2]["error"]["message"]
        assert found[3:] == ["[DONE]"]
        assert good.posts == before
        assert sample(http, 'jaxserve:router_broken_streams_total{replica="1"}') == 1


def test_ranks_pin():
    with running(*(fakes := [Fake(), Fake()])), routed(*(fake.url for fake in fakes)) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        for rank in (0, 1, 1, 0):
            answer = post(http, prompt("x"), headers={"X-data-parallel-rank": str(rank)})
            assert answer.json() == {"from": fakes[rank].url}
        for rank in ("2", "-1", "one", "1e0", "9" * 30):
            answer = post(http, prompt("x"), headers={"X-data-parallel-rank": rank})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-data-parallel-rank")
        fakes[1].status = 429
        assert post(http, prompt("x"), headers={"X-data-parallel-rank": "1"}).status_code == 429


def test_a_client_that_leaves_frees_the_replica():
    with running(fake := Fake(events=10_000, gap=0.01)), routed(fake.url) as http:
        with http.stream("POST", "/v1/completions", json=prompt("x", stream=True)) as stream:
            next(stream.iter_lines())
        wait(lambda: fake.left == 1, 2)
        fake.gap = 30.0
        with pytest.raises(httpx.ReadTimeout):  # before any byte of an answer
            post(http, prompt("x"), timeout=0.3)
        wait(lambda: sample(http, 'jaxserve:router_requests_total{replica="0",status="disconnected"}') >= 1, 2)
        wait(lambda: sample(http, 'jaxserve:router_requests_in_flight{replica="0"}') == 0, 2)
        fake.gap = 0.0
        assert post(http, prompt("x")).status_code == 200


def test_the_same_beginning_goes_to_the_same_replica():
    with running(*(fakes := [Fake(gap=0.02) for _ in range(4)])), routed(*(fake.url for fake in fakes)) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 4)
        used = set()
        for number in range(8):
            text = f"conversation {number} " * 200
            turns = [post(http, prompt(text[: 1500 + 700 * turn])).json()["from"] for turn in range(3)]
            chat = [{"role": "user", "content": text}]
            chats = [
                http.post("/v1/chat/completions", json={"messages": chat + chat * turn}).json()["from"]
                for turn in range(3)
            ]
            assert len(set(turns)) == len(set(chats)) == 1
            used |= {turns[0], chats[0]}
        assert len(used) >= 3
        assert sample(http, 'jaxserve:router_choices_total{choice="hit"}') == 32


def test_busy_replicas_get_less():
    with (
        running(*(fakes := [Fake(), Fake(load={"server_load": 50, "waiting": 30})])),
        routed(*(fake.url for fake in fakes)) as http,
    ):
        wait(lambda: sample(http, 'jaxserve:router_replica_load{replica="1"}') == 80)
        for number in range(10):
            assert post(http, prompt(f"{number}")).json() == {"from": fakes[0].url}


def test_questions_to_all_replicas():
    one = Fake(key=KEY, load={"server_load": 3, "waiting": 1}, knows="cmpl-a")
    two = Fake(
        key=KEY, load={"server_load": 4, "waiting": 0}, knows="cmpl-b", page=PAGE.format(tokens=5, usage=1, fast=5)
    )
    with running(one, two), routed(one.url, two.url, key=KEY) as http:
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 2)
        assert http.get("/load").json() == {"server_load": 7, "waiting": 1}
        assert http.post("/abort/cmpl-b").json() == {"aborted": True}
        assert http.post("/abort/cmpl-c").json() == {"aborted": False}
        assert sample(http, 'jaxserve:generation_tokens_total{engine="0"}') == 15
        assert sample(http, 'jaxserve:time_to_first_token_seconds_bucket{le="0.1"}') == 9
        assert sample(http, 'jaxserve:kv_cache_usage_perc{engine="0",replica="1"}') == 1
        assert 'status="200"} 1e+09' not in http.get("/metrics").text  # the replica's own count of requests
        for path in ("/load", "/metrics"):
            assert http.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        two.ready = 500
        wait(lambda: sample(http, "jaxserve:router_healthy_replicas") == 1)
        assert sample(http, 'jaxserve:generation_tokens_total{engine="0"}') == 15


def test_sums_never_fall_when_a_replica_restarts():
    merged = MergedMetrics()

    def total(*tokens: int | None) -> float:
        pages = {i: PAGE.format(tokens=n, usage=0, fast=0) for i, n in enumerate(tokens) if n is not None}
        found = {s.name: s.value for family in merged.merge(pages) for s in family.samples if "le" not in s.labels}
        assert found["jaxserve:time_to_first_token_seconds_count"] == found["jaxserve:generation_tokens_total"]
        return found["jaxserve:generation_tokens_total"]

    assert total(10, 5) == 15
    assert total(10, None) == 15  # away
    assert total(12, 1) == 18  # a new process counts from zero
    assert total(12, 4) == 21
    assert merged.merge({0: "{not a page"}) != []


def test_affinity_is_bounded_by_load():
    affinity = Affinity()
    body = json.dumps(prompt("a" * BLOCK * 8)).encode()
    blocks = prompt_blocks(body)
    assert len(blocks) == 8
    first, why = affinity.choose({0: 0, 1: 0}, blocks)
    assert why == "new"
    affinity.remember(blocks, first)
    other = 1 - first
    assert affinity.choose({first: 5, other: 4}, blocks) == (first, "hit")
    assert affinity.choose({first: 7, other: 4}, blocks) == (first, "hit")  # 8 <= ceil(1.5 * 6)
    assert affinity.choose({first: 9, other: 2}, blocks) == (other, "overloaded")
    longer = prompt_blocks(json.dumps(prompt("a" * BLOCK * 8 + "b" * BLOCK * 56)).encode())
    assert longer[:8] == blocks
    assert affinity.choose({first: 7, other: 4}, longer) == (other, "overloaded")  # an eighth saves less
    affinity.forget(first)
    assert affinity.choose({first: 1, other: 0}, blocks) == (other, "new")


def test_blocks_of_prompts():
    text = "x" * BLOCK * 3
    plain = prompt_blocks(json.dumps(prompt(text)).encode())
    assert len(plain) == 3
    assert prompt_blocks(json.dumps(prompt([text, "y"], n=2)).encode()) == plain
    assert not set(plain) & set(prompt_blocks(json.dumps(prompt(text, cache_salt="s")).encode()))
    assert not set(plain) & set(prompt_blocks(json.dumps(prompt(text) | {"model": "adapter"}).encode()))
    ids = prompt_blocks(json.dumps(prompt(list(range(1000)))).encode())
    assert ids[:5] == prompt_blocks(json.dumps(prompt(list(range(900)))).encode())[:5]
    assert len(prompt_blocks(json.dumps(prompt("x" * BLOCK * 100)).encode())) == MOST_BLOCKS
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    assert len(prompt_blocks(json.dumps({"messages": parts}).encode())) == 3
    odd = [b"[" * 10_000, b"\xff" * 1000, b'{"prompt": ' + b"1" * 9000 + b"}", b'["a"]' + b" " * 600]
    odd += [json.dumps({"messages": [value] * 200, "prompt": value}).encode() for value in (None, 1, "x", [[]], {})]
    odd.append(b'{"prompt": "' + b"\\ud800" * 500 + b'"}')
    for body in odd:
        prompt_blocks(body)


def test_the_table_of_beginnings_is_bounded():
    affinity = Affinity(entries=100)
    for number in range(50):
        affinity.remember(prompt_blocks(json.dumps(prompt(f"{number} " * 4000)).encode()), 0)
    assert len(affinity._seen) == 100


@pytest.mark.parametrize(
    "text", ["", "localhost:8000", "ftp://h", "http://", "http://u:p@h", "http://h/?a=1", "http://h#x", "http://h:0",
             "http://h:99999", "file:///etc/passwd", "http://[::1"]
)  # fmt: skip
def test_urls_of_replicas(text: str):
    with pytest.raises(ValueError, match=r"URL"):
        parse_url(text)
    assert parse_url("http://h:80/v1/") == "http://h:80"
    assert parse_url("https://h/base") == "https://h/base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["router"], "URL"),
        (["router", "localhost:1"], "write it as http://HOST:PORT"),
        (["router", "http://a:1", "http://a:1/v1"], "given twice"),
        (["router", "http://a:1", "--check-interval", "0"], "above 0"),
        (["serve", "m", "--replicas", "0"], "--replicas must be"),
    ],
)
def test_wrong_flags(words: list[str], message: str):
    command = [sys.executable, "-m", "jaxserve", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode in (1, 2)
    assert message in done.stderr


CHILD = """
import http.server, os, signal, sys, threading
if os.path.exists(sys.argv[1] + "/broken"):
    sys.exit("ERROR: the GPU is on strike")
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b'{"server_load": 0, "pid": %d}' % os.getpid()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        os._exit(3)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
def watch():
    while os.read(0, 100):
        pass
    os._exit(4)
threading.Thread(target=watch, daemon=True).start()
print("INFO: ready at http://127.0.0.1:%d" % server.server_port, file=sys.stderr, flush=True)
server.serve_forever()
"""

PARENT = """
import sys
from test_router import CHILD, options
from jaxserve.cli import environment, set_up_output
from jaxserve.server.router_children import Command
from jaxserve.server.router_lifecycle import Replicas, route
set_up_output(True)
command = Command([sys.executable, "-c", CHILD, sys.argv[1]], environment())
sys.exit(route(Replicas(commands=[command] * 2), options(port=0)))
"""


@contextlib.contextmanager
def parent(folder: Path) -> Iterator[Live]:
    """A router with two small processes of its own."""
    program = folder / "parent.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{PARENT}")
    with serve(command=[sys.executable, str(program), str(folder)]) as live:
        yield live


def pids(live: Live) -> list[int]:
    with live.http(None) as http:
        return [http.get("/v1/models", headers={"X-data-parallel-rank": str(i)}).json().get("pid") for i in range(2)]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_processes_are_restarted_and_end_with_the_router(tmp_path: Path):
    with parent(tmp_path) as live:
        assert any("1 of 2 replicas are ready" in line for line in live.lines)
        first = pids(live)
        os.kill(first[1], signal.SIGKILL)
        wait(lambda: pids(live)[1] is None)
        assert pids(live)[0] == first[0]
        wait(lambda: pids(live)[1] not in (None, first[1]))
        assert any("its process ended with -9" in line for line in live.lines)
        second = pids(live)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(20) == 0
        wait(lambda: not any(map(alive, second)), 5)


def test_processes_do_not_outlive_a_killed_router(tmp_path: Path):
    with parent(tmp_path) as live:
        children = pids(live)
        live.process.kill()
        wait(lambda: not any(map(alive, children)), 5)


def test_a_process_that_does_not_start_ends_the_router_with_its_last_words(tmp_path: Path):
    (tmp_path / "broken").touch()
    message = "did not start; its process ended with 1: ERROR: the GPU is on strike"
    with pytest.raises(AssertionError, match=message), parent(tmp_path):
        pass


def test_command_lines_of_replicas():
    words = ["m", "--port", "1", "--max_model_len=5", "--host=::", "--replicas", "2", "--api-key", "k", "--uds", "x"]
    assert replica_words(words) == ["m", "--max-model-len=5", "--api-key", "k"]
    assert replica_words(["--shutdown_timeout=5", "--stream"]) == ["--stream"]
    assert split_devices([], 3) == ["", "", ""]
    assert split_devices(["0", "1", "GPU-a", "GPU-b"], 2) == ["0,1", "GPU-a,GPU-b"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "3,1", "JAX_PLATFORMS": "cuda,cpu"}) == ["3", "1"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "3,1", "JAX_PLATFORMS": "cpu"}) == []
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(UsageError, match="--replicas 2 cannot share 3 GPUs evenly"):
        split_devices(["0", "1", "2"], 2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_two_real_replicas(quick_flags: list[str]):
    """Chats, streams, errors and metrics through OpenAI's client; then SIGTERM while a request runs."""
    flags = ["--replicas", "2", "--api-key", KEY, "--shutdown-timeout", "30"]
    with serve(*quick_flags, *flags) as live:
        client = live.client()
        for rank in range(2):
            warm(live, rank)
        model = client.models.list().data[0].id
        whole = client.completions.create(model=model, prompt="Once upon", max_tokens=8, temperature=0)
        for rank in range(2):
            stream = client.completions.create(
                model=model, prompt="Once upon", max_tokens=8, temperature=0, stream=True,
                extra_headers={"X-data-parallel-rank": str(rank)},
            )  # fmt: skip
            assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="unknown", prompt="x")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0).models.list()
        with live.http() as http:
            assert sample(http, "jaxserve:router_healthy_replicas") == 2
            rows = [
                row for row in http.get("/metrics").text.splitlines() if row.startswith("jaxserve:generation_tokens")
            ]
            assert [float(row.split()[-1]) for row in rows if "_total{" in row] == [24 + 2 * 12]
            stream = client.completions.create(
                model=model, prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
            )
            pieces = [next(iter(stream)).choices[0].text]
            assert http.get("/load").json()["server_load"] == 1
            live.process.send_signal(signal.SIGTERM)
            wait(lambda: http.get("/ready").status_code == 503)
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        last = None
        for chunk in stream:
            pieces.append(chunk.choices[0].text)
            last = chunk.choices[0].finish_reason or last
        assert last == "length"
        assert live.process.wait(30) == 0
