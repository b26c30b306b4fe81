"""The programs of an engine: which step shapes there are, and their ahead-of-time compilation."""

import bisect
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from enum import IntEnum

import jax
from tqdm import tqdm

from jaxserve.batch import Bucket, Level

logger = logging.getLogger(__name__)

MIN_MIXED_TOKENS = 16
FREE_TOKENS = 256  # up to about so many the weights bound a step of an accelerator: mixed sizes below are 4 apart
COSTLY_SEQS = 256  # decodes of so many take longer than those of fewer: sizes above half of it are 1.5 apart
MIN_EDITS = 1024
WASTE = 4  # a program this many times too large runs rather than compiling the right one between two steps


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
    large ones have more of them, and those with rare sampling parameters fewer. A branch at run time costs them much,
    so there plain random sampling (level DRAW) has decodes of its own; elsewhere level SAMPLE serves it. A TPU works on
    eight rows or more at a time: `smallest` decodes spare it the programs below.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        decode_steps: int,
        *,
        accelerator: bool,
        smallest: int = 1,
    ):
        self._steps = decode_steps
        self._max_seqs = max_num_seqs
        powers = _powers(min(smallest, max_num_seqs), max_num_seqs)
        self._accelerator = accelerator
        small = (2, 8) if accelerator and smallest == 1 else ()  # they run as 4 and 16
        middle = {3 * size // 4 for size in powers if accelerator and size >= COSTLY_SEQS and size.bit_count() == 1}
        kept = {size for size in powers if size not in small or size == max_num_seqs}
        self._decode = sorted(kept | middle)
        most = max(max_num_batched_tokens, _next_power(2 * min(max_num_seqs, max_num_batched_tokens)))
        self._tokens = _powers(min(MIN_MIXED_TOKENS, most), most)
        if accelerator:
            self._tokens = [t for t in self._tokens if t == most or t > FREE_TOKENS or t in (64, FREE_TOKENS)]

    def choose(self, tokens: int, seqs: int, level: Level, edits: int, steps: int = 1) -> Bucket:
        """The smallest bucket that holds a step, or `steps` decodes in a row (or one if no program has so many)."""
        decode = tokens == seqs and level < Level.PROMPT_LOGPROBS
        if level is Level.DRAW and not (decode and self._accelerator):
            level = Level.SAMPLE
        size = 0 if level < Level.SAMPLE else max(MIN_EDITS, _next_power(edits))
        if decode:
            s = self._decode[bisect.bisect_left(self._decode, seqs)]
            return Bucket(s, s, level, size, steps if steps == self._steps else 1)
        t = self._tokens[bisect.bisect_left(self._tokens, tokens)]
        return self._mixed(max(t, _next_power(2 * seqs)), level, size)

    def _mixed(self, tokens: int, level: Level, edits: int) -> Bucket:
        """T == S would say that all rows are decodes, so there are fewer sequences than tokens."""
        return Bucket(max(tokens, 2), min(self._max_seqs, max(tokens // 2, 1)), level, edits)

    def all(self) -> list[Bucket]:
        """Every common bucket: what greedy requests need before the rest, and small ones first.

        The rest ends with mixed steps of greedy requests alone, for which those that sample would do.
        """
        rare = _sparse(self._decode) if self._accelerator else self._decode
        decodes = [(s, level) for s in self._decode for level in (Level.GREEDY, Level.DRAW)]
        decodes += [(s, Level.SAMPLE) for s in rare]
        found = {self.choose(s, s, level, 0, steps) for s, level in decodes for steps in (1, self._steps)}
        mixed = {self._mixed(tokens, Level.SAMPLE, MIN_EDITS) for tokens in self._tokens}
        greedy = {self._mixed(tokens, Level.GREEDY, 0) for tokens in self._tokens if self._accelerator}
        rank = dict.fromkeys(mixed, Level.GREEDY) | dict.fromkeys(greedy, Level.SAMPLE)
        return sorted(found | mixed | greedy, key=lambda bucket: (rank.get(bucket, bucket.level), bucket))

    def essential(self) -> list[Bucket]:
        """The few that cover all common ones: the largest of mixed steps first, which prompts need, then of decodes."""
        kinds: dict[tuple[bool, int], Bucket] = {}
        for bucket in self.all():
            kind = (bucket.decode_only, bucket.steps)
            kinds[kind] = max(kinds.get(kind, bucket), bucket, key=Bucket.cost)
        return [kinds[kind] for kind in sorted(kinds)]

    @property
    def largest(self) -> Bucket:
        """The bucket that needs the most working memory."""
        return max(self.all(), key=Bucket.cost)


class Rank(IntEnum):
    """What is compiled first."""

    STOP = 0  # nothing more
    WANTED = 1  # by a step that has to make do with a larger program
    WARM_UP = 2


class CompileCounts:
    """How often programs were compiled; `after_warmup`, those that a step waited for then, is a defect count."""

    def __init__(self) -> None:
        self.total = 0
        self.after_warmup = 0
        self.seconds = 0.0
        self.warm = False


class Programs:
    """The compiled steps, by bucket. Compilation is ahead of time and in parallel threads."""

    def __init__(
        self,
        compile_bucket: Callable[[Bucket], jax.stages.Compiled],
        *,
        threads: int,
        background: bool = False,
        when_warm: Callable[[], None] | None = None,
    ):
        """`background` compiles what a step would have liked to have beside the steps, never between two of them."""
        self._compile_bucket = compile_bucket
        self._background = background
        self._when_warm = when_warm
        self._programs: dict[Bucket, Future] = {}
        self._warming: set[Future] = set()  # programs of the warm-up that are not done
        self._then: list[Bucket] = []  # warmed up after these
        self._wanted: set[Bucket] = set()  # buckets that moved up
        self._lock = threading.RLock()  # re-entrant: cancelling a future runs its callbacks
        self._queue: queue.PriorityQueue[tuple[Rank, int, Bucket | None]] = queue.PriorityQueue()
        self._count = itertools.count()
        self.counts = CompileCounts()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="compile") for _ in range(threads)]
        for thread in self._threads:
            thread.start()
        # A process that ends must not pull the ground from under a compiler at work.
        self._stop = weakref.finalize(self, _stop, self._queue, self._threads)

    def _work(self) -> None:
        """A thread's life: compile what is most urgent, until told to stop."""
        while (bucket := self._queue.get()[2]) is not None:
            with self._lock:
                future = self._programs[bucket]
                if future.running() or future.done() or not future.set_running_or_notify_cancel():
                    continue  # asked for twice, or compiled by who needed it
            try:
                future.set_result(self._compile(bucket, beside=True))
            except Exception as error:
                future.set_exception(error)

    def _compile(self, bucket: Bucket, *, beside: bool) -> jax.stages.Compiled:
        """Compile beside the steps, or while one waits, which after the warm-up should not happen."""
        start = time.perf_counter()
        compiled = self._compile_bucket(bucket)
        seconds = time.perf_counter() - start
        with self._lock:
            self.counts.total += 1
            self.counts.seconds += seconds
            late = self.counts.warm and not beside
            self.counts.after_warmup += late
        if late:
            logger.warning("compiled %s in %.1f s after warm-up", bucket, seconds)
        else:
            logger.debug("compiled %s in %.1f s", bucket, seconds)
        return compiled

    def submit(self, bucket: Bucket, rank: Rank = Rank.WARM_UP) -> Future:
        """Start compiling a bucket unless that has been done; the future holds the compiled program.

        One that is queued moves up if it is asked for with a more urgent rank.
        """
        with self._lock:
            future = self._programs.get(bucket)
            if future is None:
                future = self._programs[bucket] = Future()
                future.add_done_callback(lambda done: _say_failure(bucket, done))
            elif rank is Rank.WARM_UP or bucket in self._wanted:
                return future
            if rank is Rank.WANTED:
                self._wanted.add(bucket)
            self._queue.put((rank, next(self._count), bucket))
            return future

    def get(self, bucket: Bucket) -> jax.stages.Compiled:
        """The program of a bucket, compiled on the spot if need be (ahead of anything queued)."""
        with self._lock:
            future = self._programs.get(bucket)
            if future is None or (not future.done() and future.cancel()):
                future = self._programs[bucket] = Future()
                future.set_running_or_notify_cancel()
                mine = True
            else:
                mine = False
        if mine:
            try:
                future.set_result(self._compile(bucket, beside=False))
            except Exception as error:
                with self._lock:
                    del self._programs[bucket]
                future.set_exception(error)
        return future.result()

    def choose(self, bucket: Bucket) -> Bucket:
        """The bucket itself, or one that covers it and whose program is ready.

        In the background mode any such program will do while the bucket's own is being compiled. Otherwise one up to
        `WASTE` times as large spares compiling the right one between two steps. While something that covers the bucket
        is on its way and nothing is ready, this waits for it.
        """
        while True:
            with self._lock:
                if _is_ready(self._programs.get(bucket)):
                    return bucket
                covering = {known: future for known, future in self._programs.items() if known.covers(bucket)}
                ready = [known for known, future in covering.items() if _is_ready(future)]
                best = min(ready, default=None, key=Bucket.cost)
                if best is not None and self._background:
                    self.submit(bucket, Rank.WANTED)
                    return best
                coming = [future for future in covering.values() if not future.done()]
            if best is not None and best.tokens <= WASTE * bucket.tokens and best.seqs <= WASTE * bucket.seqs:
                return best
            if not coming or best is not None:
                return bucket
            wait(coming, return_when=FIRST_COMPLETED)

    def warm_up(self, buckets: Sequence[Bucket], then: Sequence[Bucket] = ()) -> None:
        """Start compiling these, in this order, and when they are there what comes `then`.

        Once all are there, a step that waits for another one is a defect.
        """
        with self._lock:
            futures = [self.submit(bucket) for bucket in buckets]
            self._warming.update(futures)
            self._then += then
        for future in futures:
            future.add_done_callback(self._warmed)

    def _warmed(self, future: Future) -> None:
        with self._lock:
            self._warming.discard(future)
            if self._warming or future.cancelled():
                return
            if self._then:
                self.warm_up(self._take_rest())
                return
            self.counts.warm = True
            logger.info("all %d programs are ready", sum(map(_is_ready, self._programs.values())))
        if self._when_warm is not None:
            self._when_warm()

    def _take_rest(self) -> list[Bucket]:
        rest, self._then = self._then, []
        return rest

    def wait(self, buckets: Iterable[Bucket], *, show_progress: bool) -> int:
        """Wait for these programs; returns the most working memory that one of them needs, in bytes.

        Raises:
            Exception: what the compiler raised for one of them.
        """
        futures = [self.submit(bucket) for bucket in buckets]
        done = as_completed(futures)
        bar = tqdm(done, total=len(futures), desc="Compiling programs", unit="program", disable=not show_progress)
        found = [future.result().memory_analysis() for future in bar]
        return max((analysis.temp_size_in_bytes for analysis in found if analysis is not None), default=0)

    def drop(self) -> None:
        """Compile nothing more; what is being compiled ends beside whatever comes next."""
        with self._lock:
            self._then.clear()
            for future in list(self._programs.values()):
                future.cancel()
        for _ in self._threads:
            self._queue.put((Rank.STOP, 0, None))

    def close(self) -> None:
        """Drop what is queued and wait for what is being compiled."""
        self.drop()
        self._stop()


def _stop(tasks: queue.PriorityQueue, threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put((Rank.STOP, 0, None))
    for thread in threads:
        thread.join()


def _say_failure(bucket: Bucket, future: Future) -> None:
    """A larger program may go on serving, so that nobody else would say why this one is missing."""
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("compiling %s failed: %s", bucket, error)


def _is_ready(future: Future | None) -> bool:
    return future is not None and future.done() and not future.cancelled() and future.exception() is None
