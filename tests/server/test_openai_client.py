"""The official client against a live server."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from live import ADMIN_KEY, KEY, Live, serve, warm

from jaxserve.text import load_tokenizer

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ROOT = Path(__file__).parents[2]
GREEDY = {"model": "tiny", "temperature": 0}
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def live(quick_compilation: None, quick_flags: list[str]) -> Iterator[Live]:
    names = ["--served-model-name", "tiny,small-alias"]
    with serve(*quick_flags, *names, "--api-key", KEY, "--admin-api-key", ADMIN_KEY) as server:
        warm(server)
        yield server


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.client()


def test_models(client: openai.OpenAI, live: Live):
    first, second = client.models.list().data
    assert (first.id, second.id, first.owned_by) == ("tiny", "small-alias", "jaxserve")
    assert client.models.retrieve("tiny").model_extra["max_model_len"] == 2048


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI):
    whole = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=24, **GREEDY)
    choice = whole.choices[0]
    assert choice.message.content
    assert (whole.object, choice.finish_reason, choice.message.role) == ("chat.completion", "length", "assistant")
    assert whole.id.startswith("chatcmpl-")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=MESSAGES, max_tokens=24, **GREEDY, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_messages_reach_the_model_as_its_template_wrote_them(client: openai.OpenAI, smollm2_path: Path):
    tokenizer = load_tokenizer(smollm2_path)
    prompt = tokenizer.encode(tokenizer.render_chat(MESSAGES), add_special_tokens=False)
    extra = {"return_token_ids": True}
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=1, extra_body=extra, **GREEDY)
    assert answer.model_extra["prompt_token_ids"] == prompt


def test_content_may_be_parts(client: openai.OpenAI):
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    answers = [client.chat.completions.create(messages=m, max_tokens=8, **GREEDY) for m in (MESSAGES, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_chat_logprobs(client: openai.OpenAI):
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 5 == answer.usage.completion_tokens
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob == max(top.logprob for top in entry.top_logprobs)
    stream = client.chat.completions.create(messages=MESSAGES, max_tokens=5, logprobs=True, stream=True, **GREEDY)
    streamed = [e for c in stream if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in entries], abs=1e-4)


def test_a_message_may_be_continued(client: openai.OpenAI):
    messages = [*MESSAGES, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    answer = client.chat.completions.create(messages=messages, max_tokens=4, extra_body=extra, **GREEDY)
    assert answer.choices[0].message.content.startswith("The capital of France is")
    assert len(answer.choices[0].message.content) > len("The capital of France is")


def test_completions_of_several_prompts(client: openai.OpenAI):
    prompts = ["The sky", "One two"]
    alone = [client.completions.create(prompt=p, max_tokens=6, **GREEDY).choices[0].text for p in prompts]
    together = client.completions.create(prompt=prompts, max_tokens=6, **GREEDY)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1]
    assert together.usage.completion_tokens == 12
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=prompts, max_tokens=6, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == alone


def test_token_ids_are_prompts_and_answers(client: openai.OpenAI, live: Live):
    with live.http() as http:
        ids = http.post("/tokenize", json={"prompt": "The sky is"}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The sky is"}
    extra = {"return_token_ids": True}
    answer = client.completions.create(prompt=ids, max_tokens=4, extra_body=extra, **GREEDY)
    assert (
        answer.choices[0].text == client.completions.create(prompt="The sky is", max_tokens=4, **GREEDY).choices[0].text
    )
    assert len(answer.choices[0].model_extra["token_ids"]) == 4
    assert answer.model_extra["prompt_token_ids"] == ids


def test_completion_logprobs_and_echo(client: openai.OpenAI):
    answer = client.completions.create(prompt="The sky is", max_tokens=3, logprobs=2, echo=True, **GREEDY)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert choice.text.startswith("The sky is")
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.tokens) == answer.usage.total_tokens
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    plain = client.completions.create(prompt="The sky is", max_tokens=3, extra_body={"prompt_logprobs": 1}, **GREEDY)
    prompt = plain.choices[0].model_extra["prompt_logprobs"]
    assert [None if p is None else max(v["logprob"] for v in p.values()) <= 0 for p in prompt] == [None, True, True]


@pytest.mark.parametrize("options", [{"n": 1}, {"n": 2, "seed": 3, "temperature": 0.8}, {"max_tokens": 0}], ids=str)
def test_a_streamed_echo_says_what_a_whole_one_says(client: openai.OpenAI, options: dict):
    asked = GREEDY | {"prompt": ["The sky is", "One é"], "max_tokens": 3, "logprobs": 2, "echo": True} | options
    whole = client.completions.create(**asked)
    pieces = [chunk.choices[0] for chunk in client.completions.create(stream=True, **asked)]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        said = {
            name: [value for piece in mine if piece.logprobs for value in getattr(piece.logprobs, name)]
            for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
        }
        assert (said["tokens"], said["text_offset"]) == (choice.logprobs.tokens, choice.logprobs.text_offset)
        assert said["token_logprobs"][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-3)
        assert [top and set(top) for top in said["top_logprobs"]] == [
            t and set(t) for t in choice.logprobs.top_logprobs
        ]


def test_an_echo_alone(client: openai.OpenAI):
    """As those use it who only want to know how likely a text is."""
    options = {"prompt": ["The sky is", "One"], "max_tokens": 0, "echo": True, **GREEDY}
    answer = client.completions.create(logprobs=1, **options)
    first, second = answer.choices
    assert (first.text, second.text) == ("The sky is", "One")
    assert (first.finish_reason, answer.usage.completion_tokens) == ("length", 0)
    assert len(first.logprobs.tokens) == len(first.logprobs.token_logprobs) == 3
    pieces = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert "".join(piece.text for piece in pieces if piece.index == 0) == "The sky is"
    assert sorted(piece.index for piece in pieces if piece.finish_reason == "length") == [0, 1]


def test_an_empty_answer_may_be_sent_back(client: openai.OpenAI):
    messages = [*MESSAGES, {"role": "assistant", "content": None}, {"role": "user", "content": "Well?"}]
    assert client.chat.completions.create(messages=messages, max_tokens=1, **GREEDY).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="has no content"):
        client.chat.completions.create(messages=[{"role": "user", "content": None}], **GREEDY)


def test_nobody_forges_lines_of_the_log(live: Live):
    with live.http() as http:
        assert http.get("/nothing%0AINFO:%20forged").status_code == 404
    live.settles()
    assert any("/nothing%0AINFO:%20forged" in line for line in live.lines)
    assert not any(line.startswith("INFO: forged") for line in live.lines)


def test_several_choices_and_seeds(client: openai.OpenAI):
    options = {"model": "tiny", "temperature": 1.2, "max_tokens": 8, "messages": MESSAGES, "n": 3}
    one, again, other = (client.chat.completions.create(seed=seed, **options) for seed in (7, 7, 8))
    texts = [[choice.message.content for choice in answer.choices] for answer in (one, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in one.choices] == [0, 1, 2]


def test_stop_strings(client: openai.OpenAI):
    full = client.completions.create(prompt="One, two, three,", max_tokens=20, **GREEDY).choices[0].text
    stop = full[5:8]
    answer = client.completions.create(prompt="One, two, three,", max_tokens=20, stop=[stop], **GREEDY).choices[0]
    assert answer.text == full[: full.index(stop)]
    assert (answer.finish_reason, answer.model_extra["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"max_tokens": 3000}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "word " * 2100}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": {}}, 400, "prompt"),
        ({"stop": [1]}, 400, "stop"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"logit_bias": {"no": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"repetition_detection": {"x": 1}}, 400, "repetition_detection"),
        ({"structured_outputs": {"x": 1}}, 400, "structured_outputs"),
        ({"best_of": 3}, 400, "best_of"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"seed": 1e30}, 400, "seed"),
        ({"priority": 3}, 400, "priority"),
        ({"request_id": "x" * 300}, 400, "request_id"),
        ({"request_id": "line\nbreak: in a header"}, 400, "request_id"),
        ({"request_id": "é"}, 400, "request_id"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2100}]}, 400, "messages"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ({"messages": MESSAGES, "max_completion_tokens": 3000}, 400, "max_completion_tokens"),
    ],
)
def test_mistakes_are_named(live: Live, body: dict, status: int, param: str):
    path, needed = ("chat/completions", {}) if "messages" in body else ("completions", {"prompt": "Hi"})
    with live.http() as http:
        answer = http.post(f"/v1/{path}", json=needed | {"max_tokens": 1} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status), error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").partition("[")[0] == param
    assert "__init__" not in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"[" * 50_000,
        b'{"prompt": "x", "tokens": [1], "temperature": NaN, "model": 3}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "stop": "\\udc00"}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": null}',
        b'{"messages": [{"role": 1, "content": {}}]}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_broken_bodies_are_the_clients_fault(live: Live, path: str, content: bytes):
    with live.http() as http:
        answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]
        assert http.get("/health").status_code == 200


def test_errors_of_the_client_library(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="shorten the prompt or lower max_tokens"):
        client.completions.create(model="tiny", prompt="x", max_tokens=2999)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_keys(live: Live):
    open_routes = {"/health", "/ready", "/ping"}
    closed = {"/v1/models", "/metrics", "/version", "/load", "/openapi.json", "/docs"}
    with live.http(None) as nobody, live.http() as caller, live.http(ADMIN_KEY) as admin:
        assert {path for path in open_routes | closed if nobody.get(path).status_code == 200} == open_routes
        assert all(caller.get(path).status_code == 200 for path in open_routes | closed)
        for client, status in ((nobody, 401), (caller, 401), (admin, 200)):
            assert client.post("/reset_prefix_cache").status_code == status
        assert nobody.post("/tokenize", json={"prompt": "x"}).status_code == 401


def test_metrics_count_what_a_request_did(live: Live):
    """Under vLLM's names: a prompt of which two pages of 32 tokens are found again, with two continuations."""
    prompt = [7000 + i for i in range(70)]
    before = live.metrics()
    with live.http() as http:
        for body in ({}, {"n": 2, "temperature": 1.0}):
            body |= {"prompt": prompt, "max_tokens": 3, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
    page = live.metrics()
    gained = {name: value - before.get(name, 0.0) for name, value in page.items() if value != before.get(name, 0.0)}
    by_source = "jaxserve:prompt_tokens_by_source_total"
    expected = {
        "jaxserve:prompt_tokens_total": 210,
        "jaxserve:prompt_tokens_cached_total": 128,
        f"{by_source} source=local_compute": 82,
        f"{by_source} source=local_cache_hit": 128,
        "jaxserve:request_prefill_kv_computed_tokens_sum": 76,
        "jaxserve:request_prefill_kv_computed_tokens_count": 2,
        "jaxserve:request_prefill_kv_computed_tokens_bucket le=50.0": 1,
        "jaxserve:request_max_num_generation_tokens_sum": 6,
        "jaxserve:request_success_total finished_reason=length": 2,
    }
    assert {name: gained.get(name) for name in expected} == expected
    assert page[f"{by_source} source=external_kv_transfer"] == 0
    assert "jaxserve:time_to_first_token_seconds_bucket le=2560.0" in page
    assert "jaxserve:request_prompt_tokens_bucket le=2000.0" in page
    assert "jaxserve:request_prompt_tokens_bucket le=5000.0" not in page


def test_the_dashboard_asks_for_what_there_is(live: Live):
    panels = json.loads((ROOT / "examples" / "grafana" / "dashboard.json").read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = set(re.findall(r"\$\{prefix\}:\w+|http_\w+", asked))
    there = {name.partition(" ")[0] for name in live.metrics()}
    assert {name.replace("${prefix}", "jaxserve") for name in names} <= there
    assert "${prefix}:prompt_tokens_by_source_total" in names
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


def test_unknown_fields_are_named_and_parameters_shown(live: Live):
    body = {"prompt": "Hi", "max_tokens": 1, "top_q": 1, "user": "me", "x_effective_params": True, "top_k": 5}
    with live.http() as http:
        answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc"})
    assert answer.headers["x-ignored-fields"] == "top_q"
    assert answer.headers["x-request-id"] == answer.json()["id"] == "cmpl-abc"
    shown = answer.json()["x_effective_params"]
    assert (shown["top_k"], shown["max_tokens"], shown["repetition_penalty"]) == (5, 1, 1.0)


def test_a_client_that_leaves_frees_its_pages(live: Live):
    body = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
    with live.http() as http, http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        live.settles(1.0)
        lines.close()
    live.settles()
    with live.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=0.2)
    live.settles()
    assert live.metric("jaxserve:kv_cache_usage_perc") == 0


def test_abort_by_id(live: Live):
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True, "request_id": "mine"}
    with live.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        with live.http() as other:
            assert other.post("/abort/cmpl-mine").json() == {"aborted": True}
            assert other.post("/abort/cmpl-other").json() == {"aborted": False}
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    "prompt",
    [
        "数字：一、二、",
        pytest.param("Les élèves mangèrent à", marks=pytest.mark.slow),
        pytest.param("🙂🙃🙂🙃 and", marks=pytest.mark.slow),
    ],
)
def test_streams_equal_whole_answers_whatever_the_stop_strings(client: openai.OpenAI, prompt: str):
    rng, options = random.Random(prompt), {"model": "tiny", "prompt": prompt, "max_tokens": 14, "temperature": 1.0}
    full = client.completions.create(seed=1, **options).choices[0].text
    for _ in range(4):
        starts = [rng.randrange(len(full)) for _ in range(rng.randint(0, 3))]
        stop = [full[start : start + rng.randint(1, 4)] for start in starts]
        common = options | {"seed": 1, "stop": stop, "extra_body": {"include_stop_str_in_output": rng.random() < 0.3}}
        whole = client.completions.create(**common).choices[0]
        pieces = [chunk.choices[0] for chunk in client.completions.create(stream=True, **common)]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].finish_reason == whole.finish_reason
        ends = [full.index(text) for text in stop]
        if stop and whole.finish_reason == "stop" and not common["extra_body"]["include_stop_str_in_output"]:
            assert whole.text == full[: min(ends)] or len(whole.text) <= min(ends)


@pytest.mark.slow
def test_generated_requests_never_make_the_server_fail(live: Live, tmp_path: Path):
    """Requests made from the OpenAPI schema, valid and not, by schemathesis."""
    tool = Path(sys.executable).with_name("schemathesis")
    command = [tool, "run", f"{live.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--max-examples", "4"]
    command += ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--generation-deterministic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    live.settles()


def test_the_example_runs(live: Live):
    command = [sys.executable, "examples/openai_client.py", f"{live.url}/v1", KEY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "(40 tokens)" in done.stdout
    assert "'top_k': 20" in done.stdout


def test_many_at_once_with_the_async_client(live: Live):
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:

            async def one(i: int) -> str:
                text = ""
                stream = await client.chat.completions.create(messages=MESSAGES, max_tokens=10, stream=True, **GREEDY)
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(i) for i in range(12)))

    texts = asyncio.run(all_of_them())
    assert len(set(texts)) == 1
    assert texts[0]
