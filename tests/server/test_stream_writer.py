"""Events of a stream: the short way to most of them against the general one."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sampling_params import SamplingParams
from jaxserve.server.answers import TokenNames
from jaxserve.server.protocol import ChatCompletionRequest, CompletionRequest
from jaxserve.server.streaming import MARK, Job, Opening, StreamWriter
from jaxserve.types import CompletionOutput, Request, RequestOutput

CHAT = {"messages": [{"role": "user", "content": "x"}]}
BODIES = [
    (ChatCompletionRequest, CHAT),
    (CompletionRequest, {"prompt": "x"}),
    (CompletionRequest, {"prompt": ["x", "y"]}),
]
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(['"', "\\", "\n", "\0", MARK, json.dumps(MARK), "data: [DONE]"]))


def writer(kind: type, fields: dict[str, Any], extras: dict[str, Any], **params: Any) -> StreamWriter:
    settings = SamplingParams(**params)
    requests = [Request(f"id-{i}", np.array([1, 2], np.int32), settings, "x") for i in range(2)]
    job = Job(kind(model="m", stream=True, **fields), "id", "m", requests, TokenNames(None, as_ids=False))
    made = StreamWriter(job, Opening("print", "assistant", extras, lambda _: "x"))
    made._head["created"] = 0
    return made


def delta(index: int, text: str, end: str | None = None) -> RequestOutput:
    completion = CompletionOutput(index, text, [7], None, None, end, None)
    return RequestOutput("id-0", "x", [1, 2], [completion], end is not None, None, None, 0)


@pytest.mark.parametrize(("kind", "fields"), BODIES)
@given(pieces=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), TEXTS), max_size=6), extra=st.booleans())
def test_short_and_general_events_are_the_same(
    kind: type, fields: dict[str, Any], pieces: list[tuple[int, int, str]], extra: bool
) -> None:
    extras = {"x_effective_params": {"seed": 1}} if extra else {}
    short, general = (writer(kind, fields, extras, n=2) for _ in range(2))
    general._around = None
    for number, index, text in pieces:
        found = short.events(number, delta(index, text))
        assert found == general.events(number, delta(index, text))
        for event in found.split("\n\n")[:-1]:
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            assert choice["finish_reason"] is None
            assert text == choice.get("text", choice.get("delta", {}).get("content")) or "role" in choice["delta"]
    assert short.events(0, delta(0, "end", "stop")) == general.events(0, delta(0, "end", "stop"))
    assert short.usage_event() == general.usage_event()


@pytest.mark.parametrize(
    "fields",
    [{"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, {"return_token_ids": True}],
)
def test_events_that_tell_more_than_text_are_made_the_general_way(fields: dict[str, Any]) -> None:
    made = writer(CompletionRequest, {"prompt": "x"} | fields, {})
    events = made.events(0, delta(0, "a")) + made.events(0, delta(0, "b"))
    last = json.loads(events.split("\n\n")[-2].removeprefix("data: "))
    if "return_token_ids" in fields:
        assert last["choices"][0]["token_ids"] == [7]
    else:
        assert last["usage"]["completion_tokens"] == 2
