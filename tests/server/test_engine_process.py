"""The engine in a process of its own: what passes between the two, and what happens when one of them ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import serve

from jaxserve.checks import ParameterError
from jaxserve.engine.errors import EngineDeadError
from jaxserve.engine.loop import Queue, Report
from jaxserve.engine.process import _portable, _Reports, pack, unpack
from jaxserve.types import CompletionOutput, Logprob, RequestOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")
LONG = {"prompt": "The sea", "max_tokens": 1800, "temperature": 0, "ignore_eos": True, "stream": True}

texts, ids = st.text(max_size=5), st.lists(st.integers(0, 99), max_size=3)
positions = st.lists(st.dictionaries(st.integers(0, 99), st.floats(-9, 0), max_size=2), max_size=2)
completions = st.fixed_dictionaries(
    {
        "index": st.integers(0, 3),
        "text": texts,
        "token_ids": ids,
        "cumulative_logprob": st.none() | st.floats(-9, 0),
        "logprobs": st.none() | positions,
        "finish_reason": st.sampled_from([None, "stop", "length"]),
        "stop_reason": st.none() | texts | st.integers(0, 9),
    }
)
outputs = st.fixed_dictionaries(
    {
        "request_id": texts,
        "prompt": st.none() | texts,
        "prompt_token_ids": ids,
        "outputs": st.lists(completions, max_size=2),
        "finished": st.booleans(),
        "prompt_logprobs": st.none() | positions,
        "num_cached_tokens": st.integers(0, 9),
        "error": st.none() | texts,
    }
)


def scores(drawn: list[dict[int, float]] | None) -> list[dict[int, Logprob]] | None:
    """Log-probabilities as the engine gives them."""
    return drawn and [{token: Logprob(value, 1, str(token)) for token, value in one.items()} for one in drawn]


def output(drawn: dict[str, Any]) -> RequestOutput:
    """An output with these fields."""
    made = [CompletionOutput(**one | {"logprobs": scores(one["logprobs"])}) for one in drawn["outputs"]]
    return RequestOutput(**drawn | {"outputs": made, "prompt_logprobs": scores(drawn["prompt_logprobs"])})


@given(st.lists(outputs, max_size=3), st.tuples(*[st.integers(0, 9)] * 3))
def test_a_report_arrives_as_it_was(drawn: list[dict[str, Any]], numbers: tuple[int, int, int]):
    """Through a real pipe; and nothing is remembered of requests that have ended."""
    items, queue = [output(one) for one in drawn], Queue(*numbers)
    prompts = {i: (one.request_id, one.prompt, one.prompt_token_ids) for i, one in enumerate(items)}
    report = Report(queue, list(enumerate(items)), [(1, True, None), (2, None, ValueError("no"))])
    near, far = Pipe()
    near.send(pack(report))
    found = unpack(far.recv(), prompts)
    assert (found.queue, found.outputs, found.dead) == (queue, report.outputs, None)
    assert [(number, value, repr(error)) for number, value, error in found.results] == [
        (1, True, "None"),
        (2, None, "ValueError('no')"),
    ]
    assert set(prompts) == {i for i, one in enumerate(items) if not one.finished}


def test_what_fails_arrives_as_it_was():
    refused = ParameterError("n must be 1", parameter="n", value=2)
    prompts = {7: ("a", None, [1])}
    near, far = Pipe()
    near.send(pack(Report(Queue(), [(7, refused)], dead=EngineDeadError("on fire"))))
    found = unpack(far.recv(), prompts)
    ((number, error),) = found.outputs
    assert isinstance(error, ParameterError)
    assert (number, str(error), error.parameter, error.value) == (7, "n must be 1", "n", 2)
    assert str(found.dead) == "on fire"
    assert not prompts


def test_exceptions_that_may_not_travel_are_told():
    class Odd(Exception):
        def __init__(self, one: int, two: int):
            super().__init__(f"{one} and {two}")

    assert repr(_portable(Odd(1, 2))) == "RuntimeError('Odd: 1 and 2')"
    assert repr(_portable(SystemExit(3))) == "RuntimeError('SystemExit: 3')"
    refused = ParameterError("x", parameter="n")
    assert _portable(refused) is refused


def test_a_reader_that_sleeps_holds_up_nobody():
    """Many times what the pipe holds is put in no time, and arrives in order when it is read, whoever sent it."""
    near, far = Pipe()
    reports = _Reports(near)
    start = time.monotonic()
    for number in range(1200):
        reports.put(Report(Queue(number), [] if number % 4 else [(number, ValueError("x" * 10_000))]))
    assert time.monotonic() - start < 1
    prompts = {number: ("", None, [1]) for number in range(1200)}
    found = [unpack(far.recv(), prompts) for _ in range(1200)]
    assert [report.queue.added for report in found] == list(range(1200))
    assert [len(report.outputs) for report in found] == [1, 0, 0, 0] * 300


def stream_output(tokens: int = 1, logprobs: list | None = None, prompt_logprobs: list | None = None) -> RequestOutput:
    one = CompletionOutput(0, "a" * tokens, [7] * tokens, None, logprobs)
    return RequestOutput("id", None, [1], [one], finished=False, prompt_logprobs=prompt_logprobs)


SMALL = [(1, stream_output()), (2, stream_output(8))]
LARGE = {
    "crowd": [(number, stream_output()) for number in range(5)],
    "many tokens": [(1, stream_output(100)), (2, stream_output(100))],
    "scores": [(1, stream_output(1, [{}]))],
    "scores of the prompt": [(1, stream_output(1, None, [None]))],
    "refusal": [(1, ValueError())],
}


def sent_at_once(monkeypatch: pytest.MonkeyPatch, *reports: Report) -> int:
    """How many reports arrive although no thread sends any."""
    monkeypatch.setattr(_Reports, "_write", lambda self: None)
    near, far = Pipe()
    sender = _Reports(near)
    for report in reports:
        sender.put(report)
    count = 0
    while far.poll(0.05):
        far.recv()
        count += 1
    return count


def test_what_few_wait_for_is_sent_by_the_thread_that_puts_it(monkeypatch: pytest.MonkeyPatch):
    assert sent_at_once(monkeypatch, Report(Queue(1), SMALL), Report(Queue(2))) == 2


@pytest.mark.parametrize("kind", LARGE)
def test_what_takes_longer_is_not_nor_what_follows(kind: str, monkeypatch: pytest.MonkeyPatch):
    assert sent_at_once(monkeypatch, Report(Queue(1), LARGE[kind]), Report(Queue(2), SMALL)) == 0
    assert sent_at_once(monkeypatch, Report(Queue(1), SMALL, [(1, None, None)])) == 0


def children(pid: int) -> list[int]:
    """Process ids of the engines that a server has started."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "jaxserve.engine.process"], capture_output=True, text=True,
                           check=False)  # fmt: skip
    return [int(line) for line in found.stdout.split()]


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_engine_is_told_and_ends_the_server(quick_flags: list[str]):
    with serve(*quick_flags) as live:
        (engine,) = children(live.process.pid)
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="", prompt="The sea", max_tokens=2000, stream=True)
        assert next(stream).choices[0].text is not None
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match=r"has ended unexpectedly \(SIGKILL\)"):
            for _ in stream:
                pass
        with live.http() as http:
            assert http.get("/health").status_code == 503
            assert http.post("/v1/completions", json=LONG).status_code in (500, 503)
            assert http.get("/metrics").status_code == 200
        assert live.process.wait(20) == 1
        assert any("the server ends: the engine's process has ended unexpectedly (SIGKILL)" in x for x in live.lines)


