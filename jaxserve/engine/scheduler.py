"""Who runs in the next step, and what a finished step means for those who ran.

The engine plans one step ahead: `schedule()` for step n + 1 is called before `commit()` of step n. So `schedule()`
counts a token as soon as the step that samples it is planned (`Sequence.num_pending`); its value arrives later, with
`commit()`, and may end the sequence although the next step already contains it. That step's token is then dropped.
Device steps run in order, so pages and slots can change hands as soon as the host decides so.
"""

import time
from bisect import insort

import numpy as np
from jaxtyping import Int

from jaxserve.engine.pace import FREE, StreamRules, well_filled
from jaxserve.engine.pages import Pages, extend_known
from jaxserve.engine.queues import StepRows, WaitingQueue
from jaxserve.types import Sequence, Status, Work


class Scheduler:
    """Continuous batching under a token budget, with chunked prefill, prefix caching and preemption by recompute.

    Attributes:
        pages: the page pool; only running sequences hold pages.
        page_table: int32 `[max_num_seqs, pages_per_seq]`, row = slot, unused entries 0. It changes with the next
            `schedule()`, so whoever hands it to a device copies it first.
        num_preemptions: preemptions so far.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        pages: Pages,
        policy: str = "fcfs",
        enable_chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        decode_steps: int = 1,
    ) -> None:
        """Raises ValueError for limits under which some sequence could never run.

        Args:
            max_num_seqs: sequences that may run at a time.
            max_num_batched_tokens: tokens that one step may compute.
            max_model_len: the most tokens a sequence may have.
            pages: the page pool.
            policy: "fcfs", or "priority" (lower `Request.priority` first, then earlier arrival).
            enable_chunked_prefill: whether a prompt may be spread over several steps.
            long_prefill_token_threshold: the most prompt tokens of one sequence in a step; 0 is no limit.
            decode_steps: most decodes planned at once while nobody can be admitted and no sequence needs the host.
        """
        if policy not in {"fcfs", "priority"}:
            raise ValueError(f"policy={policy!r} is unknown; use 'fcfs' or 'priority'")
        if min(max_num_seqs, max_num_batched_tokens, max_model_len) < 1 or long_prefill_token_threshold < 0:
            raise ValueError(
                f"{max_num_seqs=}, {max_num_batched_tokens=} and {max_model_len=} must be at least 1, "
                f"{long_prefill_token_threshold=} at least 0"
            )
        if not enable_chunked_prefill and (max_num_batched_tokens < max_model_len or long_prefill_token_threshold):
            raise ValueError(
                f"without chunked prefill a prompt runs whole, so {max_num_batched_tokens=} must be at least "
                f"{max_model_len=} and {long_prefill_token_threshold=} must be 0; or set enable_chunked_prefill=True"
            )
        self.pages = pages
        self.page_table = np.zeros((max_num_seqs, -(-max_model_len // pages.page_size)), np.int32)
        self.num_preemptions = 0
        self._max_model_len = max_model_len
        self._budget = max_num_batched_tokens
        self._chunk = min(long_prefill_token_threshold or max_num_batched_tokens, max_num_batched_tokens)
        self._chunked = enable_chunked_prefill
        self._by_priority = policy == "priority"
        self._decode_steps = decode_steps
        self.waiting = WaitingQueue(self._by_priority)
        # In the order of admission or of priority; either way the last one is the next victim of preemption.
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._failed: list[Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._running) or len(self.waiting) > 0

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ValueError: if its prompt is empty or leaves no room for a token, or it may grow past `max_model_len`.
        """
        room = len(seq.tokens)
        if not 1 <= seq.num_prompt < room <= self._max_model_len:
            raise ValueError(
                f"request {seq.request.request_id!r} has {seq.num_prompt} prompt tokens and room for {room} in all; "
                f"it needs a prompt, room for one more token, and at most max_model_len={self._max_model_len}"
            )
        self.waiting.push(seq)

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> bool:
        """End a sequence for a reason found outside, such as a stop string. Returns False if it had ended already.

        Tokens of steps in flight are dropped; its pages and its slot are free at once.
        """
        if seq.finished:
            return False
        was_running = seq.status is Status.RUNNING
        if was_running:
            self._running.remove(seq)
            self._vacate(seq)
        seq.status = Status.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        seq.num_pending = 0
        seq.num_computed = min(seq.num_computed, seq.num_tokens)
        if not was_running:
            self.waiting.forget(seq)
        return True

    def take_failed(self) -> list[Sequence]:
        """Those that `schedule()` ended with "error" since the last call: their pages exceed the whole pool."""
        failed, self._failed = self._failed, []
        return failed

    def schedule(self, rules: StreamRules = FREE, *, decodes: int | None = None) -> Work | None:
        """Plan the next step: running sequences first, then waiting ones. None if there is nothing to compute.

        The lengths advance as if the step had run. With None while sequences are unfinished, either they wait for a
        step in flight to be committed, or all have just failed (`take_failed`). `decodes` at once, by default as many
        as there may be.
        """
        rows = StepRows()
        rows.steps = self.most_decodes(rules) if decodes is None else decodes
        if rows.steps > 1:
            self._schedule_decodes(rows)
            return rows.work(self.page_table)
        preemptions, budget = self.num_preemptions, self._step_budget(rules)
        left = self._schedule_running(rows, budget)
        if self.num_preemptions == preemptions:
            self._schedule_waiting(rows, left, budget - left)
        return rows.work(self.page_table)

    def commit(self, work: Work, tokens: Int[np.ndarray, "steps S"]) -> list[Sequence]:
        """Append the sampled tokens of a step and end the sequences that they complete.

        Args:
            work: the oldest step that has not been committed.
            tokens: integers `[steps, S]`, sampled for each row by each of `work.steps` decodes; those of rows that do
                not sample are ignored, and so is what a sequence samples after its end.

        Returns:
            The sequences that gained tokens, in row order; those ended or aborted earlier are left out.
        """
        if tokens.shape != (work.steps, len(work.sequences)):
            raise ValueError(f"tokens are {tokens.shape}, not (steps, rows) = ({work.steps}, {len(work.sequences)})")
        gained, several = [], work.steps > 1
        columns = np.ascontiguousarray(tokens.T)
        rows = columns.tolist() if several else tokens[0].tolist()
        for row, (seq, samples, new) in enumerate(zip(work.sequences, work.samples.tolist(), rows, strict=True)):
            if not samples or seq.status is Status.FINISHED:
                continue
            gained.append(seq)
            start, room = seq.num_tokens, len(seq.tokens)
            if several and start + work.steps < room and seq.stop_ids.isdisjoint(new):
                seq.tokens[start : start + work.steps] = columns[row]
                seq.num_tokens = start + work.steps
                seq.num_pending -= work.steps
            elif not several and start + 1 < room and new not in seq.stop_ids:
                seq.tokens[start] = new
                seq.num_tokens = start + 1
                seq.num_pending -= 1
            else:
                self._append_last(seq, new if several else [new])
        return gained

    def _append_last(self, seq: Sequence, new: list[int]) -> None:
        """Append tokens of which one may end the sequence; those after it are dropped."""
        for token in new:
            length = seq.num_tokens
            seq.tokens[length] = token
            seq.num_tokens = length = length + 1
            seq.num_pending -= 1
            if token in seq.stop_ids and length >= seq.free_from:
                self.finish(seq, "stop", None if token in seq.eos_ids else token)
                return
            if length == len(seq.tokens):
                self.finish(seq, "length")
                return

    def most_decodes(self, rules: StreamRules) -> int:
        """How many decodes in a row delay nobody beyond what `rules` say that streams bear; at least 1."""
        streams = any(seq.streams for seq in self._running)
        steps = min(self._decode_steps, rules.decodes) if streams else self._decode_steps
        if steps == 1 or (len(self.waiting) and self._free_slots):
            return 1
        page_size, num_rows, missing = self.pages.page_size, 0, 0
        for seq in self._running:
            left = len(seq.tokens) - seq.num_tokens - seq.num_pending
            if left:
                if seq.needs_host or len(seq.tokens) - left - seq.num_computed != 1:
                    return 1
                if seq.num_computed + 1 < seq.free_from:
                    steps = min(steps, seq.free_from - seq.num_computed - 1)
                missing += -(-(seq.num_computed + min(left, steps)) // page_size) - len(seq.pages)
                num_rows += 1
        return 1 if missing > self.pages.num_free or num_rows > self._budget else steps

    def _schedule_decodes(self, rows: StepRows) -> None:
        """Plan `rows.steps` decodes of every running sequence at once, for which there are pages.

        A sequence that ends before the others computes on; `commit` drops what it samples.
        """
        page_size = self.pages.page_size
        for seq in self._running:
            count = min(len(seq.tokens) - seq.num_tokens - seq.num_pending, rows.steps)
            if count:
                while seq.num_computed + count > len(seq.pages) * page_size:
                    self._grow(seq)
                self._plan(rows, seq, seq.num_computed, 1, True)
                seq.num_computed += count - 1
                seq.num_pending += count - 1

    def _step_budget(self, rules: StreamRules) -> int:
        """The tokens of a step, fewer beside a stream that decodes."""
        if self._chunked and any(seq.streams and seq.num_computed >= seq.num_prompt for seq in self._running):
            return rules.budget(self._budget, len(self._running), len(self._free_slots))
        return self._budget

    def _schedule_running(self, rows: StepRows, budget: int) -> int:
        """Give each running sequence what it lacks, in order; returns the budget left."""
        page_size = self.pages.page_size
        for seq in self._running:  # preemption shortens the list at its end only, which this loop allows for
            if not budget:
                break
            length = seq.num_tokens + seq.num_pending
            if length == len(seq.tokens):
                continue  # its last token is in flight
            start = seq.num_computed
            count = length - start
            if count > 1:
                count = min(count, self._chunk, budget)
            if start + count > len(seq.pages) * page_size and not self._grow(seq):
                continue
            budget -= count
            self._plan(rows, seq, start, count, start + count == length)
        return budget

    def _schedule_waiting(self, rows: StepRows, budget: int, planned: int) -> None:
        """Admit waiting sequences in order while budget, slots and pages last, beside the tokens `planned` so far."""
        free = len(self._free_slots)
        most = well_filled(planned + self.waiting.first_tokens(free), len(rows.sequences), free) - planned
        if planned and self._chunked and most > 0:
            budget = min(budget, most)
        while budget and self._free_slots:
            seq = self.waiting.peek()
            if seq is None or seq.num_pending:  # a preempted one whose token has not arrived
                return
            found = self._find_cached(seq)
            start = len(found) * self.pages.page_size
            count = min(seq.num_tokens - start, self._chunk)
            if count > budget and not self._chunked:
                return
            count = min(count, budget)
            num_new = -(-seq.num_tokens // self.pages.page_size) - len(found)
            if self.pages.fits(found, num_new):
                self._admit(seq, found, num_new)
                budget -= count
                self._plan(rows, seq, start, count, start + count == seq.num_tokens)
            elif self._running:
                return
            else:  # every page is free, yet they are too few
                self._fail(seq)

    def _plan(self, rows: StepRows, seq: Sequence, start: int, count: int, samples: bool) -> None:
        """Add a row to the step and count it as computed."""
        rows.sequences.append(seq)
        rows.starts.append(start)
        rows.counts.append(count)
        rows.samples.append(samples)
        seq.num_computed = start + count
        if samples:
            seq.num_pending += 1
        if count > 1:  # a decode's page is registered when it takes the next one
            self._register(seq)

    def _reads_cache(self, seq: Sequence) -> bool:
        """Whether cached pages may serve its prefix; scores of prompt tokens need them computed."""
        params = seq.request.params
        skips = params.skip_reading_prefix_cache or params.prompt_logprobs is not None
        return self.pages.enable_prefix_caching and not skips

    def _find_cached(self, seq: Sequence) -> list[int]:
        """Cached pages of its prefix; never all of it, since the last token's logits must be computed."""
        if not self._reads_cache(seq):
            return []
        extend_known(seq, self.pages.page_size)
        return self.pages.lookup(seq.page_hashes[: (seq.num_tokens - 1) // self.pages.page_size])

    def _admit(self, seq: Sequence, found: list[int], num_new: int) -> None:
        """Give the first waiting sequence a slot and the pages of all its known tokens."""
        self.waiting.pop()
        pages = self.pages
        pages.take(found)
        seq.pages = found + pages.allocate(num_new)
        seq.num_computed = len(found) * pages.page_size
        seq.num_registered = len(found)
        if not seq.num_preemptions:
            seq.num_cached = seq.num_computed
            seq.stats.scheduled_ts = time.monotonic()
            if self._reads_cache(seq):
                pages.queried_tokens += seq.num_tokens
                pages.hit_tokens += seq.num_cached
        seq.slot = self._free_slots.pop()
        self.page_table[seq.slot, : len(seq.pages)] = seq.pages
        seq.status = Status.RUNNING
        if self._by_priority:
            insort(self._running, seq, key=lambda running: (running.request.priority, running.request.arrival_time))
        else:
            self._running.append(seq)

    def _grow(self, seq: Sequence) -> bool:
        """Give a running sequence one more page, preempting from the end of the list; False if it cannot run now."""
        self._register(seq)
        while not self.pages.num_free:
            if self._running[-1] is not seq:
                self._preempt()
                continue
            # The last one keeps its pages until somebody before it wants them. Alone, it holds the whole pool, and only
            # a token in flight may still end it well.
            if len(self._running) == 1 and not seq.num_pending:
                self._fail(seq)
            return False
        page = self.pages.allocate(1)[0]
        self.page_table[seq.slot, len(seq.pages)] = page
        seq.pages.append(page)
        return True

    def _preempt(self) -> None:
        """Put the last running sequence back in front of the waiting ones, to be computed again from its tokens."""
        seq = self._running.pop()
        self._vacate(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(seq, first=True)

    def _fail(self, seq: Sequence) -> None:
        self.finish(seq, "error")
        self._failed.append(seq)

    def _vacate(self, seq: Sequence) -> None:
        """Take pages and slot from a running sequence; what it has computed stays findable."""
        self._register(seq)
        self.pages.release(seq.pages)
        self.page_table[seq.slot, : len(seq.pages)] = 0
        self._free_slots.append(seq.slot)
        seq.pages, seq.slot = [], -1

    def _register(self, seq: Sequence) -> None:
        """Register the full pages whose tokens are known and whose computation is planned.

        Others may use such a page in the same step: in each layer a step writes all its keys and values before it
        reads any.
        """
        num_full = min(seq.num_computed, seq.num_tokens) // self.pages.page_size
        if num_full <= seq.num_registered or not self.pages.enable_prefix_caching:
            return
        extend_known(seq, self.pages.page_size)
        for i in range(seq.num_registered, num_full):
            self.pages.register(seq.pages[i], seq.page_hashes[i])
        seq.num_registered = num_full

    def check_integrity(self) -> None:
        """Assert that lengths, slots, page table, queues and page references agree. For tests; it is slow."""
        waiting = self.waiting.all()
        if len(waiting) != len(self.waiting):
            raise AssertionError(f"{len(waiting)} sequences wait, {len(self.waiting)} are counted")
        for seq in waiting:
            seq.check()
            if seq.status is not Status.WAITING or seq.slot != -1 or seq.pages or seq.num_computed:
                raise AssertionError(f"a waiting sequence holds something: {seq}")
        table = np.zeros_like(self.page_table)
        for seq in self._running:
            seq.check()
            table[seq.slot, : len(seq.pages)] = seq.pages
            if seq.status is not Status.RUNNING or len(seq.pages) * self.pages.page_size < seq.num_computed:
                raise AssertionError(f"a running sequence lacks pages: {seq}")
        slots = [seq.slot for seq in self._running] + self._free_slots
        if sorted(slots) != list(range(len(self.page_table))) or not np.array_equal(table, self.page_table):
            raise AssertionError(f"slots lost or page table wrong: {slots=}")
        self.pages.check_integrity(seq.pages for seq in self._running)
