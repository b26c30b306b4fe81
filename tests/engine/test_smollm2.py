"""The embedded model end to end against what transformers generates (float32, greedy), in a process of its own.

Goldens: transformers 5.17 on the same weights, dequantised to float32; see the file's own header.
"""

import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.metrics import Counter
from jaxserve.types import RequestOutput

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "smollm2_greedy.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
PROMPTS = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
TOLERANCE = 2e-3  # of a log-probability


def greedy(max_tokens: int = 64, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


class Model(LLM):
    """What the tests ask for, by calls alone."""

    def check_integrity(self) -> None:
        self.llm_engine.scheduler.check_integrity()


class Process(BaseManager):
    """Where the engine is; calls of its methods go there, and their results come back."""


Process.register("Model", Model)


@pytest.fixture(scope="module")
def process(processes_of_users: None) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        # Users' programs but for the effort of choosing instructions: as fast, and made in half the time.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=1")
        with Process(ctx=multiprocessing.get_context("spawn")) as process:
            yield process


@pytest.fixture(scope="module")
def llm(process: Any, smollm2_path: Path, compilation_cache: str) -> Model:
    """Thirty-two tokens a step cut prompts, and the pages are too few for four long sequences.

    Compiling is most of the time here. The first prompts need all that a step can do, so the two programs made for
    them (one for prompts, one for decodes) cover whatever follows.
    """
    llm = process.Model(
        dtype="float32", max_model_len=128, block_size=16, max_num_seqs=4, max_num_batched_tokens=32,
        num_gpu_blocks_override=16, compilation_cache_dir=compilation_cache, warmup="none",
    )  # fmt: skip
    first = [{"prompt_token_ids": list(range(start, start + 20))} for start in (100, 200, 300, 400)]
    llm.generate(first, greedy(6, logprobs=5, prompt_logprobs=0, ignore_eos=True), use_tqdm=False)
    assert programs(llm) == 2
    return llm


def counter(llm: Model, name: str) -> int:
    return next(m.value for m in llm.get_metrics() if isinstance(m, Counter) and m.name == f"jaxserve:{name}")


def programs(llm: Model) -> int:
    return counter(llm, "compilations")


def check(case: dict[str, Any], output: RequestOutput, tokens: int = 64) -> None:
    completion = output.outputs[0]
    assert completion.token_ids == case["token_ids"][:tokens]
    if tokens == 64:
        assert completion.text == case["text"]
        ended = completion.token_ids[-1] == 2
        assert completion.finish_reason == ("stop" if ended else "length")
    for position, expected in enumerate(case["top5_logprobs"][:tokens]):
        assert completion.logprobs is not None
        got = completion.logprobs[position]
        for token, value in expected:
            assert got[token].logprob == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("shorter", [24, pytest.param(64, marks=pytest.mark.slow)])
def test_all_together(llm: Model, shorter: int) -> None:
    """All cases, half of them in whole length, four at a time: joined to a batch, cut into chunks, preempted."""
    lengths = [64 if number // 4 % 2 == 0 else shorter for number in range(len(CASES))]
    params = [greedy(length, logprobs=5) for length in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for case, output, length in zip(CASES, outputs, lengths, strict=True):
        check(case, output, tokens=length)
    assert counter(llm, "num_preemptions") > 0
    llm.check_integrity()


def test_again_from_the_prefix_cache(llm: Model) -> None:
    chats = [case for case in CASES if case["chat"]][:4]
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in chats]
    for cached in (False, True):
        outputs = llm.generate(prompts, greedy(8, logprobs=5), use_tqdm=False)
        for case, output in zip(chats, outputs, strict=True):
            check(case, output, tokens=8)
            full_pages = (len(case["prompt_token_ids"]) - 1) // 16 * 16
            assert output.num_cached_tokens == full_pages >= 32 or not cached


def test_text_and_chat_prompts_are_tokenised_as_the_reference(llm: Model) -> None:
    params = greedy(4, logprobs=5)
    plain = [case for case in CASES if not case["chat"]]
    for case, output in zip(plain, llm.generate([c["prompt"] for c in plain], params, use_tqdm=False), strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"]
        check(case, output, tokens=4)
    chats = [case for case in CASES if case["chat"]]
    conversations = [[{"role": "user", "content": case["prompt"]}] for case in chats]
    for case, output in zip(chats, llm.chat(conversations, params, use_tqdm=False), strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"]
        check(case, output, tokens=4)


def test_alone(llm: Model) -> None:
    for case, prompt in list(zip(CASES, PROMPTS, strict=True))[::4]:
        check(case, llm.generate(prompt, greedy(8, logprobs=5), use_tqdm=False)[0], tokens=8)


def test_seeded_samples_do_not_depend_on_the_batch(llm: Model) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=11, max_tokens=12)
    alone = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0].token_ids
    together = llm.generate(PROMPTS[4:0:-1], params, use_tqdm=False)[-1].outputs[0].token_ids
    assert alone == together


def test_stop_strings_streams_and_bad_words(llm: Model) -> None:
    case = CASES[1]
    stop = llm.generate(case["prompt"], greedy(16, stop=["He lived"]), use_tqdm=False)[0].outputs[0]
    assert stop.text == case["text"].split("He lived")[0]
    assert (stop.finish_reason, stop.stop_reason) == ("stop", "He lived")
    shown = llm.generate(
        case["prompt"], greedy(16, stop=["He lived"], include_stop_str_in_output=True), use_tqdm=False
    )  # fmt: skip
    assert shown[0].outputs[0].text == stop.text + "He lived"
    banned = llm.generate(case["prompt"], greedy(16, bad_words=["old wizard", "named"]), use_tqdm=False)[0].outputs[0]
    assert "old wizard" not in banned.text
    assert " named" not in banned.text
    assert "wise old" in banned.text


def test_beam_search_finds_at_least_the_greedy_path(llm: Model) -> None:
    from jaxserve import BeamSearchParams

    best = llm.beam_search(CASES[0]["prompt"], BeamSearchParams(beam_width=3, max_tokens=6))[0].sequences
    assert len(best) == 3
    scores = [beam.cum_logprob for beam in best]
    assert scores == sorted(scores, reverse=True)
    path = llm.generate(PROMPTS[0], greedy(6, logprobs=1), use_tqdm=False)[0].outputs[0]
    logprobs = [entry[token].logprob for token, entry in zip(path.token_ids, path.logprobs or [], strict=True)]
    assert scores[0] >= sum(logprobs) - 1e-3
    assert best[0].text is not None
    assert best[0].text.startswith(CASES[0]["prompt"])
    # The score is the model's own: the sum of the tokens' log-probabilities as a prompt.
    whole = {"prompt_token_ids": best[0].tokens}
    scored = llm.generate(whole, greedy(1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs or []
    start = len(CASES[0]["prompt_token_ids"])
    total = sum((entry or {})[t].logprob for t, entry in zip(best[0].tokens[start:], scored[start:], strict=True))
    assert total == pytest.approx(scores[0], abs=1e-2)


def test_nothing_else_was_compiled(llm: Model) -> None:
    """Keeps this file quick."""
    assert programs(llm) == 2
