"""Streams that pass through: nothing changes but the usage event that only we asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llm_router.chat import Usage
from llm_router.gateway.sse import StreamWatch

CONTENT = [b'data: {"choices":[{"index":0,"delta":{"content":"w%d"}}],"usage":null}' % i for i in range(4)]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4}}'
DONE = b"data: [DONE]"


def stream(*events: bytes, separator: bytes = b"\n\n") -> bytes:
    return b"".join(event + separator for event in events)


def through(watch: StreamWatch, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    out = b"".join(watch.feed(data[a:b]) for a, b in itertools.pairwise(edges) if a < b)
    return out + watch.rest()


@given(cuts=st.lists(st.integers(0, 10_000), max_size=8), crlf=st.booleans())
def test_the_usage_event_is_hidden_and_read_wherever_the_stream_is_split(cuts: list[int], crlf: bool) -> None:
    separator = b"\r\n\r\n" if crlf else b"\n\n"
    watch = StreamWatch(hide_usage=True)
    seen = through(watch, stream(*CONTENT, USAGE, DONE, separator=separator), cuts)
    assert seen == stream(*CONTENT, DONE, separator=separator)
    assert watch.usage == Usage(7, 4)
    assert watch.events == 4
    assert watch.done


@given(cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_a_caller_that_asked_gets_the_stream_byte_for_byte(cuts: list[int]) -> None:
    data = stream(*CONTENT, USAGE, DONE)
    watch = StreamWatch(hide_usage=False)
    assert through(watch, data, cuts) == data
    assert watch.usage == Usage(7, 4)


def test_usage_beside_content_stays() -> None:
    """Some servers put it on the last content event, which must not be lost."""
    event = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}'
    watch = StreamWatch(hide_usage=True)
    assert watch.feed(stream(event)) == stream(event)
    assert watch.usage == Usage(1, 2)


def test_text_that_looks_like_usage_is_text() -> None:
    event = b'data: {"choices":[{"delta":{"content":"say \\"completion_tokens\\": 5"}}]}'
    watch = StreamWatch(hide_usage=True)
    assert watch.feed(stream(event)) == stream(event)
    assert watch.usage is None


def test_text_that_looks_like_the_end_is_text() -> None:
    """A model may well write `[DONE]`, and some servers put the text last."""
    event = b'data: {"choices":[{"delta":{"content":"[DONE]"}}]}'
    watch = StreamWatch(hide_usage=True)
    assert watch.feed(stream(event)) == stream(event)
    assert (watch.done, watch.events) == (False, 1)
    assert watch.feed(stream(DONE, b": bye")) == stream(DONE, b": bye")
    assert watch.done


def test_an_event_that_never_ends_is_not_held_for_ever() -> None:
    watch = StreamWatch(hide_usage=True)
    piece = b"x" * 300_000
    out = b"".join(watch.feed(piece) for _ in range(4))
    assert out == piece * 4


@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_arbitrary_bytes_pass_unchanged(data: bytes, cuts: list[int]) -> None:
    assert through(StreamWatch(hide_usage=False), data, cuts) == data
