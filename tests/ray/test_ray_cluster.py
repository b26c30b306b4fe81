"""Ray Data and Ray Serve on a local cluster of two CPUs."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from jaxserve import LLM, SamplingParams
from jaxserve.ray import EngineProcessorConfig, build_openai_app, build_processor

# Ray's own; ours are seen by the other tests, since here our code runs in other processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS, BAD = 1000, 13
GREEDY = {"temperature": 0.0, "max_tokens": 4}
POOL = {"concurrency": 2, "batch_size": 16, "max_concurrent_batches": 2}  # little under way, so that much is left
ACTOR = {"device": "cpu", "num_cpus": 0.5}
MESSAGES = [{"role": "user", "content": "Hello"}]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def children() -> dict[int, str]:
    """Processes that this one has started, directly or not, by their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError, IndexError):
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {os.getpid()} if pid in names}


def actors() -> set[int]:
    return {pid for pid, name in children().items() if name.startswith("ray::") and "EngineWorker" in name}


def lose_one_actor() -> None:
    """Kill an actor, and hold the others until it is started again, which happens only if there is work left."""
    killed, *others = before = sorted(actors())
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    end = time.monotonic() + 60
    while not actors() - set(before):
        assert time.monotonic() < end, "no actor came back"
        time.sleep(0.1)
    for pid in others:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def cluster(quick_compilation: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        before = set(children())
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1",
        )
        yield
        serve.shutdown()
        ray.shutdown()
    end = time.monotonic() + 20
    while left := {pid: name for pid, name in children().items() if pid not in before and "ray" in name}:
        assert time.monotonic() < end, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def config(tiny_model: str, engine_kwargs: dict[str, Any]) -> EngineProcessorConfig:
    return EngineProcessorConfig(model_source=tiny_model, engine_kwargs=engine_kwargs, **ACTOR, **POOL)


def test_a_killed_actor_loses_and_doubles_nothing(cluster: None, config: EngineProcessorConfig):
    prompts = [f"{number * 7919 % 10007}" + "ab" * (number % 5) for number in range(PROMPTS)]
    llm = LLM(config.model_source, **config.engine_kwargs)
    wanted = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
    llm.close()
    params = [{**GREEDY, "top_p": 7.0} if number == BAD else GREEDY for number in range(PROMPTS)]
    items = [{"id": id, "prompt": prompts[id], "sampling_params": params[id]} for id in range(PROMPTS)]
    processor = build_processor(config)
    rows = []
    for row in processor(ray.data.from_items(items)).iter_rows():
        rows.append(row)
        if len(rows) == 1:
            lose_one_actor()
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(PROMPTS))
    assert [row["id"] for row in rows if row["__inference_error__"]] == [BAD]
    assert "top_p" in rows.pop(BAD)["__inference_error__"]
    answers = [output.outputs[0] for output in wanted]
    del answers[BAD]
    assert [row["generated_tokens"] for row in rows] == [list(answer.token_ids) for answer in answers]
    assert [row["generated_text"] for row in rows] == [answer.text for answer in answers]
    assert len({row["generated_text"] for row in rows}) > PROMPTS // 4


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_so_once(cluster: None, engine_kwargs: dict[str, Any], tmp_path: Path):
    starts = tmp_path / "model"
    starts.mkdir()
    wrong = EngineProcessorConfig(model_source=str(starts), engine_kwargs=engine_kwargs, **ACTOR)
    begin = time.monotonic()
    with pytest.raises(ray.exceptions.RayError, match=r"config\.json"):
        build_processor(wrong)(ray.data.from_items([{"prompt": "Hello"}])).materialize()
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_serve_answers_the_official_client(cluster: None, tiny_model: str, engine_kwargs: dict[str, Any]):
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    fields = {"model_source": tiny_model, "engine_kwargs": {**engine_kwargs, "served_model_name": "tiny"}, **ACTOR}
    app = build_openai_app({**fields, "num_replicas": 2, "api_keys": ["a-key"]})
    serve.run(app)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="a-key", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list().data] == ["tiny"]
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    assert client.completions.create(prompt="word1 word2", **options).choices[0].text
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="Hello", temperature=9)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
