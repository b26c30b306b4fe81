"""Repetition detection against a brute-force search."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.repetition import detect_repetition
from jaxserve.sampling_params import RepetitionDetectionParams


def brute_force(tokens: list[int], smallest: int, largest: int, count: int) -> bool:
    tails = (tokens[-size * count :] for size in range(max(smallest, 1), largest + 1) if size * count <= len(tokens))
    return any(tail == tail[: len(tail) // count] * count for tail in tails)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=24), st.integers(0, 6), st.integers(0, 6), st.integers(2, 4))
def test_equals_brute_force(tokens, smallest, more, count):
    params = RepetitionDetectionParams(smallest + more, smallest, count)
    expected = brute_force(tokens, smallest, smallest + more, count)
    assert detect_repetition(np.array(tokens, np.int32), params) is expected


def test_examples():
    tokens = np.array([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], np.int32)
    assert detect_repetition(tokens, RepetitionDetectionParams(3, 1, 3))
    assert not detect_repetition(tokens, RepetitionDetectionParams(3, 1, 4))
    assert not detect_repetition(tokens, RepetitionDetectionParams(2, 1, 2))
    assert not detect_repetition(tokens[:-1], RepetitionDetectionParams(3, 1, 3))
    assert not detect_repetition(tokens, RepetitionDetectionParams())
    assert not detect_repetition(tokens[:0], RepetitionDetectionParams(3, 1, 2))
