"""When streams get their tokens: several decodes at a time if that is quick, and nothing that nobody can take yet."""

import asyncio
import dataclasses
import gc
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scheduler_model import Engine, make_sequence

from jaxserve import AsyncLLMEngine, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from jaxserve.engine.pace import STREAM_SECONDS, Pace, StreamRules
from jaxserve.types import RequestOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [np.random.default_rng(n).integers(1, 90, 3 + 5 * n).tolist() for n in range(3)]
DELTA = SamplingParams(
    temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
)


class Clock:
    """Goes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def decodes(pace: Pace, clock: Clock, seconds: float, count: int, each: int = 1) -> None:
    for _ in range(count):
        clock.after(seconds * each)
        pace.step(each, 4)


@pytest.mark.parametrize(("seconds", "quick"), [(0.001, True), (STREAM_SECONDS / 8 * 1.1, False)])
def test_the_pace_decides_whether_streams_wait(seconds: float, quick: bool) -> None:
    clock = Clock()
    pace = Pace(8, clock)
    pace.step(1, 4)
    assert not pace.rules.wait  # nothing is known yet
    decodes(pace, clock, seconds, 1)
    assert pace.rules.wait is quick
    decodes(pace, clock, seconds, 3, each=8)
    assert pace.rules.wait is quick


def test_the_pace_follows_a_growing_crowd_and_back() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    decodes(pace, clock, 0.001, 5)
    decodes(pace, clock, 0.02, 20)
    assert not pace.rules.wait
    decodes(pace, clock, 0.001, 30)
    assert pace.rules.wait


def test_prompts_and_pauses_say_nothing_of_decodes() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    decodes(pace, clock, 0.001, 3)
    clock.after(5)
    pace.step(0, 4096)  # a step with prompts
    pace.pause()
    clock.after(5)
    pace.step(1, 4)  # the first after a pause
    assert pace.rules.wait


def prompts(pace: Pace, clock: Clock, seconds: float, tokens: int, count: int = 1) -> None:
    for _ in range(count):
        clock.after(seconds)
        pace.step(0, tokens)


def test_prompts_beside_streams_take_about_as_long_as_decodes() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    decodes(pace, clock, 0.02, 3)
    assert pace.rules.most_tokens is None  # nothing is known of prompts yet
    prompts(pace, clock, 0.05, 64)  # so few take as long as a decode: that says nothing
    assert pace.rules.most_tokens is None
    prompts(pace, clock, 0.4, 16384)  # 41 tokens a millisecond; two decodes take 40
    assert pace.rules.most_tokens == 1024
    decodes(pace, clock, 0.04, 40)
    assert pace.rules.most_tokens == 2048
    decodes(pace, clock, 0.001, 60)  # launched eight at a time: 16 ms
    assert pace.rules.most_tokens == 512
    prompts(pace, clock, 0.5, 512, 40)  # never fewer than that, however slow
    assert pace.rules.most_tokens == 512


@pytest.mark.parametrize(
    ("rules", "rows", "free", "budget"),
    [
        (StreamRules(), 500, 12, 8192),
        (StreamRules(most_tokens=1024), 10, 502, 1024),
        (StreamRules(most_tokens=1024), 510, 514, 2048),  # the smallest program with room for a few more sequences
        (StreamRules(most_tokens=1024), 510, 2, 1024),  # which there are not
        (StreamRules(most_tokens=16384), 510, 2, 8192),
    ],
)
def test_the_budget_of_a_step_beside_streams(rules: StreamRules, rows: int, free: int, budget: int) -> None:
    assert rules.budget(8192, rows, free) == budget


def test_streams_are_spared_large_steps_and_others_are_not() -> None:
    """Prompts arrive beside a sequence that decodes: piece by piece if it streams, all at once if it does not."""
    for streams in (True, False):
        sizes = {"num_pages": 400, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "max_model_len": 400}
        engine = Engine(rules=StreamRules(most_tokens=64), caching=False, **sizes)
        first = engine.add(make_sequence(list(range(2, 302)), max_tokens=50, name="first", stops=False))
        first.streams = streams
        assert engine.launch().total_tokens == 300  # alone it spares nobody
        for name in "abc":
            engine.add(make_sequence(list(range(2, 302)), max_tokens=20, name=name))
        engine.commit()
        steps = []
        while (work := engine.launch()) is not None or engine.in_flight:
            steps += [work.total_tokens] if work is not None else []
            engine.commit()
        assert max(steps) == (64 if streams else 901)
        engine.check_end()


def args(model: Path, cache: str, **options: object) -> EngineArgs:
    return EngineArgs(
        str(model), load_format="dummy", skip_tokenizer_init=True, max_model_len=96, max_num_seqs=4,
        max_num_batched_tokens=64, block_size=4, compilation_cache_dir=cache, warmup="none", **options,
    )  # fmt: skip


def flat(pieces: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


def run(engine: LLMEngine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_streams_of_several_decodes_at_a_time(tiny_model: Path, compilation_cache: str) -> None:
    engine = LLMEngine.from_engine_args(args(tiny_model, compilation_cache, decode_steps=5))
    found = {}
    for name, seconds in (("slow", 1.0), ("quick", 0.0)):
        engine._pace = Pace(5, clock := Clock())
        decodes(engine._pace, clock, seconds, 2)
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, DELTA)
        outputs = run(engine)
        found[name] = [[o.outputs[0].token_ids for o in outputs if o.request_id == str(i)] for i in range(len(PROMPTS))]
    joined = {name: [flat(pieces) for pieces in streams] for name, streams in found.items()}
    assert joined["slow"] == joined["quick"]
    assert all(len(piece) == 1 for stream in found["slow"] for piece in stream)
    assert any(len(piece) == 5 for stream in found["quick"] for piece in stream)
    engine.scheduler.check_integrity()
    engine.close()


def test_a_busy_caller_gets_its_tokens_together(tiny_model: Path, compilation_cache: str) -> None:
    engine = LLMEngine.from_engine_args(args(tiny_model, compilation_cache))
    engine.add_request("whole", PROMPTS[1], DELTA)
    alone = flat(output.outputs[0].token_ids for output in run(engine))
    state = {"ready": True}
    engine.add_request("busy", PROMPTS[1], DELTA, ready=lambda: state["ready"])
    engine.add_request("other", PROMPTS[2], DELTA)
    got: dict[str, list[list[int]]] = {"busy": [], "other": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            got[output.request_id].append(output.outputs[0].token_ids)
        state["ready"] = len(got["other"]) not in range(2, 7)
    assert [len(piece) for piece in got["other"]] == [1] * 12
    assert max(len(piece) for piece in got["busy"]) > 3  # those of the steps in which it was busy
    assert flat(got["busy"]) == alone
    assert not engine._outputs._owed
    engine.close()


def test_the_end_of_a_stream_does_not_wait(tiny_model: Path, compilation_cache: str) -> None:
    engine = LLMEngine.from_engine_args(args(tiny_model, compilation_cache))
    engine.add_request("never", PROMPTS[0], DELTA, ready=lambda: False)
    (output,) = run(engine)
    assert output.finished
    assert len(output.outputs[0].token_ids) == 12
    assert not engine._outputs._owed
    engine.close()


def test_requests_leave_nothing_to_the_garbage_collector(tiny_model: Path, compilation_cache: str) -> None:
    engine = LLMEngine.from_engine_args(args(tiny_model, compilation_cache))
    kinds = (DELTA, dataclasses.replace(DELTA, n=2, seed=1, temperature=1.0), dataclasses.replace(DELTA, logprobs=2))
    gc.collect()
    gc.disable()
    try:
        for name, params in enumerate(kinds):
            engine.add_request(str(name), PROMPTS[1], params)
        engine.add_request("aborted", PROMPTS[2], DELTA)
        engine.step()
        engine.abort_request("aborted")
        run(engine)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [found for found in gc.garbage if type(found).__module__.startswith("jaxserve")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    engine.close()


def test_slow_and_quick_callers_get_the_same(tiny_model: Path, compilation_cache: str) -> None:
    engine = AsyncLLMEngine.from_engine_args(args(tiny_model, compilation_cache))

    async def stream(name: str, seconds: float) -> tuple[int, list[int]]:
        ids, pieces = [], 0
        async for output in engine.generate(PROMPTS[2], DELTA, name):
            ids += output.outputs[0].token_ids
            pieces += 1
            await asyncio.sleep(seconds)
        return pieces, ids

    async def main() -> None:
        quick = await stream("quick", 0)
        slow = await stream("slow", 0.5)
        assert slow[1] == quick[1]
        assert slow[0] <= 4  # the first, what came while it slept, and perhaps the last apart

    asyncio.run(main())
    engine.shutdown()
