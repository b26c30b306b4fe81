"""What the engine counts, and the snapshot `get_metrics` returns."""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxserve.types import Sequence, Work

PREFIX = "jaxserve:"
# Upper bounds as vLLM's, so that its rules and dashboards find theirs; before them some for what is faster here.
FIRST_TOKEN_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                       20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
                 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
REQUEST_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0,
                   20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, ... up to `most` tokens."""
    return tuple(m * 10**power for power in range(len(str(most))) for m in (1, 2, 5) if m * 10**power <= most)


def distributions(max_model_len: int) -> dict[str, "Distribution"]:
    """All that is observed, under vLLM's names; `max_model_len` is the most tokens that a request can have."""
    tokens = token_bounds(max_model_len)
    bounds = {
        "time_to_first_token_seconds": FIRST_TOKEN_SECONDS,
        "inter_token_latency_seconds": TOKEN_SECONDS,
        "e2e_request_latency_seconds": REQUEST_SECONDS,
        "request_queue_time_seconds": REQUEST_SECONDS,
        "iteration_tokens_total": STEP_TOKENS,
        "request_prompt_tokens": tokens,
        "request_prefill_kv_computed_tokens": tokens,
        "request_generation_tokens": tokens,
        "request_max_num_generation_tokens": tokens,
        "request_params_n": CHOICES,
        "request_params_max_tokens": tokens,
        "request_time_per_output_token_seconds": TOKEN_SECONDS,
        "request_prefill_time_seconds": REQUEST_SECONDS,
        "request_decode_time_seconds": REQUEST_SECONDS,
        "request_inference_time_seconds": REQUEST_SECONDS,
    }
    return {name: Distribution(own) for name, own in bounds.items()}


@dataclass(frozen=True)
class Metric:
    """A named number of the engine at one moment."""

    name: str
    labels: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Counter(Metric):
    """A count, or seconds in all, that only grows."""

    value: int | float


@dataclass(frozen=True)
class Gauge(Metric):
    """A value that goes up and down."""

    value: float | int


@dataclass(frozen=True)
class Vector(Metric):
    """Several counts under one name, by position."""

    values: list[int]


@dataclass(frozen=True)
class Histogram(Metric):
    """Observations by upper bound, cumulative as in Prometheus; `sum` is their total."""

    count: int
    sum: float | int
    buckets: dict[str, int]


class Distribution:
    """Observations sorted into fixed bounds."""

    def __init__(self, bounds: tuple[float | int, ...]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float | int, times: int = 1) -> None:
        """Add `times` observations of `value`."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def snapshot(self, name: str) -> Histogram:
        """The distribution so far."""
        total, buckets = 0, {}
        for bound, count in zip([*(str(float(own)) for own in self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets[bound] = total
        return Histogram(name, total, self._sum, buckets)


class Metrics:
    """Running totals of one engine; the loop adds to them, nothing else does."""

    def __init__(self, max_model_len: int) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of those
        self.generation_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.steps = 0
        self.device_wait_seconds = 0.0  # in which the host had nothing to do but to wait for results
        self.observed = distributions(max_model_len)

    def step(self, work: Work, gained: Iterable[Sequence], now: float) -> None:
        """Count a finished step, several where decodes ran in a row, and note when each sequence got its tokens.

        Sequences that got their last tokens together have equal gaps, which are counted together.
        """
        self.steps += work.steps
        observed = self.observed
        observed["iteration_tokens_total"].observe(work.total_tokens, work.steps)
        gaps: dict[tuple[float, int], int] = {}
        for sequence in gained:
            stats = sequence.stats
            total = sequence.num_tokens - sequence.num_prompt
            new = total - stats.num_generation_tokens
            if new < total:
                key = (stats.last_token_ts, new)
                gaps[key] = gaps.get(key, 0) + new
            else:
                stats.first_token_ts = now
                self.prompt_tokens += sequence.num_prompt
                self.cached_tokens += sequence.num_cached
                observed["time_to_first_token_seconds"].observe(now - stats.queued_ts)
                observed["request_queue_time_seconds"].observe(stats.scheduled_ts - stats.queued_ts)
            stats.num_generation_tokens = total
            stats.last_token_ts = now
            self.generation_tokens += new
        for (last, new), times in gaps.items():
            observed["inter_token_latency_seconds"].observe((now - last) / new, times)

    def finish(self, sequences: Iterable[Sequence], now: float) -> None:
        """Count one ended request, by its first sequence where they differ."""
        sequence, *others = sequences
        reason = sequence.finish_reason or "error"
        self.finished[reason] = self.finished.get(reason, 0) + 1
        stats, params = sequence.stats, sequence.params
        seen = {
            "e2e_request_latency_seconds": now - stats.queued_ts,
            "request_prompt_tokens": sequence.num_prompt,
            "request_generation_tokens": sequence.num_output,
            "request_max_num_generation_tokens": max(one.num_output for one in (sequence, *others)),
            "request_params_n": params.n,
        }
        if params.max_tokens is not None:
            seen["request_params_max_tokens"] = params.max_tokens
        if stats.num_generation_tokens:
            decoding = stats.last_token_ts - stats.first_token_ts
            seen |= {
                "request_prefill_kv_computed_tokens": sequence.num_prompt - sequence.num_cached,
                "request_prefill_time_seconds": stats.first_token_ts - stats.scheduled_ts,
                "request_decode_time_seconds": decoding,
                "request_inference_time_seconds": stats.last_token_ts - stats.scheduled_ts,
            }
            if stats.num_generation_tokens > 1:
                seen["request_time_per_output_token_seconds"] = decoding / (stats.num_generation_tokens - 1)
        for name, value in seen.items():
            self.observed[name].observe(value)

    def _counters(self) -> dict[str, int | float]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_cached": self.cached_tokens,
            "generation_tokens": self.generation_tokens,
            "steps": self.steps,
            "device_wait_seconds": self.device_wait_seconds,
        }

    def _labelled(self) -> list[Metric]:
        """Counters with a label. A prompt's tokens never come from another engine's cache here."""
        sources = {
            "local_compute": self.prompt_tokens - self.cached_tokens,
            "local_cache_hit": self.cached_tokens,
            "external_kv_transfer": 0,
        }
        families = ("prompt_tokens_by_source", "source", sources), ("request_success", "finished_reason", self.finished)
        return [
            Counter(PREFIX + name, count, labels={label: value})
            for name, label, counts in families
            for value, count in sorted(counts.items())
        ]

    def snapshot(self, gauges: Mapping[str, float | int], counters: Mapping[str, int | float]) -> list[Metric]:
        """Everything, with the values other parts of the engine keep themselves."""
        result: list[Metric] = [Gauge(PREFIX + name, value) for name, value in gauges.items()]
        result += [Counter(PREFIX + name, value) for name, value in {**self._counters(), **counters}.items()]
        return result + self._labelled() + [one.snapshot(PREFIX + name) for name, one in self.observed.items()]
