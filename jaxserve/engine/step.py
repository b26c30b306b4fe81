"""The jit boundary: one pure function a step, its buckets, and their ahead-of-time compilation."""

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.batch import Bucket, Level, Limits, State, packed_size, unpack
from jaxserve.models.decoder import CausalLM
from jaxserve.sampling import Scores, sample, score

logger = logging.getLogger(__name__)

PROMPT_BLOCK = 64  # prompt positions whose logits exist at one time
MIN_MIXED_TOKENS = 16
FEW_SEQUENCES = 16
MIN_EDITS = 1024

WASTE = 4  # a program this many times too large runs rather than compiling the right one between two steps

Merge = Callable[[tuple[Array, ...]], CausalLM]


class ScoreMode(NamedTuple):
    """`logprobs_mode` taken apart: before or after the processors, log-probabilities or logits."""

    processed: bool
    as_logprobs: bool

    @classmethod
    def parse(cls, mode: str) -> "ScoreMode":
        """From `raw_logprobs`, `processed_logprobs`, `raw_logits` or `processed_logits`."""
        stage, _, kind = mode.partition("_")
        return cls(stage == "processed", kind == "logprobs")


def step(
    model: CausalLM, state: State, buffer: Int[Array, "words"], bucket: Bucket, limits: Limits, mode: ScoreMode
) -> tuple[State, Int[Array, "results"]]:
    """Run one batch: embed, layers, logits of each row's last token, sample, remember the samples.

    Returns the new state and every result in one int32 array; `Results` reads it back.
    """
    batch = unpack(buffer, bucket, limits)
    chunks = batch.chunks
    carried = state.last_token.at[batch.slots[batch.row_ids]].get(mode="clip")
    ids = jnp.where(batch.token_ids >= 0, batch.token_ids, carried)
    tokens = state.tokens.at[chunks.pages, chunks.offsets].set(ids, mode="drop")
    hidden, cache = model(ids, chunks, state.cache)
    last_row = jnp.maximum(chunks.cu_q_lens[1:] - 1, 0)
    logits = model.logits(hidden[last_row])
    if batch.sampling is None or batch.edits is None:
        sampled = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        results = [sampled]
    else:
        with jax.named_scope("sample"):
            sampled, processed = sample(logits, batch.sampling, batch.edits, ids[last_row], tokens, chunks)
        shown = processed if mode.processed else logits
        results = [sampled, *_row_scores(shown, sampled, batch.sampling.logprobs, limits, mode)]
    if batch.targets is not None:
        results += _prompt_scores(model, hidden, batch.targets, limits, mode)
    last_token = state.last_token.at[batch.slots].set(sampled, mode="drop")
    return State(cache, tokens, last_token), jnp.concatenate([_bits(x) for x in results])


def _bits(x: Array) -> Int[Array, "n"]:
    return (lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x).reshape(-1)


def _row_scores(
    logits: Float[Array, "S V"], sampled: Int[Array, "S"], wanted: Array, limits: Limits, mode: ScoreMode
) -> Scores:
    s, k = sampled.shape[0], limits.max_logprobs
    nothing = Scores(
        jnp.zeros(s, jnp.float32), jnp.zeros(s, jnp.int32), jnp.zeros((s, k), jnp.int32), jnp.zeros((s, k), jnp.float32)
    )
    return lax.cond(
        jnp.any(wanted), lambda: score(logits, sampled, k, as_logprobs=mode.as_logprobs), lambda: nothing
    )  # fmt: skip


def _prompt_scores(
    model: CausalLM, hidden: Float[Array, "T D"], targets: Int[Array, "T"], limits: Limits, mode: ScoreMode
) -> Scores:
    """Scores of the prompt's own tokens, a block of positions at a time: `[T, V]` logits never exist."""
    t = hidden.shape[0]
    block = min(PROMPT_BLOCK, t)
    pad = -t % block
    blocks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, block, hidden.shape[1])
    ids = jnp.pad(targets, (0, pad), constant_values=-1).reshape(-1, block)

    def one(block_inputs: tuple[Array, Array]) -> Scores:
        rows, wanted = block_inputs
        logits = model.logits(rows)
        return score(logits, jnp.maximum(wanted, 0), limits.max_logprobs, as_logprobs=mode.as_logprobs)

    scores = lax.map(one, (blocks, ids))
    return Scores(*(x.reshape(-1, *x.shape[2:])[:t] for x in scores))


@dataclass(frozen=True)
class Results:
    """A step's results on the host: sampled ids `[S]`, and scores of the rows and of the prompt tokens if computed."""

    tokens: np.ndarray
    rows: Scores | None
    prompt: Scores | None

    @classmethod
    def read(cls, packed: np.ndarray, bucket: Bucket, limits: Limits) -> "Results":
        """Cut the packed int32 results of `step` apart."""
        tokens, rest = packed[: bucket.seqs], packed[bucket.seqs :]
        rows = prompt = None
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


