"""The host-side nouns: what a caller asks, what runs, what comes back. Nothing here knows about devices.

`Request` (immutable) -> `Sequence` (the one running record, owned by the scheduler) -> `Work` (who runs, how many
tokens) -> ... -> `RequestOutput`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from jaxserve.sampling_params import SamplingParams


class TextPrompt(TypedDict):
    """A prompt as text, tokenised by the engine."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt` is only echoed back."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | list[int] | TextPrompt | TokensPrompt


class Logprob(NamedTuple):
    """Log-probability of one token at one position; `rank` counts from 1 (the most likely token)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class RequestStateStats:
    """Times of one request: `arrival_time` is wall-clock seconds, the `_ts` fields are monotonic seconds."""

    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0

    @property
    def first_token_latency(self) -> float:
        """Seconds from queueing to the first generated token."""
        return self.first_token_ts - self.queued_ts


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` continuations of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # "stop", "length", "abort", "error" or "repetition"
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for end-of-sequence

    def finished(self) -> bool:
        """Whether nothing more will be generated for this continuation."""
        return self.finish_reason is not None

    def followed_by(self, later: "CompletionOutput") -> "CompletionOutput":
        """Two deltas of one continuation as one; both may be used up by it."""
        later.text = self.text + later.text
        later.token_ids = self.token_ids + later.token_ids
        if self.logprobs is not None:
            later.logprobs = self.logprobs + (later.logprobs or [])
        return later


@dataclass(slots=True)
class RequestOutput:
    """What a request has produced so far; `error` is set when it ended with `finish_reason="error"`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestStateStats | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @classmethod
    def failed(cls, request_id: str, prompt: object, error: str) -> "RequestOutput":
        """The output of a prompt that was refused before it ran."""
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
        shown = text if isinstance(text, str) else None
        return cls(request_id, shown, [], [completion], finished=True, error=error)

    def followed_by(self, later: "RequestOutput") -> "RequestOutput":
        """Two deltas of one request as one; both may be used up by it."""
        completions = {completion.index: completion for completion in self.outputs}
        for completion in later.outputs:
            before = completions.get(completion.index)
            completions[completion.index] = completion if before is None else before.followed_by(completion)
        later.outputs = list(completions.values())
        if later.prompt_logprobs is None:
            later.prompt_logprobs = self.prompt_logprobs
        return later


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """A request's token-level sampling constraints, resolved to ids.

    `bias` are (token, value) pairs; `allowed` the only tokens that may be sampled (None: all); `bad_words` the token
    sequences that must not appear.
    """

    bias: tuple[tuple[int, float], ...] = ()
    allowed: frozenset[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What the caller asked, validated and tokenised. Never changes.

    `prompt_token_ids` is int32 `[num_prompt]`. `cache_keys` are the typed extra keys of the prefix cache, such as
    `{"salt": b"..."}`; requests with different keys never share pages. `edits` is None when nothing is constrained.
    """

    request_id: str
    prompt_token_ids: np.ndarray
    params: SamplingParams
    prompt: str | None = None
    arrival_time: float = 0.0
    priority: int = 0
    cache_keys: Mapping[str, bytes] = field(default_factory=dict)
    edits: LogitEdits | None = None


class Status(Enum):
    """Where a sequence stands. A preempted sequence is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The one running record of a continuation. The scheduler owns it; only it changes the lengths and pages.

    The lengths form one chain:
    `num_cached <= num_computed <= num_tokens + num_pending <= len(tokens)`, and `num_prompt <= num_tokens`.

    Attributes:
        tokens: int32 buffer with room for the prompt and every token that may be generated.
        num_tokens: tokens whose value the host knows (prompt and generated).
        num_pending: tokens sampled by steps in flight, whose value only the device knows yet.
        num_computed: tokens whose keys and values the dispatched steps have written (or found in the prefix cache).
        num_cached: prompt tokens found in the prefix cache when the sequence was first admitted.
        needs_host: whether the host has something to do with a token before the next is sampled.
        free_from: length from which on any token may end it; those before must not.
        watched: whether the host may find its end in its text or tokens.
        streams: whether someone looks at the tokens as they come.
        seed: 64-bit seed of this continuation's random keys.
        stop_ids: token ids that end it, end-of-sequence ids included unless ignored.
        eos_ids: those of `stop_ids` that are the model's own and so are not reported as `stop_reason`.
        slot: row of the device state and of the page table, -1 while not running.
        pool: number of the page pool, and so of the copy of the model, that serves it.
    """

    request: Request
    index: int
    seed: int
    tokens: np.ndarray
    num_prompt: int
    num_tokens: int
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    num_pending: int = 0
    num_computed: int = 0
    num_cached: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of known tokens, in order
    num_registered: int = 0  # full pages already offered to the prefix cache
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_preemptions: int = 0
    stats: RequestStateStats = field(default_factory=RequestStateStats)
    needs_host: bool = True
    free_from: int = 0
    watched: bool = False
    streams: bool = False
    pool: int = 0

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def length(self) -> int:
        """Tokens that exist, known to the host or not."""
        return self.num_tokens + self.num_pending

    @property
    def num_output(self) -> int:
        """Generated tokens whose value is known."""
        return self.num_tokens - self.num_prompt

    @property
    def output_ids(self) -> np.ndarray:
        """Generated token ids known so far, int32 `[num_output]` (a view)."""
        return self.tokens[self.num_prompt : self.num_tokens]

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def cut(self, length: int) -> None:
        """Forget the tokens from there on, which the host knows, and those in flight."""
        self.num_tokens, self.num_pending = length, 0
        self.num_computed = min(self.num_computed, length)

    def check(self) -> None:
        """Assert the chain of lengths; cheap enough for property tests after every step."""
        chain = (0, self.num_computed, self.length, len(self.tokens))
        if any(low > high for low, high in itertools.pairwise(chain)) or self.num_prompt > self.num_tokens:
            raise AssertionError(f"broken lengths of {self.request.request_id}: {chain}, {self.num_prompt=}")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One step's plan: `S` sequences in row order and how many tokens each computes.

    Attributes:
        sequences: the rows, decodes (one token) and prefill chunks mixed.
        slots: int32 `[S]`, each row's slot.
        starts: int32 `[S]`, tokens computed before this step.
        num_tokens: int32 `[S]`, tokens computed in this step.
        samples: bool `[S]`, whether the row reaches its end, so that its sampled token counts.
        page_table: int32 `[max_num_seqs, pages_per_seq]`, the scheduler's table, row = slot (shared, not a copy).
        steps: decodes that run one after another before the host sees a token; above 1 every row is a decode.
    """

    sequences: list[Sequence]
    slots: np.ndarray
    starts: np.ndarray
    num_tokens: np.ndarray
    samples: np.ndarray
    page_table: np.ndarray
    steps: int = 1

    @classmethod
    def nothing(cls) -> "Work":
        """The plan of a copy of the model that has nothing to do in a step of the others."""
        none = np.zeros(0, np.int32)
        return cls([], none, none, none, np.zeros(0, np.bool_), np.zeros((1, 1), np.int32))

    def decode(self, number: int) -> "Work":
        """One of several decodes, from 0. A row that has ended before computes what nobody reads."""
        return replace(self, starts=self.starts + np.int32(number), steps=1)

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())
