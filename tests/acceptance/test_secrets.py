"""Secrets planted wherever a request, a backend or a configuration can carry one: the running program shows none of them.

Every kind of secret goes to every place, each with a core of its own (support/planted.py); then every file, trace, metric,
page and reply to somebody else is searched for all of them. The counter-test has content switched on, where prompts must
be found: so the search does find. Not for: what a log line or a span holds otherwise (test_logs.py, test_traces.py).
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, quote_plus

import psutil
import pytest

from llm_router.testing import ScriptedBackend, framed, json_reply, reply, stream_head
from support.callers import Administrator, request
from support.collector import Collector, Said
from support.collector import running as collecting
from support.net import free_port
from support.planted import KINDS, OPAQUE, PROMPT, Garden, Plant, plant
from support.serving import SOURCES, Serving
from support.wait import until

pytestmark = pytest.mark.slow

Headers = Mapping[str, str]
Make = Callable[[str], bytes]

# -- requests -------------------------------------------------------------------------------------------


def http(method: str, target: str, headers: Headers | None = None, body: object = None) -> bytes:
    """One request as bytes. What is no JSON already is made JSON."""
    sent = {"host": "localhost", "connection": "close", **(headers or {})}
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent.setdefault("content-type", "application/json")
        sent["content-length"] = str(len(data))
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogatepass") + data


def encoded(text: str) -> str:
    """Every character percent-encoded: nothing of it can be recognised as it stands."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


def answered(port: int, data: bytes, address: str = "127.0.0.1", *, ends: bool = False) -> bytes:
    """All that comes back for these bytes, until the server closes; `ends` says that no more will follow."""
    with socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(address, 0)) as sock:
        sock.sendall(data)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        said = bytearray()
        with contextlib.suppress(ConnectionResetError):  # what the server did not read of a malformed request
            while more := sock.recv(65536):
                said += more
        return bytes(said)


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}


def asking(target: str, headers: Headers) -> Make:
    """A GET with the secret, as a URL has it, for the @ in the target."""
    return lambda text: http("GET", target.replace("@", quote(text)), headers)


def showing(
    target: str, headers: Headers, name: str, value: str = "@", *, method: str = "GET", body: object = None
) -> Make:
    """A request with the secret for the @ in the value of a header."""

    def make(text: str) -> bytes:
        if name == "x-request-id":  # what is not written so is not taken for an id
            text = re.sub("[^A-Za-z0-9._-]", "_", text)
        elif name == "tracestate":
            text = re.sub("[=,]", "_", text)
        return http(method, target, {**headers, name: value.replace("@", text)}, body)

    return make


