"""Reading a step's packed results on the host."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxserve.batch import Bucket, Level, Limits


class HostScores(NamedTuple):
    """`jaxserve.sampling.Scores` on the host: of `R` positions, for the token itself and the `k` best."""

    value: Float[np.ndarray, "R"]
    rank: Int[np.ndarray, "R"]  # from 1
    top_ids: Int[np.ndarray, "R k"]
    top_values: Float[np.ndarray, "R k"]


@dataclass(frozen=True)
class Results:
    """A step's results on the host: sampled ids `[steps, rows]`, scores of rows and of the prompt if computed."""

    tokens: np.ndarray
    rows: HostScores | None
    prompt: HostScores | None

    @classmethod
    def read(cls, packed: np.ndarray, bucket: Bucket, limits: Limits, rows: int) -> "Results":
        """Cut the packed int32 results of `step` apart; of the bucket's sequences the first `rows` are no padding."""
        sampled = bucket.steps * bucket.seqs
        tokens, rest = packed[:sampled].reshape(bucket.steps, bucket.seqs)[:, :rows], packed[sampled:]
        scores = prompt = None
        if bucket.steps > 1:
            return cls(tokens, scores, prompt)
        if bucket.level >= Level.SAMPLE:
            scores, rest = _read_scores(rest, bucket.seqs, limits.max_logprobs)
        if bucket.level >= Level.PROMPT_LOGPROBS:
            prompt, rest = _read_scores(rest, bucket.tokens, limits.max_logprobs)
        return cls(tokens, scores, prompt)


def _read_scores(packed: np.ndarray, rows: int, k: int) -> tuple[HostScores, np.ndarray]:
    value, rank, top_ids, top_values, rest = np.split(packed, np.cumsum([rows, rows, rows * k, rows * k]))
    scores = HostScores(
        value.view(np.float32), rank, top_ids.reshape(rows, k), top_values.view(np.float32).reshape(rows, k)
    )  # fmt: skip
    return scores, rest
