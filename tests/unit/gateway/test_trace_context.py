"""The trace context of a request: what is taken from callers, and what backends are told."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.backends.wire import trace_lines
from llm_router.gateway.trace_context import TraceContext, read_tracestate
from llm_router.signals import RequestRecord

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"


def begun(headers: Mapping[bytes, bytes], *, enabled: bool = True, sample_ratio: float = 0.0) -> RequestRecord:
    record = RequestRecord("POST", "/v1/chat/completions", "id", 0.0)
    record.headers = headers
    context = TraceContext(enabled=enabled, sample_ratio=sample_ratio, rng=random.Random(1))
    context.begin(record, headers)
    return record


def traceparent(record: RequestRecord, span_id: str) -> str:
    """What a backend is told; empty outside a trace."""
    if not record.trace_id:
        return ""
    return trace_lines(record, span_id).removeprefix("\r\ntraceparent: ").partition("\r\n")[0]


def told(value: str, state: str = "") -> dict[bytes, bytes]:
    headers = {b"traceparent": value.encode("latin-1")}
    return {**headers, b"tracestate": state.encode("latin-1")} if state else headers


def test_a_callers_trace_is_continued() -> None:
    record = begun(told(VALID, "congo=t61rcWkgMzE"))
    assert (record.trace_id, record.parent_id, record.is_sampled) == (TRACE, PARENT, True)
    assert record.tracestate == "congo=t61rcWkgMzE"
    assert re.fullmatch("[0-9a-f]{16}", record.span_id)
    assert record.span_id != PARENT
    assert not record.has_bad_trace
    assert traceparent(record, "b" * 16) == f"00-{TRACE}-{'b' * 16}-01"


def test_a_request_without_one_begins_a_trace_of_its_own() -> None:
    record = begun({b"tracestate": b"congo=1"})
    assert re.fullmatch("[0-9a-f]{32}", record.trace_id)
    assert re.fullmatch("[0-9a-f]{16}", record.span_id)
    assert (record.parent_id, record.tracestate, record.has_bad_trace) == ("", "", False)
    assert traceparent(record, "b" * 16) == f"00-{record.trace_id}-{'b' * 16}-00"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-011",
        f"00-{TRACE}-{PARENT}-01-",
        f"00-{TRACE}-{PARENT}-01-more",
        f"0-{TRACE}-{PARENT}-01",
        f"000-{TRACE}-{PARENT}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"0G-{TRACE}-{PARENT}-01",
        f"0A-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT.upper()}-01",
        f"00-{TRACE}-{PARENT}-0A",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}0-{PARENT}-01",
        f"00-{TRACE}-{PARENT[:-1]}-01",
        f"00-{TRACE}-{PARENT}0-01",
        f"00-{TRACE[:-1]}.-{PARENT}-01",
        f"00_{TRACE}_{PARENT}_01",
        f"{VALID}, {VALID}",
        f"cc-{TRACE}-{PARENT}-01, {VALID}",
        f"cc-{TRACE}-{PARENT}-01.what-the-future-brings",
        f"cc-{TRACE}-{PARENT}-0",
        f"{VALID}\x85",
        "é" * 55,
    ],
)
def test_what_is_no_traceparent_begins_a_new_trace(value: str) -> None:
    record = begun(told(value, "congo=1"))
    assert record.has_bad_trace
    assert record.trace_id
    assert record.trace_id != TRACE
    assert record.span_id
    assert (record.parent_id, record.tracestate, record.is_sampled) == ("", "", False)


@pytest.mark.parametrize("rest", ["", "-", "-what-the-future-brings"])
def test_a_later_version_is_read_as_far_as_it_is_known_and_answered_by_ours(rest: str) -> None:
    record = begun(told(f"cc-{TRACE}-{PARENT}-01{rest}"))
    assert (record.trace_id, record.parent_id, record.is_sampled) == (TRACE, PARENT, True)
    assert traceparent(record, PARENT) == VALID


@pytest.mark.parametrize(
    ("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("fe", False), ("ff", True), ("09", True)]
)
def test_only_the_sampled_flag_is_understood_and_passed_on(flags: str, is_sampled: bool) -> None:
    record = begun(told(f"00-{TRACE}-{PARENT}-{flags}"), sample_ratio=0.5)
    assert record.is_sampled is is_sampled
    assert traceparent(record, PARENT)[-2:] == ("01" if is_sampled else "00")


def test_the_callers_decision_counts_and_the_ratio_only_without_one() -> None:
    assert not begun(told(f"00-{TRACE}-{PARENT}-00"), sample_ratio=1.0).is_sampled
    assert begun({}, sample_ratio=1.0).is_sampled
    assert not begun({}, sample_ratio=0.0).is_sampled
    assert begun(told("nonsense"), sample_ratio=1.0).is_sampled


def test_the_sampled_share_is_the_ratio_and_follows_from_the_id() -> None:
    """Whoever samples by a larger ratio has all traces that are sampled by a smaller one."""
    few = TraceContext(enabled=True, sample_ratio=0.1, rng=random.Random(7))
    many = TraceContext(enabled=True, sample_ratio=0.3, rng=random.Random(7))
    sampled = {0.1: 0, 0.3: 0}
    for _ in range(5000):
        one, other = RequestRecord("GET", "/", "", 0.0), RequestRecord("GET", "/", "", 0.0)
        few.begin(one, {})
        many.begin(other, {})
        assert one.trace_id == other.trace_id
        assert one.is_sampled == (int(one.trace_id[-14:], 16) >= round(0.9 * (1 << 56)))
        assert other.is_sampled or not one.is_sampled
        sampled[0.1] += one.is_sampled
        sampled[0.3] += other.is_sampled
    assert abs(sampled[0.1] / 5000 - 0.1) < 0.02
    assert abs(sampled[0.3] / 5000 - 0.3) < 0.03


def test_ids_that_are_all_zero_are_never_given() -> None:
    class Unlucky(random.Random):
        """The first numbers are zero."""

        zeros = 1

        def getrandbits(self, k: int, /) -> int:
            if self.zeros:
                self.zeros -= 1
                return 0
            return super().getrandbits(k)

    record = RequestRecord("GET", "/", "", 0.0)
    TraceContext(enabled=True, sample_ratio=0.0, rng=Unlucky(1)).begin(record, told("bad"))
    assert int(record.trace_id, 16)
    assert int(record.span_id, 16)
    assert record.has_bad_trace
    continued = RequestRecord("GET", "/", "", 0.0)
    TraceContext(enabled=True, sample_ratio=0.0, rng=Unlucky(1)).begin(continued, told(VALID))
    assert int(continued.span_id, 16)


def test_switched_off_a_callers_context_passes_as_it_came_and_nothing_begins() -> None:
    later = f"cc-{TRACE}-{PARENT}-03-future"
    record = begun(told(later, "congo=1"), enabled=False, sample_ratio=1.0)
    assert (record.trace_id, record.parent_id, record.span_id) == (TRACE, PARENT, "")
    assert record.tracestate == "congo=1"
    assert traceparent(record, "") == later
    for headers in ({}, told("nonsense", "congo=1")):
        record = begun(headers, enabled=False, sample_ratio=1.0)
        assert (record.trace_id, record.span_id, record.tracestate) == ("", "", "")
        assert not record.is_sampled
        assert not record.has_bad_trace
        assert traceparent(record, "") == ""


def test_settings_change_at_run_time() -> None:
    context = TraceContext(enabled=False, sample_ratio=0.0, rng=random.Random(1))
    context.apply(enabled=True, sample_ratio=1.0)
    record = RequestRecord("GET", "/", "", 0.0)
    context.begin(record, {})
    assert record.is_sampled
    assert repr(context) == "TraceContext(enabled=True, sample_ratio=1)"


# -- tracestate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_state", "kept"),
    [
        ("foo=1", "foo=1"),
        ("foo=1,bar=2", "foo=1,bar=2"),
        ("foo=1 , \tbar=2\t", "foo=1,bar=2"),
        ("foo=1,,bar=2,", "foo=1,bar=2"),
        (",", ""),
        ("foo= 1", "foo= 1"),
        ("foo=1,foo=2", "foo=1"),
        ("tenant@system=1", "tenant@system=1"),
        ("0tenant@system=1,0simple=2", "0tenant@system=1,0simple=2"),
        (
            "a_-*/0=!\"#$%&'()*+-./0123456789:;<>?@AZ[\\]^_`az{|}~",
            "a_-*/0=!\"#$%&'()*+-./0123456789:;<>?@AZ[\\]^_`az{|}~",
        ),
        ("z" * 256 + "=1", "z" * 256 + "=1"),
        ("t" * 241 + "@" + "v" * 14 + "=1", "t" * 241 + "@" + "v" * 14 + "=1"),
    ],
)
def test_a_valid_tracestate_is_passed_on(given_state: str, kept: str) -> None:
    record = begun(told(VALID, given_state))
    assert record.tracestate == kept
    assert record.trace_id == TRACE


@pytest.mark.parametrize(
    "given_state",
    [
        "foo",
        "foo=",
        "=1",
        "foo =1",
        "FOO=1",
        "foo.bar=1",
        "foo@=1,bar=2",
        "@foo=1,bar=2",
        "foo@@bar=1",
        "foo@bar@baz=1",
        "foo@0bar=1",
        "foo=1,b@r@z=2",
        "foo=bar=baz",
        "foo=\tbar",
        "foo=b\x00r",
        "foo=bär",
        "foo=1;bar=2",
        "z" * 257 + "=1",
        "t" * 242 + "@v=1",
        "t@" + "v" * 15 + "=1",
        "foo=" + "v" * 257,
        ",".join(f"k{number}=1" for number in range(33)),
        "foo=1," + "," * 20_000,
    ],
)
def test_an_invalid_tracestate_is_dropped_and_the_trace_goes_on(given_state: str) -> None:
    record = begun(told(VALID, given_state))
    assert record.tracestate == ""
    assert record.trace_id == TRACE
    assert not record.has_bad_trace


def test_a_long_tracestate_loses_large_members_first_and_then_those_at_the_end() -> None:
    large = "large=" + "x" * 200
    small = [f"k{number:02}={'y' * 56}" for number in range(9)]  # 60 characters each: eight fit, with commas
    assert read_tracestate(",".join([small[0], large, *small[1:]]).encode()) == ",".join(small[:8])
    assert read_tracestate(",".join([large, *small[:5]]).encode()) == ",".join([large, *small[:5]])


KEYS = st.from_regex(r"[a-z][a-z0-9_\-*/]{0,20}", fullmatch=True)
VALUES = st.text(st.sampled_from([chr(code) for code in range(0x21, 0x7F) if chr(code) not in ",="]), min_size=1)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=32, unique_by=lambda member: member[0]))
def test_what_is_passed_on_is_made_of_whole_members_in_order_and_is_itself_valid(
    members: list[tuple[str, str]],
) -> None:
    whole = [f"{key}={value[:200]}" for key, value in members]
    state = read_tracestate(",".join(whole).encode())
    assert len(state) <= 512
    left = state.split(",") if state else []
    positions = [whole.index(member) for member in left]
    assert positions == sorted(positions)
    assert read_tracestate(state.encode()) == state
    if len(",".join(whole)) <= 512:
        assert left == whole


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_header_can_break_anything(parent: bytes, state: bytes) -> None:
    for enabled in (True, False):
        record = begun({b"traceparent": parent, b"tracestate": state}, enabled=enabled)
        header = traceparent(record, "a" * 16)
        assert header == "" or re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.*", header)


@given(
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.integers(0, 255),
    st.integers(0, 254),
    st.booleans(),
)
def test_every_valid_context_is_taken(trace: int, parent: int, flags: int, version: int, enabled: bool) -> None:
    header = f"{version:02x}-{trace:032x}-{parent:016x}-{flags:02x}"
    record = begun(told(header), enabled=enabled)
    assert (record.trace_id, record.parent_id) == (f"{trace:032x}", f"{parent:016x}")
    assert record.is_sampled == bool(flags & 1)
