"""What callers get when backends fail: the right status, a clear message, and one record, whatever happens."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from llm_router.models.prices import Price
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.testing import (
    Close,
    Gate,
    Hold,
    Repeat,
    Reset,
    ScriptedBackend,
    Stall,
    framed,
    json_reply,
    reply,
    stream_head,
)
from support.ask import Answer
from support.gateway import Gateway, table
from support.net import free_port
from support.wait import until


def settled(value: Callable[[], int]) -> int:
    """The value once it has not changed for half a second."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last


BUSY = json_reply({"error": {"message": "slow down"}}, 429, [("Retry-After", "7")])
BROKEN = json_reply({"error": {"message": "oops"}}, 500)


def test_a_backend_that_is_down_is_502_with_retry_after() -> None:
    with Gateway(table(f"http://127.0.0.1:{free_port()}/v1")) as gateway:
        answer = gateway.chat()
        record = gateway.record()
    assert answer.status == 502
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "backend_unavailable"
    assert "b0" in answer.json()["error"]["message"]
    assert "127.0.0.1" not in answer.body.decode()
    assert [attempt.outcome for attempt in record.attempts] == ["network"] * 3
    assert record.retry_reasons == (("m", "unavailable"),) * 2
    assert gateway.seen == [("b0", False)]


def test_a_backend_that_comes_back_is_reported_up() -> None:
    port = free_port()
    with Gateway(table(f"http://127.0.0.1:{port}/v1")) as gateway:
        gateway.chat()
        with ScriptedBackend(port=port):
            assert gateway.chat().status == 200
        assert gateway.seen == [("b0", False), ("b0", True)]


def test_another_deployment_answers_for_one_that_is_down() -> None:
    with (
        ScriptedBackend() as backend,
        Gateway(table(f"http://127.0.0.1:{free_port()}/v1", backend.base_url)) as gateway,
    ):
        answers = [gateway.chat() for _ in range(4)]
        records = gateway.records(4)
    assert [answer.status for answer in answers] == [200] * 4
    assert {answer.headers["x-llm-router-backend"] for answer in answers} == {"b1"}
    assert [len(record.attempts) for record in records] == [2, 1, 2, 1]
    assert sum(len(record.retry_reasons) for record in records) == 2


def test_a_slow_backend_is_504_and_is_not_asked_again() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url, first_byte_s=0.2)) as gateway:
        backend.always(Stall())
        answer = gateway.chat()
        record = gateway.record()
        backend.wait(lambda b: b.connections[0].closed_by == "client")
    assert answer.status == 504
    assert "first_byte" in answer.json()["error"]["message"]
    assert len(record.attempts) == 1
    assert record.error_type == "timeout"


def test_a_stream_that_stalls_ends_with_an_error_event() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url, gap_s=0.2)) as gateway:
        backend.script(stream_head(), framed(b"data: {}\n\n"), Stall())
        answer = gateway.chat(stream=True)
        record = gateway.record()
    assert answer.status == 200
    assert answer.body.startswith(b"data: {}\n\ndata: {")
    assert b"gap" in answer.body
    assert b"[DONE]" not in answer.body
    assert (record.outcome, record.attempts[0].outcome) == ("error", "provider")


@pytest.mark.parametrize("step", [Reset(), Close()])
def test_a_connection_that_breaks_is_tried_again(step: Reset | Close) -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.script(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", step)
        answer = gateway.chat()
        record = gateway.record()
    assert answer.status == 200
    assert [attempt.outcome for attempt in record.attempts] == ["network", "success"]


def test_html_where_json_belongs_is_a_bad_reply() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(reply(b"<html>It works!</html>", 200, "text/html"))
        answer = gateway.chat()
        record = gateway.record()
    assert answer.status == 502
    assert answer.json()["error"]["code"] == "bad_reply"
    assert "<html>It works!" in answer.json()["error"]["message"]
    assert record.outcome == "error"


def test_an_error_page_keeps_neither_html_nor_headers() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(reply(b"<h1>Bad Gateway</h1>", 502, "text/html", [("Server", "cloud"), ("Set-Cookie", "a=b")]))
        answer = gateway.chat()
    assert answer.status == 502
    assert answer.headers["content-type"] == "application/json"
    assert "set-cookie" not in answer.headers
    assert "server" not in answer.headers


def test_too_many_requests_is_passed_on_with_its_retry_after() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(BUSY)
        answer = gateway.chat()
        record = gateway.record()
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.json() == {"error": {"message": "slow down"}}
    assert len(record.attempts) == 1
    assert (record.attempts[0].outcome, record.error_type) == ("provider", "overloaded")


def test_an_overloaded_deployment_is_left_for_another() -> None:
    with ScriptedBackend() as busy, ScriptedBackend() as free, Gateway(table(busy.base_url, free.base_url)) as gateway:
        busy.always(BUSY)
        assert gateway.chat().headers["x-llm-router-backend"] == "b1"
        assert gateway.record().retry_reasons == (("m", "overloaded"),)


def test_a_caller_error_is_never_tried_again() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url, backend.base_url)) as gateway:
        backend.always(json_reply({"error": {"message": "bad"}}, 400))
        assert gateway.chat().status == 400
        assert len(gateway.record().attempts) == 1