def _powers(start: int, stop: int) -> list[int]:
    """Powers of two from `start`, ending with `stop` itself."""
    sizes = [start]
    while sizes[-1] < stop:
        sizes.append(min(sizes[-1] * 2, stop))
    return sizes


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Buckets:
    """The short list of step shapes: decodes by sequences, mixed steps by tokens with few or with all sequences."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int):
        self._decode = _powers(1, max_num_seqs)
        self._tokens = _powers(min(MIN_MIXED_TOKENS, max_num_batched_tokens), max_num_batched_tokens)
        self._max_seqs = max_num_seqs

    def choose(self, tokens: int, seqs: int, level: Level, edits: int) -> Bucket:
        """The smallest bucket that holds a step."""
        size = 0 if level is Level.GREEDY else max(MIN_EDITS, _next_power(edits))
        if tokens == seqs and level < Level.PROMPT_LOGPROBS:
            s = self._decode[bisect.bisect_left(self._decode, seqs)]
            return Bucket(s, s, level, size)
        few = min(FEW_SEQUENCES, self._max_seqs)
        s = few if seqs <= few else self._max_seqs
        t = self._tokens[bisect.bisect_left(self._tokens, tokens)]
        return Bucket(max(t, _next_power(s + 1)), s, level, size)  # T == S would say that all rows are decodes

    def all(self) -> list[Bucket]:
        """Every common bucket, small ones first."""
        found = set()
        for level in (Level.GREEDY, Level.SAMPLE):
            found |= {self.choose(s, s, level, 0) for s in self._decode}
            for tokens in self._tokens:
                found |= {self.choose(tokens, s, level, 0) for s in (1, min(self._max_seqs, tokens - 1)) if s}
        return sorted(found)

    @property
    def largest(self) -> Bucket:
        """The bucket that needs the most working memory."""
        return max(self.all(), key=lambda bucket: (bucket.tokens, bucket.seqs, bucket.level))


class CompileCounts:
    """How often programs were compiled; `after_warmup` is a defect count."""

    def __init__(self) -> None:
        self.total = 0
        self.after_warmup = 0
        self.seconds = 0.0
        self.warm = False


class Programs:
    """The compiled steps, by bucket. Compilation is ahead of time and may run in parallel threads."""

    def __init__(
        self,
        merge: Merge,
        leaves: tuple[Array, ...],
        limits: Limits,
        mode: ScoreMode,
        abstract_state: State,
        *,
        threads: int,
        options: dict[str, bool | int | str] | None = None,
    ):
        self._merge = merge
        self._leaves = leaves
        self._limits = limits
        self._mode = mode
        self._abstract_state = abstract_state
        self._options = options
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
        self._programs: dict[Bucket, Future] = {}
        self._lock = threading.RLock()  # re-entrant: cancelling a future runs its callbacks
        self.counts = CompileCounts()

    def _compile(self, bucket: Bucket) -> jax.stages.Compiled:
        start = time.perf_counter()

        def program(leaves: tuple[Array, ...], state: State, buffer: Array) -> tuple[State, Array]:
            return step(self._merge(leaves), state, buffer, bucket, self._limits, self._mode)

        abstract_leaves = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._leaves
        )
        buffer = jax.ShapeDtypeStruct((packed_size(bucket, self._limits),), jnp.int32)
        lowered = jax.jit(program, donate_argnums=1).lower(abstract_leaves, self._abstract_state, buffer)
        compiled = lowered.compile(self._options)
        self._count(bucket, time.perf_counter() - start)
        return compiled

    def _count(self, bucket: Bucket, seconds: float) -> None:
        with self._lock:
            self.counts.total += 1
            self.counts.seconds += seconds
            late = self.counts.warm
            self.counts.after_warmup += late
        log = logger.warning if late else logger.info
        log("compiled %s in %.1f s%s", bucket, seconds, " after warm-up" if late else "")

    def submit(self, bucket: Bucket) -> Future:
        """Start compiling a bucket unless that has been done; the future holds the compiled program."""
        with self._lock:
            if bucket not in self._programs:
                self._programs[bucket] = self._pool.submit(self._compile, bucket)
            return self._programs[bucket]

    def get(self, bucket: Bucket) -> jax.stages.Compiled:
        """The program of a bucket, compiled on the spot if need be (ahead of anything queued)."""
        with self._lock:
            future = self._programs.get(bucket)
            if future is None or (not future.done() and future.cancel()):
                future = self._programs[bucket] = Future()
                mine = True
            else:
                mine = False
        if mine:
            try:
                future.set_result(self._compile(bucket))
            except Exception as error:
                with self._lock:
                    del self._programs[bucket]
                future.set_exception(error)
        return future.result()

    def choose(self, bucket: Bucket) -> Bucket:
        """The bucket itself, or a compiled one up to `WASTE` times as large that spares compiling it now."""
        with self._lock:
            exact = self._programs.get(bucket)
            if exact is not None and exact.done():
                return bucket
            ready = [known for known, program in self._programs.items() if program.done() and known.covers(bucket)]
        best = min(ready, default=bucket, key=lambda known: (known.tokens, known.seqs, known.level, known.edits))
        return best if best.tokens <= WASTE * bucket.tokens and best.seqs <= WASTE * bucket.seqs else bucket

    def warm_up(self, buckets: Iterable[Bucket], *, wait: bool) -> None:
        """Compile the buckets; without `wait` in the background, and then only later compilations count as late."""
        futures = [self.submit(bucket) for bucket in buckets]
        if wait:
            for future in futures:
                future.result()
            self.counts.warm = True
            return
        remaining = len(futures)

        def finished(_: Future) -> None:
            nonlocal remaining
            with self._lock:
                remaining -= 1
                self.counts.warm = remaining == 0

        for future in futures:
            future.add_done_callback(finished)

    def close(self) -> None:
        """Drop what is queued and wait for what is being compiled."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, state: State, buffer: np.ndarray, bucket: Bucket) -> tuple[State, Array]:
        """Launch one step; returns at once, `state` is consumed."""
        return self.get(bucket)(self._leaves, state, buffer)
