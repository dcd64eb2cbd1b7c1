"""Prometheus metrics of the server, and of the engine at scrape time."""

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from stepjax.inference.request import EngineClient, EngineStats
from stepjax.serving.threads import Admission

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_NOW = (
    "running",
    "waiting",
    "pages",
    "pages_used",
    "pages_cached",
)  # gauges in EngineStats; the other fields are totals


class Metrics:
    """Metrics of one app, in their own registry."""

    def __init__(self, engine: EngineClient | None, admission: Admission):
        """
        Args:
            engine: None in front of another server.
        """
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"stepjax_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"stepjax_{name}", text, ["path"], buckets=_SECONDS, registry=self._registry)

        self.requests = counter("requests", "Answered requests", "path", "status")
        self.seconds = histogram("request_seconds", "From a request to the end of its answer")
        self.first_byte_seconds = histogram(
            "first_byte_seconds", "From a request to the first byte of its answer: its first token where it is streamed"
        )
        self.disconnects = counter("disconnects", "Requests whose client disconnected before the end")
        self.pacore_requests = counter(
            "pacore_requests",
            "Requests with PaCoRe, by what answered: synthesis, agreement or fallback; else failed or cancelled",
            "answered_by",
        )
        self.pacore_rounds = counter("pacore_rounds", "Finished PaCoRe rounds")
        self.pacore_calls = counter(
            "pacore_calls",
            "PaCoRe calls: ok, error, timeout or cancelled; calls of cancelled requests do not count",
            "status",
        )
        self.pacore_attempts = counter("pacore_failed_attempts", "Failed attempts of PaCoRe calls", "status")
        self.pacore_losses = counter("pacore_losses", "Trajectories that left no message, by reason", "reason")
        self.pacore_tokens = counter("pacore_output_tokens", "Tokens of finished trajectories")
        self.streams = counter(
            "streams", "Coded images, by what came of them: decoded, cached, or the error's code", "result"
        )
        self.stream_bytes = counter("stream_bytes", "Bytes of coded images")
        self.stream_decode_seconds = Histogram(
            "stepjax_stream_decode_seconds", "Decoding of a coded image", buckets=_SECONDS, registry=self._registry
        )
        under_way = Gauge("stepjax_requests_under_way", "Requests in progress", registry=self._registry)
        under_way.set_function(lambda: admission.count)
        if engine is not None:
            self._registry.register(_EngineCollector(engine))

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: EngineClient):
        self._engine = engine

    def describe(self):
        return []

    def collect(self):
        stats = self._engine.stats()
        for field in dataclasses.fields(EngineStats):
            kind = GaugeMetricFamily if field.name in _NOW else CounterMetricFamily
            name = f"stepjax_engine_{field.name}"
            yield kind(name, f"The engine's {field.name.replace('_', ' ')}", value=getattr(stats, field.name))