def embed(gateway: Gateway) -> Answer:
    return gateway.request("POST", "/v1/embeddings", {"model": "m", "input": "one two"})


@pytest.mark.parametrize("status", [404, 405, 501])
@pytest.mark.parametrize(
    ("page", "said"),
    [
        (json_reply({"error": {"message": "no pooling here"}}), "no pooling here"),
        (reply(b"<h1>Not here</h1>", 200, "text/html"), ""),
    ],
)
def test_a_backend_that_cannot_embed_is_a_clear_400(status: int, page: bytes, said: str) -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(page.replace(b" 200 ", b" %d " % status, 1))
        answer = embed(gateway)
        record = gateway.record()
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["type"]) == (400, "unsupported", "invalid_request_error")
    assert f"backend 'b0': cannot embed (it answered {status}" in error["message"]
    assert said in error["message"]
    assert [attempt.outcome for attempt in record.attempts] == ["caller"]
    assert record.error_type == "rejected"


def test_a_backend_that_can_embed_is_asked_after_one_that_cannot() -> None:
    with ScriptedBackend() as chats, ScriptedBackend() as embeds:
        chats.always(json_reply({"error": {"message": "no pooling here"}}, 501))
        with Gateway(table(chats.base_url, embeds.base_url)) as gateway:
            assert embed(gateway).headers["x-llm-router-backend"] == "b1"
            assert gateway.record().retry_reasons == (("m", "unsupported"),)


def test_a_backend_that_is_known_not_to_embed_is_not_asked() -> None:
    with ScriptedBackend() as chats, ScriptedBackend() as embeds:
        routing = table(chats.base_url, embeds.base_url)
        first, second = routing.backends
        first = msgspec.structs.replace(first, embeddings=False)
        with Gateway(msgspec.structs.replace(routing, backends=(first, second))) as gateway:
            answers = [embed(gateway) for _ in range(4)]
            records = gateway.records(4)
        assert [answer.headers["x-llm-router-backend"] for answer in answers] == ["b1"] * 4
        assert [len(record.attempts) for record in records] == [1] * 4
        alone = msgspec.structs.replace(routing.models[0], deployments=routing.models[0].deployments[:1])
        with Gateway(msgspec.structs.replace(routing, models=(alone,), backends=(first, second))) as gateway:
            answer = embed(gateway)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "unsupported")
    assert chats.requests == []


def test_what_a_backend_does_not_implement_is_not_tried_again() -> None:
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.always(json_reply({"error": {"message": "not in this build"}}, 501))
        answer = gateway.chat()
        record = gateway.record()
    assert (answer.status, len(record.attempts)) == (501, 1)
    assert record.attempts[0].outcome == "caller"


def test_server_errors_are_tried_again_within_the_budget() -> None:
    retry = RetrySpec(backoff_s=0.001, backoff_max_s=0.001, budget_min=3, budget_ratio=0.0)
    with ScriptedBackend() as backend, Gateway(table(backend.base_url, retry=retry)) as gateway:
        backend.always(BROKEN)
        answers = [gateway.chat() for _ in range(3)]
        records = gateway.records(3)
    assert [answer.status for answer in answers] == [500] * 3
    assert [len(record.attempts) for record in records] == [3, 2, 1]


def test_fallback_models_are_asked_in_order() -> None:
    with ScriptedBackend() as first, ScriptedBackend() as second, ScriptedBackend(tokens=["third"]) as third:
        routing = RoutingTable(
            models=(
                ModelSpec(name="a", deployments=(Deployment("first", "x"),), fallbacks=("b", "c")),
                ModelSpec(name="b", deployments=(Deployment("second", "y"),)),
                ModelSpec(name="c", deployments=(Deployment("third", "z"),)),
            ),
            backends=tuple(
                BackendSpec(name=name, url=server.base_url)
                for name, server in (("first", first), ("second", second), ("third", third))
            ),
            retry=RetrySpec(attempts=1),
        )
        first.always(BROKEN)
        second.always(BUSY)
        with Gateway(routing) as gateway:
            answer = gateway.chat("a")
            record = gateway.record()
    assert answer.json()["choices"][0]["message"]["content"] == "third"
    assert answer.headers["x-llm-router-model"] == "c"
    assert answer.headers["x-llm-router-attempts"] == "3"
    assert record.fallback_reasons == (("a", "server-error"), ("b", "overloaded"))
    assert (record.model, record.outcome) == ("c", "success")
    assert third.requests[0].json()["model"] == "z"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_fallback_answers_costs_what_the_fallback_does(stream: bool) -> None:
    """And what a second deployment answers costs what that one does: never the price of who failed."""
    with ScriptedBackend() as failing, ScriptedBackend() as good:
        dear, cheap = Price(input=1000, output=1000), Price(input=1, output=2)
        routing = RoutingTable(
            models=(
                ModelSpec(name="a", deployments=(Deployment("failing", "x", price=dear),), fallbacks=("b",)),
                ModelSpec(name="b", deployments=(Deployment("good", "y", price=cheap),)),
                ModelSpec(
                    name="both",
                    deployments=(Deployment("failing", "x", price=dear), Deployment("good", "y", price=cheap)),
                    strategy="round-robin",
                ),
            ),
            backends=(
                BackendSpec(name="failing", url=failing.base_url),
                BackendSpec(name="good", url=good.base_url),
            ),
            retry=RetrySpec(attempts=2, backoff_s=0.001, backoff_max_s=0.01),
        )
        failing.always(BROKEN)
        with Gateway(routing) as gateway:
            assert [gateway.chat(model, stream=stream).status for model in ("a", "both", "both")] == [200] * 3
            records = gateway.records(3)
    assert [record.model for record in records] == ["b", "both", "both"]
    for record in records:
        assert record.attempts[-1].backend == "good"
        assert (record.cost_status, record.usage_source) == ("exact", "provider")
        assert record.cost_usd == pytest.approx((record.input_tokens + 2 * record.output_tokens) / 1e6)


