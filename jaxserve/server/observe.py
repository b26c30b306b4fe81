"""The engine's metrics for Prometheus, and the line that the log gets every few seconds."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxserve.engine import metrics
from jaxserve.engine.async_engine import AsyncLLMEngine
from jaxserve.engine.errors import EngineDeadError

logger = logging.getLogger(__name__)

STATS_SECONDS = 10.0
ANSWER_SECONDS = 2.0  # that /metrics waits for the engine, which answers between two steps


class EngineCollector(Collector):
    """The engine's metrics as they were last read.

    Names are `PREFIX:name`, with the labels `model_name` and `engine` that vLLM's dashboards select by.
    """

    def __init__(self, engine: AsyncLLMEngine, prefix: str):
        self._prefix = prefix
        self.snapshot: list[metrics.Metric] = []
        self._labels = {"model_name": engine.config.served_model_names[0], "engine": "0"}

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One family for each name."""
        families: dict[str, Metric] = {}
        for metric in self.snapshot:
            name = f"{self._prefix}:{metric.name.removeprefix(metrics.PREFIX)}"
            labels = self._labels | metric.labels
            family = families.get(name) or self._family(name, metric, list(labels))
            families[name] = family
            values = list(labels.values())
            if isinstance(family, HistogramMetricFamily) and isinstance(metric, metrics.Histogram):
                bounds = [(floatToGoString(bound), count) for bound, count in metric.buckets.items()]
                family.add_metric(values, bounds, metric.sum)
            elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
                family.add_metric(values, getattr(metric, "value", 0))
        yield from families.values()

    def _family(self, name: str, metric: metrics.Metric, labels: list[str]) -> Metric:
        text = metric.name.removeprefix(metrics.PREFIX).replace("_", " ")
        if isinstance(metric, metrics.Counter):
            return CounterMetricFamily(name, text, labels=labels)
        if isinstance(metric, metrics.Histogram):
            return HistogramMetricFamily(name, text, labels=labels)
        return GaugeMetricFamily(name, text, labels=labels)


class EngineMetrics:
    """All metrics of one server: its engine's, and what its middleware counts in `registry`."""

    def __init__(self, engine: AsyncLLMEngine, prefix: str):
        self._engine = engine
        self.registry = CollectorRegistry()
        self._collector = EngineCollector(engine, prefix)
        self.registry.register(self._collector)

    async def text(self) -> bytes:
        """In Prometheus' format; of an engine that is dead or does not answer soon, its last figures."""
        if self._engine.config.log_stats:
            with contextlib.suppress(EngineDeadError, TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    self._collector.snapshot = await self._engine.get_metrics()
        return generate_latest(self.registry)


async def read(engine: AsyncLLMEngine) -> dict[str, float]:
    """The counters and gauges without labels, by their names."""
    found = {}
    for metric in await engine.get_metrics():
        if isinstance(metric, metrics.Counter | metrics.Gauge) and not metric.labels:
            found[metric.name.removeprefix(metrics.PREFIX)] = float(metric.value)
    return found


def stats_line(before: dict[str, float], now: dict[str, float], seconds: float) -> str:
    """Throughput between two readings, and how things stand."""
    rate = {name: (now[name] - before[name]) / seconds for name in ("prompt_tokens", "generation_tokens")}
    asked = now["prefix_cache_queries"] - before["prefix_cache_queries"]
    hit = now["prefix_cache_hits"] - before["prefix_cache_hits"]
    return (
        f"prompt {rate['prompt_tokens']:.1f} tokens/s, generation {rate['generation_tokens']:.1f} tokens/s, "
        f"running {now['num_requests_running']:.0f}, waiting {now['num_requests_waiting']:.0f}, "
        f"cache {now['kv_cache_usage_perc']:.1%}, prefix hits {hit / asked if asked else 0:.1%}"
    )


async def log_stats(engine: AsyncLLMEngine, seconds: float = STATS_SECONDS) -> None:
    """Log a line now and then, as long as something happens; runs until it is cancelled."""
    quiet = False
    with contextlib.suppress(EngineDeadError):  # the server ends, and says why
        before = await read(engine)
        while True:
            await asyncio.sleep(seconds)
            now = await read(engine)
            busy = any(now[name] != before[name] for name in ("prompt_tokens", "generation_tokens"))
            busy = busy or now["num_requests_running"] + now["num_requests_waiting"] > 0
            if busy or not quiet:
                logger.info("%s", stats_line(before, now, seconds))
            before, quiet = now, not busy
