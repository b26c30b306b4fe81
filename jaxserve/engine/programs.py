"""The programs of an engine: which step shapes there are, and their ahead-of-time compilation."""

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxserve.batch import Bucket, Level, Limits, State, packed_size
from jaxserve.engine.step import ScoreMode, step
from jaxserve.models.decoder import CausalLM

logger = logging.getLogger(__name__)

MIN_MIXED_TOKENS = 16
MIN_EDITS = 1024
WASTE = 4  # a program this many times too large runs rather than compiling the right one between two steps

Merge = Callable[[tuple[Array, ...]], CausalLM]


def _powers(start: int, stop: int) -> list[int]:
    """Powers of two from `start`, ending with `stop` itself."""
    sizes = [start]
    while sizes[-1] < stop:
        sizes.append(min(sizes[-1] * 2, stop))
    return sizes


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _sparse(sizes: list[int]) -> list[int]:
    """The fewest of these ascending sizes that leave none with a substitute more than `WASTE` times as large."""
    kept = []
    for size in sizes:
        if not kept or size > kept[-1]:
            kept.append(max(other for other in sizes if other <= WASTE * size))
    return kept


class Buckets:
    """The short list of step shapes: decodes by sequences, mixed steps by tokens with room for half as many sequences.

    Accelerators decode a few padding rows for nothing, since the weights bound the step: small decodes share buckets,
    and so do those with rare sampling parameters. A branch at run time costs them much, so there plain random sampling
    (level DRAW) has decodes of its own; elsewhere level SAMPLE serves it.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, decode_steps: int, *, accelerator: bool):
        self._steps = decode_steps
        self._max_seqs = max_num_seqs
        powers = _powers(1, max_num_seqs)
        self._accelerator = accelerator
        small = powers[1:6:2] if accelerator else []  # 2, 8 and 32 run as 4, 16 and 64
        self._decode = [size for size in powers if size not in small or size == max_num_seqs]
        most = max(max_num_batched_tokens, _next_power(2 * min(max_num_seqs, max_num_batched_tokens)))
        self._tokens = _powers(min(MIN_MIXED_TOKENS, most), most)

    def choose(self, tokens: int, seqs: int, level: Level, edits: int, steps: int = 1) -> Bucket:
        """The smallest bucket that holds a step (or `steps` decodes in a row)."""
        decode = tokens == seqs and level < Level.PROMPT_LOGPROBS
        if level is Level.DRAW and not (decode and self._accelerator):
            level = Level.SAMPLE
        size = 0 if level < Level.SAMPLE else max(MIN_EDITS, _next_power(edits))
        if decode:
            s = self._decode[bisect.bisect_left(self._decode, seqs)]
            return Bucket(s, s, level, size, steps)
        t = self._tokens[bisect.bisect_left(self._tokens, tokens)]
        return self._mixed(max(t, _next_power(2 * seqs)), level, size)

    def _mixed(self, tokens: int, level: Level, edits: int) -> Bucket:
        """T == S would say that all rows are decodes, so there are fewer sequences than tokens."""
        return Bucket(max(tokens, 2), min(self._max_seqs, max(tokens // 2, 1)), level, edits)

    def all(self) -> list[Bucket]:
        """Every common bucket, small ones first."""
        rare = _sparse(self._decode) if self._accelerator else self._decode
        decodes = [(s, level) for s in self._decode for level in (Level.GREEDY, Level.DRAW)]
        decodes += [(s, Level.SAMPLE) for s in rare]
        found = {self.choose(s, s, level, 0, steps) for s, level in decodes for steps in (1, self._steps)}
        return sorted(found | {self._mixed(tokens, Level.SAMPLE, MIN_EDITS) for tokens in self._tokens})

    @property
    def largest(self) -> Bucket:
        """The bucket that needs the most working memory."""
        return max(self.all(), key=Bucket.cost)


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
    ):
        self._merge = merge
        self._leaves = leaves
        self._limits = limits
        self._mode = mode
        self._abstract_state = abstract_state
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
        compiled = lowered.compile()
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
        best = min(ready, default=bucket, key=Bucket.cost)
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
