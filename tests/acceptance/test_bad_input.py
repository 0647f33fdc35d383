"""Everything that may come wrong into the running program: each gets a clear answer, is counted, and leaves nothing.

One router serves the whole module; after every test it must answer as ever, with nothing in flight and no connection
left over. What a front or a pool does with each byte is tested in tests/contract; here it is the program as it runs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from llm_router.testing import (
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
from support.net import free_port
from support.serving import Serving, rss_bytes
from support.tls import self_signed
from support.wait import until

BACKEND_KEY = "sk-backend-key-0123456789"
BACKEND_HEADER = "tenant-secret-9876543210"
CALLER_KEY = "sk-caller-key-abcdefgh"

MAX_CONNECTIONS = 60
CONFIG = """
front: {{header_timeout: 400ms, body_timeout: 400ms, idle_timeout: 1s, max_connections: {connections}}}
routing: {{retry: {{attempts: 1}}, breaker: {{enabled: false}}}}
backends:
  - {{name: good, url: {good}}}
  - {{name: faulty, url: {faulty}, api_key: {key}, headers: {{X-Tenant: {header}}}}}
  - {{name: slow, url: {faulty}, timeouts: {{first_byte: 200ms}}}}
  - {{name: down, url: 'http://127.0.0.1:{down}/v1'}}
models:
  - {{name: m, deployments: [{{backend: good}}]}}
  - {{name: faulty, deployments: [{{backend: faulty}}]}}
  - {{name: slow, deployments: [{{backend: slow}}]}}
  - {{name: down, deployments: [{{backend: down}}]}}
"""

CHAT = "/v1/chat/completions"
EVENT = framed(b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n')


# -- a client that sends anything -------------------------------------------------------------------


class Answer(NamedTuple):
    """A reply; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error object, if this is a whole one with the request's id in the header too."""
        error: dict[str, Any] = self.json()["error"]
        assert self.json().keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code", "request_id"}
        assert error["request_id"] == self.headers["x-request-id"]
        assert all(isinstance(error[key], str) and error[key] for key in ("message", "type", "code", "request_id"))
        assert self.headers["content-type"] == "application/json"
        return error


def talk(port: int, data: bytes) -> Answer:
    """The reply to `data` on a connection of its own, which the server must close."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(data)
        return parsed(until_closed(sock))


def receive_until(sock: socket.socket, mark: bytes) -> bytes:
    """What came up to and with `mark`."""
    received = b""
    while mark not in received:
        piece = sock.recv(65536)
        assert piece, f"the connection ended after {received[-200:]!r}"
        received += piece
    return received


def until_closed(sock: socket.socket) -> bytes:
    """Everything that came before the server closed."""
    received = b""
    while piece := sock.recv(65536):
        received += piece
    return received


def parsed(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    repeated = len(pairs) - len(headers)
    assert not repeated or "vary" in headers, f"a header is repeated: {lines}"
    if "content-length" in headers:
        assert len(body) in (int(headers["content-length"]), 0)
    return Answer(int(status.split(" ")[1]), headers, body)


def message(
    method: str, path: str, body: bytes | str | None = None, *, kind: str = "application/json", **headers: str
) -> bytes:
    """A request that is well-formed HTTP. Names of further headers are written with `_`; `host` replaces the usual."""
    content = body.encode() if isinstance(body, str) else body
    lines = {"Host": headers.pop("host", "localhost"), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    if content is not None:
        lines["Content-Length"] = str(len(content))
        if kind:
            lines["Content-Type"] = kind
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    return head.encode("latin-1") + (content or b"")


def ask_for(model: str, *, stream: bool = False) -> bytes:
    return json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}).encode()


# -- the router -------------------------------------------------------------------------------------


class Subject:
    """The running program, and the backend that misbehaves as told."""

    def __init__(self, serving: Serving, faulty: ScriptedBackend) -> None:
        self.serving = serving
        self.faulty = faulty

    @property
    def port(self) -> int:
        return self.serving.port

    def values(self) -> Values:
        return Values(self.serving.get("/metrics"))

    def chat(self, model: str, **headers: str) -> Answer:
        return talk(self.port, message("POST", CHAT, ask_for(model), **headers))

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"base_url": self.serving.base_url, "api_key": CALLER_KEY, "max_retries": 0, "timeout": 20, **options}
        return openai.OpenAI(**options)

    def is_well(self) -> None:
        """It answers as ever, nothing is in flight and no client is connected."""
        answer = self.chat("m")
        assert answer.status == 200
        assert answer.json()["choices"][0]["message"]["content"] == "Hello from the scripted backend."

        def is_quiet() -> bool:
            values = self.values()
            return (
                values.total("llm_router_requests_in_flight") == 0
                and values.total("llm_router_active_connections", type="client") == 0
            )

        until(is_quiet, 5, "no request in flight and no client connected")


class Values:
    """The samples of an exposition, read without a parser: it is looked at several times in each test."""

    def __init__(self, text: bytes) -> None:
        lines = (line.rpartition(" ") for line in text.decode().splitlines() if line[:1] != "#")
        self.samples = {series: float(value) for series, _, value in lines}

    def total(self, name: str, **labels: str) -> float:
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for series, value in self.samples.items()
            if series.partition("{")[0] == name and all(label in series for label in wanted)
        )


class Counted:
    """What is counted from here on. A reply may be there an instant before its count."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._before = subject.values()

    def expect(self, wanted: float, name: str, **labels: str) -> None:
        """Exactly that much was added to all series of a family with these labels."""

        def grown() -> float:
            return self._subject.values().total(name, **labels) - self._before.total(name, **labels)

        with contextlib.suppress(AssertionError):
            until(lambda: grown() == wanted, 2)
        assert grown() == wanted, f"{name}{labels}"

    def error(self, kind: str, status: int, *, route: str, method: str = "POST", times: int = 1) -> None:
        """Exactly that error and that HTTP request were counted, and no other."""
        self.expect(times, "llm_router_errors_total", type=kind)
        self.expect(times, "llm_router_errors_total")
        self.expect(times, "llm_router_http_requests_total", method=method, route=route, status_code=str(status))
        self.expect(times, "llm_router_http_requests_total")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with ScriptedBackend() as good, ScriptedBackend() as faulty:
        config = CONFIG.format(
            good=good.base_url,
            faulty=faulty.base_url,
            down=free_port(),
            key=BACKEND_KEY,
            header=BACKEND_HEADER,
            connections=MAX_CONNECTIONS,
        )
        with Serving(tmp_path_factory.mktemp("router"), config) as serving:
            yield Subject(serving, faulty)
            assert "Traceback" not in serving.log
            for secret in (BACKEND_KEY, BACKEND_HEADER, CALLER_KEY):
                assert secret not in serving.log


