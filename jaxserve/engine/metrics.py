"""What the engine counts, and the snapshot `get_metrics` returns."""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from jaxserve.types import Sequence, Work

PREFIX = "jaxserve:"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

# Of each request as a whole, under vLLM's names.
REQUEST_DISTRIBUTIONS = {
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_params_n": (1, 2, 5, 10, 20),
    "request_params_max_tokens": TOKENS,
    "request_time_per_output_token_seconds": SECONDS,
    "request_prefill_time_seconds": SECONDS,
    "request_decode_time_seconds": SECONDS,
    "request_inference_time_seconds": SECONDS,
}


@dataclass(frozen=True)
class Metric:
    """A named number of the engine at one moment."""

    name: str
    labels: dict[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Counter(Metric):
    """A count that only grows."""

    value: int


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
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets[bound] = total
        return Histogram(name, total, self._sum, buckets)


class Metrics:
    """Running totals of one engine; the loop adds to them, nothing else does."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {}
        self.steps = 0
        self.time_to_first_token = Distribution(SECONDS)
        self.inter_token_latency = Distribution(SECONDS)
        self.e2e_latency = Distribution(SECONDS)
        self.queue_time = Distribution(SECONDS)
        self.step_tokens = Distribution(TOKENS)
        self.requests = {name: Distribution(bounds) for name, bounds in REQUEST_DISTRIBUTIONS.items()}

    def step(self, work: Work, gained: Iterable[Sequence], now: float) -> None:
        """Count a finished step, several where decodes ran in a row, and note when each sequence got its tokens.

        Sequences that got their last tokens together have equal gaps, which are counted together.
        """
        self.steps += work.steps
        self.step_tokens.observe(work.total_tokens, work.steps)
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
                self.time_to_first_token.observe(now - stats.queued_ts)
                self.queue_time.observe(stats.scheduled_ts - stats.queued_ts)
            stats.num_generation_tokens = total
            stats.last_token_ts = now
            self.generation_tokens += new
        for (last, new), times in gaps.items():
            self.inter_token_latency.observe((now - last) / new, times)

    def finish(self, sequence: Sequence, now: float) -> None:
        """Count one ended request, by its first sequence."""
        reason = sequence.finish_reason or "error"
        self.finished[reason] = self.finished.get(reason, 0) + 1
        stats, params = sequence.stats, sequence.params
        self.e2e_latency.observe(now - stats.queued_ts)
        seen = {
            "request_prompt_tokens": sequence.num_prompt,
            "request_generation_tokens": sequence.num_output,
            "request_params_n": params.n,
            "request_params_max_tokens": params.max_tokens or 0,
        }
        if stats.num_generation_tokens:
            decoding = stats.last_token_ts - stats.first_token_ts
            seen |= {
                "request_prefill_time_seconds": stats.first_token_ts - stats.scheduled_ts,
                "request_decode_time_seconds": decoding,
                "request_inference_time_seconds": stats.last_token_ts - stats.scheduled_ts,
            }
            if stats.num_generation_tokens > 1:
                seen["request_time_per_output_token_seconds"] = decoding / (stats.num_generation_tokens - 1)
        for name, value in seen.items():
            self.requests[name].observe(value)

    def snapshot(self, gauges: Mapping[str, float | int], counters: Mapping[str, int]) -> list[Metric]:
        """Everything, with the values other parts of the engine keep themselves."""
        own = {"prompt_tokens": self.prompt_tokens, "generation_tokens": self.generation_tokens, "steps": self.steps}
        result: list[Metric] = [Gauge(PREFIX + name, value) for name, value in gauges.items()]
        result += [Counter(PREFIX + name, value) for name, value in {**own, **counters}.items()]
        result += [
            Counter(PREFIX + "request_success", count, labels={"finished_reason": reason})
            for reason, count in sorted(self.finished.items())
        ]
        distributions = {
            "time_to_first_token_seconds": self.time_to_first_token,
            "inter_token_latency_seconds": self.inter_token_latency,
            "e2e_request_latency_seconds": self.e2e_latency,
            "request_queue_time_seconds": self.queue_time,
            "iteration_tokens_total": self.step_tokens,
            **self.requests,
        }
        return result + [distribution.snapshot(PREFIX + name) for name, distribution in distributions.items()]
