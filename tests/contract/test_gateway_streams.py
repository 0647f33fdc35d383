"""The ends of streams, and what a backend may say about tokens."""

from __future__ import annotations

import http.client
import socket

import pytest

from llm_router.gateway.front import FrontSettings
from llm_router.testing import Gate, Hold, Repeat, ScriptedBackend, Stall, framed, json_reply, stream_head
from support.gateway import Gateway, table

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "after", [Stall(), Repeat(framed(b": still here\n\n") + framed(EVENT), 1_000_000)], ids=["silent", "talking"]
)
def test_a_backend_that_does_not_end_after_done_is_let_go(after: Stall | Repeat) -> None:
    """The caller has its answer; neither a drain nor least-loaded may go on waiting for the backend."""
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), framed(EVENT + DONE), after)
        answer = gateway.chat(stream=True)
        record = gateway.record()
        backend.wait(lambda b: b.connections[0].closed_by == "client", timeout_s=5)
    assert answer.body.startswith(EVENT + DONE)
    assert (record.status, record.outcome, record.attempts[0].outcome) == (200, "success", "success")


def test_a_stream_may_end_without_done() -> None:
    """Not every server sends it: what came is passed on as it came, and the tokens are an estimate."""
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), framed(EVENT * 3 + b"data: tail"), framed(b""))
        answer = gateway.chat(stream=True)
        record = gateway.record()
    assert answer.body == EVENT * 3 + b"data: tail"
    assert (record.outcome, record.output_tokens, record.usage_source) == ("success", 3, "estimated")


def test_text_that_looks_like_the_end_does_not_end_the_stream() -> None:
    """A model may write [DONE] itself."""
    said = b'data: {"choices":[{"delta":{"content":"[DONE]"}}]}\n\n'
    gate = Gate()
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        gate.open()
        backend.script(stream_head(), framed(said), Hold(gate), framed(EVENT + DONE) + framed(b""))
        assert gateway.chat(stream=True).body == said + EVENT + DONE


@pytest.mark.parametrize("tokens", ["-5", "12.5", "1" * 400, '"many"'])
def test_an_answer_with_absurd_usage_is_an_answer(tokens: str) -> None:
    """It is passed on, and no counter goes down or breaks for it."""
    body = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%b}}' % tokens.encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.script(head + body)
        answer = gateway.chat()
        record = gateway.record()
    assert (answer.status, answer.body) == (200, body)
    assert (record.output_tokens, record.usage_source, len(record.attempts)) == (0, "estimated", 1)


def test_a_router_behind_a_router_does_not_speak_for_it() -> None:
    """Each header that says where a request went is there once."""
    with (
        ScriptedBackend() as backend,
        Gateway(table(backend.base_url)) as inner,
        Gateway(table(inner.base_url, upstream_model="m")) as outer,
    ):
        backend.always(json_reply({"choices": []}))
        connection = http.client.HTTPConnection("127.0.0.1", outer.port, timeout=20)
        body = b'{"model":"m","messages":[]}'
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        connection.close()
    names = [name.lower() for name, _ in reply.getheaders()]
    assert "x-llm-router-backend" in names
    assert [name for name in names if names.count(name) > 1] == []


def test_a_client_that_is_too_slow_is_no_fault_of_a_backend() -> None:
    """`errors_total{type="timeout"}` is about backends, and alerts rely on that."""
    settings = FrontSettings(header_timeout_s=0.1, max_connections=1)
    with ScriptedBackend() as backend, Gateway(table(backend.base_url), settings=settings) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            with socket.create_connection(("127.0.0.1", gateway.port)) as surplus:
                assert surplus.recv(65536).startswith(b"HTTP/1.1 503")
            assert slow.recv(65536).startswith(b"HTTP/1.1 408")
        records = gateway.records(2)
    assert [(record.status, record.error_type) for record in records] == [(503, "limit"), (408, "bad_request")]
