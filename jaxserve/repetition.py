"""Has a sequence begun to repeat itself?"""

import numpy as np
from jaxtyping import Int

from jaxserve.sampling_params import RepetitionDetectionParams


def detect_repetition(tokens: Int[np.ndarray, "T"], params: RepetitionDetectionParams) -> bool:
    """Whether the last tokens are one pattern repeated `min_count` times in a row.

    A pattern has `min_pattern_size` (at least 1) to `max_pattern_size` tokens. Costs at most
    `max_pattern_size * min_count` comparisons a pattern size, whatever the length of the sequence.

    Args:
        tokens: the generated token ids so far.
        params: sizes and count; `max_pattern_size=0` finds nothing.
    """
    count = params.min_count
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        span = size * count
        if span > len(tokens):
            return False
        if tokens[-1] != tokens[-1 - size]:  # most sizes end here, without touching the span
            continue
        tail = tokens[len(tokens) - span :]
        if np.array_equal(tail[size:], tail[:-size]):
            return True
    return False