def body_places(key: str) -> Iterator[tuple[str, Make]]:
    """Fields of bodies, those that hold what a user wrote."""
    held = {"authorization": f"Bearer {key}"}

    def chat(**fields: Callable[[str], Any]) -> Make:
        made = fields  # each field's value of the secret
        return lambda text: http(
            "POST", "/v1/chat/completions", held, chat_body(**{name: make(text) for name, make in made.items()})
        )

    yield "messages", chat(messages=lambda text: [{"role": "user", "content": f"it is {text}, is it not"}])
    yield "messages, stream", chat(messages=lambda text: [{"role": "user", "content": text}], stream=lambda _: True)
    yield "system", chat(messages=lambda text: [{"role": "system", "content": text}, {"role": "user", "content": "x"}])
    yield "content parts", chat(messages=lambda text: [{"role": "user", "content": [{"type": "text", "text": text}]}])
    yield (
        "tool call",
        chat(
            messages=lambda text: [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "pay", "arguments": json.dumps({"with": text})},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": text},
            ]
        ),
    )
    yield (
        "tools",
        chat(
            tools=lambda text: [{"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}]
        ),
    )
    yield "stop", chat(stop=lambda text: [text])
    yield "cached", chat(messages=lambda text: [{"role": "user", "content": text}], temperature=lambda _: 0)
    yield "prompt", lambda text: http("POST", "/v1/completions", held, {"model": "m", "prompt": text})
    yield "input", lambda text: http("POST", "/v1/embeddings", held, {"model": "m", "input": [text]})
    yield (
        "generate",
        lambda text: http("POST", "/api/generate", held, {"prompt": text, "options": {"model": "m", "system": text}}),
    )
    yield (
        "anthropic",
        lambda text: http(
            "POST",
            "/v1/messages",
            held,
            {"model": "m", "max_tokens": 5, "system": text, "messages": [{"role": "user", "content": text}]},
        ),
    )
    yield (
        "count_tokens",
        lambda text: http(
            "POST", "/v1/messages/count_tokens", held, {"model": "m", "messages": [{"role": "user", "content": text}]}
        ),
    )
    yield "refused", chat(messages=lambda text: [{"role": "user", "content": text}], model=lambda _: "away")
    yield "unauthorized", lambda text: http("POST", "/v1/chat/completions", None, chat_body(user=text))
    # What cannot be read.
    yield "cut", lambda text: http("POST", "/v1/chat/completions", held, json.dumps(chat_body(x=text))[:-2].encode())
    yield "no object", lambda text: http("POST", "/v1/chat/completions", held, json.dumps([text]).encode())
    yield "no JSON", lambda text: http("POST", "/v1/chat/completions", held, text.encode())
    yield "no UTF-8", lambda text: http("POST", "/v1/chat/completions", held, b'{"model": "' + text.encode() + b"\xff")
    yield "no list", chat(messages=lambda text: text)
    yield "no number", chat(max_tokens=lambda text: text, stream_options=lambda text: text)
    yield "no anthropic", lambda text: http("POST", "/v1/messages", held, {"model": "m", "max_tokens": text})
    yield "no prompt", lambda text: http("POST", "/api/generate", held, {"prompt": {"x": text}})


def label_places(key: str) -> Iterator[tuple[str, Make]]:
    """Fields of bodies that hold names, and words of the router's own."""
    held = {"authorization": f"Bearer {key}"}

    def chat(name: str, make: Callable[[str], Any] = lambda text: text) -> Make:
        return lambda text: http("POST", "/v1/chat/completions", held, chat_body(**{name: make(text)}))

    yield "model", chat("model")
    yield "model, long", chat("model", lambda text: f"{'m' * 70} {text}")
    yield "user", chat("user")
    yield "metadata", chat("metadata", lambda text: {"session": text, text: "x"})
    yield "strategy", chat("strategy")
    yield "a field", lambda text: http("POST", "/v1/chat/completions", held, chat_body(**{text: text}))
    yield "anthropic model", lambda text: http("POST", "/v1/messages", held, {"model": text, "messages": []})
    yield (
        "generate model",
        lambda text: http("POST", "/api/generate", held, {"prompt": "x", "options": {"model": text, "x": text}}),
    )


def target_places(key: str) -> Iterator[tuple[str, Make]]:
    """Paths and queries."""
    held = {"authorization": f"Bearer {key}"}

    def get(target: str, take: Callable[[str], str] = lambda text: quote(text, safe=":/@?=&")) -> Make:
        return lambda text: http("GET", target.replace("@", take(text)), held)

    whole: Callable[[str], str] = lambda text: quote(text, safe="")  # noqa: E731 - named once, used thrice
    yield "path", get("/@")
    yield "path of a model", get("/v1/models/@", whole)
    yield "path, encoded", get("/v1/models/@", encoded)
    yield "path of control", get("/debug/@")
    yield "path of a request", get("/debug/requests/@", whole)
    yield "path of an asset", get("/.git/@;x=1")
    yield "absolute", get("http://localhost/@")
    yield "method", lambda text: http("DELETE", f"/v1/chat/completions/{quote(text)}", held)
    yield "query", get("/v1/models?x=1&y=@&z", quote_plus)
    yield "query, encoded", get("/v1/models?x=@", encoded)
    yield "query alone", get("/v1/models?@", whole)
    yield "query of control", get("/debug/requests?model=@&route=@", whole)
    yield "query of metrics", get("/metrics?x=@", whole)
    yield "query of usage", get("/admin/usage?by=@&key=@", whole)
    yield "fragment", get("/v1/models#@", whole)


def parameter_places(key: str) -> Iterator[tuple[str, Make]]:
    """Parameters whose names say that they are secret."""
    held = {"authorization": f"Bearer {key}"}
    for name in ("api_key", "key", "access_token", "token", "password", "api%5Fkey", "X-Amz-Signature", "prompt"):
        yield f"?{name}=", asking(f"/v1/models?a=b&{name}=@", held)
        yield f"?{name}= of control", asking(f"/health?{name}=@", held)
        yield f"referer ?{name}=", showing("/v1/models", held, "referer", f"https://example.org/?{name}=@")


CREDENTIALS: Final = ("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization", "x-goog-api-key")
HEADERS: Final = (
    "user-agent", "referer", "x-request-id", "request-id", "traceparent", "tracestate", "baggage", "origin",
    "x-forwarded-for", "x-real-ip", "forwarded", "host", "content-type", "accept", "accept-encoding", "expect", "from",
    "x-llm-router-strategy", "x-llm-router-priority", "x-llm-router-timeout", "x-llm-router-cache", "x-llm-router-timing",
    "x-llm-router-client", "cache-control", "anthropic-version", "anthropic-beta", "sec-fetch-site", "x-planted",
    "access-control-request-headers", "transfer-encoding", "content-length", "upgrade",
)  # fmt: skip


def credential_places(key: str) -> Iterator[tuple[str, Make]]:
    """Headers that are there for secrets; the key itself is shown in another one."""
    for name in CREDENTIALS:
        held = {"x-api-key": key} if name == "authorization" else {"authorization": f"Bearer {key}"}
        for path in ("/v1/models", "/admin/log-level"):
            yield f"{name} {path}", showing(path, held, name)
            yield f"{name} alone {path}", showing(path, {}, name)
    yield "bearer", lambda text: http("POST", "/v1/chat/completions", {"authorization": f"Bearer {text}"}, chat_body())


def header_places(key: str) -> Iterator[tuple[str, Make]]:
    """All other headers, of an inference and of what control answers."""
    held = {"authorization": f"Bearer {key}"}
    valid = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    written = {
        "traceparent": f"00-@-{'cd' * 8}-01",
        "tracestate": "vendor=@",
        "forwarded": 'for="@"',
        "origin": "https://@",
        "user-agent": "curl/8 (@)",
        "content-length": "12 @",
    }
    for name in HEADERS:
        more = {**held, **(valid if name == "tracestate" else {})}
        value = written.get(name, "@")
        # A body's own length would take the place of the one that is planted.
        body = None if name == "content-length" else chat_body()
        yield name, showing("/v1/chat/completions", more, name, value, method="POST", body=body)
        if name not in ("content-length", "transfer-encoding"):
            yield f"{name} of control", showing("/admin/log-level", more, name, value)


def hostile_requests(key: str) -> Iterator[bytes]:
    """Names that drive a terminal, wherever one may stand; and halves of surrogate pairs."""
    held = {"authorization": f"Bearer {key}"}
    for text in (HOSTILE, "half \ud83d of a pair", "\udc80"):
        for name in ("model", "user", "strategy"):
            yield http("POST", "/v1/chat/completions", held, chat_body(**{name: text}))
        yield http("POST", "/v1/chat/completions", held, b'{"model": "' + text.encode("utf-8", "surrogatepass") + b'"}')
        yield http("POST", "/api/generate", held, {"prompt": text, "options": {"model": text}})
        yield http("POST", "/v1/messages", held, {"model": text, "messages": []})
        for body in ({"name": text}, {"name": "n", text: 1}, {"name": "n", "scopes": [text]}):
            yield http("POST", "/admin/keys", held, body)
        yield http("POST", "/admin/models/load", held, {"name": text})
        yield http("PUT", "/admin/log-level", held, {"level": "info", "logger": text})
        path = quote(text, safe="", errors="surrogatepass")
        for target in (
            f"/{path}",
            f"/v1/models/{path}",
            f"/debug/requests/{path}?route={path}",
            f"/admin/usage?by={path}",
        ):
            yield http("GET", target, held)
        raw = re.sub(r"[\r\n\0]", "", text)  # what ends a header; front.py refuses the others or not
        for name in (
            "user-agent",
            "referer",
            "x-request-id",
            "content-type",
            "origin",
            "x-llm-router-strategy",
            "host",
        ):
            yield http("POST", "/v1/chat/completions", {**held, name: raw}, chat_body())
        yield http("GET", f"/{raw}", held)


def malformed_places(key: str) -> Iterator[tuple[str, Make]]:
    """What is no HTTP, or none that anybody serves."""
    yield "request line", lambda text: f"GET /{text} of mine\r\n\r\n".encode()
    yield "method", lambda text: f"{text} / HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    yield "version", lambda text: f"GET / {text}\r\nhost: localhost\r\n\r\n".encode()
    yield "no colon", lambda text: f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{text}\r\n\r\n".encode()
    yield "header name", lambda text: f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{text}: 1\r\n\r\n".encode()
    yield "folded", lambda text: f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: 1\r\n {text}\r\n\r\n".encode()
    yield "NUL", lambda text: f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: \0{text}\r\n\r\n".encode()
    yield (
        "chunk size",
        lambda text: (
            f"POST /v1/chat/completions?x={quote(text)} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            f"{text}\r\n"
        ).encode(),
    )
    yield "long path", lambda text: f"GET /{text}{'x' * 9000} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    yield (
        "many headers",
        lambda text: http("GET", f"/{quote(text)}", {f"x-{number}": text for number in range(110)}),
    )
    yield "cut", lambda text: f"GET /{quote(text)} HTTP/1.1\r\nauthorization: {text}".encode()


def admin_places(key: str) -> Iterator[tuple[str, Make]]:
    """What administrators send."""
    held = {"authorization": f"Bearer {key}"}

    def send(method: str, path: str, make: Callable[[str], Any]) -> Make:
        return lambda text: http(method, path, held, make(text))

    def at(method: str, path: str) -> Make:
        return lambda text: http(method, path.replace("@", quote(text, safe="")), held, {})

    yield "key name", send("POST", "/admin/keys", lambda text: {"name": f"of {text}"[:64]})
    yield "key models", send("POST", "/admin/keys", lambda text: {"name": text[::-1][:9], "models": [text]})
    yield "key scopes", send("POST", "/admin/keys", lambda text: {"name": "n", "scopes": [text]})
    yield "key limits", send("POST", "/admin/keys", lambda text: {"name": "n", "limits": {text: 1}})
    yield "key expires", send("POST", "/admin/keys", lambda text: {"name": "n", "expires": text})
    yield "key field", send("POST", "/admin/keys", lambda text: {"name": "n", "secret": text, text: 1})
    yield "key change", send("PATCH", "/admin/keys/none", lambda text: {"name": text})
    yield "key id", at("PATCH", "/admin/keys/@")
    yield "key revoked", at("DELETE", "/admin/keys/@")
    yield "level", send("PUT", "/admin/log-level", lambda text: {"level": text})
    yield "logger", send("PUT", "/admin/log-level", lambda text: {"level": "debug", "logger": text})
    yield "for", send("PUT", "/admin/log-level", lambda text: {"level": "debug", "for": text})
    yield "load", send("POST", "/admin/models/load", lambda text: {"name": text})
    yield "load options", send("POST", "/admin/models/load", lambda text: {"name": "x", "options": {text: text}})
    yield "unload", send("POST", "/admin/models/unload", lambda text: {"name": text})
    yield "usage", at("GET", "/admin/usage?since=@&model=@")
    yield "profile", at("POST", "/debug/profile?process=@")
    yield "profile kind", at("POST", "/debug/profile?kind=@")
    yield "profile seconds", at("POST", "/debug/profile?seconds=@")
    yield "debug", at("GET", "/debug?x=@")
    yield "debug limit", at("GET", "/debug/requests?limit=@")
    yield "debug show", at("GET", "/debug/requests?show=@")
    yield "debug model", at("GET", "/debug/models?model=@")
    yield "no JSON", send("POST", "/admin/keys", lambda text: text.encode())


IDS: Final = ("x-request-id", "tracestate")
NO_IDS: Final = ("card", "card-spaced", "bearer", "basic", "cookie", "userinfo", "parameter", "password")
"""Kinds that are none once they are written as an id; and a long number is a good id, whatever its check digit."""


def wanted(kind: str, place: str) -> bool:
    return not (kind in NO_IDS and place.startswith(IDS))


# -- the program, and what it leaves behind ----------------------------------------------------------------

HOSTILE: Final = '\x1b]0;owned\x07\x1b[2J\x9b31m\r\n{"log.level":"info"}\u2028\u2029\u202e\ufeff\x00\x7f'
"""Drives a terminal, ends lines for all who read them, forges one, and turns what follows around."""

CONFIG: Final = """
server: {workers: 2, drain: 2s}
backends:
  - {name: b, url: "%(plain)s", api_key: "%(openai)s", headers: {x-org: "%(header)s"}, query: "code=%(query)s"}
  - {name: away, url: "http://127.0.0.1:%(nobody)d/v1", api_key: "%(key)s"}
%(quoting)s
models:
  - {name: m, deployments: [{backend: b, model: scripted}]}
  - {name: away, deployments: [{backend: away, model: scripted}]}
%(models)s
health:
  external: [{name: beside, target: "http://127.0.0.1:%(nobody)d/?token=%(external)s"}]
  interval: 1s
cache: {url: "redis://:%(redis)s@127.0.0.1:%(nobody)d/0"}
accounts: {redis: "redis://me:%(ledger)s@127.0.0.1:%(nobody)d/0"}
profiler: {enabled: true}
tracing: {sample_ratio: 1, recent_per_s: 1000, max_traces: 2000}
logs: {level: debug, metrics_interval: 1s, max_file: 64KiB}
"""

SAID: Final = plant(PROMPT, "a completion")


class Quoting:
    """Backends that show, in all ways that there are, what they were sent: our credentials and the caller's words."""

    def __init__(self, garden: Garden) -> None:
        self.key = garden.plant(OPAQUE, "the key of a backend that quotes it")
        self.header = garden.plant(OPAQUE, "a header of a backend that quotes it")
        self.query = garden.plant(OPAQUE, "the query of a backend that quotes it")
        self.password = garden.plant(OPAQUE, "the bearer of a backend that quotes it")
        self.prompt = garden.plant(PROMPT, "a request that a backend quotes")
        secrets = f"{self.key.text} {self.header.text} {self.password.text} code={self.query.text}"
        everything = f"{secrets} for input_value={{'role': 'user', 'content': '{self.prompt.text}'}}"
        error = {"error": {"message": f"no: {HOSTILE} {everything}", "type": "invalid_request_error", "code": "bad"}}
        event = f"data: {json.dumps(error)}\n\n".encode()
        anthropic = {"type": "error", "error": {"type": "overloaded_error", "message": everything}}
        started = {"type": "message_start", "message": {"id": "1", "model": "m", "usage": {"input_tokens": 1}}}
        first = b'data: {"choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
        place = f"http://127.0.0.1/v1/chat/completions?{secrets.replace(' ', '&')}"
        self.scripts: dict[str, tuple[bytes, ...]] = {
            **{f"error{status}": (json_reply(error, status),) for status in (400, 401, 404, 429, 500, 503)},
            "text": (reply(secrets.encode(), 502, "text/plain"),),
            "prompted": (reply(self.prompt.text.encode(), 500, "text/plain"),),
            "nojson": (reply(secrets.encode()),),
            "redirect": (reply(b"", 302, headers=[("Location", place), ("x-debug", secrets)]),),
            "header": (json_reply(error, 400, [("x-debug", secrets), ("set-cookie", f"k={secrets}")]),),
            "event": (stream_head(), framed(first), framed(event), framed(b"")),
            "first": (stream_head(), framed(event), framed(b"")),
            "halves": (stream_head(), framed(first), framed(event[:70]), framed(event[70:]), framed(b"")),
            "anthropic": (
                stream_head(),
                framed(f"event: message_start\ndata: {json.dumps(started)}\n\n".encode()),
                framed(f"event: error\ndata: {json.dumps(anthropic)}\n\n".encode()),
                framed(b""),
            ),
            "unfinished": (stream_head(), framed(first), framed(event[:-2]), framed(b"")),
        }
        self.servers = {name: ScriptedBackend() for name in self.scripts}

    def __enter__(self) -> Self:
        for name, server in self.servers.items():
            server.__enter__()
            server.always(*self.scripts[name])
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            server.stop()

    def backends(self) -> str:
        headers = f'{{x-org: "{self.header.text}", x-auth: "Bearer {self.password.text}"}}'
        return "\n".join(
            f'  - {{name: {name}, url: "{server.base_url}", api_key: "{self.key.text}", headers: {headers}, '
            f'query: "code={self.query.text}", protocol: {"anthropic" if name == "anthropic" else "openai"}}}'
            for name, server in self.servers.items()
        )

    def models(self) -> str:
        return "\n".join(
            f"  - {{name: {name}, deployments: [{{backend: {name}, model: scripted}}]}}" for name in self.servers
        )

    def ask_all(self, serving: Serving, key: str) -> Iterator[tuple[str, bytes]]:
        """What callers of every kind get from each."""
        held = {"authorization": f"Bearer {key}"}
        messages = [{"role": "user", "content": self.prompt.text}]
        for name in self.servers:
            asked = {"model": name, "messages": messages, "max_tokens": 5}
            for stream in (False, True):
                for path in ("/v1/chat/completions", "/v1/messages"):
                    body = {**asked, "stream": stream}
                    yield f"{name} {path} {stream}", answered(serving.port, http("POST", path, held, body))
            generated = {"prompt": self.prompt.text, "options": {"model": name}}
            yield f"{name} generate", answered(serving.port, http("POST", "/api/generate", held, generated))
            embedded = {"model": name, "input": self.prompt.text}
            yield f"{name} embeddings", answered(serving.port, http("POST", "/v1/embeddings", held, embedded))


class World:
    """A router with every surface on, and all that was planted around it."""

    def __init__(self, folder: Path, collector: Collector) -> None:
        self.folder = folder
        self.collector = collector
        self.garden = Garden()
        self.quoting = Quoting(self.garden)
        self.plain = ScriptedBackend(tokens=("Once", f" {SAID.text}", "."))
        self.configured = {
            name: self.garden.plant(kind, f"the configuration: {name}")
            for name, kind in (
                ("openai", "openai"), ("header", OPAQUE), ("query", OPAQUE), ("key", OPAQUE), ("external", OPAQUE),
                ("redis", OPAQUE), ("ledger", OPAQUE),
            )
        }  # fmt: skip
        self.garden.plant(PROMPT, "a completion")
        self.exporter = self.garden.plant(OPAQUE, "the collector's header")
        self.variable = self.garden.plant(OPAQUE, "a variable of the environment")
        self.key = Plant("ours", "the administrator's own", "none yet", "")
        self.leaks: dict[str, set[Plant]] = {}
        self.sent = 0

    def config(self) -> str:
        texts = {name: planted.text for name, planted in self.configured.items()}
        return CONFIG % {
            **texts,
            "plain": self.plain.base_url,
            "nobody": free_port(),
            "quoting": self.quoting.backends(),
            "models": self.quoting.models(),
        }

    def env(self) -> dict[str, str]:
        secret = self.exporter.text
        return {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://me:{secret}@127.0.0.1:{self.collector.port}/v1/traces?key={secret}",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{secret},x-team={secret}",
            "MY_PASSWORD": self.variable.text,
            "OPENAI_API_KEY": self.variable.text,
        }

    # -- planting ------------------------------------------------------------------------------------------

    def send(self, port: int, places: Iterator[tuple[str, Make]], kinds: Sequence[str], *, ends: bool = False) -> None:
        """Every kind to every place; no reply may hold what another request brought."""

        def one(item: tuple[Plant, bytes, str]) -> tuple[Plant, bytes]:
            planted, data, address = item
            return planted, answered(port, data, address, ends=ends)

        items = []
        for place, make in places:
            for kind in kinds:
                if wanted(kind, place):
                    planted = self.garden.plant(kind, f"{place} ({port})")
                    # Of an address of its own: who fails often is answered late.
                    self.sent += 1
                    address = f"127.1.{self.sent >> 8}.{self.sent & 255}"
                    items.append((planted, make(planted.text), address))
        with ThreadPoolExecutor(8) as threads:
            for planted, said in threads.map(one, items):
                # What a model said is for whoever asked.
                self.search(f"the reply to {planted.place}", said, but={planted, SAID})

    def search(self, where: str, data: bytes, *, but: set[Plant] = frozenset()) -> None:  # type: ignore[assignment]
        found = self.garden.found_in(data) - but
        if self.key.text.encode() in data:
            found.add(self.key)
        if found:
            self.leaks.setdefault(where, set()).update(found)

    # -- looking -------------------------------------------------------------------------------------------

    def search_pages(self, serving: Serving, key: str) -> None:
        held = {"authorization": f"Bearer {key}"}
        pages = [
            "/", "/metrics", "/metrics/json", "/health", "/health/live", "/health/ready", "/health/startup", "/debug",
            "/debug/models", "/admin/keys?all=true", "/admin/models", "/admin/log-level",
            "/admin/usage?by=key,model,backend,day",
            *(f"/debug/requests?show={show}&limit=200" for show in ("recent", "slowest", "failed")),
        ]  # fmt: skip
        lists = [page for page in pages if page.startswith("/debug/requests")]
        groups = request(serving.metrics_port, "GET", lists[0], key=key).json()["groups"]
        lists += [
            f"/debug/requests?route={quote(group['route'])}&model={quote(group['model'])}&limit=20" for group in groups
        ]
        ids: set[str] = set()
        for page in lists:
            listed = request(serving.metrics_port, "GET", page, key=key)
            self.search(page, listed.body)
            ids |= {one["trace_id"] for one in listed.json()["requests"]}
        assert len(ids) > 200
        for id in sorted(ids):  # at the port whose own requests are not traced
            page = f"/debug/requests/{id}"
            self.search(page, answered(serving.metrics_port, http("GET", page, held)))
        for port in (serving.port, serving.metrics_port):
            for page in pages:
                for accept in ("*/*", "application/openmetrics-text", "application/health+json"):
                    if accept == "*/*" or page in ("/metrics", "/health"):
                        said = answered(port, http("GET", page, {**held, "accept": accept}))
                        assert said.startswith(b"HTTP/1.1 200"), (page, said[:500])
                        self.search(f"{page} ({accept})", said)
        for kind, formats in (("cpu", ("speedscope", "folded")), ("memory", ("json",)), ("continuous", ("folded",))):
            for format in formats:
                for process in ("worker-0", "control"):
                    page = f"/debug/profile?process={process}&kind={kind}&seconds=0.2&format={format}"
                    said = answered(serving.port, http("POST", page, held, {}))
                    assert said.startswith(b"HTTP/1.1 200"), (page, said[:500])
                    self.search(page, said)

    def search_bystanders(self, serving: Serving, key: str) -> None:
        """Errors of others: none of them tells what somebody else sent."""
        held = {"authorization": f"Bearer {key}"}
        body = chat_body(model="unknown")
        for port in (serving.port, serving.metrics_port):
            for data in (
                http("GET", "/nothing"), http("GET", "/v1/models"), http("GET", "/v1/models/none", held), b"x y z\r\n\r\n",
                http("POST", "/v1/chat/completions", held, body), http("POST", "/v1/messages", held, body),
                http("POST", "/v1/chat/completions", held, b"{"), http("GET", "/debug/requests/none", held),
                http("POST", "/v1/chat/completions", held, chat_body(model="away")), http("GET", "/health"),
            ):  # fmt: skip
                self.search("the reply to a bystander", answered(port, data, "127.2.0.1"))

    def search_commands(self, serving: Serving) -> None:
        """What the command line prints, and that nothing of it drives the terminal."""
        data = ("--data-dir", str(self.folder / "data"))
        for arguments in (
            ("logs", "--file", "all", "--lines", "0", *data),
            ("logs", "--file", "all", "--lines", "0", "--json", *data),
            ("trace", "--failed", "--limit", "200", *data),
            ("trace", "--json", "--limit", "200", *data),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "llm_router", *arguments],
                capture_output=True,
                env={"PYTHONPATH": str(SOURCES), "HOME": str(self.folder)},
                cwd=self.folder,
                check=False,
            )
            assert done.returncode == 0 and len(done.stdout) > 1000, (arguments, done.stderr)
            self.search(f"llm-router {arguments[0]} {arguments[-3]}", done.stdout + done.stderr)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", done.stdout.decode()), arguments

    def search_processes(self, serving: Serving) -> None:
        """What `ps` shows; and what stands in the file is given to no child in its environment."""
        top = psutil.Process(serving.process.pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.search(f"the command line of {process.pid}", "\0".join(process.cmdline()).encode())
                given = {self.exporter, self.variable}  # by whoever started it
                self.search(f"the environment of {process.pid}", str(process.environ()).encode(), but=given)

    def search_files(self) -> list[str]:
        """Every file that the router wrote; returns their names."""
        names = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.name != "llm-router.yaml":
                data = path.read_bytes()
                self.search(f"the file {path.name}", gzip.decompress(data) if path.suffix == ".gz" else data)
                names.append(path.name)
        return names

    def search_spans(self) -> int:
        for export in tuple(self.collector.exports):
            self.search("the spans of an export", json.dumps(export.document).encode())
        return sum(len(export.spans) for export in self.collector.exports)

    def check(self) -> None:
        assert not self.leaks, "\n".join(
            f"{where}: {len(found)}, like {sorted((one.kind, one.place) for one in found)[:6]}"
            for where, found in sorted(self.leaks.items())
        )


def check_lines(folder: Path, *, console: bool = True) -> None:
    """Each line of each log is one object of JSON; nothing in any drives a terminal or ends a line for some reader."""
    found = [path for path in folder.rglob("*.log*") if console or path.name != "output.log"]
    assert len(found) > 3
    for path in found:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        bad = re.search(r".{0,50}[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ufeff]", text)
        assert not bad, (path.name, bad)
        for line in text.splitlines():
            if path.name != "output.log" or line.startswith("{"):  # the banner is for people
                assert isinstance(json.loads(line), dict)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with collecting() as collector:
        made = World(tmp_path_factory.mktemp("secrets"), collector)
        # A collector that is no better than the backends.
        quoted = f"{HOSTILE} no: Bearer {made.exporter.text} {made.exporter.text}".encode()
        collector.answers.append(Said(503, {"retry-after": "0"}, quoted))
        collector.answers.append(Said(401, {}, quoted))
        with made.quoting, made.plain:
            yield made


def test_no_secret_shows_anywhere(world: World) -> None:
    """Planted, searched for while the router runs, and in all that is left when it has ended."""
    with Serving(world.folder, world.config(), env=world.env()) as serving:
        administrator = Administrator(serving)
        key, _ = administrator.create(scopes=["admin", "inference", "metrics:read"])
        world.key = world.key._replace(text=key)
        app, monitoring = serving.port, serving.metrics_port
        everything = (*KINDS, PROMPT)
        world.send(app, body_places(key), everything)
        world.send(app, label_places(key), tuple(KINDS))
        world.send(app, target_places(key), tuple(KINDS))
        world.send(app, parameter_places(key), (OPAQUE, PROMPT))
        world.send(app, credential_places(key), (*KINDS, OPAQUE))
        world.send(app, header_places(key), tuple(KINDS))
        world.send(app, malformed_places(key), tuple(KINDS), ends=True)
        for port in (app, monitoring):
            world.send(port, admin_places(key), tuple(KINDS))
        some = tuple(KINDS)[::3]  # the same application answers here
        world.send(monitoring, target_places(key), some)
        world.send(monitoring, credential_places(key), (*some, OPAQUE))
        world.send(monitoring, malformed_places(key), some, ends=True)
        for what, said in world.quoting.ask_all(serving, key):
            world.search(f"the reply of {what}", said, but={world.quoting.prompt})
        until(lambda: world.search_spans() > 1000, 10, "exported spans")
        for port in (app, monitoring):
            for data in hostile_requests(key):
                answered(port, data, "127.2.0.2")
        world.search_bystanders(serving, key)
        world.search_pages(serving, key)
        world.search_processes(serving)
        world.search_commands(serving)
        until(lambda: any(world.folder.rglob("*.gz")), 20, "a rotated file")
    assert len(world.garden) > 3000
    kinds = {re.split(r"[-.]", name)[0] for name in world.search_files()}
    assert {"access", "application", "error", "audit", "metrics", "accounts", "output"} <= kinds
    world.search_spans()
    world.check()
    check_lines(world.folder)


def test_content_shows_where_it_is_wanted(tmp_path: Path) -> None:
    """Prompts and answers in log lines and spans, without the keys in them: the search above does find what is there."""
    garden = Garden()
    answer = garden.plant(PROMPT, "a completion")
    config = """
backends: [{{name: b, url: "{url}"}}]
models: [{{name: m, deployments: [{{backend: b, model: scripted}}]}}]
logs: {{level: debug, content: true, console: text}}
tracing: {{sample_ratio: 1, content: true, endpoint: "{collector}"}}
"""
    wanted: set[Plant] = set()
    secret: set[Plant] = set()
    with (
        collecting() as collector,
        ScriptedBackend(tokens=("Once", f" {answer.text}", ".")) as backend,
        Serving(tmp_path, config.format(url=backend.base_url, collector=collector.url)) as serving,
    ):
        for place, make in body_places("none"):
            if place in ("messages", "messages, stream", "prompt", "anthropic", "system"):
                for kind in (PROMPT, *KINDS):
                    planted = garden.plant(kind, place)
                    (wanted if kind == PROMPT else secret).add(planted)
                    assert answered(serving.port, make(planted.text)).startswith(b"HTTP/1.1 200")
        for data in hostile_requests("none"):
            answered(serving.port, data)

        def in_spans() -> set[Plant]:
            return garden.found_in(json.dumps([export.document for export in tuple(collector.exports)]).encode())

        until(lambda: wanted <= in_spans(), 10, "prompts in spans")
        found = [in_spans()]
        for page in ("/debug/requests?limit=200", "/metrics", "/health", "/debug"):
            found.append(garden.found_in(serving.get(page)))
            assert not found[-1], page  # lists and sums hold no content
        listed = json.loads(serving.get("/debug/requests?limit=200&route=/v1/chat/completions"))["requests"]
        found.append(
            set().union(*(garden.found_in(serving.get(f"/debug/requests/{one['trace_id']}")) for one in listed))
        )
        assert answer in found[-1]
        log = serving.log
    lines = (tmp_path / "data" / "logs" / "application.log").read_bytes()
    found.append(garden.found_in(lines))
    assert {*wanted, answer} <= found[-1]
    assert not secret & set().union(*found)
    assert not garden.found_in(log.encode())
    check_lines(tmp_path, console=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\ufeff]", log)


def test_a_database_that_refuses_is_named_without_its_password(tmp_path: Path) -> None:
    """In what the processes say, in their files, and to callers, while the router waits for it."""
    garden = Garden()
    password = garden.plant(OPAQUE, "the database's password")
    url = f"postgresql://me:{password.text}@127.0.0.1:{free_port()}/accounts?application_name=x"
    with Serving(tmp_path, "{}", env={"DATABASE_URL": url}, ready=False) as serving:
        until(lambda: "/accounts" in serving.log, 20, "the router to miss its database")
        for port in (serving.port, serving.metrics_port):
            until(functools.partial(answers, port), 10, "an answer")
            for path in ("/health", "/metrics", "/debug", "/admin/keys", "/v1/models"):
                assert not garden.found_in(answered(port, http("GET", path))), path
        log = serving.log
    assert "@127.0.0.1" in log
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or not garden.found_in(file.read_bytes()), file.name


def answers(port: int) -> bool:
    try:
        return bool(answered(port, http("GET", "/health/live")))
    except OSError:
        return False
