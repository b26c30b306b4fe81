"""From prompts and params to requests: every bad input has its own error, every good one its numbers."""

import copy
import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checks import ParameterError, UnsupportedError
from jaxserve.config import EngineArgs, EngineConfig, resolve
from jaxserve.inputs import bad_word_ids, check_prompt_ids, make_request, make_sequences
from jaxserve.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from jaxserve.types import LogitEdits, Request

VOCAB = 100
BOS = 1


class LetterTokenizer:
    """One token a character: its code modulo the vocabulary; a first token is added like Llama's."""

    max_chars_per_token = 2

    def __init__(self):
        self.calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return [BOS] * add_special_tokens + [2 + ord(letter) % (VOCAB - 2) for letter in text]


def letters(text: str) -> list[int]:
    return [2 + ord(letter) % (VOCAB - 2) for letter in text]


def make_config(**options) -> EngineConfig:
    hf = {"max_position_embeddings": 20, "vocab_size": VOCAB, "eos_token_id": 7}
    return resolve(EngineArgs(**options), hf, {}, "cpu")


CONFIG = make_config()
PRIORITY = make_config(scheduling_policy="priority")
TOKENIZER = LetterTokenizer()


def request(prompt, params=None, config: EngineConfig = CONFIG, tokenizer=TOKENIZER, **options) -> Request:
    return make_request("r", prompt, params, tokenizer=tokenizer, config=config, **options)


GOOD_PROMPTS = [
    ("abc", [BOS, *letters("abc")], "abc"),
    ("", [BOS], ""),
    ({"prompt": "abc"}, [BOS, *letters("abc")], "abc"),
    ([1, 2, 99], [1, 2, 99], None),
    ((0,), [0], None),
    (np.array([3, 4], np.uint8), [3, 4], None),
    ([np.int64(3), 4], [3, 4], None),
    ({"prompt_token_ids": [5]}, [5], None),
    ({"prompt_token_ids": [5], "prompt": "only echoed"}, [5], "only echoed"),
    ({"prompt": "ab", "multi_modal_data": None}, [BOS, *letters("ab")], "ab"),
    (list(range(19)), list(range(19)), None),
]

BAD_PROMPTS = [
    ([], ParameterError, "empty"),
    ({"prompt_token_ids": []}, ParameterError, "empty"),
    (list(range(20)), ParameterError, "20 tokens.*max_model_len is 20"),
    ([1] * 33, ParameterError, "33 tokens.*max_model_len is 20.*truncate_prompt_tokens"),
    ("x" * 20, ParameterError, "21 tokens.*20"),
    ("x" * 41, ParameterError, "41 characters.*at least 21 tokens.*20"),
    ([1, 100], ParameterError, r"prompt_token_ids\[1\].*0 to 99.*100"),
    ([1, 2, -1], ParameterError, r"prompt_token_ids\[2\].*-1"),
    ([2**80], ParameterError, r"prompt_token_ids\[0\]"),
    ([1, 2.0], TypeError, r"prompt_token_ids\[1\].*2\.0.*float"),
    ([True], TypeError, r"prompt_token_ids\[0\].*True"),
    (["a"], TypeError, r"prompt_token_ids\[0\].*'a'"),
    ([None], TypeError, r"prompt_token_ids\[0\]"),
    ([[1, 2]], TypeError, r"prompt_token_ids\[0\]"),
    (np.ones(3), TypeError, "float64"),
    (np.ones((2, 2), np.int32), TypeError, r"\[2, 2\]"),
    (None, TypeError, "NoneType"),
    (5, TypeError, "string, a list of token ids, or a dict"),
    (b"abc", TypeError, "bytes"),
    ({}, TypeError, "prompt_token_ids"),
    ({"cache_salt": "a"}, TypeError, "prompt_token_ids"),
    ({"prompt": 5}, TypeError, "prompt must be a string"),
    ({"prompt": "a", "promt": 1}, TypeError, "promt.*'prompt'"),
    ({"prompt": "a", 5: 1}, TypeError, "5"),
    ({"prompt_token_ids": "12"}, TypeError, "prompt_token_ids must be a list"),
    ({"prompt_token_ids": [1], "prompt": 3}, TypeError, "prompt must be a string"),
    ({"prompt": "a", "cache_salt": ""}, ParameterError, "cache_salt.*empty"),
    ({"prompt": "a", "cache_salt": 5}, TypeError, "cache_salt"),
    ({"prompt": "a", "cache_salt": "\ud800"}, ParameterError, "cache_salt.*Unicode"),
    ("ab\udfffc", ParameterError, r"character 2 .*surrogate"),
    ({"prompt_embeds": [1.0]}, UnsupportedError, "prompt_embeds"),
    ({"prompt": "a", "multi_modal_data": {"image": 1}}, UnsupportedError, "multi_modal_data"),
    ({"encoder_prompt": "a", "decoder_prompt": "b"}, UnsupportedError, "coder_prompt"),
]


