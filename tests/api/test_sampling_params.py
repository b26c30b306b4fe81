"""SamplingParams: defaults, bounds, types, and that nobody's objects are shared or changed."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checks import ParameterError
from jaxserve.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "thinking_token_budget": None,
    "repetition_detection": None,
    "extra_args": None,
    "skip_reading_prefix_cache": None,
}

ACCEPTED = [
    ("n", 1, 1),
    ("n", 16_384, 16_384),
    ("presence_penalty", -2, -2.0),
    ("presence_penalty", 2.0, 2.0),
    ("frequency_penalty", -2.0, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("repetition_penalty", 1e-6, 1e-6),
    ("repetition_penalty", 50, 50.0),
    ("temperature", 0, 0.0),
    ("temperature", 2, 2.0),
    ("temperature", 0.001, 0.001),  # never raised
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1e-9, 1e-9),
    ("top_p", 1, 1.0),
    ("top_k", -1, 0),
    ("top_k", np.int64(7), 7),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("seed", -1, None),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", -(2**63), -(2**63)),
    ("stop", "ab", ["ab"]),
    ("stop", ("a", "b"), ["a", "b"]),
    ("stop", None, []),
    ("stop_token_ids", (1, np.int32(2)), [1, 2]),
    ("max_tokens", None, None),
    ("max_tokens", 1, 1),
    ("min_tokens", 16, 16),
    ("logprobs", True, 1),
    ("logprobs", False, None),
    ("logprobs", -1, -1),
    ("logprobs", 0, 0),
    ("prompt_logprobs", -1, -1),
    ("logprob_token_ids", [3], [3]),
    ("logit_bias", {np.int64(3): 1}, {3: 1.0}),
    ("allowed_token_ids", {5}, [5]),
    ("bad_words", ["x"], ["x"]),
    ("thinking_token_budget", -1, -1),
    ("extra_args", {"a": 1}, {"a": 1}),
    ("skip_reading_prefix_cache", True, True),
]

BAD_VALUES = [
    ("n", 0),
    ("n", -1),
    ("n", 16_385),
    *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.01, 2.01)],
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("temperature", -0.1),
    ("temperature", 2.001),
    ("top_p", 0),
    ("top_p", 1.0001),
    ("top_p", -0.5),
    ("top_k", -2),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop_token_ids", [-1]),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -2),
    ("prompt_logprobs", -2),
    ("logprob_token_ids", list(range(129))),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: math.nan}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-3]),
    ("bad_words", [""]),
    ("thinking_token_budget", -2),
    *[
        (name, value)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for value in (math.nan, math.inf, -math.inf, 10**400)
    ],
]

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs", "thinking_token_budget")
BOOLS = ("ignore_eos", "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
         "include_stop_str_in_output", "skip_reading_prefix_cache")  # fmt: skip
BAD_TYPES = [
    *[(name, value) for name in FLOATS for value in ("1", None, True, [1.0], 1j)],
    *[(name, value) for name in INTS for value in ("1", 1.5, 1.0, [1])],
    *[(name, True) for name in ("n", "top_k", "min_tokens", "max_tokens", "seed", "thinking_token_budget")],
    *[(name, value) for name in BOOLS for value in (1, "yes")],
    ("stop", 5),
    ("stop", [5]),
    ("stop", {"a": 1}),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", [True]),
    ("bad_words", "word"),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {1: "1"}),
    ("allowed_token_ids", 4),
    ("output_kind", 0),
    ("structured_outputs", {"json": "{}"}),
    ("repetition_detection", {"min_count": 2}),
    ("extra_args", "x"),
]


def test_fields_and_defaults():
    params = SamplingParams()
    assert {field.name: getattr(params, field.name) for field in dataclasses.fields(params)} == DEFAULTS


@pytest.mark.parametrize(("name", "value", "stored"), ACCEPTED)
def test_accepted(name, value, stored):
    result = getattr(SamplingParams(**{name: value}), name)
    assert result == stored
    assert type(result) is type(stored)


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value_names_parameter_and_value(name, value):
    with pytest.raises(ParameterError) as info:
        SamplingParams(**{name: value})
    assert name in str(info.value)
    assert info.value.parameter.startswith(name)
    if not isinstance(value, list | dict | str) and abs(value) < 10**100:
        assert repr(value) in str(info.value)


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_bad_type(name, value):
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})


def test_fields_that_rule_each_other_out():
    with pytest.raises(ParameterError, match=r"n must be 1 with greedy .* got 2"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ParameterError, match=r"stop .*detokenize.*stop_token_ids"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(ParameterError, match="logprobs"):
        SamplingParams(logprobs=2, logprob_token_ids=[1, 2, 3])
    SamplingParams(logprobs=2, logprob_token_ids=[1, 2])
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=3)
    with pytest.raises(TypeError):
        SamplingParams(3)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1.1e-5, False), (1.0, False)])
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_caller_objects_are_copied_and_kept():
    stop, ids, bias, extra = ["a"], [1], {1: 2}, {"x": 1}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias, allowed_token_ids=ids, extra_args=extra)
    params.stop.append("b")
    params.stop_token_ids.append(2)
    params.logit_bias[9] = 1.0
    params.allowed_token_ids.append(3)
    params.extra_args["y"] = 2
    assert (stop, ids, bias, extra) == (["a"], [1], {1: 2}, {"x": 1})


def test_validated_is_private_checked_and_complete():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1, stop=["a"], prompt_logprobs=1)
    before = dataclasses.asdict(params)
    own = params.validated()
    assert (own.top_p, own.top_k, own.min_p, own.skip_reading_prefix_cache) == (1.0, 0, 0.0, True)
    own.stop.append("b")
    own.max_tokens = 3
    assert dataclasses.asdict(params) == before
    assert SamplingParams().validated().skip_reading_prefix_cache is False

    params.stop = "changed later"
    assert params.validated().stop == ["changed later"]
    params.max_tokens = -1
    with pytest.raises(ParameterError, match="max_tokens"):
        params.validated()


def test_clone_is_deep():
    params = SamplingParams(extra_args={"a": [1]}, repetition_detection=RepetitionDetectionParams(3, 1, 2))
    copy = params.clone()
    assert copy == params
    copy.extra_args["a"].append(2)
    copy.repetition_detection.min_count = 9
    assert params.extra_args == {"a": [1]}
    assert params.repetition_detection.min_count == 2


def test_from_optional():
    assert SamplingParams.from_optional(temperature=None, n=None, stop=None) == SamplingParams()
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    bias = {"7": 500, 8: -500.0, "9": 1}
    assert SamplingParams.from_optional(logit_bias=bias).logit_bias == {7: 100.0, 8: -100.0, 9: 1.0}
    assert bias == {"7": 500, 8: -500.0, "9": 1}
    with pytest.raises(TypeError, match=r"max_token.*max_tokens"):
        SamplingParams.from_optional(max_token=None)
    with pytest.raises(TypeError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias={"a": 1})


@pytest.mark.parametrize("values", [{}, {"json": "{}", "regex": "a"}, {"choice": []}, {"grammar": " "},
                                    {"json_object": False}])  # fmt: skip
def test_structured_outputs_bad_values(values):
    with pytest.raises(ParameterError, match="structured_outputs"):
        StructuredOutputsParams(**values)


@pytest.mark.parametrize("values", [{"regex": 1}, {"json": 1}, {"choice": "ab"}, {"choice": [1]}, {"json_object": 1},
                                    {"regex": "a", "disable_any_whitespace": 1}])  # fmt: skip
def test_structured_outputs_bad_types(values):
    with pytest.raises(TypeError, match="structured_outputs"):
        StructuredOutputsParams(**values)


@pytest.mark.parametrize("values", [(-1, 0, 2), (2, 3, 2), (3, 1, 1), (3, 1, 0)])
def test_repetition_detection_bad_values(values):
    with pytest.raises(ParameterError, match="repetition_detection"):
        RepetitionDetectionParams(*values)


def test_beam_search_params():
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    assert (params.temperature, params.length_penalty, params.ignore_eos) == (0.0, 1.0, False)
    assert params.include_stop_str_in_output is False
    assert params.structured_outputs is None
    for bad in ({"beam_width": 0}, {"max_tokens": 0}, {"temperature": 3}, {"length_penalty": math.nan}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | bad))
    for bad in ({"beam_width": 1.5}, {"ignore_eos": 1}, {"structured_outputs": {}}):
        with pytest.raises(TypeError, match=next(iter(bad))):
            BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | bad))


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
    | st.complex_numbers() | st.decimals(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), GARBAGE, min_size=1, max_size=3))
def test_garbage_raises_value_or_type_error_only(values):
    try:
        params = SamplingParams(**values)
    except (ValueError, TypeError):
        return
    assert params.validated().validated() == params.validated()  # what is accepted stays accepted
    assert 0 <= params.temperature <= 2
    assert isinstance(params.stop, list)
