"""When streams get their tokens: several decodes at a time if that is quick, and nothing that nobody can take yet."""

import asyncio
import dataclasses
import gc
import itertools
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_model import Engine, make_sequence

from jaxserve import AsyncLLMEngine, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from jaxserve.batch import Bucket, Limits, SlotTable, pack, unpack
from jaxserve.engine.pace import STREAM_SECONDS, Pace, StreamRules, well_filled
from jaxserve.engine.runner import programs_of
from jaxserve.types import RequestOutput, Work

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


class Steady(Pace):
    """Has its mind made up."""

    rules = None

    def __init__(self, rules: StreamRules):
        super().__init__(1)
        self.rules = rules


def decodes(pace: Pace, clock: Clock, seconds: float, count: int, each: int = 1) -> None:
    for _ in range(count):
        clock.after(seconds * each)
        pace.step(each, 4, waited=seconds * each)


@pytest.mark.parametrize(("seconds", "quick"), [(0.001, True), (STREAM_SECONDS / 8 * 1.1, False)])
def test_the_pace_decides_whether_streams_wait(seconds: float, quick: bool) -> None:
    clock = Clock()
    pace = Pace(8, clock)
    pace.step(1, 4)
    assert pace.rules.decodes == 1  # nothing is known yet
    decodes(pace, clock, seconds, 1)
    assert pace.rules.decodes == (8 if quick else 1)
    decodes(pace, clock, seconds, 3, each=8)
    assert pace.rules.decodes == (8 if quick else 1)


def test_the_pace_follows_a_growing_crowd_and_back() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    decodes(pace, clock, 0.001, 5)
    decodes(pace, clock, 0.02, 20)
    assert pace.rules.decodes == 1
    decodes(pace, clock, 0.001, 30)
    assert pace.rules.decodes == 8


@pytest.mark.parametrize(
    ("seconds", "host", "several"),
    [
        (0.010, 0.004, 1),  # hidden behind one decode
        (0.010, 0.007, 2),
        (0.010, 0.010, 2),  # all the time
        (0.006, 0.006, 2),
        (0.006, 0.007, 3),
        (0.006, 0.029, 5),  # as many as streams bear
        (0.006, 0.050, 8),  # for which they wait anyway
        (0.003, 0.000, 8),  # a program of its own
        (0.031, 0.000, 1),
        (0.031, 0.031, 2),  # the device may have been done long before
    ],
)
def test_several_decodes_hide_the_work_of_the_host(seconds: float, host: float, several: int) -> None:
    clock = Clock()
    pace = Pace(8, clock)
    for _ in range(60):
        clock.after(max(seconds, host))
        pace.step(1, 4, waited=max(0.0, seconds - host))
    pace._seconds = seconds  # in the steady state, the device is what launches of several take
    assert pace.rules.decodes == several
    assert Pace(1, clock).rules.decodes == 1


def test_the_host_hides_behind_its_own_launches() -> None:
    """From launches of one, which the host bounds, to those in which it has half of the time."""
    clock = Clock()
    pace = Pace(8, clock)
    device = 0.005
    for host, expected in ((0.008, {4}), (0.020, {5, 6}), (0.002, {1}), (0.029, {5, 6, 7})):
        for _ in range(100):
            several = pace.rules.decodes
            clock.after(max(device * several, host))
            pace.step(several, 4, waited=max(0.0, device * several - host))
        assert pace.rules.decodes in expected


@pytest.mark.parametrize(
    ("wanted", "rows", "free", "most"),
    [
        (1024, 100, 0, 1024),
        (1100, 100, 0, 1024),  # 2,048 would be half empty
        (1900, 100, 0, 2048),  # it is as good as full
        (1100, 500, 12, 1024),
        (1100, 500, 16, 2048),  # all of these take a program of 2,048
        (400, 10, 5, 512),  # smaller programs are not much quicker
        (700, 10, 5, 512),
        (100_000, 10, 5, 65536),
        (0, 0, 0, 1),
    ],
)
def test_steps_beside_others_fill_their_program(wanted: int, rows: int, free: int, most: int) -> None:
    assert well_filled(wanted, rows, free) == most


def test_prompts_wait_rather_than_run_in_an_empty_program() -> None:
    """1,100 tokens beside decodes, of which 1,024 are a program's."""
    sizes = {"num_pages": 900, "max_num_seqs": 8, "max_num_batched_tokens": 4096, "max_model_len": 1200}
    engine = Engine(caching=False, **sizes)
    engine.add(make_sequence([2, 3, 4], max_tokens=9, name="first", stops=False))
    engine.step()
    for name in "ab":
        engine.add(make_sequence(list(range(2, 552)), max_tokens=9, name=name, stops=False))
    steps = [work.total_tokens for _ in range(3) if (work := engine.step()) is not None]
    assert steps == [1024, 79, 3]
    engine.drain()
    engine.add(make_sequence(list(range(2, 1102)), max_tokens=9, name="alone", stops=False))
    work = engine.step()
    assert work is not None
    assert work.total_tokens == 1100  # nobody else would make use of a step more
    engine.drain()


