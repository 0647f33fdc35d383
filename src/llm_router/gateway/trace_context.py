"""W3C trace context: which trace a request belongs to, as its caller says or as we decide.

    traceparent: 00-<32 hex digits: trace>-<16 hex digits: parent span>-<2 hex digits: flags, bit 0 is "sampled">

Strict in what it takes (Trace Context level 1; keys of tracestate may begin with a digit, as level 2 allows): a header
that is none begins a new trace, and never travels on. Flags of later levels are not passed on, as level 1 demands.
Not for: what backends are told (backends/wire.py), spans, or deciding at the end what is kept (observe/tracing).

Source: https://www.w3.org/TR/trace-context-1/; the head sampler is that of https://www.w3.org/TR/trace-context-2/#randomness-of-trace-id
and OpenTelemetry's consistent probability sampling: whoever samples by the same ratio chooses the same traces.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Final

from llm_router.signals import RequestRecord

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"

_MAX_MEMBERS: Final = 32
_MAX_CHARS: Final = 512
"""Of tracestate as it is passed on; what the specification asks everybody to pass on at least."""
_LARGE_MEMBER_CHARS: Final = 128
"""Members longer than this are the first to go where a list is too long."""
_LONGEST_CHARS: Final = _MAX_MEMBERS * (256 + 1 + 256) + _MAX_MEMBERS - 1
"""Of a list with as many and as long members as there may be; anything longer is not looked at."""

_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16
_RANDOM_BITS: Final = (1 << 56) - 1  # the part of a trace id that is random by specification

# The groups: trace, parent, and the last digit of the flags. Version 00 ends with them; later ones may have added
# something; ff is none. No id is all zero, and a comma would mean that the header came twice.
_traceparent = re.compile(
    rb"(?:00(?=.{53}\Z)|(?!00|ff)[0-9a-f]{2})"
    rb"-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]([0-9a-f])(?:-[^,]*)?"
).fullmatch
_SAMPLED_DIGITS: Final = b"13579bdf"
_member = re.compile(
    r"(?:[a-z0-9][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
).fullmatch


class TraceContext:
    """Gives each request its place in a trace. Belongs to one thread.

    Args:
        enabled: off, no trace is begun: what a caller sent is passed on as it came, if it is valid.
        sample_ratio: of requests whose caller did not decide, the share that is sampled, 0 to 1.
        rng: of ids. They tell traces apart and are no secrets.
    """

    def __init__(self, *, enabled: bool, sample_ratio: float, rng: random.Random) -> None:
        self._bits = rng.getrandbits
        self.apply(enabled=enabled, sample_ratio=sample_ratio)

    def __repr__(self) -> str:
        return f"TraceContext(enabled={self._enabled}, sample_ratio={self._ratio:g})"

    def apply(self, *, enabled: bool, sample_ratio: float) -> None:
        """Use these from the next request on."""
        self._enabled = enabled
        self._ratio = sample_ratio
        self._unsampled = round((1.0 - sample_ratio) * (1 << 56))

    def begin(self, record: RequestRecord, headers: Mapping[bytes, bytes]) -> None:
        """Fill the fields of the record that are about its trace, from the caller's headers (names in lower case).

        Without a valid traceparent a new trace begins; `has_bad_trace` tells that there was one which is none. When
        tracing is off only `trace_id`, `parent_id`, `tracestate` and `is_sampled` of a valid caller are filled.
        """
        given = headers.get(TRACEPARENT)
        if given is not None:
            found = _traceparent(given)
            if found is not None:
                trace_id, parent_id, digit = found.groups()
                record.trace_id = trace_id.decode()
                record.parent_id = parent_id.decode()
                record.is_sampled = digit in _SAMPLED_DIGITS
                state = headers.get(TRACESTATE)
                if state:
                    record.tracestate = read_tracestate(state)
                if self._enabled:
                    record.span_id = "%016x" % (self._bits(64) or 1)  # half the time of an f-string
                return
            record.has_bad_trace = self._enabled
        if self._enabled:
            bits = self._bits(192)
            ids = "%048x" % bits  # noqa: UP031  # the span first: so the last 56 bits are the trace's
            span_id, trace_id = ids[:16], ids[16:]
            if span_id == _NO_SPAN or trace_id == _NO_TRACE:  # once in 2**64
                self.begin(record, {})
                return
            record.trace_id = trace_id
            record.span_id = span_id
            record.is_sampled = bits & _RANDOM_BITS >= self._unsampled


def read_tracestate(given: bytes) -> str:
    """The list as it is passed on; empty if any of it is not valid, or too much.

    Of members with the same key the first counts. A list longer than 512 characters loses whole members: the large
    ones first, then those at the end.
    """
    if len(given) > _LONGEST_CHARS:
        return ""
    members: dict[str, str] = {}
    for part in given.decode("latin-1").split(","):
        member = part.strip(" \t")
        if not member:
            continue  # allowed, and says nothing
        if _member(member) is None:
            return ""
        members.setdefault(member[: member.index("=")], member)
        if len(members) > _MAX_MEMBERS:
            return ""
    state = ",".join(members.values())
    return state if len(state) <= _MAX_CHARS else _shortened(list(members.values()))


def _shortened(members: list[str]) -> str:
    chars = sum(map(len, members)) + len(members) - 1
    for index in range(len(members) - 1, -1, -1):
        if chars > _MAX_CHARS and len(members[index]) > _LARGE_MEMBER_CHARS:
            chars -= len(members.pop(index)) + 1
    while chars > _MAX_CHARS:
        chars -= len(members.pop()) + 1
    return ",".join(members)
