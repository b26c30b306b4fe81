"""A model of everything around the scheduler: sequences, a device with pages of token ids, and what must come out."""

import zlib
from collections import deque

import numpy as np

from jaxserve.engine.pace import FREE
from jaxserve.engine.pages import Pages
from jaxserve.engine.scheduler import Scheduler
from jaxserve.sampling_params import SamplingParams
from jaxserve.types import Request, Sequence, Work

EOS, STOP, VOCAB = 0, 1, 12


def make_sequence(prompt, max_tokens=8, *, name="r", index=0, priority=0, arrival=0.0, keys=None, stops=True, **params):
    """A sequence as the engine makes it; `stops=False` never ends before its length."""
    prompt = np.asarray(prompt, np.int32)
    options = SamplingParams(max_tokens=max_tokens, **params)
    request = Request(name, prompt, options, arrival_time=arrival, priority=priority, cache_keys=keys or {})
    tokens = np.full(len(prompt) + max_tokens, -7, np.int32)
    tokens[: len(prompt)] = prompt
    stop_ids, eos_ids = (frozenset({EOS, STOP}), frozenset({EOS})) if stops else (frozenset(), frozenset())
    first = len(prompt) + options.min_tokens
    return Sequence(request, index, index, tokens, len(prompt), len(prompt), stop_ids, eos_ids, free_from=first)