def test_prompts_and_pauses_say_nothing_of_decodes() -> None:
    clock = Clock()
    pace = Pace(8, clock)
    decodes(pace, clock, 0.001, 3)
    clock.after(5)
    pace.step(0, 4096)  # a step with prompts
    pace.pause()
    clock.after(5)
    pace.step(1, 4)  # the first after a pause
    assert pace.rules.decodes == 8


def prompts(pace: Pace, clock: Clock, seconds: float, tokens: int, count: int = 1) -> None:
    for _ in range(count):
        clock.after(seconds)
        pace.step(0, tokens, waited=seconds)


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
        first = engine.add(make_sequence(list(range(2, 342)), max_tokens=50, name="first", stops=False))
        first.streams = streams
        assert engine.launch().total_tokens == 340  # alone it spares nobody
        for name in "abc":
            engine.add(make_sequence(list(range(2, 342)), max_tokens=20, name=name))
        engine.commit()
        steps = []
        while (work := engine.launch()) is not None or engine.in_flight:
            steps += [work.total_tokens] if work is not None else []
            engine.commit()
        assert max(steps) == (64 if streams else 1021)
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


@pytest.mark.parametrize("copies", [1, 2])
def test_streams_of_several_decodes_at_a_time(tiny_model: Path, compilation_cache: str, copies: int) -> None:
    """Five of them are one program, three are a program three times."""
    options = {"decode_steps": 5, "data_parallel_size": copies, "num_gpu_blocks_override": 26}  # pages are used again
    engine = LLMEngine.from_engine_args(args(tiny_model, compilation_cache, **options))
    kinds = (DELTA, dataclasses.replace(DELTA, temperature=1.0, seed=3, repetition_penalty=1.3))
    found = {}
    for name, several in (("one", 1), ("three", 3), ("five", 5)):
        engine._pace = Steady(StreamRules(decodes=several))
        for i, (prompt, params) in enumerate(itertools.product(PROMPTS, kinds)):
            engine.add_request(str(i), prompt, dataclasses.replace(params, max_tokens=12 + i))
        outputs = run(engine)
        found[name] = [[o.outputs[0].token_ids for o in outputs if o.request_id == str(i)] for i in range(6)]
    joined = {name: [flat(pieces) for pieces in streams] for name, streams in found.items()}
    assert joined["one"] == joined["three"] == joined["five"]
    assert [len(ids) for ids in joined["one"]] == [12 + i for i in range(6)]
    most = {name: max(len(piece) for stream in streams for piece in stream) for name, streams in found.items()}
    assert most == {"one": 1, "three": 3, "five": 5}
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


def test_a_decode_past_the_end_of_a_row_is_written_nowhere() -> None:
    """Of three decodes, the second row has pages for one."""
    limits = Limits(max_num_seqs=2, pages_per_seq=3, page_size=4, num_pages=9, max_logprobs=1)
    long, short = (make_sequence(list(range(2, 2 + length)), max_tokens=5, stops=False) for length in (5, 7))
    long.pages, short.pages = [5, 6], [7, 8]
    for slot, sequence in enumerate((long, short)):
        sequence.slot, sequence.num_computed = slot, sequence.num_tokens - 1
    starts, ones = np.array([4, 7], np.int32), np.ones(2, np.int32)
    table = np.array([[5, 6, 0], [7, 8, 0]], np.int32)
    work = Work([long, short], np.arange(2, dtype=np.int32), starts, ones, ones > 0, table, steps=3)
    bucket = Bucket(2, 2)
    (parts,) = zip(*programs_of([work], bucket), strict=True)
    slots = SlotTable(2)
    slots.update(work.sequences)
    batches = [unpack(jnp.asarray(pack(part, bucket, limits, slots, [])), bucket, limits) for part in parts]
    places = [(batch.chunks.pages.tolist(), batch.chunks.offsets.tolist()) for batch in batches]
    assert places == [([6, 8], [0, 3]), ([6, 9], [1, 0]), ([6, 9], [2, 1])]
    assert [batch.token_ids.tolist() for batch in batches] == [[6, -1], [-1, -1], [-1, -1]]
    assert [batch.chunks.kv_lens.tolist() for batch in batches] == [[5, 8], [6, 9], [7, 10]]
