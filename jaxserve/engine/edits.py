"""Turn token-level constraints into the sparse logit edits of one step. Host only."""

from collections.abc import Iterator
from collections.abc import Sequence as Ids

import numpy as np

from jaxserve.batch import EditRows
from jaxserve.types import LogitEdits, Sequence, Work

BAN = float("-inf")


def step_edits(work: Work) -> EditRows:
    """All edits of a step, `(row, prev, token, value)`; `prev >= 0` makes one depend on the row's last token."""
    edits: EditRows = []
    for row, sequence in enumerate(work.sequences):
        constraints, position = sequence.request.edits, int(work.starts[row] + work.num_tokens[row])
        if (constraints is None and position >= sequence.free_from) or not work.samples[row]:
            continue
        row_edits = list(_row_edits(sequence, constraints or LogitEdits(), position))
        edits += [(row, *edit) for edit in row_edits]
    return edits


def _row_edits(sequence: Sequence, edits: LogitEdits, position: int) -> Iterator[tuple[int, int, float]]:
    """Edits for sampling the token at `position`; the host may not know the token before it yet."""
    allowed = edits.allowed
    for token in allowed or ():
        yield -1, token, 0.0
    for token, value in edits.bias:
        if allowed is None or token in allowed:
            yield -1, token, value
    if position < sequence.free_from:
        for token in sequence.stop_ids:
            if allowed is None or token in allowed:
                yield -1, token, BAN
    for word in edits.bad_words:
        yield from _bad_word_edit(word, sequence, position, allowed)


def _bad_word_edit(
    word: Ids[int], sequence: Sequence, position: int, allowed: frozenset[int] | None
) -> Iterator[tuple[int, int, float]]:
    """Ban a word's last token where the text ends in the rest of the word.

    The host compares all but the last of those tokens; whether the last one matches is left to the device (`prev`),
    since a step runs before the host has seen its input token.
    """
    *head, last = word
    if allowed is not None and last not in allowed:
        return
    if not head:
        yield -1, last, BAN
        return
    start = position - len(head)
    known = sequence.tokens[max(start, 0) : position - 1]
    if start >= 0 and np.array_equal(known, head[:-1]):
        yield head[-1], last, BAN
