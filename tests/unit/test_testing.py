"""The fakes that we ship: a scripted backend that real clients believe, a clock, a recorder."""

from __future__ import annotations

import http.client
import socket
import threading
from typing import Any

import openai
import pytest

from llm_router.signals import NoRecorder, Recorder, RequestRecord
from llm_router.testing import (
    Close,
    FakeClock,
    Gate,
    Hold,
    Pause,
    RecordingRecorder,
    Reset,
    ScriptedBackend,
    Stall,
    bytewise,
    framed,
    json_reply,
    stream_head,
)

ASK: Any = [{"role": "user", "content": "three short words"}]


def post(backend: ScriptedBackend, body: bytes = b"{}", path: str = "/v1/chat/completions") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", backend.port, timeout=10)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_openai_client_believes_it() -> None:
    """Chat, streams with usage, completions, embeddings, models and errors, through the official client."""
    with ScriptedBackend(models=("one", "two")) as backend, openai.OpenAI(base_url=backend.base_url, api_key="k") as ai:
        text = "Hello from the scripted backend."
        chat: Any = ai.chat.completions.create(model="m", messages=ASK)
        assert (text, "stop", 3, 6) == (
            chat.choices[0].message.content,
            chat.choices[0].finish_reason,
            chat.usage.prompt_tokens,
            chat.usage.completion_tokens,
        )
        short = ai.chat.completions.create(model="m", messages=ASK, max_tokens=2)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("Hello from", "length")
        chunks: list[Any] = list(
            ai.chat.completions.create(model="m", messages=ASK, stream=True, stream_options={"include_usage": True})
        )
        assert text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].usage.total_tokens == 9
        assert ai.completions.create(model="m", prompt="a b").choices[0].text == text
        assert "".join(c.choices[0].text for c in ai.completions.create(model="m", prompt="a", stream=True)) == text
        vectors = ai.embeddings.create(model="m", input=["a", "b", "a"], encoding_format="float").data
        assert vectors[0].embedding == vectors[2].embedding != vectors[1].embedding
        assert [model.id for model in ai.models.list()] == ["one", "two"]
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve("three")
        assert {request.headers["authorization"] for request in backend.requests} == {"Bearer k"}


@pytest.mark.parametrize("body", [b"not json", b"[]"])
def test_bad_bodies_get_an_error_object(body: bytes) -> None:
    """It is no more lenient than what it stands for."""
    with ScriptedBackend() as backend:
        status, answer = post(backend, body)
        assert status == 400
        assert b'"error"' in answer


def test_scripts_are_played_in_order_and_then_the_usual() -> None:
    """One script a request; `always` replaces what comes after them."""
    with ScriptedBackend() as backend:
        backend.script(json_reply(1))
        backend.script(stream_head(), *bytewise(framed(b"2")), Pause(0.001), framed(b""))
        backend.always(json_reply(3, 429, headers=[("Retry-After", "7")]))
        assert [post(backend) for _ in range(4)] == [(200, b"1"), (200, b"2"), (429, b"3"), (429, b"3")]
        backend.always()
        assert post(backend)[0] == 200
        assert len(backend.connections) == 5


@pytest.mark.parametrize("fault", [Close(), Reset()])
def test_faults_are_seen_by_the_client(fault: Close | Reset) -> None:
    """A closed or reset connection is no reply, and who closed it is known."""
    with ScriptedBackend() as backend:
        backend.script(fault)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            post(backend)
        backend.wait(lambda b: b.connections[0].closed_by == "backend")


def test_a_client_that_leaves_is_recorded() -> None:
    """Stalled or held, the backend notices at once."""
    for step in (Stall(), Hold(Gate())):
        with ScriptedBackend() as backend:
            backend.script(step)
            with socket.create_connection(("127.0.0.1", backend.port)) as client:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                backend.wait(lambda b: b.requests)
            backend.wait(lambda b: b.connections[0].closed_by == "client")


def test_a_gate_holds_until_it_is_opened() -> None:
    """Opened from another thread, for all who wait and all who come later."""
    with ScriptedBackend() as backend:
        gate = Gate()
        backend.always(Hold(gate), json_reply("through"))
        answers: list[tuple[int, bytes]] = []
        threads = [threading.Thread(target=lambda: answers.append(post(backend))) for _ in range(3)]
        for thread in threads:
            thread.start()
        backend.wait(lambda b: len(b.requests) == 3)
        assert not answers
        gate.open()
        for thread in threads:
            thread.join()
        assert [*answers, post(backend)] == [(200, b'"through"')] * 4


def test_waiting_in_vain_says_what_there_was() -> None:
    """A wait that ends without its condition fails with the state."""
    with ScriptedBackend() as backend, pytest.raises(AssertionError, match="requests 0"):
        backend.wait(lambda b: b.requests, timeout_s=0.01)


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    """A backend that cannot listen does not pretend to."""
    with ScriptedBackend() as first, pytest.raises(OSError, match="address already in use"):
        ScriptedBackend(port=first.port).__enter__()


def test_the_clock_moves_when_told_to() -> None:
    """And never back."""
    clock = FakeClock(5.0)
    assert (clock(), clock.advance(2.5), clock.now) == (5.0, 7.5, 7.5)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


def test_the_recorder_keeps_and_checks() -> None:
    """It is a Recorder like the real one, and insists on the order of its protocol."""
    recorder = RecordingRecorder()
    either: list[Recorder] = [recorder, NoRecorder()]
    record = RequestRecord("POST", "/", "id", 1.0)
    for each in either:
        record = RequestRecord("POST", "/", "id", 1.0)
        record.gaps_s = [0.1, 0.2]
        each.begin()
        each.finish(record, 2.0)
        each.connection_opened("client", "http")
        each.connection_closed("client", "http", 1.0)
        each.error("worker_lost")
    assert (recorder.in_flight, len(recorder.finished), recorder.gap_seconds) == (0, 1, [0.1, 0.2])
    assert recorder.closed_connections == [("client", "http", 1.0)]
    assert recorder.errors == ["worker_lost"]
    with pytest.raises(AssertionError, match="finish without begin"):
        recorder.finish(record, 2.0)
    with pytest.raises(AssertionError, match="without being opened"):
        recorder.connection_closed("client", "http", 1.0)
