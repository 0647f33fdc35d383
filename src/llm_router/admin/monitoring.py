"""The read-only endpoints: index, metrics, health.

They answer from what is at hand; nothing here asks a backend or waits for anything but its own rendering.
Not for: what is measured (observe) or where it is gathered (processes).
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llm_router.admin.application import is_terse, json_response
from llm_router.observe.health.report import Report
from llm_router.observe.metrics.exposition import CONTENT_TYPE_OPENMETRICS, CONTENT_TYPE_TEXT, negotiate
from llm_router.observe.timestamp import timestamp

_GZIP_FROM_BYTES: Final = 1024
_GZIP_LEVEL: Final = 1  # 0.5 MB in 4 ms, 8 % of its size; level 6 takes four times as long for 6 %
_INDEX_HEAD: Final = """\
LLM Runner Router {version}

Inference (app port)
  POST /v1/chat/completions     OpenAI chat, plain and streaming
  POST /v1/completions          OpenAI completions
  POST /v1/embeddings           OpenAI embeddings
  POST /v1/messages             Anthropic messages, plain and streaming
  POST /v1/messages/count_tokens about how many tokens one has
  GET  /v1/models               what can be asked for
  POST /api/generate            prompt in, text out
"""
_SECTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "Monitoring": {
        "GET /metrics": "Prometheus text, OpenMetrics by Accept",
        "GET /metrics/json": "the same as JSON",
        "GET /health": "every check; 200 healthy or degraded, else 503",
        "GET /health/live": "whether the process turns",
        "GET /health/ready": "whether it serves",
        "GET /health/startup": "whether it has started",
    },
    "Administration": {
        "GET /admin/models": "local models: state, memory, load time",
        "POST /admin/models/load": '{"name": ..., "options": {...}}',
        "POST /admin/models/unload": '{"name": ...}',
        "GET /admin/keys": "keys, without their texts",
        "POST /admin/keys": '{"name": ..., "scopes": [...]}; shows the new key once',
        "PATCH /admin/keys/{id}": "change its name, scopes, models, expires, limits",
        "DELETE /admin/keys/{id}": "revoke it",
        "GET /admin/usage": "tokens and cost by key, model, backend, day",
        "GET /admin/log-level": "how much is logged",
        "PUT /admin/log-level": '{"level": ..., "logger": ..., "for": "10m"}',
        "POST /admin/reload": "read the configuration again",
    },
    "Looking closer": {
        "GET /debug": "versions, state and numbers at a glance",
        "GET /debug/models": "load time, waiting, speed and percentiles of each model",
        "GET /debug/requests": "recent, slowest and failed requests",
        "GET /debug/requests/{id}": "where the time of one went",
        "POST /debug/profile": "what a process is busy with",
    },
}
"""What the index says of the endpoints of control, of which it shows those that are there."""


class Monitoring(Protocol):
    """What these endpoints show."""

    def metrics(self, *, openmetrics: bool) -> bytes:
        """The exposition of every family, made now."""

    def metrics_json(self) -> bytes:
        """The same values as JSON."""

    def health(self) -> Report:
        """The newest health report."""

    def readiness(self) -> tuple[bool, str]:
        """Whether new requests are welcome, and a word for people and probes."""

    def is_initialized(self) -> bool:
        """Whether the router was ready once since it started."""


def routes(
    source: Monitoring,
    *,
    version: str,
    metrics_path: str,
    health_path: str,
    now: Callable[[], float],
    metrics_enabled: bool = True,
    health_enabled: bool = True,
) -> list[Route]:
    """The endpoints; metrics and health both at their usual and at their configured paths.

    Args:
        now: Unix time in seconds.
        metrics_enabled, health_enabled: without, there are no such routes; those for probes are there all the same.
    """
    moved = {"/metrics": metrics_path, "/health": health_path}

    async def show_index(request: Request) -> Response:
        there = [route for route in request.app.routes if isinstance(route, Route)]
        return PlainTextResponse(index(there, version=version, moved=moved))

    async def show_metrics(request: Request) -> Response:
        openmetrics = negotiate(request.headers.get("accept", ""))
        body = source.metrics(openmetrics=openmetrics)
        return await _compressed(request, body, CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_TEXT)

    async def show_json(request: Request) -> Response:
        return await _compressed(request, source.metrics_json(), "application/json")

    async def show_health(request: Request) -> Response:
        report = source.health()
        if is_terse(request):
            return json_response(report.terse(), report.http_status)
        return health_response(request, report)

    async def show_live(request: Request) -> Response:
        return json_response({"status": "alive", "timestamp": timestamp(now())})

    async def show_ready(request: Request) -> Response:
        is_ready, reason = source.readiness()
        return json_response({"status": reason, "timestamp": timestamp(now())}, 200 if is_ready else 503)

    async def show_startup(request: Request) -> Response:
        is_started = source.is_initialized()
        word = "started" if is_started else "initializing"
        return json_response({"status": word, "timestamp": timestamp(now())}, 200 if is_started else 503)

    metrics = [
        *(Route(path, show_metrics) for path in _paths("/metrics", metrics_path)),
        Route("/metrics/json", show_json),
    ]
    return [
        Route("/", show_index),
        *(metrics if metrics_enabled else ()),
        *(Route(path, show_health) for path in _paths("/health", health_path) if health_enabled),
        Route("/health/live", show_live),
        Route("/health/ready", show_ready),
        Route("/health/startup", show_startup),
    ]


def health_response(request: Request, report: Report) -> Response:
    """All of a report, in the format that the caller accepts."""
    if "application/health+json" in request.headers.get("accept", ""):
        return json_response(report.ietf(), report.http_status, "application/health+json")
    return json_response(report.document(), report.http_status)


def index(routes: Iterable[Route], *, version: str, moved: Mapping[str, str]) -> str:
    """What `GET /` answers: inference, and of the rest what is there.

    Args:
        moved: usual paths and where they are configured to be, which is what the index names.
    """
    there = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    parts = [_INDEX_HEAD.format(version=version)]
    for title, texts in _SECTIONS.items():
        lines = []
        for endpoint, text in texts.items():
            method, path = endpoint.split()
            if f"{method} {moved.get(path, path)}" in there:
                lines.append(f"  {f'{method:<4} {moved.get(path, path)}':<29} {text}\n")
        if lines:
            parts.append(f"{title} (monitoring port and app port)\n{''.join(lines)}")
    return "\n".join(parts)


def _paths(usual: str, configured: str) -> Sequence[str]:
    return tuple(dict.fromkeys((usual, configured)))


async def _compressed(request: Request, body: bytes, content_type: str) -> Response:
    headers = {"content-type": content_type, "vary": "accept, accept-encoding", "cache-control": "no-store"}
    if len(body) >= _GZIP_FROM_BYTES and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        # zlib lets go of the interpreter lock: the loop turns meanwhile.
        body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL, mtime=0)
    return Response(body, headers=headers)


def _takes_gzip(accept_encoding: str) -> bool:
    for part in accept_encoding.lower().split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return parameters.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
