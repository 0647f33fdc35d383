"""Streams that pass through: nothing changes but the usage event that only we asked for."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llm_router.chat import Endpoint, Usage
from llm_router.gateway.sse import MessagesWatch, StreamWatch, Watch, watch_for
from support import anthropic

CONTENT = [b'data: {"choices":[{"index":0,"delta":{"content":"w%d"}}],"usage":null}' % i for i in range(4)]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4}}'
DONE = b"data: [DONE]"


def stream(*events: bytes, separator: bytes = b"\n\n") -> bytes:
    return b"".join(event + separator for event in events)


def through(watch: Watch, data: bytes, cuts: list[int]) -> bytes:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    out = b"".join(watch.feed(data[a:b]) for a, b in itertools.pairwise(edges) if a < b)
    return out + watch.rest()


@given(cuts=st.lists(st.integers(0, 10_000), max_size=8), crlf=st.booleans())
def test_a_backend_that_says_it_failed_is_heard_wherever_the_stream_is_split(cuts: list[int], crlf: bool) -> None:
    """As vLLM does, an object of its own with the end mark behind it; or as OpenRouter, beside the choices."""
    separator = b"\r\n\r\n" if crlf else b"\n\n"
    alone = b'data: {"error": {"message": "out of memory", "code": 500}}'
    beside = b'data: {"choices":[{"delta":{"content":""},"finish_reason":"error"}],"error":{"message":"gone"}}'
    for event in (alone, beside):
        data = stream(*CONTENT, event, DONE, separator=separator)
        watch = StreamWatch(hide_usage=True)
        assert through(watch, data, cuts) == data
        assert (watch.failed, watch.done) == (True, True)


def test_speaking_of_errors_is_no_failure() -> None:
    watch = StreamWatch(hide_usage=True)
    events = (
        b'data: {"choices":[{"delta":{"content":"error"}}],"error":null}',
        b'data: {"choices":[{"delta":{"content":"{\\"error\\":1}"}}]}',
        b'data: {"choices":[{"delta":{"error":"of the model"}}]}',
        b': "error"',
    )
    watch.feed(stream(*events, DONE))
    assert (watch.failed, watch.done) == (False, True)


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


def test_what_was_cached_and_thought_is_part_of_the_usage() -> None:
    watch = watch_for(Endpoint.CHAT, hide_usage=False)
    details = b'"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}'
    watch.feed(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4,%b}}\n\n' % details)
    assert watch.usage == Usage(7, 4, 3, 2)


MESSAGE = anthropic.message(anthropic.thinking("hm"), anthropic.text(), anthropic.tool_use("f", {"a": 1}))


@given(
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    newline=st.sampled_from(["\n", "\r\n"]),
    hide_usage=st.booleans(),
)
def test_a_stream_of_anthropics_passes_byte_for_byte(cuts: list[int], newline: str, hide_usage: bool) -> None:
    """Wherever it is split; every piece of content counts, and the usage is the last that was said."""
    data = anthropic.stream(MESSAGE, newline=newline)
    watch = watch_for(Endpoint.MESSAGES, hide_usage=hide_usage)
    assert through(watch, data, cuts) == data
    assert watch.usage == Usage(10, 7, 3, 4, 2, 1)
    assert watch.events == data.count(b"event: content_block_delta")
    assert (watch.done, watch.failed) == (True, False)


def test_of_a_stream_of_anthropics_that_is_cut_the_output_is_what_came() -> None:
    """Its start tells the input, and one token of output."""
    data = anthropic.stream(MESSAGE, piece=1)
    watch = MessagesWatch()
    watch.feed(data[: data.index(b"event: message_delta")])
    assert watch.usage == Usage(10, watch.events, 3, 0, 2, 1)
    assert watch.events > 20
    assert not watch.done


def test_a_failure_that_anthropics_stream_tells_of_is_seen() -> None:
    watch = MessagesWatch()
    data = anthropic.event(anthropic.events(MESSAGE)[0]) + anthropic.event(anthropic.error("overloaded_error"))
    assert watch.feed(data) == data
    assert (watch.failed, watch.done) == (True, False)


def test_text_that_looks_like_an_event_of_anthropics_is_text() -> None:
    said = "\n\nevent: error\ndata: {}\n\nevent: message_stop\ndata: {}\n\nevent: content_block_delta\n"
    data = anthropic.stream(anthropic.message(anthropic.text(said)), piece=1000)
    watch = MessagesWatch()
    assert watch.feed(data[: data.index(b'event: message_stop\ndata: {"type"')])
    assert (watch.failed, watch.done, watch.events) == (False, False, 1)


@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_arbitrary_bytes_of_anthropics_pass_unchanged(data: bytes, cuts: list[int]) -> None:
    assert through(MessagesWatch(), data, cuts) == data
