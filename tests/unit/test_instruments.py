"""One record, written once: every family that a request moves, and none twice."""

from __future__ import annotations

import pytest

from llm_router import families
from llm_router.instruments import Instruments
from llm_router.observe.metrics.slots import Reader, Segment, Writer
from llm_router.signals import Attempt, Family, RequestRecord


class Metrics:
    """Instruments over a private segment, and what a scrape would read."""

    def __init__(self) -> None:
        self.segment = Segment.private()
        self.instruments = self.adopt()

    def adopt(self) -> Instruments:
        """What a process that takes over the segment begins with."""
        writer = Writer(self.segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
        self.instruments = Instruments(writer, wall=lambda: 1.0)
        return self.instruments

    def value(self, family: Family, *labels: str) -> float | None:
        """A counter's or gauge's value, a histogram's count; None if the series does not exist."""
        return Reader([self.segment], families.FAMILIES).collect().value(family, *labels)

    def moved(self) -> dict[str, float]:
        """Sum over all rows, by family, of those that are not 0 (histograms: observations)."""
        collected = Reader([self.segment], families.FAMILIES).collect()
        sums = {family.name.removeprefix("llm_router_"): collected.total(family) for family in families.FAMILIES}
        return {name: total for name, total in sums.items() if total}


def inference(**fields: object) -> RequestRecord:
    record = RequestRecord("POST", "/v1/chat/completions", "r-1", 100.0)
    record.is_inference = True
    record.model, record.strategy, record.reason = "m", "round-robin", "turn"
    record.status, record.outcome, record.usage_source = 200, "success", "provider"
    record.input_tokens, record.output_tokens = 7, 5
    attempt = Attempt("b", 100.1)
    attempt.ended_at, attempt.outcome = 100.9, "success"
    record.attempts = [attempt]
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def test_a_plain_success_moves_each_family_once() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    assert metrics.value(families.REQUESTS_IN_FLIGHT) == 1
    record = inference()
    metrics.instruments.finish(record, 101.0)
    metrics.instruments.finish(record, 102.0)
    assert metrics.moved() == {
        "http_requests_total": 1,
        "http_request_duration_seconds": 1,
        "overhead_seconds": 1,
        "inference_total": 1,
        "inference_duration_seconds": 1,
        "tokens_generated_total": 5,
        "tokens_prompt_total": 7,
        "tokens_per_second": 1,
        "usage_records_total": 1,
        "routing_decisions_total": 1,
        "attempts_total": 1,
    }
    assert metrics.value(families.INFERENCE, "m", "round-robin", "success", "false") == 1
    assert metrics.value(families.HTTP_REQUESTS, "POST", "/v1/chat/completions", "200") == 1


def test_a_stream_also_moves_first_token_and_gaps() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    record = inference(first_token_at=100.2, gaps_s=[0.1, 0.2])
    metrics.instruments.gaps(record)
    assert record.gaps_s == []
    record.gaps_s = [0.3]
    metrics.instruments.finish(record, 101.0)
    moved = metrics.moved()
    assert (moved["time_to_first_token_seconds"], moved["inter_token_seconds"]) == (1, 3)


@pytest.mark.parametrize("outcome", ["error", "cancelled"])
def test_a_failure_is_one_inference_and_one_error(outcome: str) -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    failed = inference(
        outcome=outcome,
        status=502,
        error_type="unreachable",
        output_tokens=0,
        input_tokens=0,
        usage_source="none",
        retry_reasons=(("first", "timeout"), ("m", "unavailable")),
        fallback_reasons=(("first", "unavailable"),),
    )
    metrics.instruments.finish(failed, 101.0)
    assert metrics.value(families.INFERENCE, "m", "round-robin", outcome, "false") == 1
    assert metrics.value(families.ERRORS, "unreachable", "backend", "error") == 1
    assert metrics.value(families.RETRIES, "first", "timeout") == 1
    assert metrics.value(families.RETRIES, "m", "unavailable") == 1
    assert metrics.value(families.FALLBACKS, "first", "unavailable") == 1
    assert "tokens_per_second" not in metrics.moved()


def test_an_inference_with_all_there_is_to_count_moves_every_family() -> None:
    """The provider's cache, reasoning, cost, key, queue, our cache that was asked in vain; each by its own labels."""
    metrics = Metrics()
    metrics.instruments.begin()
    record = inference(
        cached_tokens=3,
        reasoning_tokens=4,
        cost_usd=0.25,
        cost_status="exact",
        key="team",
        cache_type="redis",
        queued_at=100.25,
        slot_at=100.5,
    )
    metrics.instruments.finish(record, 101.0)
    moved = metrics.moved()
    expected = {
        "tokens_cached_total": 3,
        "tokens_reasoning_total": 4,
        "cost_usd_total": 0.25,
        "api_key_requests_total": 1,
        "api_key_tokens_total": 12,
        "cache_misses_total": 1,
        "queue_wait_seconds": 1,
        "queue_processing_seconds": 1,
    }
    assert {name: moved.get(name) for name in expected} == expected
    assert "cache_hits_total" not in moved
    assert metrics.value(families.COST, "m", "exact") == 0.25
    assert metrics.value(families.TOKENS_CACHED, "m", "round-robin") == 3
    assert metrics.value(families.API_KEY_TOKENS, "team") == 12
    assert metrics.value(families.CACHE_MISSES, "redis") == 1
    assert metrics.value(families.QUEUE_PROCESSING, "m") == 1


def test_a_cached_reply_moves_nothing_but_its_count_its_key_and_the_cache() -> None:
    """It took no tokens, no money, no turn and no backend."""
    metrics = Metrics()
    metrics.instruments.begin()
    record = inference(
        cached=True,
        cache_type="response",
        key="team",
        attempts=[],
        input_tokens=0,
        output_tokens=0,
        usage_source="none",
    )
    metrics.instruments.finish(record, 101.0)
    assert metrics.moved() == {
        "http_requests_total": 1,
        "http_request_duration_seconds": 1,
        "inference_total": 1,
        "api_key_requests_total": 1,
        "cache_hits_total": 1,
    }
    assert metrics.value(families.INFERENCE, "m", "round-robin", "success", "true") == 1


def test_a_turn_that_never_came_was_waited_for_and_one_that_failed_was_processed() -> None:
    metrics = Metrics()
    failed = {"outcome": "error", "usage_source": "none", "input_tokens": 0, "output_tokens": 0}
    metrics.instruments.begin()
    metrics.instruments.finish(
        inference(**failed, status=408, error_type="queue_timeout", attempts=[], reason="", queued_at=100.0), 130.0
    )
    moved = metrics.moved()
    assert (moved["queue_wait_seconds"], moved.get("queue_processing_seconds")) == (1, None)
    metrics.instruments.begin()
    metrics.instruments.finish(
        inference(**failed, status=502, error_type="unreachable", queued_at=100.0, slot_at=100.0), 101.0
    )
    moved = metrics.moved()
    assert (moved["queue_wait_seconds"], moved["queue_processing_seconds"]) == (2, 1)


def test_a_refusal_by_a_limit_is_counted_with_whose_it_was() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    record = inference(
        outcome="error", status=429, error_type="limit", limit_hit=("key", "usd_per_day"), attempts=[], key="team"
    )
    metrics.instruments.finish(record, 100.5)
    assert metrics.value(families.RATE_LIMIT_HITS, "key", "usd_per_day") == 1
    assert metrics.value(families.API_KEY_REQUESTS, "team") == 1


def test_a_wait_that_ended_in_a_fallback_counts_for_the_model_that_was_waited_for() -> None:
    """Beside the wait for the one that answered."""
    metrics = Metrics()
    metrics.instruments.begin()
    fallen = inference(fallback_reasons=(("full", "queue-timeout"),), waits=(("full", 30.0),), queued_at=1, slot_at=1)
    metrics.instruments.finish(fallen, 101.0)
    assert metrics.value(families.QUEUE_WAIT, "full") == 1
    assert metrics.value(families.QUEUE_WAIT, "m") == 1
    assert metrics.value(families.QUEUE_PROCESSING, "full") is None


def test_what_was_in_flight_when_a_worker_died_is_counted_as_lost() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.instruments.begin()
    metrics.instruments.finish(inference(), 101.0)
    metrics.adopt()
    assert metrics.value(families.ERRORS, "worker_lost", "worker", "error") == 2
    assert metrics.value(families.REQUESTS_IN_FLIGHT) == 0
    assert metrics.value(families.INFERENCE, "m", "round-robin", "success", "false") == 1
    metrics.adopt()
    assert metrics.value(families.ERRORS, "worker_lost", "worker", "error") == 2


def test_admitted_models_exist_at_zero() -> None:
    metrics = Metrics()
    metrics.instruments.admit([("new", "least-loaded")])
    for status in families.INFERENCE_STATUSES:
        assert metrics.value(families.INFERENCE, "new", "least-loaded", status, "false") == 0
    assert metrics.value(families.TOKENS_GENERATED, "new", "least-loaded") == 0


def test_methods_and_statuses_outside_the_list_become_other() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    record = RequestRecord("BREW", "__other__", "r", 100.0)
    record.status = 999
    metrics.instruments.finish(record, 100.5)
    assert metrics.value(families.HTTP_REQUESTS, "__other__", "__other__", "__other__") == 1
    assert "inference_total" not in metrics.moved()


def test_connections_are_counted_while_open_and_observed_when_closed() -> None:
    metrics = Metrics()
    metrics.instruments.connection_opened("client", "http")
    assert metrics.value(families.ACTIVE_CONNECTIONS, "client", "http") == 1
    metrics.instruments.connection_closed("client", "http", 2.5)
    assert metrics.value(families.ACTIVE_CONNECTIONS, "client", "http") == 0
    assert metrics.value(families.CONNECTION_DURATION, "client", "http") == 1


def test_methods_that_http_does_not_know_are_neither_labels_nor_remembered() -> None:
    """Under an ASGI server a caller may send any word."""
    metrics = Metrics()
    for number in range(100):
        metrics.instruments.begin()
        record = RequestRecord(f"WORD{number}", "/v1/models", f"r-{number}", 1.0)
        record.status = 405
        metrics.instruments.finish(record, 2.0)
    assert metrics.value(families.HTTP_REQUESTS, "__other__", "/v1/models", "405") == 100
    assert len(metrics.instruments._http) == 1


def test_examples_point_to_traces_that_are_exported_and_to_no_other() -> None:
    """A trace that is kept for our own pages only would be looked for in vain elsewhere."""
    metrics = Metrics()
    trace = {"trace_id": "ab" * 16, "span_id": "cd" * 8}
    for kept in ("", "recent", "error", "sampled"):
        metrics.instruments.begin()
        metrics.instruments.finish(inference(kept=kept, first_token_at=100.2, **trace), 101.0)
    collected = Reader([metrics.segment], families.FAMILIES).collect()
    for family, labels in (
        (families.HTTP_REQUEST_DURATION, ("POST", "/v1/chat/completions", "200")),
        (families.INFERENCE_DURATION, ("m", "round-robin")),
        (families.TIME_TO_FIRST_TOKEN, ("m",)),
    ):
        row = collected.row(family, *labels)
        assert row is not None
        examples = [example.labels for example in row.exemplars if example is not None]
        assert examples == [f'trace_id="{"ab" * 16}",span_id="{"cd" * 8}"'], family.name
        assert sum(row.values[:-1]) == 4
    assert metrics.value(families.TRACES_KEPT, "error") == 1
    assert metrics.value(families.TRACES_KEPT, "recent") == 1


def test_without_traces_examples_have_the_requests_id() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    metrics.instruments.finish(inference(), 101.0)
    row = Reader([metrics.segment], families.FAMILIES).collect().row(families.INFERENCE_DURATION, "m", "round-robin")
    assert row is not None
    assert [example.labels for example in row.exemplars if example is not None] == ['request_id="r-1"']


def test_a_sampled_route_is_counted_exactly_and_observed_one_in_n() -> None:
    """Other routes are observed as ever."""
    metrics = Metrics()
    metrics.instruments.sample({"/v1/embeddings": 5, "/v1/completions": 1})
    for route in ("/v1/embeddings", "/v1/completions"):
        for _ in range(11):
            metrics.instruments.begin()
            metrics.instruments.finish(inference(route=route), 101.0)
    assert metrics.value(families.HTTP_REQUESTS, "POST", "/v1/embeddings", "200") == 11
    assert metrics.value(families.HTTP_REQUEST_DURATION, "POST", "/v1/embeddings", "200") == 3
    assert metrics.value(families.HTTP_REQUEST_DURATION, "POST", "/v1/completions", "200") == 11
    assert metrics.value(families.INFERENCE, "m", "round-robin", "success", "false") == 22
    assert metrics.value(families.INFERENCE_DURATION, "m", "round-robin") == 14
    assert metrics.value(families.TOKENS_GENERATED, "m", "round-robin") == 110


def test_a_sample_that_is_told_again_goes_on() -> None:
    """Workers hear of it with every snapshot, and those may come as often as requests."""
    metrics = Metrics()
    for _ in range(10):
        metrics.instruments.sample({"/v1/embeddings": 5})
        metrics.instruments.begin()
        metrics.instruments.finish(inference(route="/v1/embeddings"), 101.0)
    assert metrics.value(families.HTTP_REQUEST_DURATION, "POST", "/v1/embeddings", "200") == 2


def test_a_trace_context_that_is_none_is_counted() -> None:
    metrics = Metrics()
    metrics.instruments.begin()
    metrics.instruments.finish(inference(has_bad_trace=True), 101.0)
    assert metrics.value(families.TRACE_CONTEXT_INVALID) == 1
