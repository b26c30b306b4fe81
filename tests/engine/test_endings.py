"""What ends a sequence, or constrains its tokens, does so wherever several decodes are launched at once."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from jaxserve.engine.pace import Pace, StreamRules
from jaxserve.sampling_params import RepetitionDetectionParams
from jaxserve.types import CompletionOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = [np.random.default_rng(n).integers(2, 90, 3 + 4 * n).tolist() for n in range(3)]
FREE = SamplingParams(temperature=1.0, seed=4, max_tokens=17, ignore_eos=True)
WORDS = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(96)]  # aa, ab, ...


class Steady(Pace):
    """Has its mind made up."""

    rules = StreamRules(decodes=3)


@pytest.fixture(scope="module")
def spoken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a word of two letters for each token, and spaces between them."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    spaces = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    vocab = {"\u0120" + word: number for number, word in enumerate(WORDS)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "\u0120aa"}
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": spaces, "decoder": spaces, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | rest))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def build(folder: Path, cache: str, decode_steps: int) -> LLMEngine:
    return LLMEngine.from_engine_args(
        EngineArgs(
            str(folder), load_format="dummy", max_model_len=96, max_num_seqs=8, max_num_batched_tokens=64, block_size=4,
            compilation_cache_dir=cache, warmup="none", decode_steps=decode_steps,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def engines(quick_compilation: None, spoken: Path, compilation_cache: str) -> Iterator[dict[str, LLMEngine]]:
    """One decode at a time; five; and for streams three."""
    found = {"one": build(spoken, compilation_cache, 1), "five": build(spoken, compilation_cache, 5)}
    found["five"]._pace = Steady(5)
    yield found
    for engine in found.values():
        engine.close()


def run(engine: LLMEngine, requests: list[tuple[list[int], SamplingParams]]) -> tuple[list[tuple], int]:
    """What came of each request, its deltas joined, and the most tokens that came at once."""
    pieces: dict[str, list[CompletionOutput]] = {}
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces.setdefault(output.request_id, []).append(output.outputs[0])
    engine.scheduler.check_integrity()
    engine.reset_prefix_cache()
    ended = [pieces[str(number)] for number in range(len(requests))]
    most = max(len(piece.token_ids) for some in ended for piece in some)
    return [
        (
            [token for piece in some for token in piece.token_ids],
            "".join(piece.text for piece in some),
            some[-1].finish_reason,
            some[-1].stop_reason,
        )
        for some in ended
    ], most


def everywhere(engines: dict[str, LLMEngine], cases: list[dict[str, Any]], most: int = 3) -> list[tuple]:
    """The same from single decodes, from five in a program, and from three programs in a row, if that may be."""
    requests = [(prompt, dataclasses.replace(FREE, **case)) for prompt in PROMPTS for case in cases]
    final = [
        (prompt, dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)) for prompt, params in requests
    ]
    delta = [(prompt, dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)) for prompt, params in requests]
    expected, _ = run(engines["one"], final)
    assert run(engines["five"], final)[0] == expected
    assert run(engines["five"], delta) == (expected, most)
    return expected


def test_stop_strings(engines: dict[str, LLMEngine]) -> None:
    """The first token that completes one is the last, whatever else ends the sequence in the same launch."""
    free = everywhere(engines, [{}])
    for prompt, (ids, text, *_) in zip(PROMPTS, free, strict=True):
        words = [WORDS[token] for token in ids]
        assert text == "".join(f" {word}" for word in words)
        stops = [f"{words[i]} {words[i + 1][0]}" for i in range(len(words) - 1)]
        params = [dataclasses.replace(FREE, stop=[stop]) for stop in stops]
        params += [dataclasses.replace(one, include_stop_str_in_output=True) for one in params]
        params += [dataclasses.replace(FREE, stop=[stop], stop_token_ids=[ids[9]]) for stop in stops[5:10]]
        for name in ("one", "five"):
            for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA):
                requests = [(prompt, dataclasses.replace(one, output_kind=kind)) for one in params]
                found, _ = run(engines[name], requests)
                for one, (got, shown, reason, stop) in zip(params, found, strict=True):
                    end = next(n for n in range(18) if _ends(text, words, ids, n, one))
                    matched = (one.stop or [""])[0]
                    assert got == ids[:end]
                    assert reason == "stop"
                    seen = end - (ids[end - 1] in (one.stop_token_ids or ()))  # such a token is not shown
                    if matched in "".join(f" {word}" for word in words[:seen]):
                        assert stop == matched
                        cut = text.index(matched) + len(matched) * one.include_stop_str_in_output
                        assert shown == text[:cut]
                    else:
                        assert stop == ids[9]


def _ends(text: str, words: list[str], ids: list[int], count: int, params: SamplingParams) -> bool:
    """Whether so many tokens are enough for an end."""
    shown = "".join(f" {word}" for word in words[:count])
    stopped = any(token in (params.stop_token_ids or ()) for token in ids[:count])
    return stopped or any(stop in shown for stop in params.stop or ())


def test_stop_strings_count_from_the_least_number_of_tokens(engines: dict[str, LLMEngine]) -> None:
    for ids, *_ in everywhere(engines, [{"stop": [WORDS[i] for i in range(2, 90)], "min_tokens": 7}]):
        assert len(ids) == 7


def test_stop_tokens_are_banned_up_to_the_least_number_of_tokens(engines: dict[str, LLMEngine]) -> None:
    stop = list(range(1, 94))
    cases = [{"min_tokens": least, "stop_token_ids": stop} for least in (1, 6, 11)]
    for least, (ids, _, reason, _) in zip([1, 6, 11] * 3, everywhere(engines, cases), strict=True):
        assert not set(ids[: least - 1]) & set(stop)
        assert reason == "length" or (len(ids) >= least and ids[-1] in stop)


def test_repetitions(engines: dict[str, LLMEngine]) -> None:
    rule = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=3)
    one = {"allowed_token_ids": [8], "repetition_detection": rule}
    two = {"allowed_token_ids": [8, 9], "repetition_detection": rule}
    both = {"allowed_token_ids": [8], "repetition_detection": rule, "stop": [f"{WORDS[8]} {WORDS[8]}"]}
    found = everywhere(engines, [one, two, both])
    assert list(found[::3]) == [([8, 8, 8], " ai ai ai", "repetition", "repetition_detected")] * 3
    assert all(ended[0] == [8, 8] and ended[1:] == (" ", "stop", "ai ai") for ended in found[2::3])
    assert {ended[2] for ended in found[1::3]} <= {"repetition", "length"}


def test_constraints(engines: dict[str, LLMEngine]) -> None:
    """Of biased and banned tokens; words of three tokens take the host."""
    few = [5, 6, 7, 11]
    names = [WORDS[token] for token in few]
    words = [names[3], f"{names[0]} {names[1]}", f"{names[1]} {names[2]} {names[0]}"]
    easy = [
        {"allowed_token_ids": few},
        {"allowed_token_ids": few, "bad_words": words[:2]},
        {"logit_bias": {12: 100.0, 13: 100.0}, "temperature": 0.5},
        {"allowed_token_ids": few, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ]
    hard = [{"allowed_token_ids": few, "bad_words": words}]
    for cases, most in ((easy, 3), (hard, 1)):
        for number, (ids, text, *_) in enumerate(everywhere(engines, cases, most)):
            case = cases[number % len(cases)]
            assert set(ids) <= set(case.get("allowed_token_ids", [12, 13]))
            assert not any(f" {word}" in text for word in case.get("bad_words", ()))
