"""Which traces are kept, and in what order reasons count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.tracing.keep import FAULTS_PER_S, FIRST_AGAIN_S, MAX_KINDS, Keep
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.signals import Attempt, RequestRecord
from llm_router.testing import FakeClock

QUIET = TracingSettings(recent_per_s=0.0)


def record(
    status: int = 200, *, route: str = "/v1/chat/completions", model: str = "m", backend: str = "b", error: str = ""
) -> RequestRecord:
    made = RequestRecord("POST", route, "id", 1000.0)
    made.status, made.model, made.error_type = status, model, error
    made.trace_id, made.span_id = "1" * 32, "2" * 16
    if backend:
        made.attempts.append(Attempt(backend, 1000.0))
    return made


def sampled(status: int = 200) -> RequestRecord:
    made = record(status, error="internal" if status >= 500 else "")
    made.is_sampled = True
    return made


def test_the_first_of_its_kind_is_kept_and_those_after_it_are_not() -> None:
    keep = Keep(QUIET)
    kinds = [
        record(),
        record(404),
        record(route="/v1/embeddings"),
        record(model="other"),
        record(backend="other"),
        record(backend=""),
    ]
    assert [keep.reason(kind, 1000.1) for kind in kinds] == ["first"] * len(kinds)
    assert [keep.reason(kind, 1000.2) for kind in kinds] == [""] * len(kinds)
    assert keep.reason(record(400), 1000.3) == ""  # the same class of status as 404


def test_what_was_not_seen_for_ten_minutes_is_new_again() -> None:
    keep, clock = Keep(QUIET), FakeClock()

    def now() -> RequestRecord:
        made = record()
        made.started_at = clock()
        return made

    assert keep.reason(now(), clock()) == "first"
    for _ in range(4):
        assert keep.reason(now(), clock.advance(FIRST_AGAIN_S / 2)) != "first"
    clock.advance(FIRST_AGAIN_S + 1)
    assert keep.reason(now(), clock()) == "first"


def test_sampled_comes_before_error_before_slow_before_first() -> None:
    keep = Keep(QUIET)
    fault = record(502, error="unreachable")
    slow_fault = record(502, error="unreachable")
    slow = record()
    assert keep.reason(sampled(500), 2000.0) == "sampled"
    assert keep.reason(fault, 1000.1) == "error"
    assert keep.reason(slow_fault, 2000.0) == "error"
    assert keep.reason(slow, 1004.99) == "first"
    assert keep.reason(slow, 1005.0) == "slow"


def test_a_stream_that_broke_is_an_error_though_its_status_is_200() -> None:
    keep = Keep(QUIET)
    keep.reason(record(), 1000.1)
    assert keep.reason(record(200, error="unreachable"), 1000.1) == "error"


def test_what_a_caller_did_wrong_is_no_fault() -> None:
    keep = Keep(QUIET)
    for status, kind in ((401, "unauthorized"), (404, "not_found"), (429, "limit"), (499, "client_gone")):
        keep.reason(record(status, error=kind), 1000.1)
        assert keep.reason(record(status, error=kind), 1000.1) == ""


def test_a_few_of_each_route_and_model_are_kept_besides() -> None:
    keep = Keep(TracingSettings(recent_per_s=2.0))
    keep.reason(record(), 1000.0)
    at_once = [keep.reason(record(), 1000.0) for _ in range(50)]
    assert at_once == ["recent"] * 10 + [""] * 40
    a_second_later = [keep.reason(record(), 1001.0) for _ in range(50)]
    assert a_second_later == ["recent"] * 2 + [""] * 48
    keep.reason(record(model="other"), 1001.0)
    assert keep.reason(record(model="other"), 1001.0) == "recent"
    assert keep.reason(record(backend="other"), 1001.0) == "first"
    assert keep.reason(record(backend="other"), 1001.0) == ""  # the rate is one of all backends


def test_an_outage_does_not_keep_everything() -> None:
    keep = Keep(QUIET)
    faults = [keep.reason(record(503, error="unavailable"), 1000.0 + number / 1000) for number in range(3000)]
    assert faults[:100] == ["error"] * 100
    assert 100 <= faults.count("error") <= 101 + 3 * FAULTS_PER_S
    slow = [keep.reason(record(), 1010.0 + number / 1000) for number in range(3000)]
    assert 100 <= slow.count("slow") <= 101 + 3 * FAULTS_PER_S


def test_nothing_is_kept_where_tracing_is_off_or_the_request_is_in_no_trace() -> None:
    assert Keep(TracingSettings(enabled=False)).reason(sampled(), 1000.0) == ""
    outside = sampled()
    outside.span_id = ""
    assert Keep(QUIET).reason(outside, 1000.0) == ""


def test_settings_change_at_run_time_and_what_was_seen_is_not_new_again() -> None:
    keep = Keep(QUIET)
    keep.reason(record(), 1000.0)
    keep.apply(TracingSettings(recent_per_s=0.0, slow_s=0.5))
    assert keep.reason(record(), 1000.1) == ""
    assert keep.reason(record(), 1000.5) == "slow"
    keep.apply(TracingSettings(recent_per_s=1.0))
    assert keep.reason(record(), 1000.1) == "first"
    keep.apply(TracingSettings(enabled=False, recent_per_s=1.0))
    assert keep.reason(record(), 1000.1) == ""


def test_kinds_are_bounded_and_make_room_when_they_are_old() -> None:
    keep, clock = Keep(TracingSettings(recent_per_s=1.0)), FakeClock()

    def now(model: str) -> RequestRecord:
        made = record(model=model)
        made.started_at = clock()
        return made

    for number in range(MAX_KINDS):
        assert keep.reason(now(f"m{number}"), clock()) == "first"
    beyond = [keep.reason(now(f"x{number}"), clock()) for number in range(20)]
    assert beyond == ["recent"] * 10 + [""] * 10
    assert repr(keep) == f"<Keep {MAX_KINDS} kinds>"
    clock.advance(FIRST_AGAIN_S + 1)
    assert keep.reason(now("x0"), clock()) == "first"
    assert repr(keep) == "<Keep 1 kinds>"


@given(
    st.floats(0.01, 50.0),
    st.lists(st.floats(0.0, 5.0), min_size=1, max_size=200),
)
def test_the_rate_is_never_exceeded(per_s: float, waits: list[float]) -> None:
    """However requests come, no more are kept than the burst and what the rate allows since."""
    keep = Keep(TracingSettings(recent_per_s=per_s, slow_s=1e9))
    clock, kept = FakeClock(), 0
    keep.reason(record(), clock())
    for wait in waits:
        clock.advance(min(wait, FIRST_AGAIN_S / 200))
        kept += keep.reason(record(), clock()) == "recent"
    assert kept <= 10 + (clock() - 1000.0) * per_s + 1e-6
    assert kept >= 1


def test_what_is_worth_keeping_and_is_not_kept_is_counted() -> None:
    """An outage may fail faster than traces are kept; the number of those that are missing is known."""
    keep = Keep(TracingSettings(recent_per_s=0.0))
    kept = 0
    for number in range(500):
        record = RequestRecord("POST", "/v1/chat/completions", f"r-{number}", 100.0)
        record.span_id, record.status, record.error_type = "ab" * 8, 502, "unreachable"
        kept += bool(keep.reason(record, 100.0))
    assert 0 < kept < 500
    assert keep.passed_over == 500 - kept


def test_probes_are_no_recent_requests() -> None:
    """They come every few seconds and would crowd out what somebody looks for."""
    keep = Keep(TracingSettings())
    kept = []
    for route in ("/health/live", "/health/live", "/v1/models", "/v1/models"):
        record = RequestRecord("GET", route, "r-1", 100.0)
        record.span_id, record.status = "ab" * 8, 200
        kept.append(keep.reason(record, 100.0))
    assert kept == ["first", "", "first", "recent"]
