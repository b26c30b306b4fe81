"""What an actor makes of rows, without a cluster; and configurations that are refused before there is one."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pytest

from jaxserve.engine.errors import EngineDeadError
from jaxserve.ray import EngineProcessorConfig, ServingConfig, build_openai_app, build_processor, serving, worker
from jaxserve.ray.devices import actor_options, choose_device
from jaxserve.ray.processor import add_columns, unless_failed
from jaxserve.ray.worker import ANSWER, ERROR, LOGPROBS, EngineWorker, plain_logprobs
from jaxserve.types import Logprob

pytestmark = pytest.mark.usefixtures("quick_compilation")
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def options(tiny_model: str, engine_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_source": tiny_model,
        "engine_kwargs": {**engine_kwargs, "max_num_seqs": 4, "max_num_batched_tokens": 32},
    }


@pytest.fixture(scope="module")
def ready(options: dict[str, Any], quick_compilation: None) -> Iterator[EngineWorker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "claim_devices", lambda *_: None)  # this process has its devices already
        found = EngineWorker(EngineProcessorConfig(**options, sampling_params={"max_tokens": 3}), "cpu")
    yield found
    found.close()


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def answer(actor: EngineWorker, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return asyncio.run(actor(to_table(rows))).to_pylist()


def test_prompts_come_as_text_as_a_chat_or_as_tokens(ready: EngineWorker, options: dict[str, Any]):
    greedy = {"temperature": 0.0, "logprobs": 1}
    text, chat = answer(ready, [
        {"key": "a", "prompt": "one two three", "sampling_params": greedy},
        {"key": "b", "prompt": "ignored", "messages": MESSAGES, "sampling_params": greedy},
    ])  # fmt: skip
    assert chat["prompt"] == "<Hello>"
    again = [
        {"key": "c", "tokenized_prompt": row["prompt_token_ids"], "sampling_params": greedy} for row in (text, chat)
    ]
    for first, row in zip((text, chat), answer(ready, again), strict=True):
        assert row["generated_tokens"] == first["generated_tokens"]
        assert (row[ERROR], row["key"], row["num_input_tokens"]) == ("", "c", len(first["prompt_token_ids"]))
        assert (row["num_generated_tokens"], row["finish_reason"]) == (3, "length")
        assert row["time_taken_llm"] > 0
        best = [position[0] for position in row["logprobs"]]
        assert [item["token_id"] for item in best] == row["generated_tokens"]
        assert "".join(item["decoded_token"] for item in best) == row["generated_text"]
        assert {item["rank"] for item in best} == {1}


def test_rows_with_an_error_do_not_go_through_postprocess():
    after = partial(unless_failed, lambda row: {"length": len(row["generated_text"])})
    assert after({"generated_text": "abc", "id": 1, ERROR: ""}) == {"length": 3, ERROR: ""}
    failed = {"generated_text": "", "id": 1, ERROR: "ValueError: no"}
    assert after(failed) == failed
    assert add_columns(lambda row: {"prompt": row["id"] + 1}, {"id": 1}) == {"id": 1, "prompt": 2}


def test_logprobs_fit_into_any_file():
    positions = [None, {5: Logprob(-1.0, 1, "a"), 7: Logprob(-2.0, 2, "b")}]
    plain = plain_logprobs(positions)
    assert plain is not None
    assert plain[0] is None
    assert [item["token_id"] for item in plain[1]] == [5, 7]
    pa.array([plain, None], LOGPROBS)


def test_a_bad_row_has_an_error_of_its_own(ready: EngineWorker):
    rows = answer(ready, [
        {"prompt": "Hello"},
        {"prompt": "Hello", "sampling_params": {"top_p": 7.0}},
        {"prompt": "word " * 500},
        {"prompt": None},
        {"prompt": "Hello", "sampling_params": {"n": 2, "temperature": 1.0}},
        {"messages": [{"role": "nobody", "content": "Hi"}]},
        {"prompt": "Hello", "sampling_params": {"tempratur": 1.0}},
    ])  # fmt: skip
    assert rows[0][ERROR] == ""
    assert rows[0]["num_generated_tokens"] == 3
    texts = (
        "top_p must be greater than 0 and at most 1",
        "128",
        "no value in",
        "n must be 1",
        "who is nobody",
        "temperature",
    )
    for row, text in zip(rows[1:], texts, strict=True):
        assert text in row[ERROR]
        assert (row["generated_text"], row["finish_reason"]) == ("", "error")
    assert rows[1]["prompt"] == "Hello"


def test_columns_are_the_same_whatever_happens(ready: EngineWorker):
    good, bad = ({"prompt": text, "note": 1} for text in ("Hello", ""))
    tables = [asyncio.run(ready(to_table(rows))) for rows in ([good], [bad], [good, bad])]
    assert {tuple(table.column_names) for table in tables} == {("note", *ANSWER.names)}
    assert len({table.schema for table in tables}) == 1


def test_rows_without_a_prompt_column_end_the_run(ready: EngineWorker):
    with pytest.raises(ValueError, match="'promt'; give a preprocess function"):
        answer(ready, [{"promt": "Hello"}])


def test_a_bad_row_may_end_the_run(ready: EngineWorker, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ready, "_config", EngineProcessorConfig(**options, should_continue_on_error=False))
    with pytest.raises(ValueError, match=r"a row cannot be answered: .*top_p"):
        answer(ready, [{"prompt": "Hello"}, {"prompt": "Hello", "sampling_params": {"top_p": 7.0}}])


def test_a_dead_engine_ends_its_actor(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, quick_compilation: None
):
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "claim_devices", lambda *_: None)
    monkeypatch.setattr(worker.os, "_exit", leave)
    actor = EngineWorker(EngineProcessorConfig(**options), "cpu")
    actor.close()
    with pytest.raises(SystemExit):
        answer(actor, [{"prompt": "Hello"}])


def test_a_replica_with_a_dead_engine_is_unhealthy(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "claim_devices", lambda *_: None)
    monkeypatch.setattr(serving, "take_short_turns", lambda: None)
    monkeypatch.setattr(serving, "keep_what_is_there", lambda: None)
    replica = serving.OpenAIReplica(ServingConfig(**options), "cpu")
    asyncio.run(replica.check_health())
    replica._engine.shutdown()
    with pytest.raises(EngineDeadError):
        asyncio.run(replica.check_health())
    replica.__del__()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"concurrency": (4, 2)}, r"concurrency must be .*, got \(4, 2\)"),
        ({"concurrency": "all"}, "concurrency must be an integer, got 'all'"),
        ({"max_restarts": -2}, "max_restarts must be -1 or more, got -2"),
        ({"device": "cuda"}, "device must be one of .*, got 'cuda'"),
        ({"num_cpus": -1}, "num_cpus must be 0 or more, got -1"),
        ({"engine_kwargs": {"max_num_seq": 4}}, "max_num_seq.*max_num_seqs"),
        ({"engine_kwargs": {"tensor_parallel_size": 0}}, "tensor_parallel_size.*0"),
        ({"engine_kwargs": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size"),
        ({"engine_kwargs": {"model": "m"}}, "model_source"),
        ({"sampling_params": {"temperature": 9}}, "temperature must be .*, got 9"),
        ({"sampling_params": {"temprature": 1}}, "temprature.*temperature"),
        ({"should_continue_on_error": "no"}, "should_continue_on_error must be True or False, got 'no'"),
    ],
)
def test_a_wrong_processor_is_refused_at_once(fields: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        build_processor(EngineProcessorConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_replicas": 0}, "num_replicas must be 1 or more, or 'auto', got 0"),
        ({"replicas": 2}, "replicas"),
        ({"api_keys": [""]}, r"api_keys\[0\] must not be empty"),
        ({"request_timeout": 0}, "request_timeout must be above 0, got 0"),
        ({"engine_kwargs": {"dtype": "int3"}}, "dtype.*int3"),
        ({"deployment_config": 3}, "deployment_config must be a dict, got 3"),
    ],
)
def test_a_wrong_deployment_is_refused_at_once(fields: dict[str, Any], message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        build_openai_app(fields)


def test_an_actor_gets_devices_of_its_own():
    sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    four = EngineProcessorConfig(engine_kwargs=sizes, accelerator_type="H100", runtime_env={"pip": []})
    given = {"accelerator_type": "H100", "runtime_env": {"pip": []}}
    assert actor_options(four, "gpu") == {"num_cpus": 1, "num_gpus": 4, **given}
    assert actor_options(four, "tpu") == {"num_cpus": 1, "resources": {"TPU": 4}, **given}
    assert actor_options(EngineProcessorConfig(num_cpus=8), "cpu") == {"num_cpus": 8}
    assert choose_device({"CPU": 8.0, "GPU": 2.0}) == "gpu"
    assert choose_device({"CPU": 8.0, "TPU": 4.0}) == "tpu"
    assert choose_device({"CPU": 8.0, "GPU": 0.0}) == "cpu"


def test_ray_is_loaded_only_where_it_is_asked_for_and_its_absence_explained():
    check = """
import sys, jaxserve.llm, jaxserve.server.app, jaxserve.cli
assert "ray" not in sys.modules
sys.modules["ray"] = None
try:
    import jaxserve.ray
except ImportError as error:
    assert "pip install 'jaxserve[ray]'" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", check], check=True)
