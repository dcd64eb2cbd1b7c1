"""Metrics for Prometheus: of the server, and of the engine at the moment they are read."""

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from stepjax.inference.request import EngineStats
from stepjax.serving.admission import Admission
from stepjax.serving.engine import AsyncEngine

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_NOW = ("running", "waiting", "pages", "pages_used", "pages_cached")  # of EngineStats; the others are totals


class Metrics:
    """A registry of its own for each app."""

    def __init__(self, engine: AsyncEngine | None, admission: Admission):
        """
        Args:
            engine: None where the model is another server's.
        """
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("stepjax_requests", "Answered requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "stepjax_request_seconds",
            "From a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_byte_seconds = Histogram(
            "stepjax_first_byte_seconds",
            "From a request to the first byte of its answer: its first token where it is streamed",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.disconnects = Counter(
            "stepjax_disconnects", "Requests whose client left before the end", registry=registry
        )
        self.pacore_requests = Counter(
            "stepjax_pacore_requests",
            "Requests with PaCoRe, by what answered: synthesis, agreement, fallback; else failed, or cancelled",
            ["answered_by"],
            registry=registry,
        )
        self.pacore_rounds = Counter("stepjax_pacore_rounds", "Rounds of PaCoRe that have ended", registry=registry)
        self.pacore_calls = Counter(
            "stepjax_pacore_calls",
            "Calls of PaCoRe: ok, error, timeout or cancelled; those of a request that was cancelled do not count",
            ["status"],
            registry=registry,
        )
        self.pacore_attempts = Counter(
            "stepjax_pacore_failed_attempts", "Tries of calls that led to nothing", ["status"], registry=registry
        )
        self.pacore_losses = Counter(
            "stepjax_pacore_losses", "Trajectories that left no message, by the reason", ["reason"], registry=registry
        )
        self.pacore_tokens = Counter(
            "stepjax_pacore_output_tokens", "Tokens of trajectories that have ended", registry=registry
        )
        under_way = Gauge("stepjax_requests_under_way", "Requests that are being answered", registry=registry)
        under_way.set_function(lambda: admission.count)
        if engine is not None:
            registry.register(_EngineCollector(engine))

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: AsyncEngine):
        self._engine = engine

    def describe(self):
        return []

    def collect(self):
        stats = self._engine.stats()
        for field in dataclasses.fields(EngineStats):
            kind = GaugeMetricFamily if field.name in _NOW else CounterMetricFamily
            name = f"stepjax_engine_{field.name}"
            yield kind(name, f"The engine's {field.name.replace('_', ' ')}", value=getattr(stats, field.name))
