"""A conversation with a running router."""

from __future__ import annotations

import json

import pytest

from llm_router.cli.chat import Conversation
from llm_router.cli.options import CannotAsk, first_model
from llm_router.testing import Close, ScriptedBackend, framed, json_reply, stream_head


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