def next_token(seq: Sequence, position: int) -> int:
    """The model: a token is a function of the prompt, the continuation's index and the position."""
    key = seq.request.prompt_token_ids.tobytes() + bytes([seq.index, position % 256, position // 256])
    return zlib.crc32(key) % VOCAB


def expected(seq: Sequence) -> tuple[list[int], str, int | None]:
    """All tokens, finish reason and stop reason of a sequence that nobody disturbs."""
    tokens = seq.request.prompt_token_ids.tolist()
    while True:
        token = next_token(seq, len(tokens))
        tokens.append(token)
        may_stop = len(tokens) - seq.num_prompt >= seq.params.min_tokens
        if may_stop and token in seq.stop_ids:
            return tokens, "stop", None if token == EOS else token
        if len(tokens) == len(seq.tokens):
            return tokens, "length", None


def stamp(seq: Sequence) -> int:
    """What tells the pages of one set of cache keys from those of another."""
    return VOCAB * (zlib.crc32(repr(sorted(seq.request.cache_keys.items())).encode()) + 1)


class Device:
    """Executes steps in order: pages hold stamped token ids instead of keys and values, slots the last token."""

    def __init__(self, num_pages: int, page_size: int, num_slots: int) -> None:
        self.pages = np.full((num_pages, page_size), -1)
        self.slots = np.full(num_slots, -1)

    def run(self, work: Work, truth) -> np.ndarray:
        """Write all rows' tokens, then read every row's history back and compare it; returns tokens `[steps, S]`.

        Decodes in a row start where the one before ended; a row never writes past its pages.
        """
        counts = work.num_tokens if work.steps == 1 else np.ones(len(work.sequences), np.int32)
        return np.stack([self._run_once(work, work.starts + step, counts, truth) for step in range(work.steps)])

    def _run_once(self, work: Work, starts: np.ndarray, counts: np.ndarray, truth) -> np.ndarray:
        page_size = self.pages.shape[1]
        table = work.page_table.copy()
        ends = starts + counts
        for seq, slot, start, end in zip(work.sequences, work.slots, starts, ends, strict=True):
            for position in range(start, min(end, len(seq.pages) * page_size)):
                known = position < seq.num_tokens
                token = int(seq.tokens[position] if known else self.slots[slot])
                assert known or position == end - 1
                self.pages[table[slot, position // page_size], position % page_size] = token + stamp(seq)
        sampled = np.full(len(work.sequences), VOCAB + 99, np.int64)
        for row, (seq, slot, end) in enumerate(zip(work.sequences, work.slots, ends, strict=True)):
            if end < len(seq.tokens):  # past its limit a row computes what nobody reads
                history = self.pages[table[slot]].reshape(-1)[:end] - stamp(seq)
                assert history.tolist() == truth(seq, end), f"{seq.request.request_id}: wrong history at slot {slot}"
            if work.samples[row]:
                sampled[row] = self.slots[slot] = next_token(seq, end)
        return sampled


class Engine:
    """Runs a scheduler `ahead` steps ahead of the host and checks it after every call."""

    def __init__(self, *, num_pages=32, page_size=4, ahead=1, caching=True, rules=FREE, **options) -> None:
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | options
        self.pages = Pages(num_pages, page_size, caching)
        self.scheduler = Scheduler(pages=self.pages, **options)
        self.device = Device(num_pages, page_size, options["max_num_seqs"])
        self.ahead = ahead
        self.rules = rules
        self.in_flight: deque[tuple[Work, np.ndarray]] = deque()
        self.sequences: list[Sequence] = []
        self.ended: dict[Sequence, int] = {}
        self.several = 0  # steps that held more than one decode a row
        self._true: dict[Sequence, list[int]] = {}

    def add(self, seq: Sequence) -> Sequence:
        self.scheduler.add(seq)
        self.sequences.append(seq)
        self.check()
        return seq

    def truth(self, seq: Sequence, end: int) -> list[int]:
        """The first `end` tokens of a sequence that does not stop."""
        tokens = self._true.setdefault(seq, seq.request.prompt_token_ids.tolist())
        while len(tokens) < end:
            tokens.append(next_token(seq, len(tokens)))
        return tokens[:end]

    def launch(self) -> Work | None:
        """Plan and start one step."""
        work = self.scheduler.schedule(self.rules)
        self._end(self.scheduler.take_failed())
        if work is not None:
            self._check_work(work)
            self.in_flight.append((work, self.device.run(work, self.truth)))
        self.check()
        return work

    def commit(self) -> list[Sequence]:
        """Finish the oldest step in flight, if there is one."""
        if not self.in_flight:
            return []
        work, sampled = self.in_flight.popleft()
        before = {seq: (seq.num_tokens, seq.finished) for seq in work.sequences}
        gained = self.scheduler.commit(work, np.stack(sampled))
        for seq in gained:
            assert 1 <= seq.num_tokens - before[seq][0] <= work.steps
            assert seq.finished or seq.num_tokens - before[seq][0] == work.steps
            assert not before[seq][1]
        assert all(seq in gained or before[seq] == (seq.num_tokens, seq.finished) for seq in work.sequences)
        self._end([seq for seq in gained if seq.finished])
        self.check()
        return gained

    def step(self) -> Work | None:
        """One turn of the engine's loop: start a step, then finish the one before."""
        work = self.launch()
        while len(self.in_flight) > (self.ahead if work is not None else 0):
            self.commit()
        return work

    def end(self, seq: Sequence, reason="abort", stop_reason=None) -> None:
        """Abort, or finish because of a stop string."""
        done = self.scheduler.finish(seq, reason, stop_reason)
        assert done == (seq not in self.ended)
        if done:
            self._end([seq])
        self.check()

    def drain(self) -> None:
        """Run until everything has ended, check all that must hold then, and clear the prefix cache."""
        self.drain_without_reset()
        self.check_end()

    def drain_without_reset(self) -> None:
        """Run until everything has ended, within a bound: each step gives the first running sequence one token."""
        bound = 20 + 3 * sum(len(seq.tokens) for seq in self.sequences if not seq.finished)
        for _ in range(bound):
            if not self.scheduler.has_unfinished and not self.in_flight:
                break
            self.step()
        assert not self.scheduler.has_unfinished, f"not drained within {bound} steps"

    def _end(self, sequences) -> None:
        for seq in sequences:
            self.ended[seq] = self.ended.get(seq, 0) + 1
            assert seq.finished
            assert self.ended[seq] == 1

    def _check_work(self, work: Work) -> None:
        options = self.scheduler
        assert 0 < work.total_tokens <= options._budget
        assert len(set(work.sequences)) == len(work.sequences) <= len(options.page_table)
        assert (work.num_tokens >= 1).all()
        assert [seq.slot for seq in work.sequences] == work.slots.tolist()
        if work.steps > 1:
            self.several += 1
            assert work.steps <= self.scheduler._decode_steps
            assert (work.num_tokens == 1).all()
            assert work.samples.all()
            for seq, start in zip(work.sequences, work.starts.tolist(), strict=True):
                assert not seq.needs_host
                assert not start + 1 < seq.free_from < start + 1 + work.steps
                assert not seq.streams or work.steps <= self.rules.decodes
                assert start < seq.num_computed <= min(start + work.steps, len(seq.pages) * self.pages.page_size)
                assert seq.num_computed == seq.length - 1
            return
        ends = (work.starts + work.num_tokens).tolist()
        assert ends == [seq.num_computed for seq in work.sequences]
        lengths = [seq.length - bool(samples) for seq, samples in zip(work.sequences, work.samples, strict=True)]
        assert work.samples.tolist() == [end == length for end, length in zip(ends, lengths, strict=True)]

    def check(self) -> None:
        """Nothing is broken and nothing ended unseen."""
        self.scheduler.check_integrity()
        live = [seq for seq in self.sequences if not seq.finished]
        assert len(live) == self.scheduler.num_running + self.scheduler.num_waiting
        assert len(self.ended) == len(self.sequences) - len(live)

    def check_end(self) -> None:
        """Everything ended exactly once, with the right tokens, and no page is left behind."""
        for seq in self.sequences:
            assert self.ended[seq] == 1
            assert seq.num_pending == 0
            tokens, reason, stop_reason = expected(seq)
            got = seq.tokens[: seq.num_tokens].tolist()
            if seq.finish_reason in {"abort", "error"} or seq.stop_reason == "text":
                assert got == tokens[: len(got)]
            else:
                assert (got, seq.finish_reason, seq.stop_reason) == (tokens, reason, stop_reason)
        assert self.pages.num_free == self.pages.num_pages
        assert not self.scheduler.page_table.any()
        assert self.pages.reset()