@pytest.fixture
def router(running: Subject) -> Iterator[Subject]:
    yield running
    running.faulty.always()
    running.is_well()


# -- what is no request -----------------------------------------------------------------------------

NOT_HTTP: dict[str, tuple[bytes, int]] = {
    "a word": (b"hello\r\n\r\n", 400),
    "binary": (bytes(range(256)), 400),
    "an unknown method": (b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a TLS hello": (bytes.fromhex("16030100c8010000c40303") + bytes(190), 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    "HTTP/3 by name": (b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n", 505),
    "a NUL in the path": (b"GET /a\0b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a byte beyond ASCII in the path": (b"GET /caf\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "a target that is too long": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "a proxy's CONNECT": (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", 501),
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_not_http_is_told_so(router: Subject, name: str) -> None:
    data, status = NOT_HTTP[name]
    counted = Counted(router)
    answer = talk(router.port, data)
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert answer.error()["type"] == "invalid_request_error"
    counted.error("bad_request", status, route="__other__", method="__other__")


_POST = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
MALFORMED: dict[str, tuple[bytes, int]] = {
    "both lengths": (_POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "both lengths, the other way round": (
        _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        400,
    ),
    "two lengths": (_POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
    "a length that is no number": (_POST + b"Content-Length: -1\r\n\r\n", 400),
    "a chunk that is no number": (_POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "another transfer coding": (_POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "two hosts": (_POST + b"Host: evil.example\r\n\r\n", 400),
    "a header over two lines": (_POST + b"X-Request-Id: a\r\n b\r\n\r\n", 400),
    "too many headers": (_POST + b"X-Number: 1\r\n" * 500 + b"\r\n", 431),
    "a header that is too long": (_POST + b"X-Long: " + b"y" * 100_000 + b"\r\n\r\n", 431),
    "a body that is announced too large": (_POST + b"Content-Length: 11000000\r\n\r\n", 413),
    "an expectation that is unknown": (_POST + b"Expect: a-miracle\r\nContent-Length: 3\r\n\r\n", 417),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_under_their_route(router: Subject, name: str) -> None:
    data, status = MALFORMED[name]
    counted = Counted(router)
    answer = talk(router.port, data)
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    answer.error()
    counted.error("bad_request", status, route=CHAT)


# -- what is no JSON, or not the right one ------------------------------------------------------------

DEEP = b"[" * 500_000 + b"]" * 500_000

BAD_BODIES: dict[str, tuple[str, bytes, str | None]] = {
    "nothing": (CHAT, b"", None),
    "no JSON": (CHAT, b"model=m&messages=hi", None),
    "half of it": (CHAT, b'{"model":"m","messages":[', None),
    "too much": (CHAT, b'{"model":"m","messages":[]}{}', None),
    "UTF-16": (CHAT, '{"model":"m","messages":[]}'.encode("utf-16"), None),
    "a model that is not UTF-8": (CHAT, b'{"model":"\xff\xfe","messages":[]}', None),
    "spaced, not UTF-8": (CHAT, b'{ "model": "\xff\xfe", "messages": [] }', None),
    "half a surrogate pair": (CHAT, b'{"model":"\\ud800","messages":[]}', None),
    "NaN": (CHAT, b'{"model":"m","messages":[],"temperature":NaN}', None),
    "an array": (CHAT, b"[]", None),
    "null": (CHAT, b"null", None),
    "a number for a model": (CHAT, b'{"model":5,"messages":[]}', "model"),
    "text for messages": (CHAT, b'{"model":"m","messages":"hi"}', "messages"),
    "no messages": (CHAT, b'{"model":"m"}', "messages"),
    "text for stream": (CHAT, b'{"model":"m","messages":[],"stream":"yes"}', "stream"),
    "a list of stream options": (CHAT, b'{"model":"m","messages":[],"stream":true,"stream_options":[]}', "stream_options"),
    "no model": (CHAT, b'{"messages":[]}', "model"),
    "an empty model": (CHAT, b'{"model":"","messages":[]}', "model"),
    "two models": (CHAT, b'{"model":"m","model":"faulty","messages":[]}', "model"),
    "two models, one escaped": (CHAT, b'{"model":"m","mod\\u0065l":"faulty","messages":[]}', "model"),
    "1 MB of nested arrays": (CHAT, DEEP, None),
    "1 MB of nested arrays in a message": (CHAT, b'{"model":"m","messages":' + DEEP + b"}", None),
    "1 MB of nested objects": (CHAT, b'{"model":"m","messages":[],"a":' + b'{"a":' * 200_000, None),
    "no prompt": ("/v1/completions", b'{"model":"m"}', "prompt"),
    "no input": ("/v1/embeddings", b'{"model":"m"}', "input"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_400_and_name_the_field(router: Subject, name: str) -> None:
    path, body, param = BAD_BODIES[name]
    counted = Counted(router)
    answer = talk(router.port, message("POST", path, body, X_Request_Id="mine.1"))
    assert (answer.status, answer.headers["x-request-id"]) == (400, "mine.1")
    error = answer.error()
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    counted.error("bad_request", 400, route=path)
    counted.expect(0, "llm_router_inference_total")


BAD_PROMPTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"hi", "not valid JSON"),
    "not UTF-8": (b'{"prompt":"\xff"}', "UTF-8"),
    "no prompt": (b"{}", "prompt"),
    "a number for a prompt": (b'{"prompt":5}', "prompt"),
    "an unknown field": (b'{"prompt":"hi","promt":"hi"}', "promt"),
    "a list for a model": (b'{"prompt":"hi","options":{"model":["m"]}}', "model"),
    "a stream": (b'{"prompt":"hi","options":{"stream":true}}', "stream"),
    "deep options": (b'{"prompt":"hi","options":{"a":' + DEEP + b"}}", "too deeply"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_get_the_envelope_of_their_endpoint(router: Subject, name: str) -> None:
    body, hint = BAD_PROMPTS[name]
    counted = Counted(router)
    answer = talk(router.port, message("POST", "/api/generate", body))
    assert answer.status == 400
    assert answer.json().keys() == {"success", "error", "request_id"}
    assert (answer.json()["success"], answer.json()["request_id"]) == (False, answer.headers["x-request-id"])
    assert hint in answer.json()["error"]
    counted.error("bad_request", 400, route="/api/generate")


def test_a_prompt_too_large_gets_the_envelope_too(router: Subject) -> None:
    answer = talk(router.port, message("POST", "/api/generate", bytes(11_000_000)))
    assert (answer.status, answer.json()["success"]) == (413, False)


@pytest.mark.parametrize("depth", [600, 900, 990, 1100])
def test_nesting_near_the_bound_is_never_a_fault_of_ours(router: Subject, depth: int) -> None:
    """A body that one step can decode and the next cannot encode is the caller's mistake all the same."""
    nested = b"[" * depth + b"]" * depth
    for path, body in (
        (CHAT, b'{"model":"m","messages":[],"a":%b}' % nested),
        (CHAT, b'{ "model":"m","messages":[],"a":%b}' % nested),
        (CHAT, b'{"model":"m","messages":[],"stream":true,"stream_options":{"a":%b}}' % nested),
        ("/api/generate", b'{"prompt":"hi","options":{"a":%b}}' % nested),
    ):
        assert talk(router.port, message("POST", path, body)).status in (200, 400)


# -- where and how it was sent ------------------------------------------------------------------------


def test_an_unknown_model_is_404_and_close_names_are_suggested(router: Subject) -> None:
    counted = Counted(router)
    answer = router.chat("fautly")
    assert answer.status == 404
    error = answer.error()
    assert (error["code"], "'faulty'" in error["message"]) == ("model_not_found", True)
    counted.error("not_found", 404, route=CHAT)
    counted.expect(1, "llm_router_inference_total", model="__other__", status="error")
    counted.expect(1, "llm_router_inference_total")
    assert talk(router.port, message("GET", "/v1/models/nope")).error()["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/v1",
        "/v1/chat/completions/",
        "/v1/chat%2fcompletions",
        "/%ff%00",
        "//metrics",
        "/..%2f..%2fetc/passwd",
    ],
)
def test_unknown_routes_are_404_under_one_label(router: Subject, path: str) -> None:
    counted = Counted(router)
    answer = talk(router.port, message("GET", path))
    assert (answer.status, answer.error()["code"]) == (404, "not_found")
    counted.error("not_found", 404, route="__other__", method="GET")


def test_unknown_routes_of_control_are_counted_under_their_prefix(router: Subject) -> None:
    counted = Counted(router)
    answer = talk(router.port, message("GET", "/admin/nope"))
    assert (answer.status, answer.error()["code"]) == (404, "not_found")
    counted.error("not_found", 404, route="/admin/*", method="GET")
    assert talk(router.serving.metrics_port, message("GET", "/nope")).error()["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", CHAT, "POST"),
        ("OPTIONS", CHAT, "POST"),
        ("PUT", "/api/generate", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/m", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("GET", "/admin/models/load", "POST"),
    ],
)
def test_a_wrong_method_is_405_with_allow(router: Subject, method: str, path: str, allow: str) -> None:
    counted = Counted(router)
    answer = talk(router.port, message(method, path))
    assert answer.status == 405
    assert sorted(answer.headers["allow"].split(", ")) == sorted(allow.split(", "))
    if path != "/api/generate":
        assert answer.error()["code"] == "method_not_allowed"
    counted.expect(1, "llm_router_errors_total", type="bad_request")
    counted.expect(1, "llm_router_http_requests_total", method=method, status_code="405")


def test_methods_that_nobody_knows_share_a_label(router: Subject) -> None:
    counted = Counted(router)
    for method in ("PURGE", "PROPFIND", "TRACE"):
        assert talk(router.port, message(method, CHAT)).status == 405
    counted.error("bad_request", 405, route=CHAT, method="__other__", times=3)


def test_a_refused_head_has_no_body(router: Subject) -> None:
    answer = talk(router.port, message("HEAD", CHAT))
    assert (answer.status, answer.body) == (405, b"")
    assert int(answer.headers["content-length"]) > 0


# -- large and slow -----------------------------------------------------------------------------------


def test_a_body_of_11_mb_is_413_which_every_client_can_read(router: Subject) -> None:
    """Clients send to the end before they look for a reply."""
    large = b'{"model":"m","messages":["%b"]}' % (b"x" * 11_000_000)
    counted = Counted(router)
    assert talk(router.port, message("POST", CHAT, large)).error()["code"] == "body_too_large"
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=20)
    connection.request("POST", CHAT, large, {"content-type": "application/json"})
    with connection.getresponse() as plain:
        assert (plain.status, json.loads(plain.read())["error"]["code"]) == (413, "body_too_large")
    connection.close()
    pieces = (large[at : at + 1_000_000] for at in range(0, len(large), 1_000_000))
    connection.request("POST", CHAT, pieces, {"content-type": "application/json"}, encode_chunked=True)
    with connection.getresponse() as chunked:
        assert chunked.status == 413
    connection.close()
    with router.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 11_000_000}])
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    assert caught.value.request_id
    counted.error("bad_request", 413, route=CHAT, times=4)


def test_an_admin_body_that_is_too_large_is_413_on_both_ports(router: Subject) -> None:
    for port in (router.port, router.serving.metrics_port):
        answer = talk(port, message("POST", "/admin/models/load", bytes(5_000_000)))
        assert (answer.status, answer.error()["code"]) == (413, "body_too_large")


def test_half_a_head_and_slow_bodies_are_408(router: Subject) -> None:
    body = ask_for("m")
    slow = {
        "half a head": b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc",
        "half a request line": b"POST /v1/ch",
        "no body": message("POST", CHAT, body)[: -len(body)],
        "half a body": message("POST", CHAT, body)[:-5],
        "half a chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        "no last chunk": _POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    }
    counted = Counted(router)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", router.port), timeout=5)) for _ in slow]
        for sock, data in zip(socks, slow.values(), strict=True):
            sock.sendall(data)
        for sock, name in zip(socks, slow, strict=True):
            answer = parsed(until_closed(sock))
            assert (name, answer.status, answer.error()["code"]) == (name, 408, "request_timeout")
        counted.expect(len(slow), "llm_router_errors_total", type="bad_request")
        counted.expect(len(slow), "llm_router_http_requests_total", status_code="408")


def test_connections_that_say_nothing_are_closed_and_one_too_many_is_told_so(router: Subject) -> None:
    counted = Counted(router)
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", router.port)
        silent = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(MAX_CONNECTIONS)]
        until(lambda: router.values().total("llm_router_active_connections", type="client") == MAX_CONNECTIONS)
        with socket.create_connection(address, timeout=5) as surplus:
            answer = parsed(until_closed(surplus))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error()["code"] == "too_many_connections"
        counted.expect(1, "llm_router_errors_total", type="limit")
        for sock in silent:
            assert sock.recv(1) == b""  # closed without a word after front.idle_timeout


def test_half_closed_and_reset_connections_leave_nothing(router: Subject) -> None:
    """Before, in the middle of, and after a request."""
    whole = message("POST", CHAT, ask_for("m"))
    for data in (b"", b"POST /v1", whole[:-5], whole):
        for is_reset in (False, True):
            with socket.create_connection(("127.0.0.1", router.port), timeout=5) as sock:
                sock.sendall(data)
                if is_reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                else:
                    sock.shutdown(socket.SHUT_WR)
                    until_closed(sock)


# -- clients that leave -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_counted_and_cuts_the_backend(router: Subject, *, stream: bool) -> None:
    gate = Gate()
    backend = router.faulty
    counted = Counted(router)
    if stream:
        backend.script(stream_head(), EVENT, Hold(gate))
    else:
        backend.script(Hold(gate))
    asked = len(backend.requests)
    with socket.create_connection(("127.0.0.1", router.port), timeout=5) as sock:
        sock.sendall(message("POST", CHAT, ask_for("faulty", stream=stream)))
        if stream:
            receive_until(sock, b'"content":"w"')
        backend.wait(lambda b: len(b.requests) > asked)
    connection = backend.connections[backend.requests[-1].connection]
    backend.wait(lambda _: connection.closed_by == "client")
    counted.error("client_gone", 499, route=CHAT)
    counted.expect(1, "llm_router_inference_total", model="faulty", status="cancelled")
    counted.expect(1, "llm_router_inference_total")
    gate.open()


def test_a_client_that_does_not_take_its_stream_is_cut_off(router: Subject) -> None:
    router.faulty.script(stream_head(), Repeat(framed(b"data: " + b"x" * 16_000 + b"\n\n"), 4000), framed(b""))
    counted = Counted(router)
    with socket.create_connection(("127.0.0.1", router.port), timeout=5) as sock:
        sock.sendall(message("POST", CHAT, ask_for("faulty", stream=True)))
        receive_until(sock, b"data: x")
        until(lambda: router.values().total("llm_router_active_connections", type="client", protocol="sse") == 0)
        counted.error("client_gone", 499, route=CHAT)
        counted.expect(1, "llm_router_inference_total", model="faulty", status="cancelled")


# -- backends that fail -------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, tuple[Any, ...], int, str, str, str]] = {
    # model, what its backend does, status, code, kind of error, outcome of the attempt
    "down": ("down", (), 502, "backend_unavailable", "unreachable", "network"),
    "slow": ("slow", (Stall(),), 504, "backend_timeout", "timeout", "provider"),
    "resetting": ("faulty", (Reset(),), 502, "backend_unavailable", "unreachable", "network"),
    "cut short": (
        "faulty",
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", Reset()),
        502, "backend_unavailable", "unreachable", "network",
    ),
    "HTML": ("faulty", (reply(b"<html>It works!</html>", 200, "text/html"),), 502, "bad_reply", "bad_reply", "provider"),
    "an HTML error": ("faulty", (reply(b"<h1>No</h1>", 500, "text/html"),), 502, "bad_reply", "bad_reply", "provider"),
    "no HTTP": ("faulty", (b"220 mail.example ESMTP\r\n",), 502, "bad_reply", "bad_reply", "provider"),
    "two lengths": (
        "faulty",
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",),
        502, "bad_reply", "bad_reply", "provider",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_backend_that_fails_is_a_clear_error(router: Subject, name: str) -> None:
    model, steps, status, code, kind, outcome = FAULTS[name]
    router.faulty.always(*steps)
    counted = Counted(router)
    answer = router.chat(model)
    assert answer.status == status
    error = answer.error()
    assert (error["type"], error["code"]) == ("api_error", code)
    assert repr(model) in error["message"]
    assert "127.0.0.1" not in error["message"]
    if code == "backend_unavailable":
        assert answer.headers["retry-after"] == "1"
    counted.error(kind, status, route=CHAT)
    counted.expect(1, "llm_router_inference_total", model=model, status="error")
    counted.expect(1, "llm_router_attempts_total", backend=model, outcome=outcome)
    counted.expect(1, "llm_router_attempts_total")


def test_429_is_passed_on_with_its_retry_after_and_is_the_providers_fault(router: Subject) -> None:
    router.faulty.always(json_reply({"error": {"message": "slow down", "code": "rate"}}, 429, [("Retry-After", "7")]))
    counted = Counted(router)
    answer = router.chat("faulty")
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.json() == {"error": {"message": "slow down", "code": "rate"}}
    assert answer.headers["x-request-id"]
    counted.error("overloaded", 429, route=CHAT)
    counted.expect(1, "llm_router_attempts_total", backend="faulty", outcome="provider")


def test_a_reply_to_a_prompt_that_is_not_utf_8_is_a_bad_reply(router: Subject) -> None:
    router.faulty.always(reply(b'{"choices":[{"message":{"content":"\xff"}}]}'))
    body = json.dumps({"prompt": "hi", "options": {"model": "faulty"}})
    counted = Counted(router)
    answer = talk(router.port, message("POST", "/api/generate", body))
    assert (answer.status, answer.json()["success"]) == (502, False)
    counted.error("bad_reply", 502, route="/api/generate")


def test_the_openai_client_raises_its_own_exceptions(router: Subject) -> None:
    busy = json_reply({"error": {"message": "slow down", "code": "rate", "type": "rate_limit_error"}}, 429)

    def raised(model: str, **options: Any) -> openai.APIStatusError:
        with router.client(**options) as client, pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        assert caught.value.request_id
        return caught.value

    assert isinstance(raised("nope"), openai.NotFoundError)
    assert isinstance(raised(""), openai.BadRequestError)
    assert isinstance(raised("down"), openai.InternalServerError)
    router.faulty.script(busy)
    assert isinstance(raised("faulty"), openai.RateLimitError)
    assert isinstance(raised("m", default_headers={"Origin": "https://evil.example"}), openai.PermissionDeniedError)
    assert raised("m", default_headers={"Host": "evil.example"}).status_code == 421
    router.faulty.script(stream_head(), EVENT, Reset())
    with router.client() as client, pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="faulty", stream=True, messages=[{"role": "user", "content": "hi"}]))
    assert caught.value.code == "backend_unavailable"
    router.faulty.script(Stall())
    with router.client(timeout=0.2) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="faulty", messages=[{"role": "user", "content": "hi"}])


# -- other people's web pages -------------------------------------------------------------------------

FOREIGN: dict[str, tuple[dict[str, str], int, str]] = {
    "a rebound name": ({"host": "evil.example"}, 421, "misdirected_request"),
    "a rebound name with our port": ({"host": "evil.example:3006"}, 421, "misdirected_request"),
    "a name that begins like ours": ({"host": "localhost.evil.example"}, 421, "misdirected_request"),
    "an address that is not ours": ({"host": "192.0.2.1"}, 421, "misdirected_request"),
    "all addresses": ({"host": "0.0.0.0"}, 421, "misdirected_request"),
    "a user in the host": ({"host": "localhost:80@evil.example"}, 421, "misdirected_request"),
    "no name": ({"host": ""}, 421, "misdirected_request"),
    "a page elsewhere": ({"Origin": "https://evil.example"}, 403, "forbidden_origin"),
    "a page on another port": ({"Origin": "http://localhost:1"}, 403, "forbidden_origin"),
    "a sandboxed page": ({"Origin": "null"}, 403, "forbidden_origin"),
    "an image on a page elsewhere": ({"Sec_Fetch_Site": "cross-site"}, 403, "forbidden_origin"),
    "a page whose name was rebound": ({"host": "evil.example", "Origin": "http://evil.example"}, 421, "misdirected_request"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_pages_of_others_are_kept_out_of_every_port_and_path(router: Subject, name: str) -> None:
    headers, status, code = FOREIGN[name]
    app, monitoring = router.port, router.serving.metrics_port
    body = ask_for("m")
    counted = Counted(router)
    for port, method, path, content in (
        (app, "GET", "/v1/models", None),
        (app, "POST", CHAT, body),
        (app, "GET", "/nope", None),
        (app, "GET", "/health/live", None),
        (app, "GET", "/metrics", None),
        (app, "POST", "/admin/reload", b"{}"),
        (monitoring, "GET", "/metrics", None),
        (monitoring, "GET", "/nope", None),
        (monitoring, "POST", "/admin/reload", b"{}"),
        (monitoring, "POST", "/admin/models/load", b'{"name":"x"}'),
    ):
        answer = talk(port, message(method, path, content, **headers))
        assert (path, answer.status, answer.error()["code"]) == (path, status, code)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    counted.expect(6, "llm_router_errors_total", type="forbidden")
    counted.expect(6, "llm_router_http_requests_total", status_code=str(status))
    counted.expect(0, "llm_router_inference_total")


def test_a_foreign_name_in_the_target_counts_like_one_in_the_header(router: Subject) -> None:
    assert talk(router.port, message("GET", "http://evil.example/v1/models")).status == 421
    assert talk(router.port, message("GET", "http://localhost/v1/models")).status == 200


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain",
        "text/plain; application/json",
        "application/json, text/plain",
        "",
    ],
)
def test_forms_are_415_on_every_port_and_path(router: Subject, kind: str) -> None:
    counted = Counted(router)
    for port, path in (
        (router.port, CHAT),
        (router.port, "/api/generate"),
        (router.port, "/admin/reload"),
        (router.serving.metrics_port, "/admin/reload"),
        (router.serving.metrics_port, "/admin/models/unload"),
    ):
        answer = talk(port, message("POST", path, ask_for("m"), kind=kind))
        assert answer.status == 415
        if path != "/api/generate":
            assert answer.error()["code"] == "unsupported_media_type"
    counted.expect(3, "llm_router_errors_total", type="bad_request")
    counted.expect(0, "llm_router_inference_total")


def test_no_page_is_let_in_unless_configured(router: Subject) -> None:
    """Neither by a preflight nor by a header on an ordinary reply."""
    preflight = {"Origin": "https://app.example", "Access_Control_Request_Method": "POST"}
    for port, path in ((router.port, CHAT), (router.port, "/metrics"), (router.serving.metrics_port, "/metrics")):
        assert talk(port, message("OPTIONS", path, **preflight)).status == 403
    for answer in (router.chat("m"), talk(router.port, message("GET", "/metrics"))):
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control-")]


# -- words of callers in places of ours ---------------------------------------------------------------


@pytest.mark.parametrize("given", ["a b", "a,b", "ä", '"}', "x" * 129, "a;b", "../a", "a\tb", ""])
def test_an_unfit_request_id_is_replaced(router: Subject, given: str) -> None:
    for port, path in (
        (router.port, "/v1/models"),
        (router.port, "/metrics"),
        (router.port, "/nope"),
        (router.serving.metrics_port, "/metrics"),
        (router.serving.metrics_port, "/nope"),
    ):
        found = talk(port, message("GET", path, X_Request_Id=given)).headers["x-request-id"]
        assert found
        assert found != given


def test_a_fit_request_id_is_kept_by_replies_refusals_and_backends(router: Subject) -> None:
    given = "a.B-9_" + "x" * 122
    for port, data in (
        (router.port, message("GET", "/metrics/json", X_Request_Id=given)),
        (router.port, message("GET", "/nope", X_Request_Id=given)),
        (router.port, message("POST", CHAT, b"{", X_Request_Id=given)),
        (router.port, b"POST / HTTP/1.1\r\nX-Request-Id: %b\r\nContent-Length: x\r\n\r\n" % given.encode()),
        (router.serving.metrics_port, message("GET", "/nope", X_Request_Id=given)),
        (router.port, message("POST", CHAT, ask_for("faulty"), X_Request_Id=given)),
    ):
        assert talk(port, data).headers["x-request-id"] == given
    assert router.faulty.requests[-1].headers["x-request-id"] == given


def test_names_of_callers_get_into_no_header_and_no_label(router: Subject) -> None:
    name = 'm\r\nX-Injected: 1\r\n\r\n{"}\n# HELP injected'
    encoded = "m%0d%0aX-Injected:%201%0d%0a%0d%0a"
    answers = [
        router.chat(name),
        router.chat("m\0"),
        router.chat("m\u2028x"),
        talk(router.port, message("GET", f"/v1/models/{encoded}")),
        talk(router.port, message("GET", f"/{encoded}")),
        talk(router.port, message("GET", f"/admin/{encoded}")),
        talk(router.serving.metrics_port, message("GET", f"/{encoded}")),
    ]
    for answer in answers:
        assert answer.status == 404
        answer.error()
        assert "x-injected" not in answer.headers
    assert {answer.headers["x-llm-router-model"] for answer in answers[:3]} == {"__other__"}
    assert b"njected" not in router.serving.get("/metrics")
    assert "X-Injected" not in router.serving.log


def test_thousands_of_names_make_no_series(router: Subject) -> None:
    """Of models, paths, hosts, request ids and content types; memory does not grow with them either."""
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=20)
    worker = router.serving.children()["worker-0"]

    def ask(method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> int:
        connection.request(method, path, body, headers)
        with connection.getresponse() as answer:
            answer.read()
            return answer.status

    def some(numbers: range) -> None:
        for i in numbers:
            named = {"Host": f"127.{i // 250}.7.{i % 250}:{i}", "X-Request-Id": f"number-{i}"}
            typed = {**named, "Content-Type": f"application/v{i}+json"}
            assert ask("POST", CHAT, typed, b'{"model":"model-%d","messages":[]}' % i) == 404
            assert ask("GET", f"/path-{i}", named) == 404
            assert ask("GET", f"/v1/models/model-{i}?x={i}", named) == 404
            if i % 10 == 0:
                assert ask("GET", f"/admin/path-{i}/x", named) == 404
                assert ask("DELETE", f"/metrics/path-{i}", named) == 404

    some(range(200))
    before, size = router.values(), len(router.serving.get("/metrics"))
    resident = rss_bytes(worker)
    some(range(200, 1500))
    connection.close()
    after = router.values()
    assert after.samples.keys() == before.samples.keys()
    assert len(router.serving.get("/metrics")) - size < 2000  # longer numbers
    assert rss_bytes(worker) - resident < 3e6
    assert after.total("llm_router_series_dropped_total") == 0
    other = after.total("llm_router_inference_total", model="__other__", status="error")
    assert other - before.total("llm_router_inference_total", model="__other__", status="error") == 1300


# -- secrets ------------------------------------------------------------------------------------------


def test_keys_are_in_no_reply(router: Subject) -> None:
    """Not even if the backend quotes what it was sent; and a caller's key goes to no backend."""
    quoted = f"the key Bearer {BACKEND_KEY} of {BACKEND_HEADER} is wrong"
    authorization = f"Bearer {CALLER_KEY}"
    answers = []
    for fault in (
        json_reply({"error": {"message": quoted}}, 401),
        json_reply({"error": {"message": quoted}}, 400),
        json_reply({"error": {"message": quoted}}, 429),
        json_reply({"error": {"message": quoted}}, 500),
        reply(quoted.encode(), 500, "text/plain"),
        reply(quoted.encode(), 200, "text/plain"),
    ):
        router.faulty.always(fault)
        answers.append(router.chat("faulty", Authorization=authorization))
        body = json.dumps({"prompt": "hi", "options": {"model": "faulty"}})
        answers.append(talk(router.port, message("POST", "/api/generate", body, Authorization=authorization)))
    assert router.faulty.requests[-1].headers["authorization"] == f"Bearer {BACKEND_KEY}"
    router.faulty.always(Stall())
    answers += [router.chat(model, Authorization=authorization) for model in ("slow", "down", "nope")]
    answers += [
        talk(port, message("GET", path, Authorization=authorization))
        for port in (router.port, router.serving.metrics_port)
        for path in ("/metrics", "/metrics/json", "/health", "/admin/models", "/nope")
    ]
    for answer in answers:
        shown = answer.body.decode() + repr(answer.headers)
        for secret in (BACKEND_KEY, BACKEND_HEADER, CALLER_KEY):
            assert secret not in shown
    sent = repr([(request.headers, request.body) for request in router.faulty.requests])
    assert CALLER_KEY not in sent


# -- TLS ----------------------------------------------------------------------------------------------

PAGE = "https://app.example"
TLS_CONFIG = """
server: {{tls_cert: {certificate}, tls_key: {key}}}
front: {{header_timeout: 400ms, body_timeout: 400ms}}
access: {{allowed_origins: ['{page}']}}
backends: [{{name: good, url: {good}}}]
models: [{{name: m, deployments: [{{backend: good}}]}}]
"""


class Secured(NamedTuple):
    """A router whose app port speaks TLS."""

    serving: Serving
    context: ssl.SSLContext  # of a client that trusts it
    certificate: Path

    def ask(self, data: bytes) -> Answer:
        """The reply to `data`. Over TLS a refusal cannot half-close: its end is known by its length."""
        with (
            socket.create_connection(("127.0.0.1", self.serving.port), timeout=10) as sock,
            self.context.wrap_socket(sock, server_hostname="localhost") as secured,
        ):
            secured.sendall(data)
            received = receive_until(secured, b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", received)
            missing = received.index(b"\r\n\r\n") + 4 + int(length[1] if length else 0) - len(received)
            while missing > 0:
                piece = secured.recv(missing)
                assert piece, "the reply is cut short"
                received += piece
                missing -= len(piece)
        return parsed(received)

    def is_well(self) -> bool:
        try:
            return self.ask(message("POST", CHAT, ask_for("m"))).status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    certificate, key = self_signed(folder)
    with ScriptedBackend() as good:
        config = TLS_CONFIG.format(certificate=certificate, key=key, page=PAGE, good=good.base_url)
        with Serving(folder, config, ready=False) as serving:
            secured = Secured(serving, ssl.create_default_context(cafile=str(certificate)), certificate)
            until(secured.is_well, 20, "an answer over TLS")
            yield secured
            assert "Traceback" not in serving.log


def test_the_app_port_speaks_tls_when_it_has_a_certificate(secured: Secured) -> None:
    until(lambda: f"API      https://127.0.0.1:{secured.serving.port}/v1" in secured.serving.log)
    with openai.OpenAI(
        base_url=f"https://localhost:{secured.serving.port}/v1",
        api_key=CALLER_KEY,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=secured.context),
    ) as client:
        stream = client.chat.completions.create(model="m", stream=True, messages=[{"role": "user", "content": "hi"}])
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == "Hello from the scripted backend."
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 11_000_000}])
        assert caught.value.status_code == 413
    with pytest.raises(ssl.SSLCertVerificationError):
        secured._replace(context=ssl.create_default_context()).ask(b"")


