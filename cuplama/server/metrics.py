"""What is counted and measured of requests and the engine, in the form that Prometheus reads.

The names end as vLLM's do, so that what people built for those needs another prefix alone.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..completion import Completion, Timings
from ..engine.stats import EngineStats

__all__ = ["CONTENT_TYPE", "Meter", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the histograms' buckets, in seconds.
_BETWEEN = (.001, .0025, .005, .0075, .01, .015, .02, .03, .04, .05, .075, .1, .15, .2, .3, .5, 1, 2.5)  # fmt: skip
_FIRST = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)  # fmt: skip
_WHOLE = (.1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)  # fmt: skip
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request to its first token.", _FIRST),
    "inter_token_latency_seconds": ("From one token of a text to the next.", _BETWEEN),
    "e2e_request_latency_seconds": ("From the request to the end of its answer.", _WHOLE),
    "request_queue_time_seconds": ("From the request to its admission to the batch.", _WHOLE),
    "request_prefill_time_seconds": ("From its admission to its first token.", _WHOLE),
    "request_decode_time_seconds": ("From its first token to its last.", _WHOLE),
}
# What the engine says of now, and what it has counted from the beginning: name -> help, and how to read it.
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences that are being computed.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait for pages.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Share of the cache's pages in use; 1 is all.", lambda s: s.pages_used / max(1, s.pages)),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("Tokens of prompts that were read.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda s: s.generated_tokens),
    "num_preemptions": ("Sequences that lost their pages to older ones.", lambda s: s.preemptions),
    "prefix_cache_queries": ("Tokens of prompts that were looked for in the prefix cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Tokens of prompts that were found there.", lambda s: s.prefix_hits),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
}


class Metrics:
    """The metrics of one server, in a registry of its own. stats: what the engine says, None while there is none."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats))
        self._label = {"model_name": model_name}
        self._histograms = {name: _Histogram(model_name, name, *told) for name, told in _HISTOGRAMS.items()}
        for histogram in self._histograms.values():
            self.registry.register(histogram)
        self._ended = Counter(
            "cuplama:request_success",
            "Texts that were generated, by the reason why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._requests = Counter(
            "cuplama:http_requests",
            "Requests, by endpoint and status.",
            ["model_name", "method", "path", "status"],
            registry=self.registry,
        )

    def request(self) -> Meter:
        """A meter for a request that has just come."""
        return Meter(self)

    def observe(self, name: str, seconds: float, count: int = 1) -> None:
        """Add a value to one of the histograms, ``count`` times."""
        self._histograms[name].observe(seconds, count)

    def ended(self, reason: str) -> None:
        """A text has ended: "stop", "length", "abort", ..."""
        self._ended.labels(**self._label, finished_reason=reason).inc()

    def answered(self, method: str, path: str, status: int) -> None:
        """A request has ended. path: the endpoint's, not the request's: a client must not make up label values."""
        self._requests.labels(**self._label, method=method, path=path, status=str(status)).inc()

    def exposition(self) -> bytes:
        """All of it as text, for Prometheus to read."""
        return generate_latest(self.registry)


class _Histogram(Collector):
    """A histogram of seconds. Prometheus' own takes 1 to 2 µs a value, and each of a burst alone: at ten thousand
    tokens per second the event loop has better to do. One thread writes, so nothing is locked.
    """

    def __init__(self, model_name: str, name: str, text: str, bounds: Sequence[float]) -> None:
        self._labels, self._name, self._text, self._bounds = [model_name], f"cuplama:{name}", text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(self._labels, buckets, self._sum)
        yield family


class _EngineCollector(Collector):
    """Asks the engine when Prometheus asks, so nothing is counted twice."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats() or EngineStats()
        for name, (text, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"cuplama:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], read(stats))
            yield gauge
        for name, (text, read) in _COUNTERS.items():
            counter = CounterMetricFamily(f"cuplama:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], read(stats))
            yield counter


class Meter:
    """Measures one request, for the metrics and for its line in the log.

    The frame makes one per request, as ``request.state.meter``, and ends it. A handler that generates calls ``tokens``
    when tokens have come, and ``finished`` at the end. fields: what the log's line has beside the frame's own fields.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.began = time.perf_counter()
        self.fields: dict[str, Any] = {}
        self._last: dict[int, float] = {}  # index of a text -> when its latest token came
        self._first: float | None = None
        self._open = False  # tokens have come, and nobody has said that it is over

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.began

    def tokens(self, count: int, index: int = 0) -> None:
        """That many tokens of the text of that index have come just now."""
        now = time.perf_counter()
        before = self._last.get(index)
        self._last[index] = now
        if self._first is None:
            self._first, self._open = now, True
            self._metrics.observe("time_to_first_token_seconds", now - self.began)
        if before is not None:
            # Tokens that come at once have shared the time since those before them.
            self._metrics.observe("inter_token_latency_seconds", (now - before) / count, count)

    def finished(self, completions: Sequence[Completion], timings: Timings) -> None:
        """The texts have ended, or were stopped: then their finish_reason is None, and counts as "abort"."""
        self._open = False
        now = time.perf_counter()
        first = now if self._first is None else self._first
        observe = self._metrics.observe
        observe("e2e_request_latency_seconds", now - self.began)
        observe("request_queue_time_seconds", timings.queue_seconds)
        observe("request_prefill_time_seconds", max(0.0, timings.prompt_seconds - timings.queue_seconds))
        observe("request_decode_time_seconds", now - first)
        reasons = [c.finish_reason or "abort" for c in completions]
        for reason in reasons:
            self._metrics.ended(reason)
        self.fields.update(
            prompt_tokens=timings.prompt_tokens,
            cached_tokens=sum(c.cached_tokens for c in completions),
            completion_tokens=sum(len(c.tokens) for c in completions),
            queue_seconds=round(timings.queue_seconds, 4),
            first_token_seconds=round(first - self.began, 4),
            finish=",".join(sorted(set(reasons))),
        )

    def close(self) -> None:
        """The request is over: a text that was begun and not finished was stopped."""
        if self._open:
            self._metrics.ended("abort")
            self.fields["finish"] = "abort"
            self._open = False