def test_signals_to_the_whole_group_end_it_in_order(quick_flags: list[str]):
    """As a terminal and systemd send them: what runs is finished."""
    with serve(*quick_flags, "--shutdown-timeout", "30") as live:
        (engine,) = children(live.process.pid)
        done = []
        with live.http() as http:
            body = LONG | {"stream": False, "max_tokens": 300}
            thread = threading.Thread(target=lambda: done.append(http.post("/v1/completions", json=body)))
            thread.start()
            live.settles(1)
            for pid in (live.process.pid, engine):
                os.kill(pid, signal.SIGTERM)
            assert live.process.wait(30) == 0
            thread.join(10)
        assert done[0].status_code == 200, done[0].text
        assert done[0].json()["usage"]["completion_tokens"] == 300
        assert gone(engine)


def test_what_is_wrong_with_a_model_is_said_as_elsewhere(quick_flags: list[str]):
    command = [sys.executable, "-m", "jaxserve", "serve", quick_flags[0], "--port", "0", "--max-model-len", "9999999"]
    apart, here = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=60)
        for more in ([], ["--disable-frontend-multiprocessing"])
    )
    assert apart.returncode == here.returncode == 2
    assert apart.stderr.splitlines()[-1] == here.stderr.splitlines()[-1]
    assert "error: max_model_len" in apart.stderr


def test_an_id_may_be_used_again_at_once_and_a_killed_server_leaves_no_engine(quick_flags: list[str]):
    """The client of a stream leaves, and asks again under the same id before the engine has taken notice."""
    with serve(*quick_flags) as live, live.http() as http:
        (engine,) = children(live.process.pid)
        headers = {"X-Request-Id": "again"}
        for _ in range(5):
            with http.stream("POST", "/v1/completions", json=LONG, headers=headers) as stream:
                assert next(stream.iter_lines()).startswith("data: ")
        body = LONG | {"stream": False, "max_tokens": 5}
        answers = [http.post("/v1/completions", json=body, headers=headers) for _ in range(3)]
        for answer in answers:
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5
        live.settles()
        live.process.kill()
        assert gone(engine)