def test_bad_input_over_tls_gets_the_same_answers(secured: Secured) -> None:
    assert secured.ask(b"hello\r\n\r\n").error()["code"] == "malformed_http"
    assert secured.ask(message("POST", CHAT, b"{")).error()["code"] == "invalid_json"
    assert secured.ask(message("POST", CHAT, bytes(11_000_000))).error()["code"] == "body_too_large"
    assert secured.ask(b"GET / HTTP/1.1\r\nHost: loc").error()["code"] == "request_timeout"
    assert secured.ask(message("GET", "/metrics", host="evil.example")).status == 421
    assert secured.is_well()


def test_plain_http_to_the_tls_port_gets_nothing(secured: Secured) -> None:
    """Nor does a connection that never begins its handshake."""
    address = ("127.0.0.1", secured.serving.port)
    with socket.create_connection(address, timeout=5) as sock:
        sock.sendall(message("GET", "/v1/models"))
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = until_closed(sock)
        assert not received.startswith(b"HTTP")
    with socket.create_connection(address, timeout=5) as silent, contextlib.suppress(ConnectionResetError):
        assert until_closed(silent) == b""
    assert secured.is_well()


def test_configured_pages_may_call_and_others_may_not(secured: Secured) -> None:
    page = {"Origin": PAGE, "Sec_Fetch_Site": "cross-site"}
    asking = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    for path in (CHAT, "/metrics"):
        preflight = secured.ask(message("OPTIONS", path, **page, **asking))
        assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, PAGE)
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        assert preflight.headers["x-request-id"]
    for data in (
        message("POST", CHAT, ask_for("m"), **page),
        message("POST", CHAT, ask_for("nope"), **page),
        message("GET", "/nope", **page),
        message("GET", "/metrics", **page),
    ):
        answer = secured.ask(data)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for origin in ("https://app.example.evil", "http://app.example", "https://app.example:444", "null"):
        answer = secured.ask(message("POST", CHAT, ask_for("m"), Origin=origin))
        assert answer.status == 403
        assert "access-control-allow-origin" not in answer.headers
    assert not [name for name in secured.ask(message("GET", "/v1/models")).headers if name.startswith("access-")]


def test_a_certificate_that_is_gone_is_reported_until_it_is_back(secured: Secured) -> None:
    """A worker that starts without it says why and ends; its successors try again."""
    away = secured.certificate.with_suffix(".away")
    secured.certificate.rename(away)
    secured.serving.signal("worker-0", signal.SIGKILL)
    until(lambda: f"no TLS with the certificate {secured.certificate}" in secured.serving.log)
    away.rename(secured.certificate)
    until(secured.is_well, 10, "an answer over TLS")