@pytest.mark.parametrize(("prompt", "ids", "text"), GOOD_PROMPTS)
def test_good_prompts(prompt, ids, text):
    before = copy.deepcopy(prompt)
    made = request(prompt)
    assert made.prompt_token_ids.dtype == np.int32
    assert made.prompt_token_ids.tolist() == ids
    assert made.prompt == text
    assert repr(prompt) == repr(before)
    if isinstance(prompt, np.ndarray):
        assert not np.shares_memory(prompt, made.prompt_token_ids)


@pytest.mark.parametrize(("prompt", "error", "pattern"), BAD_PROMPTS)
def test_bad_prompts(prompt, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        request(prompt)


def test_text_far_too_long_is_never_tokenised():
    tokenizer = LetterTokenizer()
    with pytest.raises(ParameterError, match="1000000 characters"):
        request("x" * 1_000_000, tokenizer=tokenizer)
    assert tokenizer.calls == 0


def test_without_a_tokenizer():
    with pytest.raises(ParameterError, match=r"skip_tokenizer_init.*prompt_token_ids"):
        request("abc", tokenizer=None)
    assert request([1], tokenizer=None).params.detokenize is False
    for values in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(ParameterError, match=next(iter(values))):
            request([1], SamplingParams(**values), tokenizer=None)


def test_request_fields():
    made = request({"prompt_token_ids": [1], "cache_salt": "säl"}, arrival_time=5, priority=0)
    assert made.request_id == "r"
    assert made.cache_keys == {"salt": "säl".encode()}
    assert made.arrival_time == 5.0
    assert abs(request("a").arrival_time - time.time()) < 5
    assert request("a").cache_keys == {}
    assert request("a", config=PRIORITY, priority=-3).priority == -3
    with pytest.raises(ParameterError, match=r"priority.*scheduling_policy"):
        request("a", priority=1)
    for options in ({"priority": 1.5}, {"arrival_time": "now"}):
        with pytest.raises(TypeError, match=next(iter(options))):
            request("a", **options)
    with pytest.raises(TypeError, match="request_id"):
        make_request(7, "a", tokenizer=TOKENIZER, config=CONFIG)


LONG = list(range(40))
TOKENIZATION = [
    (LONG, {"truncate_prompt_tokens": 3}, [37, 38, 39]),
    (LONG, {"truncate_prompt_tokens": 3, "truncation_side": "right"}, [0, 1, 2]),
    (LONG, {"truncate_prompt_tokens": -1}, LONG[-19:]),
    (LONG, {"truncate_prompt_tokens": -1, "max_length": 5}, LONG[-5:]),
    (LONG, {"truncate_prompt_tokens": -1, "max_length": 500}, LONG[-19:]),
    ([1, 2], {"truncate_prompt_tokens": 10}, [1, 2]),
    ([1, 2], {"truncate_prompt_tokens": None, "max_length": 2}, [1, 2]),
    ("ab", {"add_special_tokens": False}, letters("ab")),
    ("x" * 99 + "yz", {"truncate_prompt_tokens": 2}, letters("yz")),
]


@pytest.mark.parametrize(("prompt", "options", "ids"), TOKENIZATION)
def test_tokenization_options(prompt, options, ids):
    assert request(prompt, tokenization_kwargs=options).prompt_token_ids.tolist() == ids


@pytest.mark.parametrize(("prompt", "options", "error", "pattern"), [
    ([1], {"truncate": 1}, TypeError, "truncate.*truncate_prompt_tokens"),
    ([1], {"truncate_prompt_tokens": 0}, ParameterError, "truncate_prompt_tokens"),
    ([1], {"truncate_prompt_tokens": -2}, ParameterError, "truncate_prompt_tokens"),
    ([1], {"truncate_prompt_tokens": 2.0}, TypeError, "truncate_prompt_tokens"),
    ([1], {"truncation_side": "middle"}, ParameterError, "truncation_side"),
    ([1], {"add_special_tokens": 1}, TypeError, "add_special_tokens"),
    ([1], {"max_length": 0}, ParameterError, "max_length"),
    ([1, 2, 3], {"max_length": 2}, ParameterError, "3 tokens.*max_length of 2"),
    (LONG, {"truncate_prompt_tokens": 30}, ParameterError, "30 tokens.*max_model_len is 20"),
    ([1], [("max_length", 3)], TypeError, "tokenization_kwargs"),
])  # fmt: skip
def test_bad_tokenization_options(prompt, options, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        request(prompt, tokenization_kwargs=options)


BAD_PARAMS = [
    ({"structured_outputs": StructuredOutputsParams(json="{}")}, UnsupportedError, "structured_outputs"),
    ({"thinking_token_budget": 0}, UnsupportedError, "thinking_token_budget"),
    ({"logprob_token_ids": [1]}, UnsupportedError, "logprob_token_ids"),
    ({"flat_logprobs": True}, UnsupportedError, "flat_logprobs"),
    ({"extra_args": {"a": 1}}, UnsupportedError, "extra_args"),
    ({"logprobs": 21}, ParameterError, r"max_logprobs \(20\).*21"),
    ({"logprobs": -1}, ParameterError, r"max_logprobs \(20\).*-1"),
    ({"prompt_logprobs": 21}, ParameterError, "prompt_logprobs.*20"),
    ({"logit_bias": {100: 1.0}}, ParameterError, "logit_bias.*0 to 99.*100"),
    ({"allowed_token_ids": [5, 100]}, ParameterError, "allowed_token_ids.*100"),
    ({"stop_token_ids": [100]}, ParameterError, "stop_token_ids.*100"),
    ({"min_tokens": 18, "max_tokens": 30}, ParameterError, "min_tokens.*17 after a prompt of 3.*20.*18"),
]


@pytest.mark.parametrize(("values", "error", "pattern"), BAD_PARAMS)
def test_params_the_engine_cannot_serve(values, error, pattern):
    params = SamplingParams(**values)  # fine in itself
    with pytest.raises(error, match=f"(?s){pattern}"):
        request([1, 2, 3], params)


def test_params_of_a_wrong_kind():
    with pytest.raises(TypeError, match=r"beam_search"):
        request([1], BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(TypeError, match="SamplingParams"):
        request([1], {"temperature": 1})


def test_params_are_completed_in_a_private_copy():
    params = SamplingParams(max_tokens=None, extra_args={}, repetition_detection=RepetitionDetectionParams(2, 1, 2))
    before = dataclasses.asdict(params)
    own = request([1, 2, 3], params).params
    assert own.max_tokens == 17
    assert request([1, 2, 3], SamplingParams(max_tokens=999)).params.max_tokens == 17
    assert request([1, 2, 3], SamplingParams(max_tokens=4)).params.max_tokens == 4
    assert request([1] * 19, SamplingParams(max_tokens=4)).params.max_tokens == 1
    own.repetition_detection.min_count = 7
    assert dataclasses.asdict(params) == before

    everything = make_config(max_logprobs=-1)
    own = request([1], SamplingParams(logprobs=-1, prompt_logprobs=-1), everything).params
    assert (own.logprobs, own.prompt_logprobs, own.skip_reading_prefix_cache) == (VOCAB, VOCAB, True)
    with pytest.raises(ParameterError, match="vocabulary"):
        request([1], SamplingParams(logprobs=VOCAB + 1), everything)


def test_missing_params_are_the_models():
    config = make_config(override_generation_config={"temperature": 0.3, "max_new_tokens": 9})
    assert request([1], None, config).params.temperature == 0.3
    assert request([1], None, config).params.max_tokens == 9
    assert request([1]).params.max_tokens == 16


def test_logit_edits():
    assert request([1], SamplingParams()).edits is None
    params = SamplingParams(logit_bias={3: 1, 4: -2.5}, allowed_token_ids=[3, 4, 3], bad_words=["ab"])
    expected = LogitEdits(((3, 1.0), (4, -2.5)), frozenset({3, 4}), (tuple(letters("ab")), tuple(letters(" ab"))))
    assert request([1], params).edits == expected


def test_bad_word_ids():
    assert bad_word_ids(["ab", " ab", "c"], TOKENIZER) == [
        tuple(letters("ab")),
        tuple(letters(" ab")),
        tuple(letters("c")),
        tuple(letters(" c")),
    ]

    class Silent(LetterTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return []

    with pytest.raises(ParameterError, match=r"bad_words.*'x'"):
        bad_word_ids(["x"], Silent())


def test_make_sequences():
    made = request([5, 6], SamplingParams(n=3, seed=10, max_tokens=4, stop_token_ids=[9]))
    sequences = make_sequences(made, eos_ids=CONFIG.eos_token_ids, max_model_len=20, fallback_seed=1)
    assert [(s.index, s.seed) for s in sequences] == [(0, 10), (1, 11), (2, 12)]
    for sequence in sequences:
        sequence.check()
        assert sequence.tokens.dtype == np.int32
        assert sequence.tokens[:2].tolist() == [5, 6]
        assert (sequence.num_prompt, sequence.num_tokens, len(sequence.tokens), sequence.num_output) == (2, 2, 6, 0)
        assert (sequence.stop_ids, sequence.eos_ids) == ({7, 9}, {7})
    sequences[0].tokens[0] = 77
    assert sequences[1].tokens[0] == made.prompt_token_ids[0] == 5
    sequences[0].pages.append(1)
    assert sequences[1].pages == []


def test_sequences_without_seed_or_end():
    made = request([5], SamplingParams(n=2, ignore_eos=True, stop_token_ids=[7]))
    first, second = make_sequences(made, eos_ids=[7, 8], max_model_len=20, fallback_seed=2**64 - 1)
    assert (first.seed, second.seed) == (2**64 - 1, 0)
    assert (first.stop_ids, first.eos_ids) == ({7}, frozenset())
    negative = request([5], SamplingParams(seed=-2))
    assert make_sequences(negative, eos_ids=[], max_model_len=20, fallback_seed=0)[0].seed == 2**64 - 2


def test_long_prompts_are_checked_fast():
    ids = [3] * 200_000
    start = time.perf_counter()
    check_prompt_ids(ids, VOCAB)
    assert time.perf_counter() - start < 1.0


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
KEYS = st.sampled_from(["prompt", "prompt_token_ids", "cache_salt", "multi_modal_data", "x"]) | st.integers()
GARBAGE = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3))


@settings(max_examples=150, deadline=None)
@given(GARBAGE | st.lists(st.integers(-2, VOCAB + 1), max_size=25))
def test_garbage_raises_value_or_type_error_only(prompt):
    try:
        made = request(prompt)
    except (ValueError, TypeError):
        return
    ids = made.prompt_token_ids
    assert 0 < len(ids) < 20
    assert ids.min() >= 0
    assert ids.max() < VOCAB
    assert len(ids) + made.params.max_tokens <= 20
