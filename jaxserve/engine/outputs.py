"""From sampled tokens to what callers see: text, stop strings, log-probabilities, finished requests. Host only."""

import time
from collections.abc import Iterable

import numpy as np

from jaxserve.engine.metrics import Metrics
from jaxserve.engine.results import HostScores, Results
from jaxserve.engine.scheduler import Scheduler
from jaxserve.repetition import detect_repetition
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.text import Detokenizer, Tokenizer
from jaxserve.types import CompletionOutput, Logprob, PositionLogprobs, Request, RequestOutput, Sequence, Work


def needs_host(request: Request) -> bool:
    """Whether each token must reach the host before the next step is planned: someone looks at it or acts on it."""
    params = request.params
    watched = params.stop or params.repetition_detection is not None or params.logprobs is not None
    constrained = request.edits is not None or params.min_tokens > 0
    return params.output_kind is not RequestOutputKind.FINAL_ONLY or bool(watched) or constrained


class Continuation:
    """One sequence and the text and log-probabilities made from its tokens so far."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None):
        params = sequence.params
        self.sequence = sequence
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer: Detokenizer | None = None
        self._num_decoded = 0  # output tokens given to the detokenizer
        self._num_shown = 0  # output tokens and characters in earlier DELTA outputs
        self._text_shown = 0
        self.logprobs: list[PositionLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0

    def decode(self) -> str | None:
        """Give new tokens to the detokenizer; the stop string they complete, if any."""
        sequence, tokenizer = self.sequence, self._tokenizer
        if tokenizer is None:
            return None
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(tokenizer, sequence.request.prompt_token_ids, sequence.params)
        new = sequence.output_ids[self._num_decoded :]
        self._num_decoded += len(new)
        ended = sequence.finish_reason == "stop"
        return self._detokenizer.update(new, stop_token=ended) if len(new) else None

    def _text(self) -> str:
        self.decode()
        return "" if self._detokenizer is None else self._detokenizer.text(finished=self.sequence.finished)

    def output(self, kind: RequestOutputKind) -> CompletionOutput:
        """What has been produced: everything, or for DELTA what the last output did not hold."""
        text, token_ids, logprobs = self._text(), self.sequence.output_ids.tolist(), self.logprobs
        if kind is RequestOutputKind.DELTA:
            shown, start = len(token_ids), self._num_shown
            text, self._text_shown = text[self._text_shown :], len(text)
            token_ids, self._num_shown = token_ids[start:], shown
            logprobs = None if logprobs is None else logprobs[start:]
        elif logprobs is not None:
            logprobs = list(logprobs)
        return CompletionOutput(
            index=self.sequence.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=self.sequence.finish_reason,
            stop_reason=self.sequence.stop_reason,
        )


class RequestRecord:
    """A running request: its continuations and what they share."""

    def __init__(self, request: Request, sequences: list[Sequence], tokenizer: Tokenizer | None):
        self.request = request
        self.continuations = [Continuation(sequence, tokenizer) for sequence in sequences]
        self.prompt_ids: list[int] = request.prompt_token_ids.tolist()
        wanted = request.params.prompt_logprobs is not None
        self.prompt_logprobs: list[PositionLogprobs | None] | None = [None for _ in self.prompt_ids] if wanted else None
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        return all(continuation.sequence.finished for continuation in self.continuations)

    def output(self, changed: Iterable[Continuation]) -> RequestOutput | None:
        """The output due now, or None when the caller wants only the final one."""
        kind, finished = self.request.params.output_kind, self.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        shown = changed if kind is RequestOutputKind.DELTA else self.continuations
        sequences = [continuation.sequence for continuation in self.continuations]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[continuation.output(kind) for continuation in shown],
            finished=finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=sequences[0].stats,
            num_cached_tokens=max(sequence.num_cached for sequence in sequences),
            error=self.error,
        )


class OutputProcessor:
    """Keeps the records of unfinished requests and turns committed steps into their outputs."""

    def __init__(self, tokenizer: Tokenizer | None, scheduler: Scheduler, metrics: Metrics):
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._metrics = metrics
        self.records: dict[str, RequestRecord] = {}

    def add(self, request: Request, sequences: list[Sequence]) -> None:
        """Start a record; its sequences have been given to the scheduler."""
        self.records[request.request_id] = RequestRecord(request, sequences, self._tokenizer)

    def process(self, work: Work, results: Results, gained: list[Sequence]) -> list[RequestOutput]:
        """Outputs after a committed step; `gained` are the sequences that got a token."""
        now = time.monotonic()
        if results.prompt is not None:
            self._add_prompt_logprobs(work, results.prompt)
        if results.rows is not None:
            self._add_logprobs(work, results.rows, gained)
        changed: dict[str, list[Continuation]] = {}
        for sequence in gained:
            record = self.records[sequence.request.request_id]
            continuation = record.continuations[sequence.index]
            self._check_text(continuation)
            self._time(sequence, now)
            changed.setdefault(record.request.request_id, []).append(continuation)
        return [output for key, some in changed.items() if (output := self._emit(self.records[key], some, now))]

    def close(self, record: RequestRecord, error: str | None = None) -> RequestOutput | None:
        """The last output of a request whose sequences were ended from outside (aborted or failed)."""
        record.error = error
        return self._emit(record, record.continuations, time.monotonic())

    def _emit(self, record: RequestRecord, changed: list[Continuation], now: float) -> RequestOutput | None:
        output = record.output(changed)
        if record.finished and self.records.pop(record.request.request_id, None) is not None:
            first = record.continuations[0].sequence
            self._metrics.finish(first.finish_reason or "error")
            self._metrics.e2e_latency.observe(now - first.stats.queued_ts)
        return output

    def _check_text(self, continuation: Continuation) -> None:
        """End a sequence at a stop string or a repetition; decoding waits for the end when nobody looks earlier."""
        sequence = continuation.sequence
        params = sequence.params
        if params.stop and (matched := continuation.decode()) is not None and not sequence.finished:
            self._scheduler.finish(sequence, "stop", matched)
        rule = params.repetition_detection
        if rule is not None and not sequence.finished and detect_repetition(sequence.output_ids, rule):
            self._scheduler.finish(sequence, "repetition", "repetition_detected")

    def _time(self, sequence: Sequence, now: float) -> None:
        stats, metrics = sequence.stats, self._metrics
        new = sequence.num_output - stats.num_generation_tokens
        if stats.num_generation_tokens == 0:
            stats.first_token_ts = now
            metrics.prompt_tokens += sequence.num_prompt
            metrics.time_to_first_token.observe(now - stats.queued_ts)
            metrics.queue_time.observe(stats.scheduled_ts - stats.queued_ts)
        else:
            metrics.inter_token_latency.observe((now - stats.last_token_ts) / new, new)
        stats.num_generation_tokens += new
        stats.last_token_ts = now
        metrics.generation_tokens += new

    def _add_logprobs(self, work: Work, scores: HostScores, gained: list[Sequence]) -> None:
        wanted = {id(sequence) for sequence in gained if sequence.params.logprobs is not None}
        if not wanted:
            return
        for row, sequence in enumerate(work.sequences):
            if id(sequence) in wanted:
                continuation = self.records[sequence.request.request_id].continuations[sequence.index]
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