def test_a_model_whose_backends_are_not_ready_falls_back_or_says_so() -> None:
    with ScriptedBackend() as backend:
        loading = BackendSpec(name="loading", url="http://127.0.0.1:9/v1", ready=False)
        up = BackendSpec(name="up", url=backend.base_url)
        routing = RoutingTable(
            models=(
                ModelSpec(name="a", deployments=(Deployment("loading", "x"),), fallbacks=("b",)),
                ModelSpec(name="b", deployments=(Deployment("up", "y"),)),
                ModelSpec(name="alone", deployments=(Deployment("loading", "x"),)),
            ),
            backends=(loading, up),
        )
        with Gateway(routing) as gateway:
            assert gateway.chat("a").headers["x-llm-router-model"] == "b"
            answer = gateway.chat("alone")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert "'alone' is not ready" in answer.json()["error"]["message"]


def test_least_loaded_avoids_the_deployment_that_is_at_work() -> None:
    gate = Gate()
    with (
        ScriptedBackend() as slow,
        ScriptedBackend() as fast,
        Gateway(table(slow.base_url, fast.base_url, strategy="least-loaded")) as gateway,
    ):
        slow.always(Hold(gate), json_reply({"choices": []}))
        callers = [threading.Thread(target=gateway.chat) for _ in range(2)]
        for caller in callers:  # equals take turns: one of the two is held
            caller.start()
        slow.wait(lambda b: b.requests)
        until(lambda: gateway.recorder.finished, what="the end of the request that is not held")
        others = [gateway.chat().headers["x-llm-router-backend"] for _ in range(4)]
        gate.open()
        for caller in callers:
            caller.join()
    assert others == ["b1"] * 4


def test_a_swapped_table_keeps_connections_and_lets_requests_finish() -> None:
    gate = Gate()
    with ScriptedBackend() as old, ScriptedBackend() as new, Gateway(table(old.base_url)) as gateway:
        assert gateway.chat().status == 200
        gateway.call(lambda: gateway.router.update(table(old.base_url)))
        assert gateway.chat().status == 200
        assert len(old.connections) == 1
        old.script(Hold(gate), json_reply({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}))
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            body = b'{"model":"m","messages":[]}'
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            old.wait(lambda b: len(b.requests) == 3)
            gateway.call(lambda: gateway.router.update(table(new.base_url)))
            assert gateway.chat().status == 200
            assert len(new.requests) == 1
            gate.open()
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        old.wait(lambda b: b.connections[0].closed_by == "client")


def test_a_slow_client_does_not_make_memory_grow() -> None:
    piece = b"data: " + b"x" * 16_000 + b"\n\n"
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        backend.script(stream_head(), Repeat(framed(piece), 4000), framed(b"data: [DONE]\n\n") + framed(b""))
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            body = b'{"model":"m","messages":[],"stream":true}'
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            backend.wait(lambda b: b.connections and b.connections[0].sent_bytes)
            sent = settled(lambda: backend.connections[0].sent_bytes)
            # 64 MB are on offer; what was taken lies in socket buffers and two bounded ones of ours.
            assert sent < 16_000_000
        backend.wait(lambda b: b.connections[0].closed_by == "client")
        assert gateway.record().outcome == "cancelled"


def test_a_million_names_make_no_new_labels() -> None:
    """Scaled down to two thousand; what counts is that none of them appears."""
    with ScriptedBackend() as backend, Gateway(table(backend.base_url)) as gateway:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
        for i in range(1000):
            connection.request(
                "POST",
                "/v1/chat/completions",
                b'{"model":"model-%d","messages":[]}' % i,
                {"content-type": "application/json"},
            )
            assert connection.getresponse().read()
            connection.request("GET", f"/path-{i}")
            assert connection.getresponse().read()
        connection.close()
        records = gateway.records(2000)
    assert {record.model for record in records} == {"__other__"}
    assert {record.route for record in records} == {"/v1/chat/completions", "__other__"}
