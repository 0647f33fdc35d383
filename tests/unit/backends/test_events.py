"""Server-sent events are read as the standard says, wherever the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.backends.events import EventReader
from llm_router.errors import BadReply
from support.anthropic import split


@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=5
    ),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    is_ended=st.booleans(),
)
def test_events_are_the_same_wherever_the_stream_is_cut(
    texts: list[str], newline: str, cuts: list[int], is_ended: bool
) -> None:
    stream = (newline * 2).join(f"event: a{newline}data: {text}" for text in texts) + newline * (2 if is_ended else 0)
    reader = EventReader("b")
    told = [event for piece in split(stream.encode(), cuts) for event in reader.feed(piece)]
    told += reader.rest()
    assert told == [text.encode() for text in texts]


def test_comments_and_names_say_nothing_and_lines_of_data_are_one_text() -> None:
    reader = EventReader("b")
    assert reader.feed(b": still here\n\nevent: ping\n\nid: 1\ndata:one\ndata: two\nretry: 3\n\n") == [b"one\ntwo"]
    assert reader.rest() == []


def test_an_event_that_never_ends_is_refused() -> None:
    reader = EventReader("b")
    with pytest.raises(BadReply, match="16 MiB"):
        for _ in range(17):
            reader.feed(b"x" * (1 << 20))
