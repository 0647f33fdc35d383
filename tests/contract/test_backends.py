"""The contract of backends, run by every protocol: what goes to the wire, and what the caller gets to see of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from llm_router.backends.base import Backend
from llm_router.backends.connections import Connections
from llm_router.chat import Endpoint, InferenceRequest, Usage
from llm_router.errors import BadReply, InvalidRequest
from llm_router.gateway.anthropic import read_messages
from llm_router.gateway.openai import read_request
from llm_router.gateway.sse import watch_for
from llm_router.routing.table import BackendSpec
from llm_router.testing import (
    RecordedRequest,
    RecordingRecorder,
    ScriptedBackend,
    framed,
    json_reply,
    reply,
    stream_head,
)
from support import anthropic, chats
from support.aio import run

KEY = "sk-very-secret-key"


class Kind(NamedTuple):
    """A protocol: how its server answers, and which requests it gets as they came."""

    protocol: Any
    auth: Any
    native: Endpoint
    path: str
    whole: dict[str, Any]
    stream: bytes
    error: dict[str, Any]
    usage: Usage


KINDS = {
    "openai": Kind(
        "openai",
        "bearer",
        Endpoint.CHAT,
        "/v1/chat/completions",
        chats.completion(),
        chats.stream(chats.completion()),
        {"error": {"message": f"said so to {KEY}", "type": "invalid_request_error", "param": None, "code": None}},
        Usage(10, 7, 3, 4),
    ),
    "anthropic": Kind(
        "anthropic",
        "x-api-key",
        Endpoint.MESSAGES,
        "/v1/messages",
        anthropic.message(),
        anthropic.stream(anthropic.message()),
        anthropic.error(says=f"said so to {KEY}"),
        Usage(10, 7, 3, 4, 2, 1),
    ),
}
DIALECTS = [Endpoint.CHAT, Endpoint.MESSAGES]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def asked(endpoint: Endpoint, *, stream: bool = False) -> InferenceRequest:
    fields: dict[str, Any] = {"stream": True} if stream else {}
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "vendor": 1, **fields}
    data = json.dumps(body).encode()
    return read_messages(data) if endpoint is Endpoint.MESSAGES else read_request(endpoint, data)


@asynccontextmanager
async def opened(kind: Kind, url: str, **fields: Any) -> AsyncIterator[Backend]:
    connections = Connections(RecordingRecorder())
    spec = BackendSpec(name="b", url=url, protocol=kind.protocol, auth=kind.auth, api_key=KEY, **fields)
    try:
        yield connections.open(spec)
    finally:
        await connections.aclose()


class Heard(NamedTuple):
    """What a caller got, and what the server was asked."""

    status: int
    body: bytes
    sent: RecordedRequest
    usage: Usage | None


def exchange(kind: Kind, request: InferenceRequest, *script: Any, **fields: Any) -> Heard:
    """One request through backend and pool to a server that follows the script, as the router does it."""

    async def ask(url: str) -> tuple[int, bytes, Usage | None]:
        async with opened(kind, url, **fields) as backend:
            answer = await backend.pool.send(*backend.encode(request, "upstream-x", "req-1"))
            reader = backend.reader(request)
            try:
                if not request.stream or answer.status != 200:
                    body = await answer.read()
                    body = body if answer.status == 200 else backend.without_secrets(body)
                    body = body if reader is None else reader.plain(answer.status, body)
                    usage = backend.usage_of(request.endpoint, body) if answer.status == 200 else None
                    return answer.status, body, usage
                watch = watch_for(request.endpoint, hide_usage=False)
                out = b""
                while data := await answer.chunk():
                    out += watch.feed(data if reader is None else reader.feed(data))
                out += watch.feed(b"" if reader is None else reader.rest()) + watch.rest()
                assert watch.done
                return answer.status, out, watch.usage
            finally:
                answer.close()

    with ScriptedBackend() as server:
        server.script(*script)
        status, body, usage = run(ask(server.base_url))
        return Heard(status, body, server.requests[0], usage)


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_a_request_reaches_the_server_in_its_protocol(kind: Kind, endpoint: Endpoint) -> None:
    heard = exchange(kind, asked(endpoint), json_reply(kind.whole), headers={"X-Extra": "1"}, query="api-version=1")
    sent = heard.sent
    assert (sent.method, sent.target) == ("POST", f"{kind.path}?api-version=1")
    assert sent.json()["model"] == "upstream-x"
    assert (sent.json()["max_tokens"], "vendor" in sent.json()) == (9, endpoint is kind.native)
    assert (sent.headers["x-request-id"], sent.headers["x-extra"]) == ("req-1", "1")
    shown = sent.headers["authorization"] if kind.auth == "bearer" else sent.headers[kind.auth]
    assert shown.removeprefix("Bearer ") == KEY
    assert sent.headers.get("anthropic-version") == ("2023-06-01" if kind.protocol == "anthropic" else None)


def test_a_request_in_its_own_protocol_passes_as_it_came(kind: Kind) -> None:
    request = asked(kind.native)
    heard = exchange(kind, request, json_reply(kind.whole))
    assert heard.sent.body == request.body.replace(b'"m"', b'"upstream-x"')
    assert json.loads(heard.body) == kind.whole


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_a_whole_answer_is_in_the_callers_dialect(kind: Kind, endpoint: Endpoint) -> None:
    heard = exchange(kind, asked(endpoint), json_reply(kind.whole))
    told = json.loads(heard.body)
    if endpoint is Endpoint.MESSAGES:
        assert (told["content"][0]["text"], told["stop_reason"]) == (chats.TEXT, "end_turn")
    else:
        choice = told["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (chats.TEXT, "stop")
    assert heard.usage == kind.usage


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("endpoint", DIALECTS)
def test_a_stream_is_in_the_callers_dialect_however_it_is_split(kind: Kind, endpoint: Endpoint, size: int) -> None:
    pieces = [framed(kind.stream[at : at + size]) for at in range(0, len(kind.stream), size)]
    heard = exchange(kind, asked(endpoint, stream=True), stream_head(), *pieces, framed(b""))
    if endpoint is kind.native:
        assert heard.body == kind.stream
    else:
        reader = _reader(kind, asked(endpoint, stream=True))
        expected = reader.feed(kind.stream) + reader.rest()
        assert _undated(heard.body) == _undated(expected)
    if endpoint is Endpoint.CHAT:
        assert chats.gathered(heard.body)["text"] == chats.TEXT
    else:
        said = [json.loads(line[6:]) for line in heard.body.splitlines() if line.startswith(b"data: ")]
        assert "".join(value.get("delta", {}).get("text", "") for value in said) == chats.TEXT
    assert heard.usage == kind.usage


def _reader(kind: Kind, request: InferenceRequest) -> Any:
    async def made() -> Any:
        async with opened(kind, "http://127.0.0.1:1/v1") as backend:
            return backend.reader(request)

    return run(made())


def _undated(data: bytes) -> list[Any]:
    values = [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]
    return [{key: value for key, value in told.items() if key != "created"} for told in values]


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_an_error_is_in_the_callers_dialect_and_shows_no_key(kind: Kind, endpoint: Endpoint) -> None:
    heard = exchange(kind, asked(endpoint), json_reply(kind.error, 400))
    told = json.loads(heard.body)
    assert told["error"]["message"] == "said so to ***"
    assert told["error"]["type"] == "invalid_request_error"
    assert ("type" in told) is (endpoint is Endpoint.MESSAGES)


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_an_error_that_is_no_json_stays_what_it_is(kind: Kind, endpoint: Endpoint) -> None:
    heard = exchange(kind, asked(endpoint), reply(b"<html>", 502, "text/html"))
    assert (heard.status, heard.body) == (502, b"<html>")


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_a_success_that_is_no_json_is_a_bad_reply(kind: Kind, endpoint: Endpoint) -> None:
    with pytest.raises(BadReply, match="'b'"):
        exchange(kind, asked(endpoint), reply(b"<html>", 200, "text/html"))


@pytest.mark.parametrize("endpoint", DIALECTS)
def test_an_answer_without_usage_is_an_answer(kind: Kind, endpoint: Endpoint) -> None:
    whole = {key: value for key, value in kind.whole.items() if key != "usage"}
    assert exchange(kind, asked(endpoint), json_reply(whole)).usage is None


def test_the_message_of_an_error_is_found_in_both_dialects(kind: Kind) -> None:
    async def found() -> list[str]:
        async with opened(kind, "http://127.0.0.1:1/v1") as backend:
            bodies = [json.dumps(other.error).encode() for other in KINDS.values()]
            return [backend.problem_in(body) for body in (*bodies, b'{"error":"plain"}', b"<html>", b"{}")]

    said = f"said so to {KEY}"
    assert run(found()) == [said, said, "plain", "", ""]


def test_what_a_protocol_cannot_do_is_refused() -> None:
    async def refused() -> None:
        async with opened(KINDS["anthropic"], "http://127.0.0.1:1/v1") as backend:
            for endpoint, body in (
                (Endpoint.COMPLETION, b'{"model":"m","prompt":"x"}'),
                (Endpoint.EMBEDDING, b'{"model":"m","input":"x"}'),
            ):
                with pytest.raises(InvalidRequest, match="'b'") as raised:
                    backend.encode(read_request(endpoint, body), "x", "req-1")
                assert raised.value.code == "unsupported"

    run(refused())


def test_a_backend_may_want_its_key_and_the_models_name_elsewhere() -> None:
    """As Azure does: `api-key`, the deployment in the path, and the API's version behind it."""

    async def written() -> bytes:
        azure = KINDS["openai"]._replace(auth="api-key")
        url = "http://127.0.0.1:1/openai/deployments/{model}"
        async with opened(azure, url, query="api-version=2024-10-21") as backend:
            return backend.encode(asked(Endpoint.CHAT), "gpt 4/o", "req-1")[0]

    head = run(written())
    assert head.startswith(b"POST /openai/deployments/gpt%204%2Fo/chat/completions?api-version=2024-10-21 HTTP/1.1\r\n")
    assert f"api-key: {KEY}\r\n".encode() in head
    assert b"Authorization" not in head


