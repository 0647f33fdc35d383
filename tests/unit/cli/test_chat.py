"""A conversation with a running router."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from llm_router.cli.chat import Conversation
from llm_router.cli.options import CannotAsk, first_model
from llm_router.testing import Close, ScriptedBackend, framed, json_reply, stream_head

SOURCES = Path(__file__).parents[3] / "src"

AT_A_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)  # what a session opens first becomes the terminal whose Ctrl-C it gets
from llm_router.cli import main
main()
"""


def test_answers_arrive_in_pieces_and_are_remembered() -> None:
    """The next question is asked with what was said before."""
    with ScriptedBackend(tokens=("Hello", " you", ".")) as backend:
        conversation = Conversation(backend.url, "key", "Be brief.", {"model": "m", "max_tokens": 9})
        assert list(conversation.ask("Hi")) == ["Hello", " you", "."]
        list(conversation.ask("Again"))
        first, second = backend.requests
    assert first.headers["authorization"] == "Bearer key"
    assert first.json() == {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    }
    assert [message["content"] for message in second.json()["messages"]] == ["Be brief.", "Hi", "Hello you.", "Again"]


def test_clear_forgets_all_but_the_instructions() -> None:
    """They are part of how the conversation was begun."""
    with ScriptedBackend() as backend:
        conversation = Conversation(backend.url, None, "Be brief.", {})
        list(conversation.ask("Hi"))
        conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_errors_show_the_message_of_the_router() -> None:
    """Also one inside a stream; a question without an answer is not remembered."""
    error = {"error": {"message": "no model 'x'", "type": "model_not_found"}}
    with ScriptedBackend() as backend:
        conversation = Conversation(backend.url, None, None, {})
        backend.script(json_reply(error, 404))
        with pytest.raises(CannotAsk, match="no model 'x'"):
            list(conversation.ask("Hi"))
        backend.script(stream_head(), framed(b"data: " + json.dumps(error).encode() + b"\n\n"), framed(b""))
        with pytest.raises(CannotAsk, match="no model 'x'"):
            list(conversation.ask("Hi"))
        backend.script(json_reply("?", 500))
        with pytest.raises(CannotAsk, match="answered 500"):
            list(conversation.ask("Hi"))
    assert conversation.messages == []


def test_a_conversation_goes_on_until_it_is_ended(tmp_path: Path) -> None:
    """Ctrl-C at the prompt only drops what was typed; an unknown command is not sent to the model."""
    terminal, theirs = pty.openpty()
    env = {"PATH": os.defpath, "HOME": str(tmp_path), "PYTHONPATH": str(SOURCES), "TERM": "dumb"}
    with ScriptedBackend(tokens=("Fine",)) as backend:
        chat = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, "chat", "--url", backend.url, "--model", "m"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
        )
        try:
            os.close(theirs)
            screen = _Screen(terminal)
            seen = screen.until(b"> ")
            os.write(terminal, b"half a que")
            seen += screen.until(b"half a que")
            os.write(terminal, b"\x03")
            seen += screen.until(b"> ", again=b"\x03")
            os.write(terminal, b"/help\n")
            seen += screen.until(b"> ")
            os.write(terminal, b"How are you?\n")
            seen += screen.until(b"Fine") + screen.until(b"> ")
            os.write(terminal, b"\x04")
            assert chat.wait(20) == 0
        finally:
            chat.kill()
            chat.wait()
            os.close(terminal)
    assert seen.count(b"/exit or Ctrl-D ends") == 3
    assert [request.json()["messages"] for request in backend.requests] == [
        [{"role": "user", "content": "How are you?"}]
    ]


class _Screen:
    """What a terminal shows, read step by step."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._unread = b""

    def until(self, wanted: bytes, again: bytes = b"") -> bytes:
        """What comes up to and with `wanted`.

        Args:
            again: typed again after each silent second. CPython's `input` sleeps through a Ctrl-C that comes in the
                moment between its look at signals and its wait for a key; a person presses it again.
        """
        silent_s = 0
        while wanted not in self._unread:
            if select.select([self._terminal], [], [], 1)[0]:
                self._unread += os.read(self._terminal, 4096)
                continue
            silent_s += 1
            assert silent_s < 20, f"{wanted!r} did not come; there is {self._unread!r}"
            if again:
                os.write(self._terminal, again)
        before, _, self._unread = self._unread.partition(wanted)
        return before + wanted


def test_an_answer_cut_short_is_an_error_but_remembered() -> None:
    """What was read stays part of the conversation."""
    event = {"choices": [{"index": 0, "delta": {"content": "Half"}}]}
    with ScriptedBackend() as backend:
        conversation = Conversation(backend.url, None, None, {})
        backend.script(stream_head(), framed(b"data: " + json.dumps(event).encode() + b"\n\n"), Close())
        with pytest.raises(CannotAsk, match="ended early"):
            list(conversation.ask("Hi"))
    assert [message["content"] for message in conversation.messages] == ["Hi", "Half"]


def test_a_stopped_answer_is_remembered_as_far_as_it_came() -> None:
    """Ctrl-C ends the answer, not the conversation."""
    with ScriptedBackend(tokens=("One", "Two")) as backend:
        conversation = Conversation(backend.url, None, None, {})
        answer = conversation.ask("Hi")
        assert next(answer) == "One"
        answer.close()  # type: ignore[attr-defined]  # it is a generator
    assert [message["content"] for message in conversation.messages] == ["Hi", "One"]


def test_without_a_model_the_first_one_is_asked() -> None:
    """In the order that the router lists; none is an error that says what to do."""
    with ScriptedBackend(models=("b", "a")) as backend:
        assert first_model(backend.url, None) == "b"
        backend.models = ()
        with pytest.raises(CannotAsk, match="has no models yet"):
            first_model(backend.url, None)
