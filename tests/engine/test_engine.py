"""The whole engine on a tiny random model: results must not depend on how the work was scheduled."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, AsyncLLMEngine, EngineArgs, EngineDeadError, LLMEngine, RequestOutputKind, SamplingParams
from jaxserve.engine.metrics import Counter, Histogram, Metric
from jaxserve.engine.results import Results
from jaxserve.engine.runner import InFlight
from jaxserve.types import RequestOutput, Work

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [np.random.default_rng(n).integers(1, 90, 3 + 5 * n).tolist() for n in range(8)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
RANDOM = SamplingParams(temperature=0.9, top_p=0.9, top_k=20, seed=5, max_tokens=12, ignore_eos=True, detokenize=False)


def build(model: Path, cache: str, **options: object) -> LLM:
    defaults = {
        "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 96, "max_num_seqs": 4,
        "max_num_batched_tokens": 64, "block_size": 4, "compilation_cache_dir": cache, "warmup": "none",
    }  # fmt: skip
    return LLM(str(model), **(defaults | options))


# Compiling is most of the time of these tests: engines that share their sizes share their programs.
CRAMPED = {"max_num_batched_tokens": 16, "num_gpu_blocks_override": 26}  # chunks; too few pages for four: preemption


@pytest.fixture(scope="module")
def llm(quick_compilation: None, tiny_model: Path, compilation_cache: str) -> LLM:
    """Its first requests make the programs that cover what follows: greedy ones, then those for the rest."""
    llm = build(tiny_model, compilation_cache)
    for params in (GREEDY, dataclasses.replace(RANDOM, prompt_logprobs=1)):
        llm.generate(PROMPTS[3:7], params, use_tqdm=False)
    return llm


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def count(metrics: list[Metric], name: str) -> int | float:
    return next(metric.value for metric in metrics if isinstance(metric, Counter) and metric.name == f"jaxserve:{name}")


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[str, list]:
    """Every prompt by itself, without any sharing: what all schedules must reproduce."""
    results = {}
    for name, params in {"greedy": GREEDY, "random": RANDOM}.items():
        results[name] = []
        for prompt in PROMPTS:
            llm.reset_prefix_cache()
            results[name] += tokens(llm.generate([prompt], params, use_tqdm=False))
    return results


@pytest.mark.parametrize("name", ["greedy", "random"])
def test_batched_equals_alone_in_any_order(llm: LLM, alone: dict[str, list], name: str) -> None:
    params = {"greedy": GREEDY, "random": RANDOM}[name]
    assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == alone[name]
    assert tokens(llm.generate(PROMPTS[::-1], params, use_tqdm=False))[::-1] == alone[name]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"long_prefill_token_threshold": 5},
        {"enable_prefix_caching": False},
        {"scheduling_policy": "priority"},
        {"decode_steps": 5},
        {"max_num_seqs": 2, "num_gpu_blocks_override": None, "decode_steps": 4},
    ],
    ids=["chunks_preemption", "threshold", "no_sharing", "priority", "steps_preemption", "few_slots_steps"],
)
def test_scheduling_does_not_change_results(
    tiny_model: Path, compilation_cache: str, alone: dict[str, list], options: dict
) -> None:
    llm = build(tiny_model, compilation_cache, **(CRAMPED | options))
    mixed = [dataclasses.replace(RANDOM) if i % 2 else GREEDY for i in range(len(PROMPTS))]
    expected = [alone["random" if i % 2 else "greedy"][i] for i in range(len(PROMPTS))]
    assert tokens(llm.generate(PROMPTS, mixed, use_tqdm=False)) == expected
    if "num_gpu_blocks_override" not in options:
        assert count(llm.get_metrics(), "num_preemptions") > 0
    llm.llm_engine.scheduler.check_integrity()
    assert llm.reset_prefix_cache()
    llm.close()


def test_prefix_cache_gives_the_same_tokens(llm: LLM, alone: dict[str, list]) -> None:
    llm.reset_prefix_cache()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(outputs) == alone["greedy"]
    assert [output.num_cached_tokens for output in outputs] == [(len(prompt) - 1) // 4 * 4 for prompt in PROMPTS]
    salted = [{"prompt_token_ids": prompt, "cache_salt": "other"} for prompt in PROMPTS]
    assert all(output.num_cached_tokens == 0 for output in llm.generate(salted, GREEDY, use_tqdm=False))


def test_n_continuations_are_those_of_consecutive_seeds(llm: LLM) -> None:
    together = llm.generate([PROMPTS[3]], dataclasses.replace(RANDOM, n=3), use_tqdm=False)[0]
    single = [
        llm.generate([PROMPTS[3]], dataclasses.replace(RANDOM, seed=5 + i), use_tqdm=False)[0].outputs[0].token_ids
        for i in range(3)
    ]
    assert [completion.token_ids for completion in together.outputs] == single
    assert [completion.index for completion in together.outputs] == [0, 1, 2]
    assert len({tuple(ids) for ids in single}) > 1


def test_logprobs_are_consistent(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, logprobs=4, prompt_logprobs=2)
    output = llm.generate([PROMPTS[5]], params, use_tqdm=False)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) == 12
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry[token].rank == 1
        assert len(entry) == 4
        values = [logprob.logprob for logprob in entry.values()]
        assert values == sorted(values, reverse=True)
    chosen = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))

    # The same tokens as a prompt get the same log-probabilities, however the prompt is cut into chunks.
    whole = PROMPTS[5] + completion.token_ids
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompt_logprobs = llm.generate([whole], params, use_tqdm=False)[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert prompt_logprobs[0] is None
    assert len(prompt_logprobs) == len(whole)
    again = [entry[t].logprob for t, entry in zip(whole[1:], prompt_logprobs[1:], strict=True)]
    np.testing.assert_allclose(again[-12:], chosen, atol=1e-4)


@pytest.fixture(scope="module")
def processed(tiny_model: Path, compilation_cache: str) -> LLM:
    return build(tiny_model, compilation_cache, max_logprobs=-1, logprobs_mode="processed_logprobs")


def test_whole_vocabulary_logprobs(processed: LLM) -> None:
    params = SamplingParams(max_tokens=2, logprobs=-1, temperature=0.0, ignore_eos=True, detokenize=False)
    entries = processed.generate([PROMPTS[1]], params, use_tqdm=False)[0].outputs[0].logprobs or []
    assert len(entries) == 2
    for entry in entries:
        assert set(entry) == set(range(96))
        assert np.exp([logprob.logprob for logprob in entry.values()]).sum() == pytest.approx(1, abs=1e-4)


def test_processed_logprobs_show_the_mask(processed: LLM) -> None:
    params = dataclasses.replace(RANDOM, logprobs=2, allowed_token_ids=[7], temperature=0.5)
    completion = processed.generate([PROMPTS[1]], params, use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == [7] * 12
    assert completion.cumulative_logprob == pytest.approx(0.0, abs=1e-5)


def test_constraints_hold_over_a_whole_generation(llm: LLM) -> None:
    free = llm.generate([PROMPTS[4]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    first, last = free[0], free[-1]
    banned = dataclasses.replace(GREEDY, logit_bias={first: -1e9})
    assert first not in llm.generate([PROMPTS[4]], banned, use_tqdm=False)[0].outputs[0].token_ids
    stopping = dataclasses.replace(GREEDY, stop_token_ids=[last])
    stopped = llm.generate([PROMPTS[4]], stopping, use_tqdm=False)[0].outputs[0]
    assert stopped.token_ids == free[: free.index(last) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", last)
    waiting = llm.generate([PROMPTS[4]], dataclasses.replace(stopping, min_tokens=12), use_tqdm=False)[0].outputs[0]
    assert last not in waiting.token_ids[:-1]
    assert len(waiting.token_ids) == 12
    no_repeat = dataclasses.replace(GREEDY, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1e6)
    ids = llm.generate([PROMPTS[4]], no_repeat, use_tqdm=False)[0].outputs[0].token_ids
    assert len(set(ids)) == len(ids)


def test_end_of_sequence_and_length(tiny_model: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logit_bias={95: 1e4}, detokenize=False)
    output = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([95], "stop", None)
    long = llm.generate([PROMPTS[7]], dataclasses.replace(GREEDY, max_tokens=None), use_tqdm=False)[0].outputs[0]
    assert len(long.token_ids) == 96 - len(PROMPTS[7])
    assert long.finish_reason == "length"


def test_repetition_detection_ends_a_loop(llm: LLM) -> None:
    from jaxserve.sampling_params import RepetitionDetectionParams

    rule = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=3)
    params = dataclasses.replace(GREEDY, allowed_token_ids=[8], max_tokens=20, repetition_detection=rule)
    output = llm.generate([PROMPTS[2]], params, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == ([8, 8, 8], "repetition")


def test_a_bad_prompt_harms_nobody(llm: LLM, alone: dict[str, list]) -> None:
    bad: list = [[], [1, -5], [96], list(range(1, 90)) * 2, [1.5], {"nothing": 1}, ["a"]]
    prompts = [PROMPTS[0], *bad, PROMPTS[1]]
    outputs = llm.generate(prompts, GREEDY, on_error="return", use_tqdm=False)
    assert tokens([outputs[0], outputs[-1]]) == alone["greedy"][:2]
    for output in outputs[1:-1]:
        assert output.finished
        assert output.error
        assert output.outputs[0].finish_reason == "error"
    with pytest.raises((TypeError, ValueError)):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.llm_engine.get_num_unfinished_requests() == 0  # found before anything was queued


def test_params_are_not_changed_and_lists_must_fit(llm: LLM) -> None:
    params = dataclasses.replace(GREEDY, stop_token_ids=[3])
    before = dataclasses.asdict(params)
    llm.generate([PROMPTS[0]], params, use_tqdm=False)
    assert dataclasses.asdict(params) == before
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate([PROMPTS[0]], [params, params], use_tqdm=False)
    with pytest.raises(TypeError, match="sampling_params"):
        llm.generate([PROMPTS[0]], {"n": 1}, use_tqdm=False)  # type: ignore[arg-type]


def test_enqueue_then_wait(llm: LLM, alone: dict[str, list]) -> None:
    first = llm.enqueue(PROMPTS[:2], GREEDY)
    second = llm.enqueue(PROMPTS[2], GREEDY)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == first + second
    assert tokens(outputs) == alone["greedy"][:3]


def test_too_little_memory_names_the_numbers(tiny_model: Path, compilation_cache: str) -> None:
    with pytest.raises(ValueError, match=r"room for 3 pages of 4 tokens \(12 tokens\).*max_model_len=96"):
        build(tiny_model, compilation_cache, num_gpu_blocks_override=3)


def test_full_warmup_leaves_nothing_to_compile(tiny_model: Path, compilation_cache: str) -> None:
    llm = build(tiny_model, compilation_cache, warmup="full", max_num_seqs=2, max_num_batched_tokens=16)
    compiled = count(llm.get_metrics(), "compilations")
    llm.generate(PROMPTS, [GREEDY, RANDOM] * 4, use_tqdm=False)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert count(llm.get_metrics(), "compilations") == compiled
    assert count(llm.get_metrics(), "compilations_after_warmup") == 0
    llm.generate(PROMPTS[0], dataclasses.replace(GREEDY, prompt_logprobs=1), use_tqdm=False)
    assert count(llm.get_metrics(), "compilations_after_warmup") == 1
    llm.close()


def test_each_choice_of_a_kernel_is_logged_once(
    tiny_model: Path, compilation_cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    choices = logging.getLogger("pallas_kernels.dispatch")
    for one in list(choices.filters):  # what engines of other tests have said
        choices.removeFilter(one)
    jax.clear_caches()
    with caplog.at_level(logging.INFO, "pallas_kernels.dispatch"):
        llm = build(tiny_model, compilation_cache, **CRAMPED)
        for prompts in (PROMPTS[3:7], PROMPTS[:1]):
            llm.generate(prompts, RANDOM, use_tqdm=False)
    assert len(caplog.messages) == len(set(caplog.messages))
    assert {message.partition(":")[0] for message in caplog.messages} >= {"paged_attention"}
    llm.close()


def test_without_statistics_none_are_collected(tiny_model: Path, compilation_cache: str, alone: dict) -> None:
    llm = build(tiny_model, compilation_cache, disable_log_stats=True)
    outputs = llm.generate(PROMPTS[3:7], GREEDY, use_tqdm=False)
    assert tokens(outputs) == alone["greedy"][3:7]
    assert [output.metrics for output in outputs] == [None] * 4
    assert llm.llm_engine._metrics is None
    with pytest.raises(ValueError, match="disable_log_stats"):
        llm.get_metrics()
    llm.close()


def test_statistics_of_a_request(llm: LLM) -> None:
    before = {metric.name: metric for metric in llm.get_metrics()}
    outputs = llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    after = {metric.name: metric for metric in llm.get_metrics()}
    for output in outputs:
        times = output.metrics
        assert times is not None
        assert times.num_generation_tokens == len(output.outputs[0].token_ids) == 12
        assert 0 < times.queued_ts <= times.scheduled_ts <= times.first_token_ts <= times.last_token_ts

    def grown(name: str) -> int:
        old, new = (metrics[f"jaxserve:{name}"] for metrics in (before, after))
        assert isinstance(old, Histogram)
        assert isinstance(new, Histogram)
        return new.count - old.count

    assert grown("time_to_first_token_seconds") == grown("e2e_request_latency_seconds") == 3
    assert grown("inter_token_latency_seconds") == 3 * 11


def test_a_lazy_warmup_serves_with_few_programs_and_makes_nobody_wait(
    tiny_model: Path, compilation_cache: str, alone: dict[str, list]
) -> None:
    llm = build(tiny_model, compilation_cache, warmup="lazy", max_num_seqs=2, max_num_batched_tokens=16)
    assert count(llm.get_metrics(), "compilations") >= 2  # the others follow beside the requests
    mixed = [RANDOM if i % 2 else GREEDY for i in range(len(PROMPTS))]
    expected = [alone["random" if i % 2 else "greedy"][i] for i in range(len(PROMPTS))]
    assert tokens(llm.generate(PROMPTS, mixed, use_tqdm=False)) == expected
    assert count(llm.get_metrics(), "compilations_after_warmup") == 0
    llm.close()


def test_waiting_for_the_device_is_counted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original, slept = InFlight.results, []

    def slow(self: InFlight) -> Iterator[tuple[Work, Results]]:
        slept.append(time.sleep(0.02))
        return original(self)

    monkeypatch.setattr(InFlight, "results", slow)
    before = count(llm.get_metrics(), "device_wait_seconds")
    began = time.monotonic()
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    waited = count(llm.get_metrics(), "device_wait_seconds") - before
    assert 0.02 * len(slept) <= waited <= time.monotonic() - began


def engine_of(llm: LLM) -> LLMEngine:
    return llm.llm_engine


def test_step_api_streams_deltas_and_aborts(llm: LLM, alone: dict[str, list]) -> None:
    engine = engine_of(llm)
    delta = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.DELTA)
    engine.add_request("a", PROMPTS[0], delta)
    engine.add_request("b", PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=80))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("a", PROMPTS[0], delta)
    got: list[int] = []
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
            if output.request_id == "a":
                got += output.outputs[0].token_ids
            elif len(output.outputs[0].token_ids) == 5:
                last["b"] = engine.abort_request("b")[0]
    assert got == alone["greedy"][0][0]
    assert last["a"].finished
    assert last["b"].outputs[0].finish_reason == "abort"
    assert len(last["b"].outputs[0].token_ids) == 5
    assert engine.get_num_unfinished_requests() == 0
    engine.scheduler.check_integrity()


def test_async_generation_cancellation_and_shutdown(
    tiny_model: Path, compilation_cache: str, alone: dict[str, list]
) -> None:
    args = EngineArgs(
        str(tiny_model), load_format="dummy", skip_tokenizer_init=True, max_model_len=96, max_num_seqs=4,
        max_num_batched_tokens=64, block_size=4, compilation_cache_dir=compilation_cache, warmup="none",
    )  # fmt: skip
    engine = AsyncLLMEngine.from_engine_args(args)

    async def collect(prompt: list[int], request_id: str) -> list[int]:
        last = None
        async for output in engine.generate(prompt, GREEDY, request_id):
            last = output
        assert last is not None
        return last.outputs[0].token_ids

    async def cancelled() -> int:
        seen = 0
        endless = dataclasses.replace(GREEDY, max_tokens=None)
        async for output in engine.generate(PROMPTS[0], endless, "cancelled"):
            seen = len(output.outputs[0].token_ids)
            if seen == 3:
                break
        return seen

    async def main() -> None:
        results = await asyncio.gather(*(collect(prompt, str(i)) for i, prompt in enumerate(PROMPTS)), cancelled())
        assert [[ids] for ids in results[:-1]] == alone["greedy"]
        with pytest.raises((TypeError, ValueError)):
            await collect([-1], "bad")
        waiting = asyncio.create_task(collect(PROMPTS[0], "cut"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for _ in range(200):
            if not await engine.call(LLMEngine.has_unfinished_requests):
                break
            await asyncio.sleep(0.05)
        assert await engine.call(LLMEngine.get_num_unfinished_requests) == 0

    asyncio.run(main())
    engine.shutdown()

    async def too_late() -> None:
        with pytest.raises(EngineDeadError):
            await collect(PROMPTS[0], "late")

    asyncio.run(too_late())
