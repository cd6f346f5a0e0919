"""What Prometheus reads at /metrics: requests, tokens, times, and the engine's slots and pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv3_jax.serve.worker import Counts

# Seconds, from a small model on a desk to a queue in front of a large one.
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one server."""

    def __init__(self, num_pages: int, counts: Callable[[], Counts]) -> None:
        """Counts from 0; `counts` tells the engine's own numbers when they are asked for."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "dsv3_requests", "Requests by endpoint and status; 499 hung up.", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("dsv3_prompt_tokens", "Tokens of prompts that were answered.", registry=self._registry)
        self.cached_tokens = Counter("dsv3_cached_prompt_tokens", "Those that the prefix cache had.", registry=self._registry)
        self.generated_tokens = Counter("dsv3_generated_tokens", "Tokens of completions.", registry=self._registry)
        self.first_token = Histogram(
            "dsv3_time_to_first_token_seconds", "From a request to its first token.", buckets=_TIMES, registry=self._registry
        )
        self.latency = Histogram(
            "dsv3_request_seconds",
            "From a request to its end, of those that ended well.",
            buckets=_TIMES,
            registry=self._registry,
        )
        self._registry.register(_EngineNumbers(num_pages, counts))

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    """Read off the engine's last step, so that they belong together."""

    def __init__(self, num_pages: int, counts: Callable[[], Counts]) -> None:
        self._num_pages, self._counts = num_pages, counts

    def collect(self) -> Iterable[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily("dsv3_waiting", "Completions that wait for a slot.", counts.waiting)
        yield GaugeMetricFamily("dsv3_running", "Completions that have a slot.", counts.running)
        yield GaugeMetricFamily("dsv3_pages", "Pages of the cache.", self._num_pages)
        yield GaugeMetricFamily("dsv3_free_pages", "Pages with nothing in them.", counts.free_pages)
        yield GaugeMetricFamily("dsv3_cached_pages", "Pages that only the prefix cache keeps.", counts.cached_pages)
        yield CounterMetricFamily("dsv3_preemptions", "Completions that lost their slot for a while.", counts.preemptions)
        yield CounterMetricFamily("dsv3_steps", "Decoding steps of single completions.", counts.steps)
        yield CounterMetricFamily(
            "dsv3_step_tokens", "Tokens that these steps gave; over dsv3_steps it is tokens a step.", counts.step_tokens
        )
