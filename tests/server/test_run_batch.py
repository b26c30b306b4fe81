"""`jaxserve run-batch`: bad lines, runs that go on, signals, and the same text as `LLM`."""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cli import main
from jaxserve.engine.errors import EngineDeadError
from jaxserve.server.batch import Batch, Outcome
from jaxserve.server.batch_files import open_files, parse_line, raw_lines
from jaxserve.server.service import Service
from jaxserve.text import load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Fake(Service):
    """Answers with the prompt; `step(prompt)` may wait or raise."""

    def __init__(self, step: Callable[[str], Any] | None = None):
        self.step = step
        self.running = self.most = 0
        self.asked: list[str] = []

    async def prepare(self, body: Any, request_id: Any) -> Any:
        body.check()
        return SimpleNamespace(text=body.prompt)

    async def answer(self, job: Any) -> Any:
        self.asked.append(job.text)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.001)
            waiting = self.step(job.text) if self.step is not None else None
            if waiting is not None:
                await waiting
        finally:
            self.running -= 1
        return {"text": job.text, "usage": {"prompt_tokens": 2, "completion_tokens": 3}}


def request(key: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": key, "method": "POST", "url": url, "body": {"prompt": key} | body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes().decode()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def execute(
    source: Path, target: Path, service: Service | None = None, concurrency: int = 3, **options: Any
) -> Outcome:
    with open_files(str(source), str(target), **options) as files:
        return asyncio.run(Batch(service or Fake(), files, concurrency).run())


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


