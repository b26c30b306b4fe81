"""From sampled tokens to what callers see: text, stop strings, log-probabilities, finished requests. Host only."""

import time
from collections.abc import Callable

import numpy as np

from jaxserve.engine.balancer import Balancer
from jaxserve.engine.metrics import Metrics
from jaxserve.engine.results import HostScores, Results
from jaxserve.repetition import detect_repetition
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.text import Detokenizer, Tokenizer
from jaxserve.types import CompletionOutput, Logprob, PositionLogprobs, Request, RequestOutput, Sequence, Status, Work


def needs_host(request: Request) -> bool:
    """Whether each token must reach the host before the next is sampled.

    So it is with log-probabilities, and with banned words of which the device does not know all tokens but the last.
    """
    words = () if request.edits is None else request.edits.bad_words
    return request.params.logprobs is not None or any(len(word) > 2 for word in words)


def watched(request: Request) -> bool:
    """Whether its text or tokens may end it."""
    return bool(request.params.stop) or request.params.repetition_detection is not None


def streams(request: Request) -> bool:
    """Whether someone looks at the tokens as they come."""
    return request.params.output_kind is not RequestOutputKind.FINAL_ONLY


class Continuation:
    """One sequence and the text and log-probabilities made from its tokens so far.

    It does not know its record: a cycle in each request would be left to the garbage collector.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None):
        params = sequence.params
        self.sequence = sequence
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer: Detokenizer | None = None
        self._num_checked = sequence.num_prompt  # tokens in which an end was looked for
        self._num_decoded = sequence.num_prompt  # tokens given to the detokenizer
        self._num_shown = sequence.num_prompt  # tokens in earlier DELTA outputs
        self.logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0

    def end(self) -> tuple[int, str, str] | None:
        """Length, finish and stop reason where a stop string or a repetition ends it, by the first token that does."""
        sequence = self.sequence
        rule, found, length = sequence.params.repetition_detection, None, sequence.num_tokens
        if rule is not None:
            for end in range(self._num_checked + 1, length + 1):
                if detect_repetition(sequence.tokens[sequence.num_prompt : end], rule):
                    found = end, "repetition", "repetition_detected"
                    break
        self._num_checked = length
        matched = self.decode(length if found is None else found[0]) if sequence.params.stop else None
        if matched is not None and self._detokenizer is not None:
            return sequence.num_prompt + self._detokenizer.num_tokens, "stop", matched
        return None if found is None or (found[0] == length and sequence.finished) else found

    def decode(self, end: int) -> str | None:
        """Give new tokens up to a length to the detokenizer; the stop string they complete, if any."""
        if self._tokenizer is None or self._num_decoded >= end:
            return None
        return self._decode(self.sequence.tokens[self._num_decoded : end].tolist(), self._tokenizer)

    def _decode(self, new: list[int], tokenizer: Tokenizer) -> str | None:
        sequence, detokenizer = self.sequence, self._detokenizer
        if detokenizer is None:
            detokenizer = Detokenizer(tokenizer, sequence.request.prompt_token_ids, sequence.params)
            self._detokenizer = detokenizer
        self._num_decoded += len(new)
        stop_token = sequence.finish_reason == "stop" and self._num_decoded == sequence.num_tokens
        return detokenizer.update(new, stop_token)

    def delta(self) -> CompletionOutput:
        """What the last output did not hold. Its cost does not depend on how much there was before."""
        sequence, logprobs = self.sequence, self.logprobs
        start, self._num_shown = self._num_shown, sequence.num_tokens
        new = sequence.tokens[start : self._num_shown].tolist()
        if self._tokenizer is not None and new and self._num_decoded == start:
            self._decode(new, self._tokenizer)
        detokenizer = self._detokenizer
        return CompletionOutput(
            sequence.index,
            "" if detokenizer is None else detokenizer.new_text(sequence.status is Status.FINISHED),
            new,
            self.cumulative_logprob,
            None if logprobs is None else logprobs[start - sequence.num_prompt :],
            sequence.finish_reason,
            sequence.stop_reason,
        )

    def whole(self) -> CompletionOutput:
        """Everything that has been produced."""
        sequence = self.sequence
        self.decode(sequence.num_tokens)
        detokenizer = self._detokenizer
        return CompletionOutput(
            index=sequence.index,
            text="" if detokenizer is None else detokenizer.text(sequence.finished),
            token_ids=sequence.output_ids.tolist(),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )


class RequestRecord:
    """A running request: its continuations and what they share."""

    def __init__(
        self,
        request: Request,
        sequences: list[Sequence],
        tokenizer: Tokenizer | None,
        ready: Callable[[], bool],
        *,
        timed: bool,
    ):
        """`ready` says whether the caller has taken all outputs so far."""
        self.request = request
        self.ready = ready
        self.continuations = [Continuation(sequence, tokenizer) for sequence in sequences]
        self.prompt_ids: list[int] = request.prompt_token_ids.tolist()
        wanted = request.params.prompt_logprobs is not None
        self.prompt_logprobs: list[PositionLogprobs | None] | None = [None for _ in self.prompt_ids] if wanted else None
        self.error: str | None = None
        self._stats = sequences[0].stats if timed else None

    @property
    def finished(self) -> bool:
        for continuation in self.continuations:  # noqa: SIM110 (a generator costs more than the whole loop)
            if continuation.sequence.status is not Status.FINISHED:
                return False
        return True

    def output(self, changed: list[Continuation], finished: bool) -> RequestOutput | None:
        """The output due now, or None when the caller wants only the final one."""
        kind = self.request.params.output_kind
        if kind is RequestOutputKind.DELTA:
            completions = [continuation.delta() for continuation in changed]
        elif finished or kind is RequestOutputKind.CUMULATIVE:
            completions = [continuation.whole() for continuation in self.continuations]
        else:
            return None
        return RequestOutput(
            self.request.request_id,
            self.request.prompt,
            self.prompt_ids,
            completions,
            finished,
            self.prompt_logprobs,
            self._stats,
            max([continuation.sequence.num_cached for continuation in self.continuations]),
            self.error,
        )


class OutputProcessor:
    """Keeps the records of unfinished requests and turns committed steps into their outputs.

    `metrics` is None where no statistics are collected.
    """

    def __init__(self, tokenizer: Tokenizer | None, scheduler: Balancer, metrics: Metrics | None):
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._metrics = metrics
        self.records: dict[str, RequestRecord] = {}
        self._running: dict[Sequence, tuple[RequestRecord, Continuation]] = {}  # of `records`
        self._owed: dict[Continuation, RequestRecord] = {}  # got tokens while their callers were busy, in order

    def add(self, request: Request, sequences: list[Sequence], ready: Callable[[], bool]) -> None:
        """Start a record; its sequences have been given to the scheduler."""
        record = RequestRecord(request, sequences, self._tokenizer, ready, timed=self._metrics is not None)
        self.records[request.request_id] = record
        for sequence, continuation in zip(sequences, record.continuations, strict=True):
            self._running[sequence] = record, continuation

    def process(self, work: Work, results: Results, gained: list[Sequence]) -> list[RequestOutput]:
        """Outputs after a committed step; `gained` are the sequences that got tokens.

        A caller who has not taken the last output gets the next one when it has: making outputs that nobody can take in
        time would cost the steps of a crowd more than the device needs for them.
        """
        now = time.monotonic()
        for sequence in gained:
            if sequence.watched:
                self._end_at(sequence, self._running[sequence][1].end())
        if self._metrics is not None:
            self._metrics.step(work, gained, now)
        if results.prompt is not None:
            self._add_prompt_logprobs(work, results.prompt)
        if results.rows is not None:
            self._add_logprobs(work, results.rows, gained)
        outputs: list[RequestOutput | None] = []
        changed: dict[RequestRecord, list[Continuation]] = {}  # of requests with several continuations
        owed, self._owed = self._owed, {}
        for sequence in gained:
            if sequence.streams or sequence.status is Status.FINISHED:
                record, continuation = self._running[sequence]
                owed.pop(continuation, None)
                if sequence.status is not Status.FINISHED and not record.ready():
                    self._owed[continuation] = record
                elif len(record.continuations) == 1:
                    outputs.append(self._emit(record, record.continuations, now))
                else:
                    changed.setdefault(record, []).append(continuation)
        outputs += [self._emit(record, some, now) for record, some in changed.items()]
        for continuation, record in owed.items():  # of those that got nothing in this step
            if record.ready():
                outputs.append(self._emit(record, [continuation], now))
            else:
                self._owed[continuation] = record
        return [output for output in outputs if output is not None]

    def close(self, record: RequestRecord, error: str | None = None) -> RequestOutput | None:
        """The last output of a request whose sequences were ended from outside (aborted or failed)."""
        record.error = error
        return self._emit(record, record.continuations, time.monotonic())

    def _emit(self, record: RequestRecord, changed: list[Continuation], now: float) -> RequestOutput | None:
        finished = record.finished
        output = record.output(changed, finished)
        if finished and self.records.pop(record.request.request_id, None) is not None:
            for continuation in record.continuations:
                del self._running[continuation.sequence]
                self._owed.pop(continuation, None)
            if self._metrics is not None:
                self._metrics.finish([one.sequence for one in record.continuations], now)
        return output

    def _end_at(self, sequence: Sequence, end: tuple[int, str, str] | None) -> None:
        """End a sequence at a stop string or a repetition; what it has gained after that is dropped.

        It may have ended later, by its length or a token, or with the same token: then its text decides.
        """
        if end is not None:
            length, reason, stop_reason = end
            if not self._scheduler.finish(sequence, reason, stop_reason):
                sequence.finish_reason, sequence.stop_reason = reason, stop_reason
            sequence.cut(length)

    def _add_logprobs(self, work: Work, scores: HostScores, gained: list[Sequence]) -> None:
        wanted = {sequence for sequence in gained if sequence.params.logprobs is not None}
        if not wanted:
            return
        for row, sequence in enumerate(work.sequences):
            if sequence in wanted:
                _, continuation = self._running[sequence]
                token, count = int(sequence.tokens[sequence.num_tokens - 1]), sequence.params.logprobs
                entry = self._entry(scores, row, token, count or 0)
                assert continuation.logprobs is not None
                assert continuation.cumulative_logprob is not None
                continuation.logprobs.append(entry)
                continuation.cumulative_logprob += entry[token].logprob

    def _add_prompt_logprobs(self, work: Work, scores: HostScores) -> None:
        """Token `t` of a chunk scores the prompt token after it; all children of a request compute the same."""
        ends = np.cumsum(work.num_tokens)
        for row, sequence in enumerate(work.sequences):
            record = self.records.get(sequence.request.request_id)
            if record is None or record.prompt_logprobs is None:
                continue
            start, first = int(work.starts[row]), int(ends[row] - work.num_tokens[row])
            stop = min(start + int(work.num_tokens[row]), sequence.num_prompt - 1)
            for position in range(start, stop):
                token = record.prompt_ids[position + 1]
                count = sequence.params.prompt_logprobs or 0
                record.prompt_logprobs[position + 1] = self._entry(scores, first + position - start, token, count)

    def _entry(self, scores: HostScores, row: int, token: int, count: int) -> PositionLogprobs:
        """The token itself first, then the `count` most likely ones (-1: all that were computed)."""
        top_ids, top_values = scores.top_ids[row], scores.top_values[row]
        count = len(top_ids) if count < 0 else count
        entry = {token: Logprob(float(scores.value[row]), int(scores.rank[row]), self._token_text(token))}
        best = zip(top_ids[:count].tolist(), top_values[:count].tolist(), strict=True)
        for rank, (best_token, value) in enumerate(best, start=1):
            entry.setdefault(best_token, Logprob(value, rank, self._token_text(best_token)))
        return entry

    def _token_text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token)
