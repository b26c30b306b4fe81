"""Starting, refusing, draining and ending, seen from outside."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live import KEY, Live, serve, warm

from jaxserve.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def in_background(live: Live, body: dict) -> tuple[threading.Thread, list[httpx.Response]]:
    """Post a completion from another thread."""
    answers: list[httpx.Response] = []

    def post() -> None:
        with live.http() as http, contextlib.suppress(httpx.TransportError):  # a server that ends at once
            answers.append(http.post("/v1/completions", json=body))

    thread = threading.Thread(target=post)
    thread.start()
    return thread, answers


def wait_for(live: Live, running: int) -> None:
    with live.http() as http:
        end = time.monotonic() + 30
        while http.get("/load").json()["server_load"] < running:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_limits_drain_and_exit(quick_flags: list[str]):
    """One server: a full queue, a time limit, strict fields, a large body, then SIGTERM while a request runs."""
    limits = ["--max-queue-requests", "5", "--request-timeout", "120", "--strict-requests", "--max-body-mb", "0.01"]
    with serve(*quick_flags, *limits, "--shutdown-timeout", "30", "--metrics-prefix", "vllm") as live:
        warm(live)
        with live.http(None) as http:
            refused = http.post("/v1/completions", json=LONG | {"n": 6, "temperature": 1})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "at most 5 may" in refused.json()["error"]["message"]
            large = http.post("/v1/completions", json={"prompt": "x" * 20_000})
            assert (large.status_code, large.json()["error"]["type"]) == (413, "RequestTooLargeError")
            assert "the limit is 10,485 (--max-body-mb)" in large.json()["error"]["message"]
            chunked = http.post("/v1/completions", content=iter([b"x" * 8000] * 3))
            assert chunked.status_code == 413
            strict = http.post("/v1/completions", json=LONG | {"top_q": 1})
            assert (strict.status_code, strict.json()["error"]["param"]) == (400, "top_q")
            assert http.post("/reset_prefix_cache").status_code == 404
            assert "vllm:generation_tokens_total" in http.get("/metrics").text
            assert (
                http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
            )
        thread, answers = in_background(live, LONG)
        wait_for(live, 1)
        live.process.send_signal(signal.SIGTERM)
        with live.http(None) as http:
            while http.get("/ready").status_code == 200:
                time.sleep(0.01)
            late = http.post("/v1/completions", json=LONG)
            assert (late.status_code, late.json()["error"]["type"]) == (503, "ServiceUnavailableError")
            assert http.get("/health").status_code == 200
        thread.join(60)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert live.process.wait(30) == 0


def test_a_time_limit_and_an_end_at_once(quick_flags: list[str]):
    with serve(*quick_flags, "--request-timeout", "0.2", "--shutdown-timeout", "60") as live:
        body = LONG
        with live.http() as http:
            answer = http.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (504, "TimeoutError")
            assert "0.2 s (--request-timeout)" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                events = [line[6:] for line in stream.iter_lines() if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == 504
        live.settles()
        thread, _ = in_background(live, LONG)
        live.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(10) in (0, 128 + signal.SIGTERM)  # 0 if the request was over by then
        thread.join(10)


def test_a_dead_engine_says_why_and_ends_the_server(quick_flags: list[str], tmp_path: Path):
    """The engine's step is made to fail in a process that is otherwise `jaxserve serve`."""
    program = tmp_path / "failing.py"
    program.write_text(
        "import sys\n"
        "from jaxserve.cli import main\n"
        "from jaxserve.engine.runner import Runner\n"
        "def launch(self, work):\n"
        "    raise RuntimeError('the device is on fire')\n"
        "Runner.launch = launch\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    here = "--disable-frontend-multiprocessing"
    command = [sys.executable, str(program), "serve", here, "--port", "0", *quick_flags]
    with serve(command=command) as live, live.http() as http:
        answer = http.post("/v1/completions", json=LONG)
        assert answer.status_code == 500
        assert "the device is on fire" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        assert live.process.wait(30) == 1
        assert any("the device is on fire" in line for line in live.lines)


def test_an_address_in_use_is_found_before_the_model_loads():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "jaxserve", "serve", "no-such-model", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port must be in [0, 65535]"),
        (["--request-timeout", "0"], "--request-timeout must be above 0"),
        (["--api-key-file", "/nonexistent"], "No such file"),
        (["--max-queue-requests", "many"], "no whole number"),
        (["--prot", "1"], "--port"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", *flags]) in (1, 2)
    assert message in capsys.readouterr().err


def test_keys_from_files_and_the_environment(tmp_path: Path):
    from jaxserve.server.middleware import Keys
    from jaxserve.server.options import read_keys

    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\nsecond\n")
    keys = Keys(read_keys(["third"], [str(path)]))
    assert all(keys.accept(f"Bearer {key}".encode()) for key in ("first", "second", "third"))
    assert keys.accept(b"bearer first")
    assert not any(
        keys.accept(value) for value in (b"", b"Bearer", b"Bearer ", b"first", b"Basic first", b"Bearer fir")
    )
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys([], [str(path)])
    with pytest.raises(ValueError, match="empty"):
        read_keys([" "], [])


def test_a_unix_socket_with_keys_and_pages_of_an_origin(quick_flags: list[str], tmp_path: Path):
    place = tmp_path / "socket"
    page = "https://page.example"
    with serve(*quick_flags, "--uds", str(place), "--api-key", KEY, "--allowed-origins", page) as live:
        assert live.url == f"unix:{place}"
        transport = httpx.HTTPTransport(uds=str(place))
        with httpx.Client(transport=transport, base_url="http://localhost") as http:
            assert http.get("/health").status_code == 200
            assert [http.head(path).status_code for path in ("/health", "/ping", "/ready")] == [200] * 3
            refused = http.get("/v1/models", headers={"Origin": page})
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
            asks = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "a"}
            assert http.options("/v1/completions", headers=asks).status_code == 200
            assert "access-control-allow-origin" not in http.get("/health", headers={"Origin": "https://b"}).headers
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(20) == 0
    assert not os.path.exists(place)