@pytest.mark.parametrize(("version", "expected"), [(None, 0.5), ("2023-06-01", 0.5), ("2026-10-21", None)])
def test_a_version_of_the_api_that_knows_no_temperature_gets_none(version: str | None, expected: float | None) -> None:
    request = read_request(Endpoint.CHAT, b'{"model":"m","messages":[],"temperature":0.5,"top_p":1,"top_k":2}')
    kind = KINDS["anthropic"]
    headers = {} if version is None else {"Anthropic-Version": version}
    sent = exchange(kind, request, json_reply(kind.whole), headers=headers).sent
    assert sent.headers["anthropic-version"] == (version or "2023-06-01")
    assert sent.json().get("temperature") == expected


def test_the_callers_words_about_the_protocol_go_along_unless_they_are_configured() -> None:
    request = asked(Endpoint.MESSAGES)
    request.headers = ((b"anthropic-version", b"2099-01-01"), (b"anthropic-beta", b"b-1"))
    kind = KINDS["anthropic"]
    sent = exchange(kind, request, json_reply(kind.whole), headers={"Anthropic-Beta": "ours"}).sent
    assert (sent.headers["anthropic-version"], sent.headers["anthropic-beta"]) == ("2099-01-01", "ours")
    sent = exchange(KINDS["openai"], request, json_reply(KINDS["openai"].whole)).sent
    assert "anthropic-beta" not in sent.headers
