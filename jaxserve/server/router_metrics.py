"""One /metrics for all replicas, and what the router counts itself.

Counters and histograms are sums over the replicas. The sums never fall: what a replica had counted before it restarted
or went away stays in them, since Prometheus takes any fall for a restart from zero, and would add everything that is
left a second time. Gauges (and whatever else cannot be added) keep a series for each replica, with the label
`replica`; dashboards add, average or compare them. Families that the router has under the same name, such as
`http_requests`, are the router's alone: they say what clients saw.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from jaxserve.server.router_replicas import Fleet

logger = logging.getLogger(__name__)

ADDED = ("counter", "histogram", "summary")
Series = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and sorted labels


@dataclass
class Tally:
    """One counting series of one replica: where it stood last, and what was lost in restarts before."""

    last: float = 0.0
    lost: float = 0.0

    def see(self, value: float) -> None:
        """Note a new reading."""
        if value < self.last:
            self.lost += self.last
        self.last = value


@dataclass
class Family:
    """What is known of a family that is added up."""

    kind: str
    text: str
    tallies: dict[Series, dict[int, Tally]] = field(default_factory=dict)  # by series, then by replica


class MergedMetrics:
    """Adds up the pages of all replicas, and remembers what they counted."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def merge(self, pages: Mapping[int, str]) -> list[Metric]:
        """One list of families from the pages of the replicas that answered (number -> text)."""
        gauges: dict[str, Metric] = {}
        for index, text in pages.items():
            for family in parse(text, index):
                if family.type in ADDED:
                    self._add(family, index)
                else:
                    self._keep(gauges, family, index)
        return [*self._sums(), *gauges.values()]

    def _add(self, family: Metric, index: int) -> None:
        known = self._families.setdefault(family.name, Family(family.type, family.documentation))
        for sample in family.samples:
            if "quantile" in sample.labels:  # of a summary; quantiles cannot be added
                continue
            series = (sample.name, tuple(sorted(sample.labels.items())))
            known.tallies.setdefault(series, {}).setdefault(index, Tally()).see(
                float(sample.value)
            )  # the parser makes whole numbers ints

    def _keep(self, gauges: dict[str, Metric], family: Metric, index: int) -> None:
        merged = gauges.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        for sample in family.samples:
            merged.add_sample(sample.name, sample.labels | {"replica": str(index)}, sample.value)

    def _sums(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            merged = Metric(name, family.text, family.kind)
            for (sample, labels), tallies in family.tallies.items():
                total = sum(tally.last + tally.lost for tally in tallies.values())
                merged.add_sample(sample, dict(labels), total)
            yield merged


def parse(text: str, index: int) -> list[Metric]:
    """The families of a replica's page; none, and a warning, if it is not in Prometheus' text format."""
    try:
        return list(text_string_to_metric_families(text))
    except (ValueError, KeyError, IndexError) as error:
        logger.warning("the metrics of replica %d cannot be read: %s", index, error)
        return []


class _Listed:
    """Families as the writer of the text format wants them."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def page(families: list[Metric], own: CollectorRegistry) -> bytes:
    """The text of /metrics: the merged families, and the router's own, which win."""
    names = {family.name for family in own.collect()}
    rest = [family for family in families if family.name not in names]
    return generate_latest(_Listed(rest)) + generate_latest(own)  # type: ignore[arg-type]


class FleetCollector(Collector):
    """Reads the state of the replicas when Prometheus asks."""

    def __init__(self, fleet: Fleet, prefix: str):
        self._fleet, self._prefix = fleet, prefix

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Which replicas work, and what they have to do."""
        name = f"{self._prefix}:router_"
        yield GaugeMetricFamily(name + "healthy_replicas", "Replicas that get requests.", len(self._fleet.healthy))
        healthy = GaugeMetricFamily(name + "replica_healthy", "Whether it gets requests.", labels=["replica"])
        flying = GaugeMetricFamily(name + "requests_in_flight", "Requests not finished.", labels=["replica"])
        load = GaugeMetricFamily(name + "replica_load", "Load by which replicas are chosen.", labels=["replica"])
        for replica in self._fleet.replicas:
            healthy.add_metric([str(replica.index)], replica.healthy)
            flying.add_metric([str(replica.index)], replica.in_flight)
            load.add_metric([str(replica.index)], replica.load)
        yield from (healthy, flying, load)


class RouterMetrics:
    """What the router counts."""

    def __init__(self, fleet: Fleet, prefix: str):
        self.registry = CollectorRegistry()
        self.registry.register(FleetCollector(fleet, prefix))
        name = f"{prefix}:router_"

        def counter(short: str, text: str, *labels: str) -> Counter:
            return Counter(name + short, text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests sent to a replica, by its answer.", "replica", "status")
        self.retries = counter("retries", "Requests sent to a further replica, by why.", "reason")
        self.choices = counter("choices", "How replicas were chosen: hit is a known prompt.", "choice")
        self.broken = counter("broken_streams", "Streams that a replica broke off.", "replica")
