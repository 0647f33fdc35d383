"""Messages between supervisor and children: cut right, bounded, never waiting."""

from __future__ import annotations

import json
import socket
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llm_router.processes.channel import LONGEST_LINE_BYTES, Channel, Lines


@given(st.lists(st.dictionaries(st.text(), st.integers()), max_size=5), st.data())
def test_messages_come_whole_however_bytes_arrive(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    """Every split of the stream gives the same messages."""
    stream = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    lines = Lines()
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += lines.feed(stream[begin:end])
    assert found == messages
    assert lines.bad == 0


def test_what_is_no_json_object_is_counted_and_left_out() -> None:
    """A child that writes nonsense disturbs nobody."""
    lines = Lines()
    assert lines.feed(b'nonsense\n[1]\n\xff\n{"a": 1}\n') == [{"a": 1}]
    assert lines.bad == 3


def test_a_line_without_end_does_not_grow_memory() -> None:
    """Beyond the bound the line is dropped."""
    lines = Lines()
    lines.feed(b"x" * (LONGEST_LINE_BYTES + 1))
    assert lines.bad == 1
    assert lines.feed(b'\n{"a": 1}\n')[-1] == {"a": 1}


def read_lines(sock: socket.socket) -> list[dict[str, Any]]:
    sock.setblocking(False)
    messages, _ = Lines().read_all(sock.fileno())
    return messages


def test_the_state_is_sent_at_once_and_then_only_when_it_changed() -> None:
    """A new control knows everything from the first message on."""
    number = 0
    channel = Channel(lambda: {"event": "state", "number": number})
    channel.flush()
    channel.flush()
    assert read_lines(channel.theirs) == [{"event": "state", "number": 0}]
    number = 1
    channel.changed()
    channel.flush()
    assert read_lines(channel.theirs) == [{"event": "state", "number": 1}]
    channel.close()


def test_a_reply_comes_after_the_state_that_it_speaks_of() -> None:
    """Whoever is told that a runner is gone must not still find it in the state."""
    runners = ["m"]
    channel = Channel(lambda: {"runners": list(runners)})
    channel.flush()
    runners.clear()
    channel.changed()
    channel.reply({"id": 1, "ok": True})
    channel.flush()
    assert read_lines(channel.theirs) == [{"runners": ["m"]}, {"runners": []}, {"id": 1, "ok": True}]
    channel.close()


def test_a_slow_reader_misses_states_but_not_the_last_and_no_reply() -> None:
    """What waits does not grow with the number of changes."""
    number = 0
    channel = Channel(lambda: {"number": number, "filling": "x" * 50_000})
    for number in range(1, 200):  # noqa: B007  # the lambda reads it
        channel.changed()
        channel.flush()
    channel.reply({"id": 1, "ok": True})
    waited = channel.is_waiting
    found: list[dict[str, Any]] = []
    lines = Lines()
    channel.theirs.setblocking(False)
    while more := lines.read_all(channel.theirs.fileno())[0]:
        found += more
        channel.flush()
    assert waited
    states = [message["number"] for message in found if "number" in message]
    assert len(states) < 100
    assert states[-1] == 199
    assert {"id": 1, "ok": True} in found
    channel.close()


def test_a_control_that_never_reads_is_given_up() -> None:
    """Replies are bounded too: beyond the bound the channel is broken."""
    channel = Channel(dict)
    while not channel.broken:
        channel.reply({"id": 1, "error": "x" * 100_000})
        channel.flush()
    assert not channel.is_waiting
    channel.close()


def test_the_end_of_the_stream_breaks_the_channel() -> None:
    """What arrived before the end is still obeyed."""
    channel = Channel(dict)
    channel.theirs.sendall(b'{"op": "announce"}\n')
    channel.theirs.close()
    assert channel.receive() == [{"op": "announce"}]
    assert channel.broken
    channel.close()
