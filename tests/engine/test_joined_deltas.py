"""Deltas that waited for a slow caller reach it as one, and nothing of them is lost."""

import asyncio
import functools
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.async_engine import _joined, _Stream
from jaxserve.engine.errors import EngineDeadError
from jaxserve.types import CompletionOutput, Logprob, RequestOutput

PIECE = st.tuples(st.integers(0, 2), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3))


def delta(pieces: list[tuple[int, str, list[int]]], *, finished: bool, logprobs: bool) -> RequestOutput:
    made = {}
    for index, text, ids in pieces:
        found = [{i: Logprob(-1.0, 1, str(i))} for i in ids] if logprobs else None
        reason = "stop" if finished else None
        made[index] = CompletionOutput(index, text, ids, logprobs=found, finish_reason=reason)
    return RequestOutput("r", None, [1], list(made.values()), finished=finished)


@given(st.lists(st.lists(PIECE, max_size=3), min_size=1, max_size=6), st.booleans())
def test_texts_ids_and_logprobs_follow_each_other(steps: list, logprobs: bool) -> None:
    deltas = [delta(step, finished=i == len(steps) - 1, logprobs=logprobs) for i, step in enumerate(steps)]
    texts, ids = defaultdict(str), defaultdict(list)
    for output in deltas:
        for completion in output.outputs:
            texts[completion.index] += completion.text
            ids[completion.index] += completion.token_ids
    whole = functools.reduce(RequestOutput.followed_by, deltas)
    assert whole.finished
    assert {c.index: c.text for c in whole.outputs} == texts
    assert {c.index: c.token_ids for c in whole.outputs} == ids
    for completion in whole.outputs:
        found = completion.logprobs
        assert found is None if not logprobs else [next(iter(p)) for p in found or []] == completion.token_ids


def test_an_error_comes_after_what_came_before_it() -> None:
    async def main() -> list:
        stream = _Stream(asyncio.get_running_loop(), lambda: None)
        for item in (delta([(0, "a", [1])], finished=False, logprobs=False),
                     delta([(0, "b", [2])], finished=False, logprobs=False), EngineDeadError("gone")):  # fmt: skip
            stream.put([item])
        return _joined(await stream.take())

    text, error = asyncio.run(main())
    assert text.outputs[0].text == "ab"
    assert isinstance(error, EngineDeadError)


def test_who_waits_is_woken_once_and_others_are_told_of() -> None:
    async def main() -> tuple[list, int]:
        asked = []
        stream = _Stream(asyncio.get_running_loop(), lambda: asked.append(1))
        waiting = asyncio.create_task(stream.take())
        await asyncio.sleep(0)
        stream.put([1])
        stream.put([2])
        first = await waiting
        stream.put([3])
        return [first, await stream.take()], len(asked)

    assert asyncio.run(main()) == ([[1, 2], [3]], 1)
