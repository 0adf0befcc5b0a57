"""The ingress's own Prometheus metrics, on a listener of their own; labels are bounded by routes and classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from enova_agent.core.local import HeldReplica
from enova_common.records import Outcome, RequestRecord

_LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_LABELS = ("deployment", "serving_class")


class _Bound:
    """The metrics of one deployment and class, looked up once."""

    def __init__(self, metrics: Metrics, deployment: str, serving_class: str) -> None:
        labels = (deployment, serving_class)
        self.outcomes = {outcome: metrics.requests.labels(*labels, outcome.value) for outcome in Outcome}
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.output_tokens = metrics.output_tokens.labels(*labels)
        self.ttft = metrics.ttft.labels(*labels)
        self.tpot = metrics.tpot.labels(*labels)
        self.queue = metrics.queue.labels(*labels)


class Metrics:
    """Fed with request records; asked for an exposition."""

    def __init__(
        self, *, held: Callable[[], Mapping[str, HeldReplica]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "enova_ingress_requests", "Requests that ended here, by outcome.", (*_LABELS, "outcome"), registry=registry
        )
        self.prompt_tokens = Counter(
            "enova_ingress_prompt_tokens", "Prompt tokens, as engines counted them.", _LABELS, registry=registry
        )
        self.output_tokens = Counter(
            "enova_ingress_output_tokens", "Output tokens, as engines counted them.", _LABELS, registry=registry
        )
        self.ttft = Histogram(
            "enova_ingress_time_to_first_token_seconds", "Arrival to first token of streams, in model time.",
            _LABELS, buckets=_LATENCY_BUCKETS_S, registry=registry,
        )
        self.tpot = Histogram(
            "enova_ingress_time_per_output_token_seconds", "Mean time between tokens of streams, in model time.",
            _LABELS, buckets=_TPOT_BUCKETS_S, registry=registry,
        )
        self.queue = Histogram(
            "enova_ingress_queue_seconds", "Time in the owner's queue, in model time.",
            _LABELS, buckets=_LATENCY_BUCKETS_S, registry=registry,
        )
        registry.register(_Gauges(held, gauges))
        self._bound: dict[tuple[str, str], _Bound] = {}

    def add(self, record: RequestRecord) -> None:
        """Count one request."""
        key = (record.deployment, record.serving_class)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = _Bound(self, *key)
        bound.outcomes[record.outcome].inc()
        if record.prompt_tokens:
            bound.prompt_tokens.inc(record.prompt_tokens)
        if record.output_tokens:
            bound.output_tokens.inc(record.output_tokens)
        if record.ttft_s is not None:
            bound.ttft.observe(record.ttft_s)
        if record.tpot_s is not None:
            bound.tpot.observe(record.tpot_s)
        if record.queue_s is not None:
            bound.queue.observe(record.queue_s)

    def retain(self, deployments: Iterable[str]) -> None:
        """Forget deployments that have no route any more; one that comes back counts from zero, as after a restart."""
        kept = {"", *deployments}  # the empty name counts requests for models that nobody serves
        for deployment, serving_class in [key for key in self._bound if key[0] not in kept]:
            del self._bound[deployment, serving_class]
            for metric in (self.prompt_tokens, self.output_tokens, self.ttft, self.tpot, self.queue):
                metric.remove(deployment, serving_class)
            for outcome in Outcome:
                self.requests.remove(deployment, serving_class, outcome.value)

    def exposition(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is true at the moment of the scrape."""

    def __init__(
        self, held: Callable[[], Mapping[str, HeldReplica]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._held = held
        self._gauges = gauges

    def collect(self) -> list[GaugeMetricFamily]:
        """The families of one scrape."""
        in_flight = GaugeMetricFamily("enova_ingress_in_flight", "Sent to an engine of this node.", labels=["replica"])
        queued = GaugeMetricFamily("enova_ingress_queued", "Waiting for an engine of this node.", labels=["replica"])
        for replica, held in self._held().items():
            in_flight.add_metric([replica], held.in_flight)
            queued.add_metric([replica], held.queued)
        families = [in_flight, queued]
        for name, value in self._gauges().items():
            family = GaugeMetricFamily(f"enova_ingress_{name}", name.replace("_", " "))
            family.add_metric([], value)
            families.append(family)
        return families
