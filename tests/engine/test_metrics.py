"""What is counted of a request, under vLLM's names and with its bounds; no device, no clock."""

from dataclasses import replace

import pytest
from scheduler_model import make_sequence

from jaxserve.engine import metrics
from jaxserve.engine.metrics import Counter, Histogram, Metrics, token_bounds
from jaxserve.types import Sequence, Work

# vLLM 0.24's own. https://github.com/vllm-project/vllm/blob/v0.24.0/vllm/v1/metrics/loggers.py
FIRST_TOKEN = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
BETWEEN_TOKENS = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"


def ended(cached: int = 0, outputs: int = 4, *, first: float = 2.0, reason: str = "stop", **params) -> Sequence:
    """A sequence with a prompt of ten tokens that waited a second, and got its tokens from `first` on, one a second."""
    sequence = make_sequence(list(range(10)), max_tokens=64, **params)
    sequence.num_cached, sequence.num_tokens = cached, 10 + outputs
    sequence.finish_reason = reason
    stats = sequence.stats
    stats.queued_ts, stats.scheduled_ts, stats.num_generation_tokens = 0.0, 1.0, outputs
    stats.first_token_ts, stats.last_token_ts = first, first + max(outputs - 1, 0)
    return sequence


def read(counted: Metrics) -> tuple[dict[str, int], dict[str, Histogram]]:
    """Counters (with the values of their labels) and histograms by name."""
    counters, histograms = {}, {}
    for metric in counted.snapshot({}, {}):
        name = metric.name.removeprefix(metrics.PREFIX)
        if isinstance(metric, Counter):
            counters[":".join([name, *metric.labels.values()])] = metric.value
        elif isinstance(metric, Histogram):
            histograms[name] = metric
    return counters, histograms


def test_prompt_tokens_by_where_they_came_from():
    counted = Metrics(2048)
    assert read(counted)[0]["prompt_tokens_by_source:local_cache_hit"] == 0  # there from the beginning
    for cached in (0, 8):
        sequence = ended(cached, outputs=1)
        sequence.stats.num_generation_tokens = 0  # its first one comes now
        counted.step(Work.nothing(), [sequence], 2.0)
        sequence.num_tokens += 1
        counted.step(Work.nothing(), [sequence], 3.0)  # its second
    counters, _ = read(counted)
    assert counters["prompt_tokens"] == 20
    assert counters["prompt_tokens_cached"] == 8
    assert counters["generation_tokens"] == 4
    sources = {name: value for name, value in counters.items() if name.startswith("prompt_tokens_by_source")}
    assert sources == {
        "prompt_tokens_by_source:local_compute": 12,
        "prompt_tokens_by_source:local_cache_hit": 8,
        "prompt_tokens_by_source:external_kv_transfer": 0,
    }


def test_one_request_with_several_continuations():
    counted = Metrics(2048)
    counted.finish([ended(8, 4, n=3), ended(8, 9, n=3), ended(8, 2, n=3)], 12.0)
    counters, seen = read(counted)
    assert counters["request_success:stop"] == 1
    assert counters["request_success:abort"] == 0
    sums = {
        "request_prompt_tokens": 10,
        "request_generation_tokens": 4,
        "request_max_num_generation_tokens": 9,
        "request_prefill_kv_computed_tokens": 2,
        "request_params_n": 3,
        "request_params_max_tokens": 64,
        "e2e_request_latency_seconds": 12,
        "request_prefill_time_seconds": 1,
        "request_decode_time_seconds": 3,
        "request_inference_time_seconds": 4,
        "request_time_per_output_token_seconds": 1,
    }
    assert {name: one.sum for name, one in seen.items() if one.count} == sums
    assert seen["request_max_num_generation_tokens"].buckets["5.0"] == 0
    assert seen["request_max_num_generation_tokens"].buckets["10.0"] == 1


def test_what_never_ran_has_computed_nothing():
    counted = Metrics(2048)
    waiting = ended(outputs=0, reason="abort")
    waiting.request = replace(waiting.request, params=replace(waiting.params, max_tokens=None))
    counted.finish([waiting], 5.0)
    counters, seen = read(counted)
    assert counters["request_success:abort"] == 1
    assert seen["request_max_num_generation_tokens"].count == seen["request_prompt_tokens"].count == 1
    for name in ("request_prefill_kv_computed_tokens", "request_prefill_time_seconds", "request_params_max_tokens"):
        assert seen[name].count == 0


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("time_to_first_token_seconds", FIRST_TOKEN),
        ("inter_token_latency_seconds", BETWEEN_TOKENS),
        ("request_time_per_output_token_seconds", BETWEEN_TOKENS),
        ("e2e_request_latency_seconds", LATENCY),
        ("request_queue_time_seconds", LATENCY),
        ("request_inference_time_seconds", LATENCY),
        ("request_prefill_time_seconds", LATENCY),
        ("request_decode_time_seconds", LATENCY),
        ("iteration_tokens_total", "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
        ("request_params_n", "1 2 5 10 20"),
        ("request_prompt_tokens", "1 2 5 10 20 50 100 200 500 1000 2000"),
        ("request_prefill_kv_computed_tokens", "1 2 5 10 20 50 100 200 500 1000 2000"),
        ("request_generation_tokens", "1 2 5 10 20 50 100 200 500 1000 2000"),
        ("request_max_num_generation_tokens", "1 2 5 10 20 50 100 200 500 1000 2000"),
        ("request_params_max_tokens", "1 2 5 10 20 50 100 200 500 1000 2000"),
    ],
)
def test_bounds_are_vllms(name: str, bounds: str):
    """All of vLLM's are there; ours below its first one are finer."""
    wanted = [str(float(bound)) for bound in bounds.split()] + ["+Inf"]
    found = list(read(Metrics(2048))[1][name].buckets)
    assert found[-len(wanted) :] == wanted
    assert all(float(bound) < float(wanted[0]) for bound in found[: -len(wanted)])
    assert [float(bound) for bound in found] == sorted({float(bound) for bound in found})


def test_bounds_of_tokens_end_with_the_context():
    assert token_bounds(1) == (1,)
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(131_072)[-2:] == (50_000, 100_000)
