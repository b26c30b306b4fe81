"""Reading a step's packed results on the host."""

from dataclasses import dataclass

import numpy as np

from jaxserve.batch import Bucket, Level, Limits
from jaxserve.sampling import Scores


@dataclass(frozen=True)
class Results:
    """A step's results on the host: sampled ids `[steps, S]`, scores of the rows and of the prompt if computed."""

    tokens: np.ndarray
    rows: Scores | None
    prompt: Scores | None

    @classmethod
    def read(cls, packed: np.ndarray, bucket: Bucket, limits: Limits) -> "Results":
        """Cut the packed int32 results of `step` apart."""
        sampled = bucket.steps * bucket.seqs
        tokens, rest = packed[:sampled].reshape(bucket.steps, bucket.seqs), packed[sampled:]
        rows = prompt = None
        if bucket.steps > 1:
            return cls(tokens, rows, prompt)
        if bucket.level >= Level.SAMPLE:
            rows, rest = _read_scores(rest, bucket.seqs, limits.max_logprobs)
        if bucket.level >= Level.PROMPT_LOGPROBS:
            prompt, rest = _read_scores(rest, bucket.tokens, limits.max_logprobs)
        return cls(tokens, rows, prompt)


def _read_scores(packed: np.ndarray, rows: int, k: int) -> tuple[Scores, np.ndarray]:
    value, rank, top_ids, top_values, rest = np.split(packed, np.cumsum([rows, rows, rows * k, rows * k]))
    scores = Scores(
        value.view(np.float32), rank, top_ids.reshape(rows, k), top_values.view(np.float32).reshape(rows, k)
    )  # fmt: skip
    return scores, rest
