"""What is measured of requests, and what Prometheus reads of it."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest

from cuplama.completion import Completion, Timings
from cuplama.engine.stats import EngineStats
from cuplama.server import metrics
from cuplama.server.log import RequestLog
from cuplama.server.metrics import Metrics


class Clock:
    """Stands in for the module time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def values(found: Metrics) -> dict[str, float]:
    """Name and labels without the model's -> value, of all samples but the buckets."""
    samples = re.findall(r"^cuplama:(\S+) (\S+)$", found.exposition().decode(), re.M)
    told = {re.sub(r',?model_name="m"', "", name).replace("{}", ""): float(value) for name, value in samples}
    return {name: value for name, value in told.items() if "_bucket" not in name and "_created" not in name}


def completion(tokens: int, reason: str | None) -> Completion:
    return Completion("", [1] * tokens, reason, None, TIMINGS, cached_tokens=4)


TIMINGS = Timings(10, 3.0, 3, 2.0, 4, queue_seconds=1.0)


def test_the_times_of_a_request_go_where_they_belong(clock: Clock) -> None:
    found = Metrics("m", lambda: None)
    meter = found.request()
    clock.now += 3
    meter.tokens(1)
    clock.now += 0.5
    meter.tokens(1, index=1)  # another text: not a step from the one before
    clock.now += 1.5
    meter.tokens(2)  # a burst: 2 s for two tokens
    meter.finished([completion(3, "stop"), completion(1, None)], TIMINGS)
    meter.close()
    told = values(found)
    assert told["time_to_first_token_seconds_sum"] == 3
    assert (told["inter_token_latency_seconds_sum"], told["inter_token_latency_seconds_count"]) == (2, 2)
    assert told["e2e_request_latency_seconds_sum"] == 5
    assert told["request_queue_time_seconds_sum"] == 1
    assert told["request_prefill_time_seconds_sum"] == 2
    assert told["request_decode_time_seconds_sum"] == 2
    reasons = {name: told[f'request_success_total{{finished_reason="{name}"}}'] for name in ("stop", "abort")}
    assert reasons == {"stop": 1, "abort": 1}
    assert meter.fields == {
        "prompt_tokens": 10,
        "cached_tokens": 8,
        "completion_tokens": 4,
        "queue_seconds": 1.0,
        "first_token_seconds": 3.0,
        "finish": "abort,stop",
    }


def test_what_was_begun_and_not_finished_was_stopped(clock: Clock) -> None:
    found = Metrics("m", lambda: None)
    idle, begun = found.request(), found.request()
    begun.tokens(1)
    for meter in (idle, begun, begun):
        meter.close()
    assert values(found)['request_success_total{finished_reason="abort"}'] == 1
    assert (idle.fields, begun.fields) == ({}, {"finish": "abort"})


def test_the_engine_is_asked_when_prometheus_asks() -> None:
    stats = EngineStats(2, 3, 10, 5, 7, 100, 50, 90, 30, 1)
    told = values(Metrics("m", lambda: stats))
    assert {name: value for name, value in told.items() if "seconds" not in name} == {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.5,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 50,
        "num_preemptions_total": 1,
        "prefix_cache_queries_total": 90,
        "prefix_cache_hits_total": 30,
        "engine_steps_total": 7,
    }


def test_a_value_is_in_every_bucket_that_reaches_it() -> None:
    found = Metrics("m", lambda: None)
    for seconds, count in ((0.0005, 1), (0.001, 2), (0.0011, 1), (99.0, 1)):
        found.observe("inter_token_latency_seconds", seconds, count)
    text = found.exposition().decode()
    buckets = dict(re.findall(r'inter_token_latency_seconds_bucket\{le="(.*?)",model_name="m"\} (\S+)', text))
    wanted = {"0.001": "3.0", "0.0025": "4.0", "2.5": "4.0", "+Inf": "5.0"}
    assert {bound: buckets[bound] for bound in wanted} == wanted
    assert values(found)["inter_token_latency_seconds_count"] == 5
    assert values(found)["inter_token_latency_seconds_sum"] == pytest.approx(99.0036)


def test_two_servers_do_not_share_their_metrics() -> None:
    one, other = Metrics("m", lambda: None), Metrics("m", lambda: None)
    one.ended("stop")
    assert 'finished_reason="stop"' in one.exposition().decode()
    assert 'finished_reason="stop"' not in other.exposition().decode()


def test_a_line_of_the_log_is_written_at_once() -> None:
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    RequestLog(Stream()).write(path="/")
    assert [text.count("\n") for text in written] == [1]


def test_a_line_of_the_log_is_json_on_one_line() -> None:
    stream = io.StringIO()
    log = RequestLog(stream)
    log.write(path="/a\nb", status=None, tokens=3)
    log.failure(ValueError("two\nlines"), id="x")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.keys() == {"time", "path", "tokens"}
    assert second["error"] == "ValueError('two\\nlines')"
    assert "ValueError: two\nlines" in second["traceback"]
