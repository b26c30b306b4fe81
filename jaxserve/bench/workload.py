"""What a benchmark runs."""

import random
from dataclasses import dataclass

from jaxserve.checks import check_float, check_int, require
from jaxserve.types import TokensPrompt

LARGEST_TOKEN_ID = 10_000  # most vocabularies have ordinary tokens below it


@dataclass(frozen=True)
class Workload:
    """Random prompts of `input_len` tokens that generate exactly `output_len` tokens each.

    With `range_ratio` r both lengths are uniform in `[len * (1 - r), len * (1 + r)]`. `num_prompts` is the number of
    requests of a run, None as many as are in flight.

    Raises:
        TypeError, ParameterError: a length below 1 or a ratio outside [0, 1).
    """

    input_len: int = 64
    output_len: int = 64
    range_ratio: float = 0.0
    num_prompts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            require(check_int(name, getattr(self, name)) >= 1, name, getattr(self, name), "be 1 or more")
        ratio = check_float("range_ratio", self.range_ratio)
        require(0.0 <= ratio < 1.0, "range_ratio", ratio, "be 0 or more and less than 1")
        if self.num_prompts is not None:
            number = check_int("num_prompts", self.num_prompts)
            require(number >= 1, "num_prompts", number, "be 1 or more")

    @property
    def longest(self) -> int:
        """The most tokens of one request, prompt and output."""
        return self._range(self.input_len)[1] + self._range(self.output_len)[1]

    def _range(self, length: int) -> tuple[int, int]:
        return max(1, round(length * (1 - self.range_ratio))), round(length * (1 + self.range_ratio))

    def requests(self, count: int, vocab_size: int) -> list[tuple[TokensPrompt, int]]:
        """`count` prompts and output lengths, the same for the same seed."""
        rng = random.Random(self.seed)
        largest = min(LARGEST_TOKEN_ID, vocab_size - 1)
        made = []
        for _ in range(count):
            ids = [rng.randint(0, largest) for _ in range(rng.randint(*self._range(self.input_len)))]
            made.append((TokensPrompt(prompt_token_ids=ids), rng.randint(*self._range(self.output_len))))
        return made
