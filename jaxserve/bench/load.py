"""The load on a server: how long requests are, when they are sent, and what they say."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.bench.workload import LARGEST_TOKEN_ID
from jaxserve.checks import check_choice, check_float, check_int, require

DISTRIBUTIONS = ("lognormal", "uniform", "fixed")
SPECIAL_TOKENS = 300  # vocabularies with special tokens or single bytes in front have them below
DRAWS = 100  # tries to draw lengths that fit, before giving up
# Short and frequent: one token each, with the blank before it, in practically every vocabulary.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its "
    "about than into them can only other time new some could these two may first then do any like my now over such "
    "our man me even most made after also did many off before must well back through years much where your way down "
    "should because long each just state those people too how little good world make very year still see own work men "
    "day get here old"
)


@dataclass(frozen=True)
class Lengths:
    """Random lengths of prompts and outputs in tokens, independent of each other.

    Attributes:
        input_len, output_len: the means.
        distribution: "lognormal" as in collections of real conversations, "uniform" or "fixed".
        sigma: standard deviation of the logarithm, for "lognormal"; 1 is about that of ShareGPT.
        range_ratio: half the width as a share of the mean, for "uniform".
        limit: most tokens of a prompt and its output together; longer pairs are drawn anew, which lowers the means.

    Raises:
        TypeError, ParameterError: a value is out of its range.
    """

    input_len: int = 220
    output_len: int = 190
    distribution: str = "lognormal"
    sigma: float = 1.0
    range_ratio: float = 0.5
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            require(check_int(name, getattr(self, name)) >= 1, name, getattr(self, name), "be 1 or more")
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        require(0 <= check_float("sigma", self.sigma) <= 4, "sigma", self.sigma, "be between 0 and 4")
        ratio = check_float("range_ratio", self.range_ratio)
        require(0 <= ratio < 1, "range_ratio", ratio, "be 0 or more and less than 1")
        shortest = self.input_len + self.output_len if self.distribution == "fixed" else 2
        rule = f"be at least {shortest}, the tokens of the shortest request"
        require(self.most >= shortest, "max_total_len", self.most, rule)

    @property
    def most(self) -> int:
        """`limit`; if there is none, 4 times the means, so that one request in a hundred is not the whole load."""
        return 4 * (self.input_len + self.output_len) if self.limit is None else check_int("max_total_len", self.limit)

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Prompt and output lengths of `count` requests.

        Raises:
            ParameterError: hardly any request fits the limit.
        """
        kept: list[tuple[int, int]] = []
        for _ in range(DRAWS):
            pairs = zip(self._some(rng, self.input_len, count), self._some(rng, self.output_len, count), strict=True)
            kept += [pair for pair in pairs if sum(pair) <= self.most]
            if len(kept) >= count:
                return kept[:count]
        require(False, "max_total_len", self.most, f"leave room for lengths {self.input_len} and {self.output_len}")
        return kept

    def _some(self, rng: np.random.Generator, mean: int, count: int) -> list[int]:
        if self.distribution == "fixed":
            return [mean] * count
        if self.distribution == "uniform":
            low, high = max(1, round(mean * (1 - self.range_ratio))), round(mean * (1 + self.range_ratio))
            return rng.integers(low, high, count, endpoint=True).tolist()
        drawn = rng.lognormal(math.log(mean) - self.sigma**2 / 2, self.sigma, count)
        return np.maximum(1, np.rint(drawn)).astype(int).tolist()


def arrival_times(rng: np.random.Generator, count: int, rate: float, burstiness: float = 1.0) -> list[float]:
    """When requests are sent, in seconds after the first, which is sent at 0.

    The gaps are gamma distributed with mean 1 / `rate` and shape `burstiness`: 1 makes the arrivals a Poisson process,
    less makes bursts, more makes them regular. With an infinite rate all are sent at once.

    Raises:
        ParameterError: a value is not above 0.
    """
    require(rate > 0, "request_rate", rate, "be above 0 requests per second, or inf for all at once")
    require(0 < burstiness < math.inf, "burstiness", burstiness, "be above 0 and finite")
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), count)
    gaps[:1] = 0.0
    return np.cumsum(gaps).tolist()


@dataclass(frozen=True)
class Request:
    """What is sent: the JSON text of the body, and what it asks for in tokens (for chat the prompt in words)."""

    body: bytes
    prompt_len: int
    output_len: int


def make_requests(
    rng: np.random.Generator,
    lengths: Sequence[tuple[int, int]],
    *,
    endpoint: str,
    vocab_size: int = LARGEST_TOKEN_ID,
    fields: dict[str, Any],
) -> list[Request]:
    """Random prompts of these lengths: token ids for completions, words for chat. `fields` are the rest of the body.

    Raises:
        ParameterError: `vocab_size` is below 2.
    """
    require(check_int("vocab_size", vocab_size) >= 2, "vocab_size", vocab_size, "be 2 or more")
    words, low = WORDS.split(), min(SPECIAL_TOKENS, vocab_size // 2)
    made = []
    for prompt_len, output_len in lengths:
        if endpoint == "chat":
            content = " ".join(words[i] for i in rng.integers(len(words), size=prompt_len))
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        else:
            prompt = {"prompt": rng.integers(low, vocab_size, prompt_len).tolist()}
        body = {"max_tokens": output_len, "stream": True, "stream_options": {"include_usage": True}} | prompt | fields
        made.append(Request(json.dumps(body).encode(), prompt_len, output_len))
    return made