BAD_LINES = {
    "{": "not JSON",
    "\xff": "not JSON",
    "[" * 100_000: "not JSON",
    "[1]": "not a JSON object but list",
    "{}": "custom_id is missing",
    '{"custom_id": 3}': "custom_id is 3, not a text",
    '{"custom_id": ""}': "custom_id is ''",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_line_that_is_no_request_is_named(line: str):
    found = parse_line(7, line.encode("latin-1"))
    assert (found.number, found.custom_id) == (7, None)
    assert BAD_LINES[line] in (found.error or "")


def test_lines_too_long_are_passed_over(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.server.batch_files.LONGEST_LINE", 100)
    source = write(paths[0], "\ufeffa", "", "x" * 1000, "b")
    with source.open("rb") as file:
        assert list(raw_lines(file)) == [(1, b"a\n"), (3, None), (4, b"b\n")]


BAD_REQUESTS = [
    (request("url", url="/v1/embeddings"), 404, "url"),
    (request("no-url") | {"url": None}, 404, "url"),
    (request("method") | {"method": "GET"}, 405, "method"),
    (request("body") | {"body": [1]}, 400, "body"),
    (request("type", n="many"), 400, "n"),
    (request("stream", stream=True), 400, "stream"),
    (request("tools", tools=[{}]), 400, "tools"),
    (request("half", stop="\ud800"), 400, None),
    (request("boom"), 500, None),
    (request("group"), 400, None),
]


def fail(prompt: str) -> None:
    if prompt == "boom":
        raise RuntimeError("boom")
    if prompt == "group":
        raise ExceptionGroup("", [ExceptionGroup("", [ValueError("inner")])])


def test_good_and_bad_lines(paths: tuple[Path, Path]):
    lines = [request("a"), "{", request("ü\u2028"), request("a"), *(line for line, _, _ in BAD_REQUESTS), request("z")]
    outcome = execute(write(paths[0], *lines), paths[1], Fake(fail))
    assert (outcome.done, outcome.failed, outcome.completion_tokens) == (len(lines), len(BAD_REQUESTS) + 2, 9)
    found = records(paths[1])
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in found)
    assert len({line["id"] for line in found}) == len(lines)
    by_id = {line["custom_id"]: line for line in found if line["error"] is None}
    for key in ("a", "ü\u2028", "z"):
        assert by_id[key]["response"]["status_code"] == 200
        assert by_id[key]["response"]["body"]["text"] == key
    for line, status, param in BAD_REQUESTS:
        response = by_id[line["custom_id"]]["response"]
        error = response["body"]["error"]
        assert (response["status_code"], error["code"], error["param"]) == (status, status, param)
    errors = {line["error"]["line"]: line["error"]["message"] for line in found if line["error"] is not None}
    assert errors.keys() == {2, 4}
    assert errors[4] == "line 4: custom_id 'a' is that of line 1 already"


class Watched(io.FileIO):
    """A file that knows how many lines were taken from it."""

    taken = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        self.taken += 1
        return super().readline(size)


def test_input_is_read_as_there_is_room(paths: tuple[Path, Path]):
    source = write(paths[0], *(request(str(number)) for number in range(50)))
    watched, ahead = Watched(source), []

    async def answer() -> None:
        ahead.append(watched.taken - len(service.asked))
        async with asyncio.timeout(20):
            while service.most < 4:  # until as many are in flight as may be
                await asyncio.sleep(0.001)

    service = Fake(lambda prompt: answer())
    with open_files(str(source), str(paths[1])) as files:
        outcome = asyncio.run(Batch(service, dataclasses.replace(files, source=watched), 4).run())
    assert outcome.done == 50
    assert service.most == 4
    assert max(ahead) <= 4 + 1  # in flight, and one read ahead
    assert Counter(line["custom_id"] for line in records(paths[1])) == {str(number): 1 for number in range(50)}


def test_a_second_run_does_the_rest(paths: tuple[Path, Path]):
    source, target = paths
    lines = [request("a"), "{", request("bad", n="x"), request("b"), request("a"), request("c")]
    execute(write(source, *lines), target)
    whole = target.read_bytes().splitlines(keepends=True)
    keep = [line for line in whole if b'"c"' not in line]
    target.write_bytes(b"".join(keep) + whole[-1][:30])
    with open_files(str(source), str(target)) as files:
        before = files.output.written
        assert (before.ids, before.bad_lines, before.failed, files.total) == ({"a", "bad", "b"}, {2, 5}, 3, 6)
    service = Fake()
    assert execute(source, target, service).done == 1
    assert service.asked == ["c"]
    assert target.read_bytes().startswith(b"".join(keep))
    assert len(records(target)) == 6
    assert execute(source, target).done == 0
    assert execute(source, target, overwrite=True).done == 6
    assert len(records(target)) == 6


def test_outputs_that_are_not_ours_stay_as_they_are(paths: tuple[Path, Path]):
    source, target = paths
    execute(write(source, request("a"), request("b")), target)
    cases = {"another input": target.read_bytes(), "no output of run-batch": b'{"id": 1}\n', "line 1 is no": b"notes"}
    write(source, request("a"))
    for message, content in cases.items():
        target.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            execute(source, target)
        assert target.read_bytes() == content
    assert execute(source, target, overwrite=True).done == 1
    with pytest.raises(ValueError, match="input and output at once"):
        execute(source, source)
    os.link(source, target.with_name("link"))
    with pytest.raises(ValueError, match="input and output at once"):
        execute(source, target.with_name("link"))
    with open_files(str(source), str(target)), pytest.raises(ValueError, match="another run"):
        execute(source, target)


def test_what_a_dead_engine_leaves_is_not_written(paths: tuple[Path, Path]):
    source, target = write(paths[0], *(request(key) for key in "abcd")), paths[1]

    def die(prompt: str) -> None:
        if prompt == "c":
            raise ExceptionGroup("", [EngineDeadError("it has failed")])

    with pytest.raises(EngineDeadError):
        execute(source, target, Fake(die), concurrency=1)
    assert [line["custom_id"] for line in records(target)] == ["a", "b"]
    assert execute(source, target).done == 2


@contextlib.contextmanager
def pipe(path: Path, *lines: Any) -> Iterator[Path]:
    """A named pipe that holds lines and stays open."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    os.write(end, "".join(json.dumps(line) + "\n" for line in lines).encode())
    try:
        yield path
    finally:
        os.close(end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_that_waits_for_input_and_answers(paths: tuple[Path, Path], number: int):
    def hang(prompt: str) -> Any:
        if prompt == "b":
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
            return asyncio.sleep(60)
        return None

    service = Fake(hang)
    with pipe(paths[0], request("a"), request("b")) as source:
        outcome = execute(source, paths[1], service)
        assert outcome.stopped_by == number
        assert outcome.seconds < 10
        assert service.running == 0
        assert [line["custom_id"] for line in records(paths[1])] == ["a"]
        with pytest.raises(ValueError, match="an input that is no file"):
            execute(source, paths[1])


def test_command_line_mistakes_are_told_before_the_model_loads(
    paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    source, target = map(str, paths)
    for words, code, message in [
        (["-i", source], 2, "required: -o/--output-file"),
        (["-i", source, "-o", target], 1, "No such file"),
        (["-i", source, "-o", target, "--max-concurrency", "0"], 2, "at least 1"),
    ]:
        assert main(["run-batch", *words]) == code
        assert message in capsys.readouterr().err


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 49152,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def engine_options(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, compilation_cache: str) -> dict:
    """A tiny random Llama with the embedded model's tokenizer: its programs compile in a moment."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    load_tokenizer(smollm2_path).hf.save_pretrained(folder)
    return {"model": str(folder), "load_format": "dummy", "max_model_len": 256, "max_num_seqs": 4,
            "num_gpu_blocks_override": 64, "warmup": "none", "compilation_cache_dir": compilation_cache}  # fmt: skip


CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def test_kill_and_go_on_with_the_same_answers_as_llm(
    paths: tuple[Path, Path], engine_options: dict, capsys: pytest.CaptureFixture[str]
):
    """A killed run and a second one answer every request once, greedily as `LLM` does."""
    source, target = paths
    prompts = [f"The number {number} is" for number in range(16)]
    lines = [request(str(i), prompt=text, max_tokens=12, temperature=0) for i, text in enumerate(prompts)]
    chat = request("chat", url="/v1/chat/completions", messages=CHAT, max_tokens=12, temperature=0)
    write(source, *lines, "{", request("hot", temperature=9), chat)
    options = [word for name, value in engine_options.items() for word in (f"--{name}", str(value))]
    words = ["run-batch", *options, "-i", str(source), "-o", str(target), "--max-concurrency", "4"]
    process = subprocess.Popen([sys.executable, "-m", "jaxserve", *words], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not target.exists() or target.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = target.read_bytes()
    assert 3 <= before.count(b"\n") < 19

    assert main(words) == 1
    assert "were done before" in capsys.readouterr().err
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    found = records(target)
    keys = [*(line["custom_id"] for line in lines), None, "hot", "chat"]
    assert Counter(line["custom_id"] for line in found) == Counter(keys)
    assert main(words) == 1  # nothing to do, but there are errors
    assert len(records(target)) == len(found)

    bodies = {line["custom_id"]: line["response"]["body"] for line in found if line["response"] is not None}
    params = SamplingParams(temperature=0, max_tokens=12)
    llm = LLM(**engine_options)
    expected = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    assert [bodies[str(i)]["choices"][0]["text"] for i in range(16)] == expected
    [answer] = llm.chat(CHAT, params, use_tqdm=False)
    assert bodies["chat"]["choices"][0]["message"]["content"] == answer.outputs[0].text
    llm.close()
